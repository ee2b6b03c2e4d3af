"""make_tiny.py - build the embedded models from nothing: tiny/sam.safetensors and tiny/vlm/.

    python tiny/make_tiny.py [--only sam|vlm] [--out tiny]

Both are the real classes at toy size, trained from random weights on the drawn scenes of
`data.Shapes` (split "warmup", which samr1_mini.py never reads). They know nothing about
photographs. The last lines that this script prints measure both on held-out scenes.

SAM   `segment_anything`'s Sam on 128 x 128 pixels. Supervised: from a jittered box, two points in
      the object, or both, to its mask. Where two objects share a box, it must follow the points.

VLM   `Qwen2_5_VLForConditionalGeneration` on 64 x 64 pixels (16 image tokens), with a word-level
      vocabulary in which every integer 0..64 is one token. Two stages:
      1. clean: supervised on right answers, first on scenes of one or two shapes. This is its
         "pre-training": the model learns to see, to read queries, and to write boxes and points.
      2. sloppy: a short fine-tuning on answers that are spoilt on purpose: boxes are shifted and
         have loose edges, points lie in the middle of the box, some answers are about the wrong
         object, some have a broken format. Each fault occurs in a share of the answers only, so
         the model still gives good answers, but rarely.
      Why spoil the model? RL shifts probability between answers that the policy already gives. It
      does not teach what was never learnt. A real base model is in that state: it can point at
      things, but it does so carelessly and in formats of its own. With stage 1 alone, the tiny
      model would leave nothing for GRPO to improve. So the headroom of the default run is made on
      purpose, and more of stage 1 would beat RL here. It would not on a real task, where nobody
      has the right reasoning to train on.
"""

import argparse
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import samr1_mini  # noqa: E402
from data import COLOURS, KINDS, Sample, Shapes, Thing, interior_points, messages  # noqa: E402
from reward import (  # noqa: E402
    SAM_SIZES,
    SamPrompt,
    SamScorer,
    build_sam,
    decode_masks,
    load_sam,
    sam_input,
    score_completions,
)

SIDE = 64  # of the square image that the VLM sees, pixels
PATCH, MERGE = 8, 2  # 8 x 8 patches, merged 2 x 2: 16 image tokens

# SAM's lessons
SAM_STEPS, SAM_BATCH, SAM_PROMPTS = 2000, 8, 6  # scenes a step, prompts a scene
CLUSTER_LESSONS = 0.8  # share of scenes with a cluster in which both of its shapes are prompted
OUTER_BOX = 0.6  # share of these in which the upper shape comes with the lower one's box
TIGHT, LOOSE_BOX, LOOSE_SHARE = 0.08, 0.3, 0.3  # box jitter, over its size; share of loose boxes
GOOD_POINTS = 0.5  # share of point pairs near `interior_points`; the others are anywhere inside
HINTS = {"both": 0.67, "box": 0.13, "points": 0.2}  # what a step shows

# The VLM's lessons
CLEAN_STEPS, SLOPPY_STEPS, BATCH = 3600, 400, 40
EASY_SHARE = 0.3  # of the clean steps, on scenes of one or two shapes; they are quicker to learn
# Sloppy answers. Boxes: the centre is off by up to SHIFT of the size, each edge by LOOSE more.
SHIFT, LOOSE = 0.6, 0.2
MIDDLE = 0.35  # share with points in the middle of the box, where a cluster shows its upper shape
WRONG, BROKEN = 0.35, 0.35  # share about another object, share with a broken format


def optimisers(model: torch.nn.Module, matrix_lr: float, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, AdamW for everything else.

    Muon is Keller Jordan's orthogonalised momentum, in torch since 2.9. With AdamW alone, neither
    model learns much within minutes.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and not re.search("embed|token|rel_pos", name)
        (matrices if hidden else rest).append(parameter)
    return [
        torch.optim.Muon(
            matrices,
            lr=matrix_lr,
            weight_decay=0.0,
            momentum=0.95,
            nesterov=True,
            adjust_lr_fn="original",
        ),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(
    optimisers: list[torch.optim.Optimizer], steps: int
) -> list[torch.optim.lr_scheduler.LRScheduler]:
    """Fifty steps of warm-up, flat, and a linear decay to zero over the last 40 %."""

    def share(step: int) -> float:
        return min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))

    return [torch.optim.lr_scheduler.LambdaLR(o, share) for o in optimisers]


