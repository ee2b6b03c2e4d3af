"""sam.py - everything about `segment_anything` that the reward does not need to know.

`Sam1` is the model with the four steps that the reward calls. The rest builds a model of any size,
loads its weights, and computes the steps: attention that needs less memory, the resized input, the
embedding of prompts, many prompts in one call of the decoder, and masks at full size. SAM 2 is in
plumbing/sam2.py.
"""

from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from segment_anything.modeling.image_encoder import Attention
from segment_anything.utils.transforms import ResizeLongestSide

from plumbing.devices import to_device
from plumbing.sam2 import Sam2, load_sam2

TINY = Path(__file__).resolve().parent.parent / "tiny" / "sam.safetensors"

# The three official sizes (SAM, arXiv 2304.02643, and the package's build_sam.py), and the tiny one
# that tiny/make_tiny.py trains. image_size: side of the padded square that the encoder sees, in
# pixels. global_blocks: these attend over the whole image, all others within windows.
SAM_SIZES = {
    "vit_b": dict(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
    "vit_l": dict(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
    "vit_h": dict(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
    "tiny": dict(
        width=96,
        depth=3,
        heads=4,
        global_blocks=(1, 2),
        image_size=128,
        patch=8,
        window=8,
        prompt_width=64,
        mlp=128,
        decoder_heads=4,
    ),
}
KNOWN_SAMS = "tiny, vit_b:FILE, vit_l:FILE, vit_h:FILE or sam2:MODEL"


class Sam1(Sam):
    """`segment_anything`'s model, with the four steps that `reward.SamScorer` calls.

    `plumbing.sam2.Sam2` has the same four. So nothing else needs to know which of the two it has.
    """

    def prepare(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (3, h, w) for `encode`, and the factors (x, y) to them, see `sam_input`."""
        return sam_input(image, self.image_encoder.img_size)

    def encode(self, pixels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Encode B prepared images. Returns one level of embeddings, (B, C, h, w)."""
        return [self.image_encoder(torch.stack([self.preprocess(p) for p in pixels]))]

    def decode(
        self,
        embeddings: list[torch.Tensor],
        image_index: torch.Tensor,
        boxes: torch.Tensor | None,
        points: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, 3, 4h, 4w) and ratings (N, 3) of the three candidates for each of N prompts.

        embeddings are those of `encode`; the other arguments are those of `decode_masks`.
        """
        logits, rating = decode_masks(self, embeddings[0], image_index, boxes, points)
        return logits[:, 1:], rating[:, 1:]

    def upsample(self, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Bring logits (G, 4h, 4w) of one image to its size (H, W), see `upsample_masks`."""
        side = self.image_encoder.img_size
        input_size = ResizeLongestSide.get_preprocess_shape(*size, side)
        return upsample_masks(logits, side, input_size, size)


def build_sam(
    width: int,
    depth: int,
    heads: int,
    global_blocks: tuple[int, ...],
    image_size: int = 1024,
    patch: int = 16,
    window: int = 14,
    prompt_width: int = 256,
    mlp: int = 2048,
    decoder_heads: int = 8,
) -> Sam1:
    """A frozen `segment_anything` model with random weights.

    The package's own builder fixes all but the first four of these numbers.
    """
    grid = (image_size // patch, image_size // patch)
    sam = Sam1(
        ImageEncoderViT(
            img_size=image_size,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            out_chans=prompt_width,
            window_size=window,
            global_attn_indexes=global_blocks,
            use_rel_pos=True,
            qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        ),
        PromptEncoder(
            prompt_width,
            image_embedding_size=grid,
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        MaskDecoder(
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=prompt_width, mlp_dim=mlp, num_heads=decoder_heads
            ),
            transformer_dim=prompt_width,
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=prompt_width,
        ),
    )
    for block in sam.image_encoder.blocks:
        block.attn.forward = partial(folded_attention, block.attn)
    return sam.eval().requires_grad_(False)


def load_sam(spec: str) -> Sam1 | Sam2:
    """Build the SAM that `spec` names and load its weights: frozen, float32, on the CPU.

    spec: "tiny" (part of this repository), or "vit_b:FILE", "vit_l:FILE", "vit_h:FILE" with an
          official checkpoint, or "sam2:MODEL", see `plumbing.sam2.load_sam2`.
    Raises ValueError or FileNotFoundError with one line that names the problem and the remedy.
    """
    size, _, path = spec.partition(":")
    if size == "sam2":
        return load_sam2(path)
    if size not in SAM_SIZES:
        raise ValueError(f"no SAM is called {size!r}: use {KNOWN_SAMS}")
    if not path and size != "tiny":
        raise ValueError(f"{size} needs its checkpoint: write {size}:FILE")
    file = Path(path) if path else TINY
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            weights = safetensors.torch.load_file(file)
        else:  # weights_only: a downloaded pickle could run any code; this reads only tensors
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything; this block only reads
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{file} cannot be read as weights: it is truncated or not a checkpoint; "
            f"fetch it again ({reason})"
        ) from error
    sam = build_sam(**SAM_SIZES[size])
    try:
        sam.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} holds weights of another model than SAM {size}: name the size it belongs to"
        ) from error
    return sam


@lru_cache
def grid_positions(H: int, W: int, device: torch.device, dtype: torch.dtype):
    """What `folded_attention` needs to know about a grid of H x W places. Computed once.

    Returns the indices (H, H) and (W, W) of each pair's entry in the tables of relative positions,
    and row and column of each place as one-hot vectors, (HW, H + W).

    `segment_anything`'s get_rel_pos computes the indices on the CPU, for each block and image. To
    index a tensor on a GPU with them makes the host wait, 64 times an image for ViT-H.
    """

    def differences(n: int) -> torch.Tensor:
        place = torch.arange(n, device=device)
        return place[:, None] - place + n - 1

    row = torch.eye(H, device=device, dtype=dtype).repeat_interleave(W, 0)
    column = torch.eye(W, device=device, dtype=dtype).repeat(H, 1)
    return differences(H), differences(W), torch.cat([row, column], 1)


def folded_attention(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """`segment_anything`'s attention without its (heads, HW, HW) tensor. (B, H, W, C) -> same.

    The original adds a position bias rel_h[q, row of k] + rel_w[q, column of k] to the scores.
    One-hot row and column vectors turn this bias into a dot product. Appending them to q and k lets
    `scaled_dot_product_attention` compute it with its fused kernels, which need values of the same
    width, so v is padded. The result is the same to 2e-6. benchmarks/sam_scoring.py measures it:
    ViT-B on two CPU cores is 1.3x faster, and eight images need less memory than one did.
    """
    B, H, W, _ = x.shape
    heads = attention.num_heads
    qkv = attention.qkv(x).reshape(B, H * W, 3, heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, HW, c)
    grid = q.reshape(B, heads, H, W, -1)
    rows, columns, one_hot = grid_positions(H, W, x.device, q.dtype)
    table_h = attention.rel_pos_h[rows].to(q.dtype)  # (H, H, c)
    table_w = attention.rel_pos_w[columns].to(q.dtype)  # (W, W, c)
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid, table_h).flatten(2, 3)  # (B, heads, HW, H)
    rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid, table_w).flatten(2, 3)  # (B, heads, HW, W)
    q = torch.cat([q * attention.scale, rel_h, rel_w], -1)
    k = torch.cat([k, one_hot.expand(B, heads, -1, -1)], -1)
    out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, H + W)), scale=1.0)
    out = out[..., : v.shape[-1]]
    return attention.proj(out.transpose(1, 2).reshape(B, H, W, -1))


