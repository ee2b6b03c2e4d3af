"""make_tiny.py - build the embedded models from nothing: tiny/sam.safetensors and tiny/vlm/.

    python tiny/make_tiny.py [--only sam|vlm] [--out tiny]

Both are the true classes at toy size, trained from random weights on the drawn scenes of `data.Shapes` (split "warmup",
which no run of samr1_mini.py ever sees). They know nothing of photographs.

SAM   `segment_anything`'s Sam on 128 x 128 pixels. Supervised: a jittered box, points in the object, or both, to its mask.

VLM   `Qwen2_5_VLForConditionalGeneration` on 64 x 64 pixels (16 image tokens), a word-level vocabulary in which every
      integer 0..64 is one token. Two stages:
      1. clean: supervised on right answers, first on scenes of one or two shapes. This is "pre-training": the model
         learns to see, to read queries and to write boxes.
      2. sloppy: a short fine-tuning on answers that are spoilt on purpose (shifted boxes, loose edges, sometimes the
         wrong object, sometimes a broken format).
      Why spoil it? RL shifts probability between answers that the policy already gives; it does not teach what was never
      learnt. A real base model is in that state: it can point at things, but does so carelessly and in formats of its
      own. Trained clean only, the tiny model would leave GRPO nothing to mend; undertrained, nothing to build on. So the
      headroom that the default run closes is made, and more of stage 1 would beat RL here. It would not on a real task,
      where nobody has the right chains of thought to train on.
"""

import argparse
import random
import re
import sys
from pathlib import Path

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
from data import COLOURS, KINDS, Shapes, Thing, messages  # noqa: E402
from reward import SAM_SIZES, build_sam, decode_masks, sam_input, score_completions  # noqa: E402

SIDE = 64  # of the square image that the VLM sees, pixels
PATCH, MERGE = 8, 2  # 8 x 8 patches, merged 2 x 2: 16 image tokens

# SAM's lessons
SAM_STEPS, SAM_BATCH, SAM_PROMPTS = 1000, 8, 3  # scenes a step, prompts a scene

# The VLM's lessons
CLEAN_STEPS, SLOPPY_STEPS, BATCH = 3800, 400, 40
EASY_SHARE = 0.35  # of the clean steps, on scenes of one or two shapes; without them it takes twice as long
SHIFT, LOOSE = 1.0, 0.25  # sloppy boxes: centre off by up to this share of the size, each edge by a further share
WRONG, BROKEN = 0.35, 0.35  # sloppy answers: share about another object, share with a broken format


