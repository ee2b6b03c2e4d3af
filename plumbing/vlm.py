"""vlm.py - running a Qwen-VL model: loading, chat template, image features, a CUDA graph."""

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor

from data import Sample, messages
from plumbing.command_line import exit_on_error
from plumbing.devices import choose_device, choose_dtype, four_bit, keep_gradients

# peft asks for this property of every model. The warning does not concern the user.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

# peft imports bitsandbytes where that is installed. On some CPUs, bitsandbytes then logs that a
# kernel for 4 bit is missing, which concerns only commands that ask for 4 bit. This must come
# before the first import of peft, so peft is imported where it is used.
if not any("4bit" in argument for argument in sys.argv):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# What transformers raises on a folder that holds no model, or a damaged one.
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError)


@dataclass
class Prompts:
    """B prompts for the language model. Their images have been through the vision tower.

    Token ids, mask and positions stay in host memory. They are small, and indexing them on a GPU
    would make the host wait for it. The image features are on the model's device.
    """

    ids: torch.Tensor  # (B, P) int64, padded on the left
    mask: torch.Tensor  # (B, P) bool, False on padding
    positions: torch.Tensor  # (3, B, P) M-RoPE positions: each token has a time, a row, a column
    vision: object  # the vision tower's output, its features as tuples with one tensor per image

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "Prompts":
        """Some of the prompts, with their image features."""
        vision = type(self.vision)(pooler_output=tuple(self.vision.pooler_output[rows]))
        if deep := getattr(self.vision, "deepstack_features", None):  # Qwen3-VL: several layers
            vision.deepstack_features = [tuple(layer[rows]) for layer in deep]
        return Prompts(self.ids[rows], self.mask[rows], self.positions[:, rows], vision)


