"""Text-to-pixel contrastive loss: the similarity's shift-add, with the loss and its slope computed before it is stored.

    z     = sum_t T_t shifted by its tap             taps T from the similarity's product, (B, Q*k*k, P) float32
    loss  = positive * softplus(-z) + negative * softplus(z)
    slope = dloss/dz = negative * sigma(z) - positive * sigma(-z)

``positive`` and ``negative`` (B, Q, H, W), float32, are each pixel's factors of ``-log sigma(z)`` and of
``-log(1 - sigma(z))``: target and 1 - target, with the weight of referred pixels and the ignored ones multiplied in.
Where both are 0 the pixel does not count, and loss and slope are 0 whatever z is. Kept for backward beside the
features: the slope. The gradient of the logits is slope * dloss + dlogits; from there on the backward is the
similarity's. Against BCE after the similarity, fusing saves reading the logits back and all of BCE's intermediate maps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .common import cross_entropy
from .configs import Config, choose
from .launch import launch
from .similarity import launch_taps, shifted_sum
from .similarity_backward import similarity_gradients
from .similarity_tiles import SIZES, similarity_flops

LOSS_CONFIG = Config((("BLOCK", 256),), num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=SIZES)
def _loss_kernel(
    loss_ptr,  # [B, Q, P] float32
    logits_ptr,  # [B, Q, P]
    slope_ptr,  # [B, Q, P] float32
    taps_ptr,  # [B, Q*SIZE*SIZE, P] float32
    positive_ptr,  # [B, Q, P] float32
    negative_ptr,  # [B, Q, P] float32
    height,
    width,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixels = height * width
    tiles = tl.cdiv(pixels, BLOCK)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    index = plane * pixels + pixel
    logits = shifted_sum(taps_ptr, plane, pixel, height, width, SIZE)
    tl.store(logits_ptr + index, logits.to(logits_ptr.dtype.element_ty), mask=inside)

    positive = tl.load(positive_ptr + index, mask=inside, other=0.0)
    negative = tl.load(negative_ptr + index, mask=inside, other=0.0)
    z = tl.where((positive == 0.0) & (negative == 0.0), 0.0, logits)
    loss, slope = cross_entropy(z, positive, negative)
    tl.store(loss_ptr + index, loss, mask=inside)
    tl.store(slope_ptr + index, slope, mask=inside)


@torch.library.custom_op("fastris::text_contrastive", mutates_args=())
def _contrastive(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    norm: Tensor | None,
    of_batch: bool,
    positive: Tensor,
    negative: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every pixel, logits, and the loss's slope, all (B, Q, H, W)."""
    logits = torch.empty(positive.shape, dtype=x.dtype, device=x.device)
    loss = torch.empty(positive.shape, dtype=torch.float32, device=x.device)
    slope = torch.empty(positive.shape, dtype=torch.float32, device=x.device)
    if logits.numel():
        batch, queries, height, width = positive.shape
        taps = launch_taps(x, weight, constants, norm)
        config = choose(_loss_kernel, LOSS_CONFIG, x.device, x.dtype, batch * height * width)
        grid = (batch * queries * triton.cdiv(height * width, config["BLOCK"]),)
        factors = (positive.contiguous(), negative.contiguous())
        launch(_loss_kernel, grid, loss, logits, slope, taps, *factors, height, width, size, config=config)
    return loss, logits, slope


@_contrastive.register_fake
def _(x, weight, constants, norm, of_batch: bool, positive: Tensor, negative: Tensor, size: int):
    loss = x.new_empty(positive.shape, dtype=torch.float32)
    return loss, x.new_empty(positive.shape), torch.empty_like(loss)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, norm, ctx.of_batch, _, _, ctx.size = inputs
    slope = output[2]
    ctx.mark_non_differentiable(slope)
    ctx.save_for_backward(x, weight, norm, slope)


def _backward(ctx, dloss: Tensor, dlogits: Tensor, _):
    slope = ctx.saved_tensors[3]
    total = torch.addcmul(dlogits.float(), dloss, slope)
    return (*similarity_gradients(ctx, total), None, None, None, None)


_contrastive.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastris.text_contrastive)
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return similarity_flops(x_shape, weight_shape[1])


def contrastive(
    x: Tensor,
    weight: Tensor,
    constants: Tensor,
    norm: Tensor | None,
    of_batch: bool,
    positive: Tensor,
    negative: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Loss of every pixel in float32, and logits in the dtype of ``x``, both (B, Q, H, W).

    From features (B, C, H*W), kernels folded in float32, the norm before them as :func:`.similarity.similarity` takes
    it, and the pixels' factors (B, Q, H, W) in float32.
    """
    loss, logits, _ = _contrastive(x, weight, constants, norm, of_batch, positive, negative, size)
    return loss, logits