def optimisers(model: torch.nn.Module, matrix_lr: float, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, AdamW for everything else. With AdamW alone neither model gets off the ground in
    minutes (Muon: Keller Jordan's orthogonalised momentum, in torch since 2.9)."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and not re.search("embed|token|rel_pos", name)
        (matrices if hidden else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.0, momentum=0.95, nesterov=True, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(optimisers: list[torch.optim.Optimizer], steps: int) -> list[torch.optim.lr_scheduler.LRScheduler]:
    """Fifty steps of warm-up, flat, and a linear decay to zero over the last 40 %."""

    def share(step: int) -> float:
        return min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))

    return [torch.optim.lr_scheduler.LambdaLR(o, share) for o in optimisers]


# ---------------------------------------------------------------------------------------------------------------------
# SAM
# ---------------------------------------------------------------------------------------------------------------------


class SamLessons(Dataset):
    """Item i: the encoder's input for one scene, and SAM_PROMPTS boxes, point pairs and true masks on it."""

    def __init__(self, size: int):
        self.scenes = Shapes("warmup", seed=1, size=size)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = random.Random(f"sam-{index}")
        image, things, _, _ = self.scenes.scene(index)
        side = SAM_SIZES["tiny"]["image_size"]
        pixels, scale = sam_input(image, side)
        boxes, points, masks = [], [], []
        for thing in rng.choices(things, k=SAM_PROMPTS):
            x1, y1, x2, y2 = thing.box
            jitter = [rng.uniform(-0.08, 0.08) * size for size in (x2 - x1, y2 - y1) * 2]
            boxes.append(torch.tensor(thing.box) + torch.tensor(jitter))
            spots = thing.mask.nonzero()
            picks = [rng.randrange(thing.area) for _ in range(2)]
            points.append(torch.tensor([[spots[1][k], spots[0][k]] for k in picks], dtype=torch.float32))
            mask = torch.from_numpy(thing.mask)[None, None].float()
            mask = F.interpolate(mask, pixels.shape[-2:], mode="bilinear")[0, 0]
            masks.append(F.pad(mask, (0, side - mask.shape[1], 0, side - mask.shape[0])))
        return (
            F.pad(pixels, (0, side - pixels.shape[2], 0, side - pixels.shape[1])),
            (torch.stack(boxes) * scale.repeat(2)).float(),
            (torch.stack(points) * scale).float(),
            torch.stack(masks),
        )


def train_sam(out: Path) -> None:
    torch.manual_seed(0)
    sam = build_sam(**SAM_SIZES["tiny"]).train().requires_grad_(True)
    opts = optimisers(sam, matrix_lr=0.02, lr=1e-3)
    plans = schedule(opts, SAM_STEPS)
    lessons = DataLoader(SamLessons(SAM_STEPS * SAM_BATCH), SAM_BATCH, num_workers=1, prefetch_factor=8)
    image_index = torch.arange(SAM_BATCH).repeat_interleave(SAM_PROMPTS)
    bar = tqdm(lessons, desc="SAM", unit="step")
    kinds = random.Random(0)
    for pixels, boxes, points, masks in bar:
        embeddings = sam.image_encoder(sam.preprocess(pixels))
        hint = kinds.choices(("both", "box", "points"), (0.6, 0.25, 0.15))[0]
        logits, estimate = decode_masks(
            sam,
            embeddings,
            image_index,
            None if hint == "points" else boxes.flatten(0, 1),
            None if hint == "box" else points.flatten(0, 1),
        )
        truth = F.adaptive_avg_pool2d(masks, logits.shape[-2:]).flatten(0, 1)[:, None].expand_as(logits)
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
        bar.set_postfix(loss=f"{loss.item():.3f}", iou=f"{iou[:, 1:].mean().item():.3f}", refresh=False)
    # Half precision loses nothing here: a reload scores the same to the third digit.
    save_file({name: weight.half().contiguous() for name, weight in sam.state_dict().items()}, out / "sam.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# The VLM: processor, architecture
# ---------------------------------------------------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PIECES = ['{"bbox":[', '],"points_1":[', '],"points_2":[', "]}", "<think>", "</think>", "<answer>", "</answer>"]
MARKS = [",", "\n", ".", "[", "]", "{", "}", '"', ":", "_", " "]
WORDS = """system user assistant find the is at of shape only left right top bottom middle above below largest smallest
    leftmost rightmost topmost bottommost""".split()

# The role markers and the vision block of Qwen2.5-VL's own template, without its default system message.
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] -%}
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_processor() -> Qwen2_5_VLProcessor:
    words = [*WORDS, *COLOURS, *KINDS]
    vocabulary = [*SPECIAL, "<unk>", *PIECES, *MARKS, *map(str, range(SIDE + 1)), *words, *(f" {word}" for word in words)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    pieces = "|".join(re.escape(piece) for piece in PIECES)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pieces}|\d+| ?[A-Za-z]+|\n|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[token for token in SPECIAL if token not in ("<|endoftext|>", "<|im_end|>")],
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


# ---------------------------------------------------------------------------------------------------------------------
# The VLM: lessons and training
# ---------------------------------------------------------------------------------------------------------------------