def base(model: torch.nn.Module) -> torch.nn.Module:
    """The VLM inside a peft wrapper, with its LoRA layers in place, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def encode_prompts(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Prompts:
    """Run the vision tower and compute the positions, once for rollout, reference and updates.

    The vision tower is frozen, so its output stays the same during a step.

    inputs: the processor's output for B prompts of one image each, padded on the left, in host
            memory. It must hold `mm_token_type_ids`: without them Qwen2.5-VL silently uses
            one-dimensional positions.
    """
    inner, device = base(model).model, base(model).device
    pixels, grid = inputs["pixel_values"].to(device), inputs["image_grid_thw"].to(device)
    vision = inner.get_image_features(pixels, grid, return_dict=True)
    positions, _ = inner.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    return Prompts(inputs["input_ids"], inputs["attention_mask"].bool(), positions, vision)


def append_tokens(prompts: Prompts, tokens: list[list[int]]) -> Prompts:
    """B prompts, each followed by tokens that count as the start of its completion.

    Their positions continue after the prompt's largest one, as those of sampled tokens do.
    """
    ids, positions = [], []
    for b, more in enumerate(tokens):
        keep = prompts.mask[b]
        before = prompts.positions[:, b, keep]  # (3, P)
        after = before.max() + 1 + torch.arange(len(more))
        ids.append(torch.cat([prompts.ids[b, keep], torch.tensor(more, dtype=torch.int64)]))
        positions.append(torch.cat([before, after.expand(3, -1)], 1).T)
    left = {"batch_first": True, "padding_side": "left"}
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], **left)
    positions = pad_sequence(positions, **left).permute(2, 0, 1)
    return Prompts(pad_sequence(ids, **left), mask, positions, prompts.vision)


def record_graph(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor] | None:
    """Record `forward` as a CUDA graph, and return a function that replays it, or None on failure.

    Why: a decoding step of the 3B policy is 2,469 kernels and 757 matrix products (counted on a
    stubbed CUDA runtime), and to launch them takes longer than to run them (not measured on a GPU
    yet). A graph launches all of them with one call.

    `forward` must read and write the same tensors every time. It runs twice here: once on a side
    stream, because libraries set themselves up in their first call, and once to record it.
    """
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = forward()
    except RuntimeError as error:
        warnings.warn(f"decoding continues without a CUDA graph, slower: {error}", stacklevel=4)
        return None

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay


@dataclass
class Policy:
    """A VLM with its processor, and how it is asked."""

    model: torch.nn.Module
    processor: object
    device: torch.device
    side: int  # of the square image it sees, pixels
    prompt: str  # "full" or "brief", see `data.messages`
    coordinates: str  # "pixels" or "thousandths"
    end: torch.Tensor  # (E,) tokens that end a completion
    banned: torch.Tensor  # the vision tokens, which are never sampled
    opening: str  # of a completion: "<think>" if the chat template writes that, else ""
    scaler: torch.amp.GradScaler  # keeps small gradients above zero in float16, else does nothing

    @property
    def frame(self) -> float:
        """The number it writes for the far edge of the image, see `reward.sam_prompt`."""
        return self.side if self.coordinates == "pixels" else 1000

    def read(self, samples: list[Sample], starts: list[str] | None = None) -> Prompts:
        """Tokenise the queries and encode the images, resized without keeping the aspect ratio.

        starts: texts with which the completions begin; the policy continues after them. A thinking
                model's <think> may be part of them: it stands in the prompt once.
        """
        chats = [messages(one.query, self.prompt, self.coordinates, self.side) for one in samples]
        images = [one.image.resize((self.side, self.side)) for one in samples]
        texts = self.processor.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )
        inputs = self.processor(
            text=texts, images=images, return_tensors="pt", padding=True, padding_side="left"
        )
        prompts = encode_prompts(self.model, inputs)
        if starts is None:
            return prompts
        starts = [start.removeprefix(self.opening) for start in starts]
        tokens = self.processor.tokenizer(starts, add_special_tokens=False)["input_ids"]
        return append_tokens(prompts, tokens)

    def texts(self, completions) -> list[list[str]]:
        """Completions (B, G, T) as B lists of G texts, without their end-of-text tokens.

        Each text begins with `opening`: a thinking model's <think> stands at the prompt's end.
        """
        texts = []
        for ids, mask in zip(completions.ids, completions.mask, strict=True):
            group = [tokens[keep].tolist() for tokens, keep in zip(ids, mask, strict=True)]
            group = self.processor.batch_decode(group, skip_special_tokens=True)
            texts.append([self.opening + text for text in group])
        return texts


def vlm_path(name: str) -> str:
    """The folder of the embedded model for "tiny"; any other name as it is."""
    return str(Path(__file__).resolve().parent.parent / "tiny" / "vlm") if name == "tiny" else name


def template_end(processor) -> str:
    """What the chat template writes of a completion: "<think>" for a thinking model, or ""."""
    chat = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    text = processor.apply_chat_template([chat], tokenize=False, add_generation_prompt=True)[0]
    return "<think>" if text.rstrip().endswith("<think>") else ""


def load_vlm(
    name: str,
    device: str,
    side: int,
    prompt: str,
    adapter: str = "none",
    dtype: str = "auto",
    load_in_4bit: bool = False,
) -> Policy:
    """Load a VLM, frozen in eval mode, and the trained adapter in the folder `adapter`.

    What cannot be used exits with code 2 and one line that names the flag.
    """
    with exit_on_error(f"--device {device}"):
        device = choose_device(device)
    with exit_on_error(f"--dtype {dtype}"):
        dtype = choose_dtype(dtype, device, name == "tiny")
    path = vlm_path(name)
    # sdpa: `grpo.group_logprobs` relies on its boolean masks.
    options = dict(dtype=dtype, attn_implementation="sdpa")
    if load_in_4bit:
        with exit_on_error("--load_in_4bit"):
            options |= four_bit(name == "tiny", dtype, device)
    with exit_on_error(f"--vlm {name}", UNREADABLE):
        if path.startswith((".", "/", "~")) and not Path(path).is_dir():
            raise FileNotFoundError("there is no such folder")
        processor = AutoProcessor.from_pretrained(path)
        opening = template_end(processor)
        model = AutoModelForImageTextToText.from_pretrained(path, **options).to(device)
        config, vision = model.config, model.config.vision_config
        keep_gradients(model)
    if model.num_parameters() < 10_000_000:
        torch.set_num_threads(1)  # such small matrices are slower when threads share them
    if name == "tiny":
        model.name_or_path = "tiny/vlm"  # for adapter_config.json: not a path of this machine
    coordinates = "thousandths" if config.model_type.startswith("qwen3_vl") else "pixels"
    with exit_on_error(f"--side {side}"):
        patch = vision.patch_size * vision.spatial_merge_size
        if coordinates == "pixels" and side % patch:
            raise ValueError(f"the model would see another size: use a multiple of {patch}")
    if adapter != "none":
        from peft import PeftModel

        with exit_on_error(f"--adapter {adapter}", Exception):  # a bad file can raise anything
            if not (Path(adapter) / "adapter_config.json").is_file():
                raise FileNotFoundError("no adapter_config.json there: name a RUN/adapter")
            model = PeftModel.from_pretrained(model, adapter)
    ends = base(model).generation_config.eos_token_id or processor.tokenizer.eos_token_id
    end = torch.tensor([ends] if isinstance(ends, int) else ends, device=device)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    banned = torch.tensor([getattr(config, token) for token in names], device=device)
    model.eval().requires_grad_(False)
    scaler = torch.amp.GradScaler(device.type, 2.0**12, enabled=dtype == torch.float16)
    asked = (side, prompt, coordinates)
    return Policy(model, processor, device, *asked, end, banned, opening, scaler)
