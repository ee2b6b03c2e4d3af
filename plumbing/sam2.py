"""sam2.py - SAM 2 of transformers: loading it, and the four steps that the reward calls.

The paper's segmenter is SAM2-Large: `--sam sam2:facebook/sam2-hiera-large`. Resizing, normalising
and the masks at full size are those of the model's own image processor.
"""

import torch
from PIL import Image
from transformers import AutoConfig, Sam2Config, Sam2ImageProcessor, Sam2Model

from plumbing import weights
from plumbing.errors import UserError

EXAMPLE = "facebook/sam2-hiera-large"
# Folders on the hub hold the model for videos. That for images is a part of it.
MODEL_TYPES = ("sam2", "sam2_video")
PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")


class Sam2(Sam2Model):
    """transformers' model, with the four steps of `reward.Sam1`.

    Images are resized to a square without keeping the aspect ratio: one factor for each axis, and
    no padding.
    """

    image_processor: Sam2ImageProcessor  # set by `load_sam2`
    mask_threshold = 0.0  # of the logits, as in `Sam2ImageProcessor.post_process_masks`

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

        (B, C/8, 4h, 4w), (B, C/4, 2h, 2w) and (B, C, h, w), of 16 MiB an image for an official
        model: C is 256, h and w are 64.
        """
        return self.get_image_embeddings(torch.stack(pixels))

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
        output = self(
            image_embeddings=[level[image_index] for level in embeddings],
            input_boxes=None if boxes is None else boxes[:, None],
            input_points=None if points is None else points[:, None],  # without labels: foreground
        )
        return output.pred_masks[:, 0], output.iou_scores[:, 0]

    def upsample(self, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Bring logits (G, 4h, 4w) of one image to its size (H, W): (G, H, W)."""
        resize = self.image_processor.post_process_masks
        return resize([logits[None]], [size], binarize=False)[0][0]


def open_config(name: str) -> tuple[Sam2Config, str, dict]:
    """The config of a SAM 2; the folder or hub name to load it from, and options for that.

    Raises UserError. See `load_sam2`.
    """
    if not name:
        raise UserError(f"--sam sam2: it needs a model: write sam2:{EXAMPLE} or sam2:FOLDER")
    flag = f"--sam sam2:{name}"
    if name.endswith((".pt", ".pth")):
        raise UserError(
            f"{flag}: the original checkpoint is not read: write sam2:{EXAMPLE}, or sam2:FOLDER "
            "with transformers' files of it"
        )
    path, options = weights.find_model(name, flag)
    try:
        config = AutoConfig.from_pretrained(path, **options)
        if config.model_type in MODEL_TYPES:
            parts = {part: getattr(config, part) for part in PARTS}
            return Sam2Config(**parts), path, options
    except Exception as error:  # a damaged file can raise anything
        raise unreadable(flag, path, error) from error
    raise UserError(f"{flag}: it holds a {config.model_type}, not a SAM 2: use sam2:{EXAMPLE}")


def sam2_config(name: str) -> Sam2Config:
    """The config of a SAM 2, without its weights. Raises UserError. See `load_sam2`."""
    return open_config(name)[0]


def load_sam2(name: str) -> Sam2:
    """Load a SAM 2, frozen, in float32 and on the CPU, with its image processor.

    name: hub name or local folder of transformers' `Sam2Model` or `Sam2VideoModel`.
    Raises UserError.
    """
    flag = f"--sam sam2:{name}"
    config, path, options = open_config(name)
    try:
        processor = Sam2ImageProcessor.from_pretrained(path, **options)
        sam = weights.load_model(
            kind=Sam2,
            path=path,
            flag=flag,
            mend="fetch all of its files again",
            unknown=True,  # a model for videos has more
            options={"config": config, "dtype": torch.float32, **options},
        )
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise unreadable(flag, path, error) from error
    sam.image_processor = processor
    weights.check_finite(sam.state_dict().items(), flag, "its file is damaged: fetch it again")
    side = sam.config.prompt_encoder_config.image_size
    size = sam.image_processor.size
    if {size.height, size.width} != {side}:
        raise UserError(
            f"{flag}: it takes images of {side} x {side} pixels, but its "
            f"preprocessor_config.json says {size.width} x {size.height}: fetch it again"
        )
    return sam.eval().requires_grad_(False)


def unreadable(flag: str, path: str, error: Exception) -> UserError:
    mend = f"use a hub name such as {EXAMPLE}, or fetch all files of the folder again"
    return UserError(f"{flag}: {weights.unreadable(path, error)}: {mend}")
