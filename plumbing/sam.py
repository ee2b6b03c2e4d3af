"""sam.py - build a SAM of any size, load its weights, and compute its attention in less memory.

What the reward does with it is in reward.py. SAM 2 and SAM 3 are in plumbing/transformers_sam.py.
"""

from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from segment_anything import modeling
from segment_anything.modeling.image_encoder import Attention

from plumbing.errors import UserError

TINY = Path(__file__).resolve().parent.parent / "tiny" / "sam.safetensors"

# The three official sizes (SAM, arXiv 2304.02643, and the package's build_sam.py), and the tiny one
# that tiny/make_tiny.py trains. image_size: side of the padded square that the encoder sees, in
# pixels. global_blocks: these attend over the whole image, all others within windows.
SAM_SIZES = {
    "vit_b": dict(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
    "vit_l": dict(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
    "vit_h": dict(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
    "tiny": dict(
        width=96, depth=3, heads=4, global_blocks=(1, 2), image_size=128, patch=8, window=8,
        prompt_width=64, mlp=128, decoder_heads=4,
    ),
}  # fmt: skip
KNOWN_SAMS = "tiny, vit_b:FILE, vit_l:FILE, vit_h:FILE, sam2:MODEL or sam3:MODEL"


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
) -> modeling.Sam:
    """A frozen `segment_anything` model with random weights.

    The package's own builder fixes all but the first four of these numbers.
    """
    grid = (image_size // patch, image_size // patch)
    sam = modeling.Sam(
        modeling.ImageEncoderViT(
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
        modeling.PromptEncoder(
            prompt_width,
            image_embedding_size=grid,
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        modeling.MaskDecoder(
            transformer=modeling.TwoWayTransformer(
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


def load_sam(spec: str) -> torch.nn.Module:
    """Build the SAM that `spec` names and load its weights: frozen, float32, on the CPU.

    spec: "tiny" (part of this repository), or "vit_b:FILE", "vit_l:FILE", "vit_h:FILE" with an
          official checkpoint, or "sam2:MODEL", "sam3:MODEL", see
          `plumbing.transformers_sam.load_transformers_sam`.
    Raises UserError.
    """
    size, _, path = spec.partition(":")
    if size in ("sam2", "sam3"):
        from plumbing.transformers_sam import load_transformers_sam  # only with this setting

        return load_transformers_sam(spec)
    if size not in SAM_SIZES:
        raise UserError(f"--sam {spec}: no SAM is called {size!r}: use {KNOWN_SAMS}")
    if not path and size != "tiny":
        raise UserError(f"--sam {spec}: {size} needs its checkpoint: write {size}:FILE")
    build = partial(build_sam, **SAM_SIZES[size])
    if path:
        from plumbing.foreign import load_sam_checkpoint  # checks what other people made

        return load_sam_checkpoint(build, spec, KNOWN_SAMS)
    sam = build()
    sam.load_state_dict(load_file(TINY))
    return sam


@lru_cache
def grid_positions(H: int, W: int, device: torch.device, dtype: torch.dtype):
    """What `folded_attention` needs to know about a grid of H x W places. Computed once.

    Returns the indices (H, H) and (W, W) of each pair's entry in the tables of relative positions,
    and row and column of each place as one-hot vectors, (HW, H + W).

    `segment_anything`'s get_rel_pos computes the indices on the CPU, for each block and image. To
    index a tensor on a GPU with them makes the host wait, 64 times an image for ViT-H.
    """
    y = torch.arange(H, device=device)
    x = torch.arange(W, device=device)
    row = torch.eye(H, device=device, dtype=dtype).repeat_interleave(W, 0)
    column = torch.eye(W, device=device, dtype=dtype).repeat(H, 1)
    one_hot = torch.cat([row, column], 1)
    return y[:, None] - y + H - 1, x[:, None] - x + W - 1, one_hot


def folded_attention(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """`segment_anything`'s attention without its (heads, HW, HW) tensor. (B, H, W, C) -> same.

    The original adds a position bias rel_h[q, row of k] + rel_w[q, column of k] to the scores.
    One-hot row and column vectors turn this bias into a dot product. Appending them to q and k lets
    `scaled_dot_product_attention` compute it with its fused kernels, which need values of the same
    width, so v is padded. The result is the same to 2e-6. benchmarks/sam_scoring.py measures it:
    ViT-B on two CPU cores is 1.1x faster, and eight images need less memory than one did.
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
