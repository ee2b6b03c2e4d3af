"""vlm.py - running a Qwen-VL model: loading, chat template, image features, positions."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PretrainedConfig

from data import Sample, messages
from plumbing import weights
from plumbing.devices import choose_device, choose_dtype
from plumbing.errors import UserError
from plumbing.four_bit import four_bit, keep_gradients

# Model types of Qwen2.5-VL and Qwen3-VL. Others may load, but answer in other coordinates
# (Qwen2-VL) or in layers that ignore the attention mask of packed rows (Qwen3.5).
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
KNOWN = "use a Qwen2.5-VL or a Qwen3-VL, such as Qwen/Qwen2.5-VL-3B-Instruct"


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


def base(model: torch.nn.Module) -> torch.nn.Module:
    """The VLM inside a peft wrapper, with its LoRA layers in place, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def encode_prompts(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Prompts:
    """Run the frozen vision tower and compute the positions, once for all passes of a step.

    inputs: the processor's output for B prompts of one image each, padded on the left, in host
            memory. It must hold `mm_token_type_ids`: without them Qwen2.5-VL silently uses
            one-dimensional positions.
    """
    inner = base(model).model
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
    prompt: str  # style of the request, see `data.messages`
    coordinates: str  # "pixels" or "thousandths"
    end: torch.Tensor  # (E,) tokens that end a completion
    banned: torch.Tensor  # the vision tokens, which are never sampled
    opening: str  # of a completion: "<think>" if the chat template writes that, else ""
    scaler: torch.amp.GradScaler  # keeps small gradients above zero in float16, else does nothing

    @property
    def extent(self) -> float:
        """The number it writes for the far edge of the image, see `reward.sam_prompt`."""
        return self.side if self.coordinates == "pixels" else 1000

    def read(self, samples: list[Sample]) -> Prompts:
        """Tokenise the queries and encode the images, resized without keeping the aspect ratio."""
        chats = [messages(one.query, self.prompt, self.coordinates, self.side) for one in samples]
        images = [one.image.resize((self.side, self.side)) for one in samples]
        texts = self.processor.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )
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


def template_end(processor) -> str:
    """What the chat template writes of a completion: "<think>" for a thinking model, or "".

    Raises ValueError if it leaves the image out, as that of a language model does.
    """
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if processor.image_token not in text:
        raise ValueError("its chat template leaves the image out: fetch the files of a VLM")
    return "<think>" if text.rstrip().endswith("<think>") else ""


def check_family(config: PretrainedConfig, vlm: str) -> None:
    """Raise UserError for a model that would be asked or trained in the wrong way."""
    if config.model_type not in FAMILIES:
        raise UserError(f"--vlm {vlm}: it is a {config.model_type}: {KNOWN}")
    layers = set(getattr(config.text_config, "layer_types", None) or ()) - {"full_attention"}
    if layers:
        found = ", ".join(sorted(layers))
        raise UserError(f"--vlm {vlm}: it has layers with {found}, not full attention: {KNOWN}")


def check_processor(processor, config: PretrainedConfig, vlm: str) -> None:
    """Raise UserError if the processor's files belong to another model."""
    image, tokens, vision = processor.image_processor, processor.tokenizer, config.vision_config
    of_files = image.patch_size, image.merge_size, processor.image_token_id
    of_model = vision.patch_size, vision.spatial_merge_size, config.image_token_id
    if of_files != of_model or len(tokens) > config.text_config.vocab_size:
        raise UserError(
            f"--vlm {vlm}: its processor or tokenizer is of another model (patch, merge, image "
            f"token {of_files} in place of {of_model}, {len(tokens)} tokens): fetch all files again"
        )


