"""transformers_sam.py - SAM 2 and SAM 3 of transformers: loading, and the steps of the reward.

The paper's segmenter is SAM2-Large: `--sam sam2:facebook/sam2-hiera-large`. Of a SAM 3 the tracker
is used, the part that takes boxes and points: `--sam sam3:facebook/sam3`. Resizing, normalising and
the masks at full size are those of the model's own image processor.
"""

from typing import NamedTuple

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam3ImageProcessor,
    Sam3TrackerConfig,
    Sam3TrackerModel,
)

from plumbing import weights
from plumbing.errors import UserError


class Family(NamedTuple):
    """The classes of a SAM in transformers, and what its folders hold."""

    model: type
    config: type
    image_processor: type
    model_types: tuple[str, ...]  # the folders on the hub hold a model for videos
    example: str  # a name on the hub


FAMILIES = {
    "sam2": Family(
        model=Sam2Model,
        config=Sam2Config,
        image_processor=Sam2ImageProcessor,
        model_types=("sam2", "sam2_video"),
        example="facebook/sam2-hiera-large",
    ),
    "sam3": Family(
        model=Sam3TrackerModel,
        config=Sam3TrackerConfig,
        image_processor=Sam3ImageProcessor,
        model_types=("sam3_tracker", "sam3_tracker_video", "sam3_video"),
        example="facebook/sam3",
    ),
}
PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")


class TransformersSam(torch.nn.Module):
    """A SAM 2 or SAM 3 with the four steps of `reward.Sam1`.

    Images are resized to a square without keeping the aspect ratio: one factor for each axis, and
    no padding.
    """

    mask_threshold = 0.0  # of the logits, as in `post_process_masks` of the image processors

    def __init__(self, model: Sam2Model | Sam3TrackerModel, image_processor):
        """The model is not a base class: transformers converts the names of the weights in the
        hub's folder of SAM 3 for its own classes only."""
        super().__init__()
        self.model = model
        self.image_processor = image_processor

    def prepare(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Resize and normalise an image.

        Returns pixels (3, h, w), float32, and the factors (x, y), float64, from image pixels to
        the pixels of the encoder's input.
        """
        pixels = self.image_processor(image, return_tensors="pt").pixel_values[0]
        factors = [pixels.shape[2] / image.width, pixels.shape[1] / image.height]
        return pixels, torch.tensor(factors, dtype=torch.float64)

    def encode(self, pixels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Encode B prepared images. Returns three levels of embeddings.

        (B, C/8, 4h, 4w), (B, C/4, 2h, 2w) and (B, C, h, w). C is 256 for an official model. h and w
        are 64 for SAM 2, 72 for SAM 3, so an image takes 16 or 20 MiB.
        """
        return self.model.get_image_embeddings(torch.stack(pixels))

    def decode(
        self,
        embeddings: list[torch.Tensor],
        image_index: torch.Tensor,
        boxes: torch.Tensor | None,
        points: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, 3, 4h, 4w) and ratings (N, 3) of the three candidates for each of N prompts.

        embeddings: the levels of `encode`, float32. All three are repeated for each prompt.
        image_index: (N,) int64, the image that each prompt is about.
        boxes:       (N, 4) x1, y1, x2, y2, or None. In pixels of the encoder's input.
        points:      (N, K, 2) x, y, all foreground, or None. In the same pixels. Not both None.
        """
        output = self.model(
            image_embeddings=[level[image_index] for level in embeddings],
            input_boxes=None if boxes is None else boxes[:, None],
            input_points=None if points is None else points[:, None],  # without labels: foreground
        )
        return output.pred_masks[:, 0], output.iou_scores[:, 0]

    def upsample(self, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Bring logits (G, 4h, 4w) of one image to its size (H, W): (G, H, W)."""
        resize = self.image_processor.post_process_masks
        return resize([logits[None]], [size], binarize=False)[0][0]


def open_config(spec: str) -> tuple[PreTrainedConfig, str, dict]:
    """The config of a model; the folder or hub name to load it from, and options for that.

    Raises UserError. See `load_transformers_sam`.
    """
    name, _, model = spec.partition(":")
    family = FAMILIES[name]
    use = f"use {name}:{family.example}"
    if not model:
        raise UserError(f"--sam {name}: it needs a model: {use} or {name}:FOLDER")
    flag = f"--sam {spec}"
    if model.endswith((".pt", ".pth")):
        raise UserError(
            f"{flag}: the original checkpoint is not read: {use}, or {name}:FOLDER with "
            "transformers' files of it"
        )
    path, options = weights.find_model(model, flag)
    try:
        config = AutoConfig.from_pretrained(path, **options)
        if config.model_type in family.model_types:
            config = getattr(config, "tracker_config", config)  # of the whole SAM 3
            parts = {part: getattr(config, part) for part in PARTS}
            if name == "sam3":
                # A fourth level is not used. With it, transformers adds the embedding of "no
                # memory" to the fourth level. The original predictor adds it to the third.
                vision = parts["vision_config"]
                vision.scale_factors = vision.scale_factors[: len(vision.backbone_feature_sizes)]
            return family.config(**parts), path, options
    except Exception as error:  # a damaged file can raise anything
        raise unreadable(spec, path, error) from error
    known = " or ".join(family.model_types)
    raise UserError(f"{flag}: it holds a {config.model_type}, not a {known}: {use}")


def load_transformers_sam(spec: str) -> TransformersSam:
    """Load a SAM 2 or SAM 3, frozen, in float32 and on the CPU, with its image processor.

    spec: "sam2:MODEL" or "sam3:MODEL". MODEL is a hub name or local folder of transformers'
          `Sam2Model` or `Sam2VideoModel`; `Sam3TrackerModel`, `Sam3TrackerVideoModel` or
          `Sam3VideoModel`.
    Raises UserError.
    """
    flag = f"--sam {spec}"
    family = FAMILIES[spec.partition(":")[0]]
    config, path, options = open_config(spec)
    try:
        processor = family.image_processor.from_pretrained(path, **options)
        model = weights.load_model(
            kind=family.model,
            path=path,
            flag=flag,
            mend="fetch all of its files again",
            unknown=True,  # a model for videos has more
            options={"config": config, "dtype": torch.float32, **options},
        )
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise unreadable(spec, path, error) from error
    weights.check_finite(model.state_dict().items(), flag, "its file is damaged: fetch it again")
    side = config.prompt_encoder_config.image_size
    size = processor.size
    if {size.height, size.width} != {side}:
        raise UserError(
            f"{flag}: it takes images of {side} x {side} pixels, but its "
            f"preprocessor_config.json says {size.width} x {size.height}: fetch it again"
        )
    return TransformersSam(model, processor).eval().requires_grad_(False)


def unreadable(spec: str, path: str, error: Exception) -> UserError:
    example = FAMILIES[spec.partition(":")[0]].example
    mend = f"use a hub name such as {example}, or fetch all files of the folder again"
    return UserError(f"--sam {spec}: {weights.unreadable(path, error, mend)}")