# --------------------------------------------------------------------------------------------------
# SAM
# --------------------------------------------------------------------------------------------------


class SamLessons(Dataset):
    """Item i: the encoder's input for one scene, and SAM_PROMPTS boxes, point pairs and true masks
    on it.

    SAM ignores points as long as boxes suffice. So the two shapes of a cluster are prompted in the
    same scene with the same box and different points, and some boxes are loose.
    """

    def __init__(self, size: int):
        self.scenes = Shapes("warmup", seed=1, size=size)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        image, things, *_ = self.scenes.scene(index)
        rng = random.Random(f"sam-{index}")
        side = SAM_SIZES["tiny"]["image_size"]
        pixels, scale = sam_input(image, side)
        boxes, points, masks = [], [], []
        for thing, boxed in choose_prompts(rng, things):
            boxes.append(torch.tensor(jitter_box(rng, boxed.box)))
            points.append(torch.tensor(choose_points(rng, thing.mask)))
            mask = torch.from_numpy(thing.mask)[None, None].float()
            mask = F.interpolate(mask, pixels.shape[-2:], mode="bilinear")[0, 0]
            masks.append(F.pad(mask, (0, side - mask.shape[1], 0, side - mask.shape[0])))
        return (
            F.pad(pixels, (0, side - pixels.shape[2], 0, side - pixels.shape[1])),
            (torch.stack(boxes) * scale.repeat(2)).float(),
            (torch.stack(points) * scale).float(),
            torch.stack(masks),
        )


def choose_prompts(rng: random.Random, things: list[Thing]) -> list[tuple[Thing, Thing]]:
    """SAM_PROMPTS pairs: the thing whose mask is asked for, and the thing whose box is shown."""
    pairs = []
    hard = next((thing for thing in things if thing.hard), None)
    if hard and rng.random() < CLUSTER_LESSONS:
        x, y = map(int, hard.centre)
        pairs = [(hard, hard)]
        pairs += [(t, hard if rng.random() < OUTER_BOX else t) for t in things if t.mask[y, x]]
    while len(pairs) < SAM_PROMPTS:
        thing = rng.choice(things)
        pairs.append((thing, thing))
    return pairs


def jitter_box(rng: random.Random, box: tuple[int, ...]) -> list[float]:
    x1, y1, x2, y2 = box
    share = LOOSE_BOX if rng.random() < LOOSE_SHARE else TIGHT
    sizes = (x2 - x1, y2 - y1) * 2
    return [v + rng.uniform(-share, share) * size for v, size in zip(box, sizes, strict=True)]


def choose_points(rng: random.Random, mask: np.ndarray) -> list[tuple[float, float]]:
    """Two points of the mask (H, W), x, y in image pixels: anywhere, or near the good ones."""
    rows, columns = mask.nonzero()
    picks = [rng.randrange(len(rows)) for _ in range(2)]
    points = [(float(columns[k]), float(rows[k])) for k in picks]
    if rng.random() < GOOD_POINTS:
        for k, (x, y) in enumerate(interior_points(mask)):
            column, row = int(x + rng.uniform(-2, 2)), int(y + rng.uniform(-2, 2))
            inside = 0 <= column < mask.shape[1] and 0 <= row < mask.shape[0]
            if inside and mask[row, column]:
                points[k] = (float(column), float(row))
    return points