def load_weights(sam: torch.nn.Module, device: torch.device) -> list[torch.Tensor]:
    """Copy the weights to a device. Returns those in host memory, for `restore_weights`."""
    host = [x.data for x in (*sam.parameters(), *sam.buffers())]
    for x in (*sam.parameters(), *sam.buffers()):
        x.data = to_device(x.data, device)
    return host


def restore_weights(sam: torch.nn.Module, host: list[torch.Tensor]) -> None:
    """Use the weights in host memory again. SAM is frozen, so nothing is copied back."""
    for x, weight in zip((*sam.parameters(), *sam.buffers()), host, strict=True):
        x.data = weight


def sam_input(image: Image.Image, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize an image so that its longest side has `side` pixels, as SAM's own predictor does.

    Returns pixels (3, h, w), float32 in 0..255, not normalised and not padded, and the factors
    (x, y), float64, from image pixels to the pixels of the encoder's input.
    """
    resized = ResizeLongestSide(side).apply_image(np.asarray(image))  # (h, w, 3) uint8
    factors = [resized.shape[1] / image.width, resized.shape[0] / image.height]
    pixels = torch.from_numpy(resized).permute(2, 0, 1).float()
    return pixels, torch.tensor(factors, dtype=torch.float64)


def embed_prompts(
    encoder: PromptEncoder, boxes: torch.Tensor | None, points: torch.Tensor | None
) -> torch.Tensor:
    """Sparse embeddings, (N, tokens, C), of boxes (N, 4) and foreground points (N, K, 2).

    The same as `PromptEncoder.forward`, which selects points by label with boolean masks. Each such
    mask makes the host wait for the GPU. Here all labels are known. Points without a box are
    followed by one "not a point" token, as in SAM's training.
    """
    tokens = []
    if points is not None:
        centres = points + 0.5  # SAM takes the centre of a pixel
        position = encoder.pe_layer.forward_with_coords(centres, encoder.input_image_size)
        tokens.append(position + encoder.point_embeddings[1].weight)  # 1: foreground
        if boxes is None:
            tokens.append(encoder.not_a_point_embed.weight.expand(len(points), 1, -1))
    if boxes is not None:
        tokens.append(encoder._embed_boxes(boxes))
    return torch.cat(tokens, 1)


def decode_masks(
    sam: Sam,
    embeddings: torch.Tensor,
    image_index: torch.Tensor,
    boxes: torch.Tensor | None,
    points: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode N prompts on any of B images in one call of the mask decoder.

    embeddings:  (B, C, h, w) image embeddings.
    image_index: (N,) int64, the image that each prompt is about.
    boxes:       (N, 4) x1, y1, x2, y2, or None. In pixels of the encoder's input.
    points:      (N, K, 2) x, y, all foreground, or None. In the same pixels. Not both None.

    Returns mask logits (N, 4, 4h, 4w) and the decoder's own estimates of their IoU (N, 4). Mask 0
    is the single-mask output; masks 1 to 3 are the three candidates for an ambiguous prompt.

    SAM embeds a prompt as two tensors: sparse (tokens of the box and the points) and dense (a map
    of a mask prompt; we give none, so it is the learned `no_mask` vector everywhere). `MaskDecoder`
    takes one image per call: it repeats that image's embedding for every prompt and adds the dense
    embedding. Only the sum counts. So pass zeros as the image embedding and add each image's
    embedding to its prompt's dense embedding.
    """
    no_mask = sam.prompt_encoder.no_mask_embed.weight[:, :, None, None]  # (1, C, 1, 1)
    return sam.mask_decoder.predict_masks(
        image_embeddings=embeddings.new_zeros(1, *embeddings.shape[1:]),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=embed_prompts(sam.prompt_encoder, boxes, points),
        dense_prompt_embeddings=embeddings[image_index] + no_mask,
    )


def upsample_masks(
    logits: torch.Tensor, side: int, input_size: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """Bring the logits of G masks, (G, 4h, 4w), to the size (H, W) of their image: (G, H, W).

    side: of the padded square that the encoder saw, pixels; input_size: (h, w) of the image in it.
    The same as `Sam.postprocess_masks`: bilinear to the square, crop the padding, bilinear to the
    image. Here most of the padding is cropped before the first step, which saves time: a quarter of
    the square is padding for a 4:3 photograph. Two rows and columns of it stay, because
    interpolation mixes them into the last pixels of the image.
    """
    factor = side // logits.shape[-1]  # 4 for an official SAM
    height, width = input_size
    near = logits[:, None, : height // factor + 2, : width // factor + 2]
    square = F.interpolate(near, scale_factor=factor, mode="bilinear")[..., :height, :width]
    return F.interpolate(square, size, mode="bilinear")[:, 0]
