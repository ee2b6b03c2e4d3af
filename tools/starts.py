"""starts.py - prompts that are followed by the start of a completion, such as a forced thought."""

from data import messages
from plumbing.vlm import Policy, Prompts, encode_prompts


def read_with_starts(policy: Policy, samples: list, starts: list[str]) -> Prompts:
    """`Policy.read`, and texts with which the completions begin: the policy continues after them.

    A thinking model's <think> may be part of a start: it stands in the prompt once.
    """
    chats = [messages(one.query, policy.prompt, policy.coordinates, policy.side) for one in samples]
    prompts = policy.processor.apply_chat_template(
        chats, tokenize=False, add_generation_prompt=True
    )
    pairs = zip(prompts, starts, strict=True)
    inputs = policy.processor(
        text=[prompt + start.removeprefix(policy.opening) for prompt, start in pairs],
        images=[one.image.resize((policy.side, policy.side)) for one in samples],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    return encode_prompts(policy.model, inputs)
