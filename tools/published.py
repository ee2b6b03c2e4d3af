"""published.py - the sizes of the presets' policies, so that nothing is downloaded to know them."""

from transformers import AutoConfig, PretrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig

from plumbing.errors import reason_of, refusing
from plumbing.weights import find_model

# What the published config.json of the presets' models has in place of the defaults of its class.
# The sizes of Qwen3-VL-2B are also those of torchtitan's model "2B" in models/qwen3_vl.
SIZES = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    vocab_size tie_word_embeddings""".split()
PUBLISHED = {
    "Qwen/Qwen3-VL-2B-Instruct": (2048, 6144, 28, 16, 8, 151936, True),
    "Qwen/Qwen2.5-VL-3B-Instruct": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False),
}


def published_config(vlm: str) -> PretrainedConfig:
    """The config of a VLM, without its weights: for the presets' models without a download.

    For any other name or folder it is read from config.json. Raises UserError.
    """
    if vlm not in PUBLISHED:
        path, options = find_model(vlm, f"--vlm {vlm}")
        with refusing(lambda error: f"--vlm {vlm}: it has no config ({reason_of(error)})"):
            return AutoConfig.from_pretrained(path, **options)
    text = dict(zip(SIZES, PUBLISHED[vlm], strict=True))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = Qwen2_5_VLConfig
    vision = dict(hidden_size=1280)
    if "Qwen3" in vlm:
        rope |= {"rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
        config = Qwen3VLConfig
        vision = dict(depth=24, hidden_size=1024, intermediate_size=4096)
        vision |= dict(deepstack_visual_indexes=[5, 11, 17])
    return config(
        text_config=text | dict(rope_parameters=rope),
        vision_config=vision | dict(out_hidden_size=text["hidden_size"]),
        tie_word_embeddings=text["tie_word_embeddings"],
    )
