"""Other policies than the tiny one, by their true classes with random weights: what the code takes for granted of a VLM."""

import json

import pytest
import torch
from transformers import (
    AutoProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

import samr1_mini
from data import Shapes
from grpo import Completions, group_logprobs, rollout
from reward import SamScorer, parse_answer, sam_prompt


@pytest.fixture(scope="module")
def qwen3vl(tmp_path_factory):
    """A Qwen3-VL of 0.1 million random weights, in a local folder, with the tiny model's tokenizer."""
    tiny = AutoProcessor.from_pretrained(samr1_mini.HERE / "tiny" / "vlm")
    tokens = tiny.tokenizer
    special = {f"{name}_token_id": tokens.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    special |= {f"{name}_token_id": tokens.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    config = Qwen3VLConfig(
        text_config=dict(vocab_size=len(tokens), hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=3,
                         num_key_value_heads=3, head_dim=16, rope_parameters=rope, eos_token_id=tokens.eos_token_id),
        vision_config=dict(depth=3, hidden_size=48, intermediate_size=64, num_heads=3, patch_size=16, spatial_merge_size=2,
                           out_hidden_size=48, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        **special,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    patches = dict(patch_size=16, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128})
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokens,
        video_processor=Qwen3VLVideoProcessor(**patches),
        chat_template=tiny.chat_template,
    )
    folder = tmp_path_factory.mktemp("qwen3vl")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_qwen3vl_log_probs_equal_the_padded_forward(qwen3vl):
    """Its vision tower feeds several layers (deepstack): those features must be reused and sliced along with the prompts."""
    policy = samr1_mini.load_policy(samr1_mini.parse_settings("eval", ["--vlm", str(qwen3vl), "--side", "96"]))
    assert policy.coordinates == "thousandths" and policy.frame == 1000
    batch = [Shapes("heldout")[i] for i in range(3)]
    prompts = policy.read(batch)
    completions = rollout(policy.model, prompts, 3, 7, policy.end, policy.banned, generator=torch.Generator().manual_seed(0))
    completions.mask[0, 0, 4:] = False  # unequal lengths
    part = slice(1, 3)
    whole, _ = group_logprobs(policy.model, prompts, completions, policy.banned)
    sliced, _ = group_logprobs(policy.model, prompts[part], completions[part], policy.banned)
    assert torch.allclose(whole[part], sliced, atol=1e-5)
    for b, one in enumerate(batch):
        talk = samr1_mini.messages(one.query, "brief", "thousandths", 96)
        text = policy.processor.apply_chat_template([talk], tokenize=False, add_generation_prompt=True)
        inputs = policy.processor(text=text, images=[one.image.resize((96, 96))], return_tensors="pt")
        P = inputs["input_ids"].shape[1]
        for g in range(3):
            said = completions.ids[b, g][completions.mask[b, g]]
            ids = torch.cat([inputs["input_ids"][0], said])[None]
            kinds = torch.cat([inputs["mm_token_type_ids"][0], torch.zeros_like(said, dtype=inputs["mm_token_type_ids"].dtype)])[None]
            with torch.no_grad():
                logits = policy.model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=kinds,
                    pixel_values=inputs["pixel_values"],
                    image_grid_thw=inputs["image_grid_thw"],
                ).logits[0, P - 1 : -1]
            logits[:, policy.banned] = -torch.inf
            alone = logits.log_softmax(-1)[torch.arange(len(said)), said]
            assert torch.allclose(whole[b, g, : len(said)], alone, atol=1e-4)


def test_qwen3vl_trains_through_the_command_line(qwen3vl, tmp_path):
    flags = "--side 96 --steps 1 --eval_samples 2 --prompts_per_step 2 --group_size 2 --sample_every 9 --max_new_tokens 6"
    samr1_mini.main(["train", "--vlm", str(qwen3vl), *flags.split(), "--checkpoint_layers", "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["side"] == 96


@pytest.mark.parametrize("coordinates", ["pixels", "thousandths"])
def test_true_answers_in_the_policys_own_coordinates_earn_everything(coordinates, scorer: SamScorer, monkeypatch):
    """A policy that writes the true box (a stand-in for the text alone): scaled once and rightly, SAM finds the object in scenes
    that are not square. Scaled twice, not at all, or with width and height exchanged, it does not."""
    s = samr1_mini.parse_settings("eval", ["--coordinates", coordinates])
    policy = samr1_mini.load_policy(s)
    batch = [one for one in (Shapes("heldout")[i] for i in range(60)) if one.image.width != one.image.height][:12]

    far = {"pixels": 64, "thousandths": 1000}[coordinates]  # what the image's far edge is called

    def texts(_):
        written = []
        for one in batch:
            to = far / one.image.width, far / one.image.height
            x1, y1, x2, y2 = (round(v * to[k % 2]) for k, v in enumerate(samr1_mini.true_box(one.mask)))
            x, y = (x1 + x2) // 2, (y1 + y2) // 2
            written.append([f'<think>t</think><answer>{{"bbox":[{x1},{y1},{x2},{y2}],"points_1":[{x},{y}],"points_2":[{x},{y}]}}</answer>'])
        return written

    monkeypatch.setattr(policy, "texts", texts)
    monkeypatch.setattr(samr1_mini, "sample", lambda *_, **__: Completions(None, None))
    ours = samr1_mini.figures(samr1_mini.judge(policy, scorer, batch, s))
    assert ours["giou"] > 0.85 and ours["box"] == 1 and ours["format"] == 1
    answer = parse_answer(texts(None)[0][0])
    wrong = sam_prompt(answer, policy.frame * 2, *batch[0].image.size)
    assert samr1_mini.box_iou(wrong.box, samr1_mini.true_box(batch[0].mask)) < 0.5
