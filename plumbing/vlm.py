"""vlm.py - running a Qwen-VL model: loading, chat template, image features, positions."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from data import Sample, messages
from plumbing.devices import choose_device, choose_dtype
from plumbing.errors import UserError, reason_of, refusing


@dataclass
class Prompts:
    """B prompts for the language model. Their images have been through the vision tower.

    Token ids, mask and positions stay in host memory, because indexing them on a GPU would make the
    host wait for it. The image features are on the model's device.
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


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The VLM inside a peft wrapper, or the model itself. Its LoRA layers stay active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def encode_prompts(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Prompts:
    """Run the frozen vision tower and compute the positions, once for all passes of a step.

    inputs: the processor's output for B prompts of one image each, padded on the left, in host
            memory. It must hold `mm_token_type_ids`: without them Qwen2.5-VL silently uses
            one-dimensional positions.
    """
    inner = unwrap(model).model
    pixels = inputs["pixel_values"].to(inner.device)
    grid = inputs["image_grid_thw"].to(inner.device)
    vision = inner.get_image_features(pixels, grid, return_dict=True)
    positions, _ = inner.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    return Prompts(inputs["input_ids"], inputs["attention_mask"].bool(), positions, vision)


@dataclass
class Policy:
    """A VLM with its processor, and how it is asked."""

    model: torch.nn.Module
    processor: object
    device: torch.device
    side: int  # of the square image it sees, pixels
    style: str  # of the prompt, see `data.messages`
    units: str  # of its answers, "pixels" or "thousandths"
    end: torch.Tensor  # (E,) tokens that end a completion
    banned: torch.Tensor  # the vision tokens, which are never sampled
    opening: str  # of a completion: "<think>" if the chat template writes that, else ""
    scaler: torch.amp.GradScaler  # keeps small gradients above zero in float16, else does nothing

    @property
    def extent(self) -> float:
        """The number it writes for the far edge of the image, see `reward.sam_prompt`."""
        return self.side if self.units == "pixels" else 1000

    def read(self, samples: list[Sample], starts: list[str] | None = None) -> Prompts:
        """Tokenise the queries and encode the images, resized without keeping the aspect ratio.

        starts: texts that completions are made to begin with, such as a thought. They stand at the
                end of the prompts. A thinking model's <think> may be part of one.
        """
        chats = [messages(one.query, self.style, self.units, self.side) for one in samples]
        images = [one.image.resize((self.side, self.side)) for one in samples]
        texts = self.processor.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )
        pairs = zip(texts, starts or [""] * len(texts), strict=True)
        texts = [text + start.removeprefix(self.opening) for text, start in pairs]
        inputs = self.processor(
            text=texts, images=images, return_tensors="pt", padding=True, padding_side="left"
        )
        return encode_prompts(self.model, inputs)

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


def template_end(processor, vlm: str) -> str:
    """What the chat template writes of a completion: "<think>" for a thinking model, or "".

    Raises UserError if there is none, or if it leaves the image out, as that of a language model.
    """
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    unfit = f"--vlm {vlm}: its chat template cannot be used"
    with refusing(lambda error: f"{unfit} ({reason_of(error)}): fetch it again"):
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if processor.image_token not in text:
        reason = "its chat template leaves the image out"
        raise UserError(f"--vlm {vlm}: {reason}: fetch the files of a VLM")
    return "<think>" if text.rstrip().endswith("<think>") else ""


def open_model(vlm: str, dtype: torch.dtype | str, device: torch.device | str, options: dict):
    """The processor and the model that --vlm names. options: of `from_pretrained`."""
    # `grpo.group_logprobs` relies on the boolean masks of sdpa.
    options = {"dtype": dtype, "attn_implementation": "sdpa", **options}
    if vlm != "tiny":
        from plumbing.foreign import open_foreign_model  # checks what other people made

        return open_foreign_model(vlm, device, options)
    path = vlm_path(vlm)
    model = AutoModelForImageTextToText.from_pretrained(path, **options).to(device)
    return AutoProcessor.from_pretrained(path), model


def check_side(processor, patch: int, side: int, vlm: str) -> None:
    """Raise UserError if the processor makes another size of an image of `side` pixels.

    Its sizes are multiples of the patch, within limits. A model that answers in pixels counts those
    that it sees, so each of its boxes would be scaled wrongly.
    """
    image = Image.new("RGB", (side, side))
    grid = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"]
    _, height, width = (grid[0] * patch).tolist()
    if (width, height) != (side, side):
        raise UserError(
            f"--side {side}: the processor of --vlm {vlm} makes {width} x {height} pixels of it: "
            f"use --side {width}"
        )


def load_vlm(
    name: str,
    device: str,
    side: int,
    prompt: str,
    adapter: str = "none",
    dtype: str = "auto",
) -> Policy:
    """Load a VLM, frozen in eval mode, and the trained adapter in the folder `adapter`.

    The arguments are settings, see plumbing/settings.py. Raises UserError.
    """
    device = choose_device(device)
    in_4bit = dtype == "4bit"
    dtype = choose_dtype(dtype, device, tiny=name == "tiny")
    options = {}
    if in_4bit:
        from plumbing.four_bit import four_bit, keep_gradients  # only with this setting

        options = four_bit(name == "tiny", dtype, device)
    processor, model = open_model(name, dtype, device, options)
    if in_4bit:
        keep_gradients(model)
    config = model.config
    if model.num_parameters() < 10_000_000:
        torch.set_num_threads(1)  # such small matrices are slower when threads share them
    if name == "tiny":
        model.name_or_path = "tiny/vlm"  # for adapter_config.json: not a path of this machine
    units = "thousandths" if config.model_type.startswith("qwen3_vl") else "pixels"
    if units == "pixels":
        check_side(processor, config.vision_config.patch_size, side, name)
    if adapter != "none":
        from plumbing.foreign import load_adapter  # only with this setting

        model = load_adapter(model, adapter)
    ends = unwrap(model).generation_config.eos_token_id or processor.tokenizer.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    if max(ends) >= len(processor.tokenizer):  # completions would never end
        raise UserError(f"--vlm {name}: its generation_config.json is of another model: {ends}")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    model.eval().requires_grad_(False)
    return Policy(
        model=model,
        processor=processor,
        device=device,
        side=side,
        style=prompt,
        units=units,
        end=torch.tensor(ends, device=device),
        banned=torch.tensor([getattr(config, token) for token in names], device=device),
        opening=template_end(processor, name),
        scaler=torch.amp.GradScaler(device.type, 2.0**12, enabled=dtype == torch.float16),
    )