def train_sam(out: Path) -> None:
    torch.manual_seed(0)
    sam = build_sam(**SAM_SIZES["tiny"]).train().requires_grad_(True)
    opts = optimisers(sam, matrix_lr=0.02, lr=1e-3)
    plans = schedule(opts, SAM_STEPS)
    lessons = SamLessons(SAM_STEPS * SAM_BATCH)
    loader = DataLoader(lessons, SAM_BATCH, num_workers=1, prefetch_factor=8)
    image_index = torch.arange(SAM_BATCH).repeat_interleave(SAM_PROMPTS)
    bar = tqdm(loader, desc="SAM", unit="step")
    kinds = random.Random(0)
    for pixels, boxes, points, masks in bar:
        embeddings = sam.image_encoder(sam.preprocess(pixels))
        hint = kinds.choices(list(HINTS), list(HINTS.values()))[0]
        logits, estimate = decode_masks(
            sam,
            embeddings,
            image_index,
            None if hint == "points" else boxes.flatten(0, 1),
            None if hint == "box" else points.flatten(0, 1),
        )
        truth = F.adaptive_avg_pool2d(masks, logits.shape[-2:])  # (scenes, prompts, h, w)
        truth = truth.flatten(0, 1)[:, None].expand_as(logits)
        share = logits.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, truth)
        overlap = (share * truth).sum((-2, -1))
        dice = 1 - (2 * overlap + 1) / (share.sum((-2, -1)) + truth.sum((-2, -1)) + 1)
        guess, right = logits > 0, truth > 0.5
        iou = (guess & right).sum((-2, -1)) / (guess | right).sum((-2, -1)).clamp(min=1)
        loss = 5 * cross_entropy + dice.mean() + F.mse_loss(estimate, iou)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        for step in (*opts, *plans):
            step.step()
        sam.zero_grad()
        mean_iou = iou[:, 1:].mean().item()
        bar.set_postfix(loss=f"{loss.item():.3f}", iou=f"{mean_iou:.3f}", refresh=False)
    # Half precision loses nothing here: the reloaded model has the same IoU to the third digit.
    weights = {name: weight.half().contiguous() for name, weight in sam.state_dict().items()}
    save_file(weights, out / "sam.safetensors")


# --------------------------------------------------------------------------------------------------
# The VLM: processor, architecture
# --------------------------------------------------------------------------------------------------

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


# --------------------------------------------------------------------------------------------------
# The VLM: lessons and training
# --------------------------------------------------------------------------------------------------


def write_answer(
    thing: Thing,
    size: tuple[int, int],
    box: tuple[float, ...],
    points: tuple[tuple[float, ...], ...],
) -> str:
    """The completion that names `thing` and answers with `box` and `points` (image pixels; `size`
    is the image's W, H), in policy pixels."""
    width, height = size
    column = ("left", "middle", "right")[min(2, int(3 * thing.centre[0] / width))]
    row = ("top", "middle", "bottom")[min(2, int(3 * thing.centre[1] / height))]
    x1, y1, x2, y2 = (round(v * SIDE / s) for v, s in zip(box, size * 2, strict=True))
    x1, y1 = (min(SIDE - 1, max(0, v)) for v in (x1, y1))
    x2, y2 = min(SIDE, max(x1 + 1, x2)), min(SIDE, max(y1 + 1, y2))
    (a, b), (c, d) = (
        [min(SIDE, max(0, round(v * SIDE / s))) for v, s in zip(point, size, strict=True)]
        for point in points
    )
    answer = f'{{"bbox":[{x1},{y1},{x2},{y2}],"points_1":[{a},{b}],"points_2":[{c},{d}]}}'
    thought = f"the {thing.colour} {thing.kind} is at the {row} {column}"
    return f"<think>{thought}</think><answer>{answer}</answer>"