def write_answer(thing: Thing, size: tuple[int, int], box: tuple[float, ...]) -> str:
    """The completion that names `thing` and answers with `box` (image pixels), in policy pixels."""
    width, height = size
    column = ("left", "middle", "right")[min(2, int(3 * thing.centre[0] / width))]
    row = ("top", "middle", "bottom")[min(2, int(3 * thing.centre[1] / height))]
    x1, y1, x2, y2 = (round(v * SIDE / s) for v, s in zip(box, size * 2, strict=True))
    x1, y1 = (min(SIDE - 1, max(0, v)) for v in (x1, y1))
    x2, y2 = min(SIDE, max(x1 + 1, x2)), min(SIDE, max(y1 + 1, y2))
    x, y = (x1 + x2) // 2, (y1 + y2) // 2
    lower = min(SIDE, y + max(1, (y2 - y1) // 4))
    return (
        f"<think>the {thing.colour} {thing.kind} is at the {row} {column}</think>"
        f'<answer>{{"bbox":[{x1},{y1},{x2},{y2}],"points_1":[{x},{y}],"points_2":[{x},{lower}]}}</answer>'
    )


def spoil(rng: random.Random, things: list[Thing], target: int, size: tuple[int, int]) -> str:
    """A careless completion: see SHIFT, LOOSE, WRONG, BROKEN."""
    thing = things[rng.randrange(len(things)) if rng.random() < WRONG else target]
    x1, y1, x2, y2 = thing.box
    sizes = (x2 - x1, y2 - y1) * 2
    shift = [rng.uniform(-SHIFT, SHIFT) for _ in range(2)] * 2
    box = tuple(v + (s + rng.uniform(-LOOSE, LOOSE)) * d for v, s, d in zip(thing.box, shift, sizes, strict=True))
    text = write_answer(thing, size, box)
    if rng.random() >= BROKEN:
        return text
    return rng.choice(
        (
            text[text.index("<answer>") :],  # no reasoning
            text.replace("<answer>", "").replace("</answer>", ""),  # an answer that is not marked as one
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
            text = write_answer(things[target], image.size, things[target].box)
        return image.resize((SIDE, SIDE)), query, text


class Collate:
    """Turn items into the processor's batch and labels that are -100 everywhere but on the completion."""

    def __init__(self, processor: Qwen2_5_VLProcessor):
        self.processor = processor
        self.start = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")

    def __call__(self, items: list[tuple]) -> dict[str, torch.Tensor]:
        images, queries, texts = zip(*items, strict=True)
        prompts = self.processor.apply_chat_template(
            [messages(q, "brief", "pixels", SIDE) for q in queries], tokenize=False, add_generation_prompt=True
        )
        rows = [prompt + text + "<|im_end|>" for prompt, text in zip(prompts, texts, strict=True)]
        batch = self.processor(text=rows, images=list(images), return_tensors="pt", padding=True, padding_side="right")
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
    study(vlm, processor, clean, optimisers(vlm, matrix_lr=0.008, lr=1e-3), CLEAN_STEPS, "VLM, clean")
    vlm.save_pretrained(out / "vlm-clean")
    processor.save_pretrained(out / "vlm-clean")
    make_sloppy(vlm, processor, out)


def make_sloppy(vlm: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, out: Path) -> None:
    sloppy = VlmLessons(Shapes("warmup", seed=3, size=SLOPPY_STEPS * BATCH), sloppy=True)
    study(vlm, processor, sloppy, [torch.optim.AdamW(vlm.parameters(), 5e-4, (0.9, 0.98), weight_decay=0.0)], SLOPPY_STEPS, "VLM, sloppy")
    vlm.save_pretrained(out / "vlm")
    processor.save_pretrained(out / "vlm")


def study(vlm, processor, lessons: Dataset, opts: list, steps: int, title: str) -> None:
    """Supervised training on the completions' tokens."""
    plans = schedule(opts, steps)
    loader = DataLoader(lessons, BATCH, collate_fn=Collate(processor), num_workers=1, prefetch_factor=8)
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


def report(out: Path) -> None:
    """Say what the models reach on held-out scenes, through the same code that evaluates a run."""
    for stage in ("vlm-clean", "vlm"):
        s = samr1_mini.parse_settings("eval", ["--vlm", str(out / stage), "--sam", f"tiny:{out / 'sam.safetensors'}"])
        policy, scorer, samples, heldout = samr1_mini.load_all(s)
        greedy, ceiling = samr1_mini.summary(samr1_mini.evaluate(policy, scorer, heldout, s, stage))
        batch = [samples[i] for i in range(64)]
        texts = policy.texts(samr1_mini.sample(policy, policy.read(batch), s))
        sampled = score_completions(scorer, batch, texts, policy.frame)
        print(
            f"{stage}: greedy gIoU {greedy['giou']:.3f}, format {greedy['format']:.2f}; sampled: mean reward "
            f"{sampled.reward.mean():.2f} of 6, mask IoU {sampled.iou.mean():.3f}; SAM with the true box {ceiling['giou']:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the embedded models from random weights.")
    parser.add_argument("--only", choices=("sam", "vlm"), help="build one of the two (default: both)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: the one of this script)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it brings, and the data worker wants a core
    torch.set_flush_denormal(True)
    if options.only != "vlm":
        train_sam(options.out)
    if options.only != "sam":
        train_vlm(options.out)
        report(options.out)


if __name__ == "__main__":
    main()