def open_model(vlm: str, dtype: torch.dtype | str, device: torch.device | str, options: dict):
    """The processor and the model that --vlm names, with all of its weights and no others.

    options: of `from_pretrained`. Raises UserError.
    """
    path, found = weights.find_model(vlm_path(vlm), f"--vlm {vlm}")
    flag = f"--vlm {vlm}"
    try:
        config = AutoConfig.from_pretrained(path, **found)
        check_family(config, vlm)
        if quantised := getattr(config, "quantization_config", None):
            method = quantised["quant_method"]
            flag += f": config.json says that its weights are quantised ({method})"
        if Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").is_file():
            raise UserError(f"{flag}: tokenizer_config.json is missing: fetch it too")
        processor = AutoProcessor.from_pretrained(path, **found)
        check_processor(processor, config, vlm)
        # `grpo.group_logprobs` relies on the boolean masks of sdpa.
        options = {"dtype": dtype, "attn_implementation": "sdpa", **found, **options}
        model = weights.load_model(
            kind=AutoModelForImageTextToText,
            path=path,
            flag=flag,
            mend="fetch all files of its folder again",
            unknown=False,
            options=options,
        ).to(device)
        template_end(processor)  # raises an error without a chat template
    except UserError:
        raise
    except Exception as error:  # a folder that holds no model, or a damaged one, can raise anything
        raise UserError(f"{flag}: {weights.unreadable(path, error)}") from error
    mend = "its file is damaged: fetch it again"
    if model.dtype == torch.float16:
        mend = f"float16 ends at 65,504: use --dtype bfloat16 or float32; or {mend}"
    weights.check_finite(model.named_parameters(), f"{flag} in {model.dtype}", mend)
    return processor, model


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
    options = four_bit(name == "tiny", dtype, device) if in_4bit else {}
    processor, model = open_model(name, dtype, device, options)
    config = model.config
    keep_gradients(model)
    if model.num_parameters() < 10_000_000:
        torch.set_num_threads(1)  # such small matrices are slower when threads share them
    if name == "tiny":
        model.name_or_path = "tiny/vlm"  # for adapter_config.json: not a path of this machine
    coordinates = "thousandths" if config.model_type.startswith("qwen3_vl") else "pixels"
    if coordinates == "pixels":
        check_side(processor, config.vision_config.patch_size, side, name)
    if adapter != "none":
        model = load_adapter(model, adapter)
    ends = base(model).generation_config.eos_token_id or processor.tokenizer.eos_token_id
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    model.eval().requires_grad_(False)
    return Policy(
        model=model,
        processor=processor,
        device=device,
        side=side,
        prompt=prompt,
        coordinates=coordinates,
        end=torch.tensor([ends] if isinstance(ends, int) else ends, device=device),
        banned=torch.tensor([getattr(config, token) for token in names], device=device),
        opening=template_end(processor),
        scaler=torch.amp.GradScaler(device.type, 2.0**12, enabled=dtype == torch.float16),
    )


def read_adapter(adapter: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a trained adapter, and its weights. Raises UserError."""
    flag = f"--adapter {adapter}"
    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{flag}: no adapter_config.json there: name a RUN/adapter")
    file = weights.adapter_file(folder, flag)
    tensors = weights.read_tensors(file, flag)
    weights.check_finite(tensors.items(), f"{flag}: {file.name}", "it is damaged: fetch it again")
    return folder, tensors


def load_adapter(model: torch.nn.Module, adapter: str) -> PeftModel:
    """Put the trained adapter in a folder on a model, with all of its weights. Raises UserError."""
    flag = f"--adapter {adapter}"
    folder, tensors = read_adapter(adapter)
    try:
        with warnings.catch_warnings(action="ignore"):  # `check_keys` reports the same
            model = PeftModel.from_pretrained(model, folder, ignore_mismatched_sizes=True)
            # A second time, because only this returns which keys were not used.
            keys = model.load_adapter(folder, "default", ignore_mismatched_sizes=True)
    except Exception as error:  # a damaged file can raise anything
        reason = weights.unreadable(str(folder), error)
        raise UserError(f"{flag}: it does not fit: {reason}") from error
    config = model.active_peft_config
    base_name = config.base_model_name_or_path
    if config.is_prompt_learning:
        raise UserError(f"{flag}: it holds a prompt ({config.peft_type}): use a LoRA")
    missing = {key.replace(".default", "") for key in keys.missing_keys}
    expected = weights.shapes(get_peft_model_state_dict(model, save_embedding_layers=False))
    weights.check_keys(
        missing=missing - tensors.keys(),
        unknown=keys.unexpected_keys,
        sizes={key: (tensors[key].shape, expected[key]) for key in missing & tensors.keys()},
        what=flag,
        mend=f"it was trained on {base_name}: use that --vlm, or fetch it again",
    )
    return model


def continue_adapter(model: PeftModel, adapter: str) -> None:
    """Give the untrained adapter of a model the weights of a trained one, in the folder `adapter`.

    Both must be LoRA of one rank on the same layers. A trained one of another scale, alpha / rank,
    is scaled in its factor B, so that it does the same. Raises UserError if it does not fit.
    """
    flag = f"--adapter {adapter}"
    folder, tensors = read_adapter(adapter)
    try:
        given = PeftConfig.from_pretrained(folder)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{flag}: {weights.unreadable(str(folder), error)}") from error
    ours = model.active_peft_config
    if given.peft_type != ours.peft_type:
        raise UserError(f"{flag}: it is a {given.peft_type}, not LoRA: name another")
    # These train other weights, or scale or start from them, so that the base model differs too.
    plain = given.init_lora_weights in (True, False, "gaussian")
    if given.use_rslora or given.use_dora or given.alpha_pattern or not plain:
        raise UserError(f"{flag}: it is a variant of LoRA (adapter_config.json): name another")
    if given.r != ours.r:
        raise UserError(f"{flag}: its rank is {given.r}: use --lora_rank {given.r}")
    weights.compare(
        expected=weights.shapes(get_peft_model_state_dict(model, save_embedding_layers=False)),
        given=weights.shapes(tensors),
        what=flag,
        mend=f"it was trained on {given.base_model_name_or_path}: use that --vlm, or an adapter on "
        "all linear layers of the language model and no others",
    )
    scale = given.lora_alpha / ours.lora_alpha
    scaled = {key: x * scale if ".lora_B." in key else x for key, x in tensors.items()}
    set_peft_model_state_dict(model, scaled)