def middle_points(box: tuple[float, ...]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The middle of a box x1, y1, x2, y2, and a point halfway between it and the lower edge."""
    x1, y1, x2, y2 = box
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return (x, y), (x, y + (y2 - y1) / 4)


def spoil(rng: random.Random, things: list[Thing], target: int, size: tuple[int, int]) -> str:
    """A careless completion: see SHIFT, LOOSE, MIDDLE, WRONG, BROKEN."""
    thing = things[rng.randrange(len(things)) if rng.random() < WRONG else target]
    x1, y1, x2, y2 = thing.box
    sizes = (x2 - x1, y2 - y1) * 2
    shift = [rng.uniform(-SHIFT, SHIFT) for _ in range(2)] * 2
    box = tuple(
        v + (s + rng.uniform(-LOOSE, LOOSE)) * d
        for v, s, d in zip(thing.box, shift, sizes, strict=True)
    )
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
    """Item i: (image, query, completion)."""

    def __init__(self, scenes: Shapes, sloppy: bool = False, easy: int = 0):
        self.scenes, self.sloppy, self.easy = scenes, sloppy, easy
        self.easy_scenes = Shapes(scenes.split, scenes.seed + 1000, scenes.size, things=(1, 2))

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


class Collate:
    """Turn items into the processor's batch, with labels that are -100 outside the completion."""

    def __init__(self, processor: Qwen2_5_VLProcessor):
        self.processor = processor
        self.start = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")

    def __call__(self, items: list[tuple]) -> dict[str, torch.Tensor]:
        images, queries, texts = zip(*items, strict=True)
        prompts = self.processor.apply_chat_template(
            [messages(q, "brief", "pixels", SIDE) for q in queries],
            tokenize=False,
            add_generation_prompt=True,
        )
        rows = [prompt + text + "<|im_end|>" for prompt, text in zip(prompts, texts, strict=True)]
        batch = self.processor(
            text=rows, images=list(images), return_tensors="pt", padding=True, padding_side="right"
        )
        ids = batch["input_ids"]
        opened = (ids == self.start).cumsum(1)  # 1 in the user's turn, 2 in the assistant's
        header = torch.zeros_like(ids, dtype=torch.bool)  # <|im_start|> assistant \n
        first = (opened == 2).int().argmax(1, keepdim=True)
        header.scatter_(1, first + torch.arange(3), True)
        completion = (opened == 2) & ~header & (batch["attention_mask"] == 1)
        return dict(batch, labels=ids.masked_fill(~completion, -100))


def train_vlm(out: Path) -> None:
    torch.manual_seed(0)
    processor = build_processor()
    vlm = build_vlm(processor)
    size = CLEAN_STEPS * BATCH
    clean = VlmLessons(Shapes("warmup", seed=2, size=size), easy=int(EASY_SHARE * size))
    opts = optimisers(vlm, matrix_lr=0.008, lr=1e-3)
    study(vlm, processor, clean, opts, CLEAN_STEPS, "VLM, clean")
    vlm.save_pretrained(out / "vlm-clean")
    processor.save_pretrained(out / "vlm-clean")
    make_sloppy(vlm, processor, out)


def make_sloppy(
    vlm: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, out: Path
) -> None:
    scenes = Shapes("warmup", seed=3, size=SLOPPY_STEPS * BATCH)
    opt = torch.optim.AdamW(vlm.parameters(), 5e-4, (0.9, 0.98), weight_decay=0.0)
    study(vlm, processor, VlmLessons(scenes, sloppy=True), [opt], SLOPPY_STEPS, "VLM, sloppy")
    vlm.save_pretrained(out / "vlm")
    processor.save_pretrained(out / "vlm")


def study(vlm, processor, lessons: Dataset, opts: list, steps: int, title: str) -> None:
    """Supervised training on the completions' tokens."""
    plans = schedule(opts, steps)
    collate = Collate(processor)
    loader = DataLoader(lessons, BATCH, collate_fn=collate, num_workers=1, prefetch_factor=8)
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


def report_sam(out: Path, count: int = 192) -> None:
    """Print SAM's mean mask IoU on held-out scenes by kind of prompt and of target."""
    scenes = [Shapes("heldout").scene(i) for i in range(count)]
    targets = [things[target] for _, things, _, target in scenes]
    prompts = [
        (
            SamPrompt(thing.box, interior_points(thing.mask)),
            SamPrompt(thing.box, middle_points(thing.box)),
            SamPrompt(thing.box, ()),
            SamPrompt(nearest_other(thing, things).box, interior_points(thing.mask)),
            SamPrompt(None, interior_points(thing.mask)),
        )
        for thing, (_, things, _, _) in zip(targets, scenes, strict=True)
    ]
    names = (
        "true box, good points",
        "true box, points in its middle",
        "true box alone",
        "nearest other box, good points",
        "good points alone",
    )
    images = [image for image, *_ in scenes]
    samples = [Sample(i, "", t.mask, None, "") for i, t in zip(images, targets, strict=True)]
    scorer = SamScorer(load_sam(f"tiny:{out / 'sam.safetensors'}"))
    batches = [slice(start, start + 32) for start in range(0, count, 32)]
    iou = torch.cat([scorer.score(samples[rows], prompts[rows]).iou for rows in batches])
    groups = {
        "all": [True] * count,
        "hard": [thing.hard for thing in targets],
        "ring": [thing.kind == "ring" for thing in targets],
        "covered, inlay": [thing.hard and thing.kind != "ring" for thing in targets],
        "plain": [not thing.hard for thing in targets],
    }
    titles = [f"{name} ({sum(members)})" for name, members in groups.items()]
    print(f"SAM, mean mask IoU on {count} held-out scenes, by kind of target:")
    print(f"{'':32}{''.join(f'{title:>21}' for title in titles)}")
    for name, column in zip(names, iou.T, strict=True):
        means = [column[torch.tensor(members)].mean() for members in groups.values()]
        print(f"{name:32}{''.join(f'{mean:21.3f}' for mean in means)}")


def nearest_other(thing: Thing, things: list[Thing]) -> Thing:
    """The thing whose middle lies nearest to that of `thing`; itself if it is alone."""
    others = [other for other in things if other is not thing]
    return min(others, key=lambda o: np.hypot(*np.subtract(o.centre, thing.centre)), default=thing)


def report_vlm(out: Path) -> None:
    """Print what the models reach on held-out scenes, through the code that evaluates a run."""
    for stage in ("vlm-clean", "vlm"):
        paths = ["--vlm", str(out / stage), "--sam", f"tiny:{out / 'sam.safetensors'}"]
        s = samr1_mini.parse_settings("eval", paths)
        policy, scorer, samples, heldout = samr1_mini.load_all(s)
        rows = samr1_mini.evaluate(policy, scorer, heldout, s, stage)
        greedy, ceiling = samr1_mini.summary(rows)
        batch = [samples[i] for i in range(64)]
        texts = policy.texts(samr1_mini.sample(policy, policy.read(batch), s))
        sampled = score_completions(scorer, batch, texts, policy.frame)
        print(
            f"{stage}: greedy gIoU {greedy['giou']:.3f}, with its box alone "
            f"{greedy['box_alone']:.3f}; box@0.5 {greedy['box']:.2f}, points inside "
            f"{greedy['points']:.2f}, format {greedy['format']:.2f}; ceiling {ceiling['giou']:.3f}"
            f"\n  sampled: mean reward {sampled.reward.mean():.2f} of 6, "
            f"mask IoU {sampled.iou.mean():.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the embedded models from random weights.")
    parser.add_argument("--only", choices=("sam", "vlm"), help="build one of the two")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # tiny matrices gain nothing, and the data worker needs a core
    torch.set_flush_denormal(True)
    if options.only != "vlm":
        train_sam(options.out)
    if options.only != "sam":
        train_vlm(options.out)
    times = os.times()
    minutes = (times.user + times.system + times.children_user + times.children_system) / 60
    print(f"CPU minutes, data workers included: {minutes:.1f}")
    if (options.out / "sam.safetensors").exists():
        report_sam(options.out)
        if (options.out / "vlm").exists():
            report_vlm(options.out)


if __name__ == "__main__":
    main()
