"""make_vlm.py - train the tiny VLM of tiny/make_tiny.py from random weights."""

import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from data import Shapes, messages
from plumbing.scenes import COLOURS, KINDS, Thing, interior_points, taught_thought
from tiny.make_sam import jitter_box, middle_points, optimisers, schedule

SIDE = 64  # of the square image that the VLM sees, pixels
PATCH, MERGE = 8, 2  # 8 x 8 patches, merged 2 x 2: 16 image tokens

# The VLM's lessons
CLEAN_STEPS, PLAIN_STEPS, SLOPPY_STEPS, BATCH = 3600, 1600, 400, 40
HARD_SHARE = 0.8  # of the queries in scenes with a cluster, about its back shape; Shapes has more
PLAIN_SHARE = 0.75  # of the plain steps' queries in scenes with a cluster: not about its back shape
EASY_SHARE = 0.3  # of the clean steps, on scenes of one or two shapes; they are quicker to learn
# Sloppy answers. Boxes: the centre is off by up to SHIFT of the size, each edge by LOOSE more.
SHIFT, LOOSE = 0.6, 0.2
MIDDLE = 0.35  # share with points in the middle of the box, where a cluster shows its upper shape
WRONG, BROKEN = 0.5, 0.35  # share about an object drawn at random, share with a broken format


SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|>
    <|image_pad|> <|video_pad|>""".split()
PIECES = ['{"bbox":[', '],"points_1":[', '],"points_2":[', "]}"]
PIECES += ["<think>", "</think>", "<answer>", "</answer>"]
MARKS = [",", "\n", ".", "[", "]", "{", "}", '"', ":", "_", " "]
WORDS = """system user assistant find the is at of shape only left right top bottom middle above
    below largest smallest leftmost rightmost topmost bottommost""".split()

# The role markers and the vision block of Qwen2.5-VL's template, without its system message.
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_processor() -> Qwen2_5_VLProcessor:
    words = [*WORDS, *COLOURS, *KINDS]
    words += [f" {word}" for word in words]
    numbers = map(str, range(SIDE + 1))
    vocabulary = [*SPECIAL, "<unk>", *PIECES, *MARKS, *numbers, *words]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    pieces = "|".join(re.escape(piece) for piece in PIECES)
    pattern = Regex(rf"{pieces}|\d+| ?[A-Za-z]+|\n|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|endoftext|>", "<|im_end|>")],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    vision = dict(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**vision),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(**vision),
        chat_template=TEMPLATE,
    )


def build_vlm(processor: Qwen2_5_VLProcessor) -> Qwen2_5_VLForConditionalGeneration:
    tokenizer = processor.tokenizer
    width, spread = 96, 0.05  # spread of the initial weights: the usual 0.02 is for wider layers
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=512,
            initializer_range=spread,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=width,
            intermediate_size=2 * width,
            num_heads=3,
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            temporal_patch_size=2,
            window_size=SIDE,
            out_hidden_size=width,
            fullatt_block_indexes=[0, 1],
            initializer_range=spread,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def write_answer(thing: Thing, size: tuple[int, int], box: tuple, points: tuple) -> str:
    """The completion that names `thing` and answers with `box` and two points, in policy pixels.

    They are given in pixels of an image of `size` (W, H).
    """
    x1, y1, x2, y2 = (round(v * SIDE / s) for v, s in zip(box, size * 2, strict=True))
    x1, y1 = (min(SIDE - 1, max(0, v)) for v in (x1, y1))
    x2, y2 = min(SIDE, max(x1 + 1, x2)), min(SIDE, max(y1 + 1, y2))
    (a, b), (c, d) = (
        [min(SIDE, max(0, round(v * SIDE / s))) for v, s in zip(point, size, strict=True)]
        for point in points
    )
    answer = f'{{"bbox":[{x1},{y1},{x2},{y2}],"points_1":[{a},{b}],"points_2":[{c},{d}]}}'
    return f"<think>{taught_thought(thing, size)}</think><answer>{answer}</answer>"


def spoil(rng: random.Random, things: list[Thing], target: int, size: tuple[int, int]) -> str:
    """A careless completion: see SHIFT, LOOSE, MIDDLE, WRONG, BROKEN."""
    thing = things[rng.randrange(len(things)) if rng.random() < WRONG else target]
    box = jitter_box(rng, thing.box, SHIFT, LOOSE)
    points = middle_points(box) if rng.random() < MIDDLE else interior_points(thing.mask)
    text = write_answer(thing, size, box, points)
    if rng.random() >= BROKEN:
        return text
    return rng.choice(
        (
            text[text.index("<answer>") :],  # no reasoning
            text.replace("<answer>", "").replace("</answer>", ""),  # an answer without its tags
            text[: text.index(',"points_2"')] + "}</answer>",  # one point is missing
        )
    )


class VlmLessons(Dataset):
    """Item i: (image, query, completion). The first items, a share `easy`, are easy scenes."""

    def __init__(self, seed: int, steps: int, hard: float, easy: float = 0.0, sloppy: bool = False):
        self.scenes = Shapes("warmup", seed=seed, size=steps * BATCH, hard_share=hard)
        self.easy_scenes = replace(self.scenes, seed=seed + 1000, things=(1, 2))
        self.easy = int(easy * len(self.scenes))
        self.sloppy = sloppy

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple:
        scenes = self.easy_scenes if index < self.easy else self.scenes
        image, things, query, target = scenes.scene(index)
        if self.sloppy:
            text = spoil(random.Random(f"sloppy-{index}"), things, target, image.size)
        else:
            thing = things[target]
            text = write_answer(thing, image.size, thing.box, interior_points(thing.mask))
        return image.resize((SIDE, SIDE)), query, text


def collate(processor: Qwen2_5_VLProcessor, items: list[tuple]) -> dict[str, torch.Tensor]:
    """The processor's batch of some items, with labels that are -100 outside the completion."""
    images, queries, texts = zip(*items, strict=True)
    chats = [messages(query, "brief", "pixels", SIDE) for query in queries]
    prompts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    rows = [prompt + text + "<|im_end|>" for prompt, text in zip(prompts, texts, strict=True)]
    batch = processor(
        text=rows, images=list(images), return_tensors="pt", padding=True, padding_side="right"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    start = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    for row in labels:
        header = (row == start).nonzero()[-1]  # of the completion: <|im_start|> assistant \n
        row[: header + 3] = -100
    return dict(batch, labels=labels)


def train_vlm(out: Path) -> None:
    torch.manual_seed(0)
    processor = build_processor()
    vlm = build_vlm(processor)
    for title, lessons in (
        ("VLM, clean", VlmLessons(2, CLEAN_STEPS, hard=HARD_SHARE, easy=EASY_SHARE)),
        # More lessons about small single shapes, which are harder to see than clusters.
        ("VLM, plain", VlmLessons(4, PLAIN_STEPS, hard=1 - PLAIN_SHARE)),
    ):
        study(vlm, processor, lessons, optimisers(vlm, matrix_lr=0.008, lr=1e-3), title)
    vlm.save_pretrained(out / "vlm-clean")
    processor.save_pretrained(out / "vlm-clean")

    lessons = VlmLessons(3, SLOPPY_STEPS, hard=HARD_SHARE, sloppy=True)
    optimiser = torch.optim.AdamW(vlm.parameters(), 5e-4, (0.9, 0.98), weight_decay=0.0)
    study(vlm, processor, lessons, [optimiser], "VLM, sloppy")
    vlm.save_pretrained(out / "vlm")
    processor.save_pretrained(out / "vlm")


def study(vlm, processor, lessons: VlmLessons, opts: list, title: str) -> None:
    """Supervised training on the completions' tokens."""
    plans = schedule(opts, len(lessons) // BATCH)
    join = partial(collate, processor)
    loader = DataLoader(lessons, BATCH, collate_fn=join, num_workers=1, prefetch_factor=8)
    vlm.train()
    bar = tqdm(loader, desc=title, unit="step")
    for batch in bar:
        labels = batch.pop("labels")[:, 1:]
        hidden = vlm.model(**batch, use_cache=False).last_hidden_state[:, :-1]
        loss = F.cross_entropy(vlm.lm_head(hidden[labels != -100]), labels[labels != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        for step in (*opts, *plans):
            step.step()
        vlm.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    vlm.eval()
