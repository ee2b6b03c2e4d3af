"""foreign.py - open what other people made: --vlm, --adapter, and the checkpoint of a SAM 1.

What does not fit is refused, see plumbing/weights.py.
"""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from segment_anything.modeling import Sam
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PretrainedConfig

from plumbing import weights
from plumbing.errors import UserError, refusing

# Model types of Qwen2.5-VL and Qwen3-VL. Others may load, but answer in other coordinates
# (Qwen2-VL) or in layers that ignore the attention mask of packed rows (Qwen3.5).
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
KNOWN = "use a Qwen2.5-VL or a Qwen3-VL, such as Qwen/Qwen2.5-VL-3B-Instruct"

# --------------------------------------------------------------------------------------------------
# --vlm
# --------------------------------------------------------------------------------------------------


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


def open_foreign_model(vlm: str, device: torch.device | str, options: dict):
    """The processor and the model that --vlm names, with all of its weights and no others.

    options: of `from_pretrained`. Raises UserError.
    """
    path, found = weights.find_model(vlm, f"--vlm {vlm}")
    flag = f"--vlm {vlm}"
    with refusing(lambda error: f"{flag}: {weights.unreadable(path, error)}"):
        config = AutoConfig.from_pretrained(path, **found)
        check_family(config, vlm)
        if quantised := getattr(config, "quantization_config", None):
            method = quantised["quant_method"]
            flag += f": config.json says that its weights are quantised ({method})"
        if Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").is_file():
            raise UserError(f"{flag}: tokenizer_config.json is missing: fetch it too")
        processor = AutoProcessor.from_pretrained(path, **found)
        check_processor(processor, config, vlm)
        model = weights.load_model(
            kind=AutoModelForImageTextToText,
            path=path,
            flag=flag,
            mend="fetch all files of its folder again",
            unknown=False,
            options=found | options,
        ).to(device)
    mend = "its file is damaged: fetch it again"
    if model.dtype == torch.float16:
        mend = f"float16 ends at 65,504: use --dtype bfloat16 or float32; or {mend}"
    held = [(name, x) for name, x in model.named_parameters() if x.is_floating_point()]  # not 4 bit
    weights.check_finite(held, f"{flag} in {model.dtype}", mend)
    return processor, model


# --------------------------------------------------------------------------------------------------
# --adapter
# --------------------------------------------------------------------------------------------------


def read_adapter(adapter: str) -> tuple[Path, PeftConfig, dict[str, torch.Tensor]]:
    """The folder of a trained adapter, its configuration, and its weights. Raises UserError."""
    flag = f"--adapter {adapter}"
    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{flag}: no adapter_config.json there: name a RUN/adapter")
    file = weights.adapter_file(folder, flag)
    tensors = weights.read_tensors(file, flag)
    weights.check_finite(tensors.items(), f"{flag}: {file.name}", "it is damaged: fetch it again")
    with refusing(lambda error: f"{flag}: {weights.unreadable(str(folder), error)}"):
        with warnings.catch_warnings(action="ignore"):  # of keys that it does not know, see below
            config = PeftConfig.from_pretrained(folder)
        stated = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        # A newer version writes its new keys into every file. Null, false or {} is a method unused.
        ignored = [key for key, value in stated.items() if value and not hasattr(config, key)]
    if ignored:
        keys = ", ".join(ignored)
        raise UserError(f"{flag}: this peft does not know its {keys}: pip install -U peft")
    if config.is_prompt_learning:
        raise UserError(f"{flag}: it holds a prompt ({config.peft_type}): use a LoRA")
    scales = [getattr(config, "r", 1), getattr(config, "lora_alpha", 1)]
    scales += (getattr(config, "alpha_pattern", None) or {}).values()
    if not all(isinstance(x, int | float) and x and math.isfinite(x) for x in scales):
        reason = "its r, lora_alpha or alpha_pattern has 0 or no number, so it would do nothing"
        raise UserError(f"{flag}: {reason}: name another")
    start = str(getattr(config, "init_lora_weights", ""))
    if getattr(config, "alora_invocation_tokens", None) or "niter" in start:
        reason = "it acts after some tokens only, or on base weights that were found at random"
        raise UserError(f"{flag}: {reason}, which cannot be done here: use a plain LoRA")
    return folder, config, tensors


def load_adapter(model: torch.nn.Module, adapter: str) -> PeftModel:
    """Put the trained adapter in a folder on a model, with all of its weights. Raises UserError."""
    flag = f"--adapter {adapter}"
    folder, config, tensors = read_adapter(adapter)
    unfit = f"{flag}: it does not fit"
    with (
        refusing(lambda error: f"{unfit}: {weights.unreadable(str(folder), error)}"),
        warnings.catch_warnings(action="ignore"),  # `check_keys` reports the same
    ):
        model = PeftModel.from_pretrained(model, folder, ignore_mismatched_sizes=True)
        # A second time, because only this returns which keys were not used.
        keys = model.load_adapter(folder, "default", ignore_mismatched_sizes=True)
    missing = {key.replace(".default", "") for key in keys.missing_keys}
    expected = weights.shapes(get_peft_model_state_dict(model, save_embedding_layers=False))
    weights.check_keys(
        missing=missing - tensors.keys(),
        unknown=keys.unexpected_keys,
        sizes={key: (tensors[key].shape, expected[key]) for key in missing & tensors.keys()},
        what=flag,
        mend=f"it was trained on {config.base_model_name_or_path}: use that --vlm, or "
        "fetch it again",
    )
    return model


def continue_adapter(model: PeftModel, adapter: str) -> None:
    """Give the untrained adapter of a model the weights of a trained one, in the folder `adapter`.

    Both must be LoRA of one rank on the same layers. A trained one of another scale, alpha / rank,
    is scaled in its factor B, so that it does the same. Raises UserError if it does not fit.
    """
    flag = f"--adapter {adapter}"
    _, given, tensors = read_adapter(adapter)
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


# --------------------------------------------------------------------------------------------------
# --sam
# --------------------------------------------------------------------------------------------------


def load_sam_checkpoint(build: Callable[[], Sam], spec: str, known: str) -> Sam:
    """The SAM 1 that `build` makes, with all of its weights from a checkpoint. Raises UserError.

    spec: SIZE:FILE, as in --sam. known: what that flag takes, for the error message.
    """
    size, _, path = spec.partition(":")
    given = sam_weights(weights.read_tensors(Path(path).expanduser(), f"--sam {spec}"))
    sam = build()
    weights.compare(
        expected=weights.shapes(sam.state_dict()),
        given=weights.shapes(given),
        what=f"--sam {spec}: it is not a SAM {size}",
        mend=f"name the size it belongs to: {known}",
    )
    weights.check_finite(given.items(), f"--sam {spec}", "it is damaged: fetch it again")
    sam.load_state_dict(given)
    return sam


def sam_weights(held: dict) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint of SAM 1, under the names of `segment_anything`.

    Training programs put them beside other things, and wrappers put a prefix before each name.

    >>> list(sam_weights({"epoch": 3, "model": {"module.neck": torch.ones(1)}}))
    ['neck']
    """
    wrappers = ("state_dict", "model_state_dict", "model")
    while inside := [held[name] for name in wrappers if isinstance(held.get(name), dict)]:
        held = inside[0]
    for prefix in ("_orig_mod.", "module.", "model."):
        if all(str(key).startswith(prefix) for key in held):
            held = {key.removeprefix(prefix): tensor for key, tensor in held.items()}
    return {
        str(key): tensor
        for key, tensor in held.items()
        if isinstance(tensor, torch.Tensor) and key not in ("pixel_mean", "pixel_std")
    }
