"""Binary cross-entropy on bilinearly upsampled logits: every pixel of the large maps is made once, in registers.

Low-resolution pixels are the corners of cells, (h + 1) (w + 1) of them with those at the border, and each pixel of the
large map lies in one cell: it is ``lerp(lerp(x00, x01, right), lerp(x10, x11, right), down)`` of the cell's corners.

* loss: one program takes some cells of one map, goes through their pixels, and leaves one sum of losses and, for each
  cell, what its pixels' slopes give to the four corners, [4] float32.
* corners: each logit's gradient is the sum of what the four cells round it give it: no atomics, the same bits each run.

At the border both corners are one pixel, and all goes to that one. Which cell a pixel lies in is found in whole
numbers, so any two sizes are exact. Neither the large maps nor their gradients are ever written; the masks are read
once a map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cross_entropy
from .configs import Config, choose
from .launch import launch

MAX_PHASES = 16
"""Pixels of a cell's row that are made at a time."""
SIZES = ("maps", "height", "width", "rows", "columns", "tall", "steps")

LOSS_CONFIG = Config((("BLOCK", 256),), 4, 1, (Config((("BLOCK", 512),), 8, 1), Config((("BLOCK", 512),), 4, 1)))
"""BLOCK: pixels that are made at a time, a row of each of BLOCK / PHASES cells."""
CORNERS_CONFIG = Config((("BLOCK", 256),), 4, 1)


@triton.jit
def _cell(cell, inputs, outputs):
    """Of a cell along one axis: its first output, how many it has, and twice ``outputs`` times the first's share.

    Output Y lies (2 Y + 1) inputs / (2 outputs) - 1/2 from the first input; cells are counted from -1, before it.
    """
    start = (2 * cell.to(tl.int64) + 1) * outputs - inputs
    first = tl.minimum(tl.maximum((start + 2 * inputs - 1) // (2 * inputs), 0), outputs)
    end = tl.minimum(tl.maximum((start + 2 * outputs + 2 * inputs - 1) // (2 * inputs), 0), outputs)
    return first.to(tl.int32), (end - first).to(tl.int32), (2 * inputs * first - start).to(tl.int32)


@triton.jit
def _share(cell, begin, step, inputs, outputs):
    """How far an output lies from the cell's low corner to its high one, from 0 to 1; at the border at the only one."""
    share = (begin + 2 * inputs * step).to(tl.float32) / (2.0 * outputs)
    return tl.where(cell < 0, 1.0, tl.where(cell == inputs - 1, 0.0, share))


@triton.jit(do_not_specialize=SIZES)
def _loss_kernel(
    loss_ptr,  # [programs] float32
    corners_ptr,  # [B * Q, 4, h + 1, w + 1] float32, or None
    logits_ptr,  # [B * Q, h, w]
    target_ptr,  # [B, H, W]
    pos_weight,
    maps,
    height,
    width,
    rows,
    columns,
    tall,
    steps,
    PHASES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    CELLS: tl.constexpr = BLOCK // PHASES
    cells = (height + 1) * (width + 1)
    tiles = tl.cdiv(cells, CELLS)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    cell = (tl.program_id(0) % tiles) * CELLS + tl.arange(0, CELLS)
    present = cell < cells
    y, x = cell // (width + 1) - 1, cell % (width + 1) - 1
    first_row, row_count, down_begin = _cell(y, height, rows)
    first_column, column_count, right_begin = _cell(x, width, columns)
    row_count = tl.where(present, row_count, 0)
    above, below = tl.maximum(y, 0), tl.minimum(y + 1, height - 1)
    left, right = tl.maximum(x, 0), tl.minimum(x + 1, width - 1)
    source = logits_ptr + plane * height * width
    x00 = tl.load(source + above * width + left, mask=present, other=0.0).to(tl.float32)[:, None]
    x01 = tl.load(source + above * width + right, mask=present, other=0.0).to(tl.float32)[:, None]
    x10 = tl.load(source + below * width + left, mask=present, other=0.0).to(tl.float32)[:, None]
    x11 = tl.load(source + below * width + right, mask=present, other=0.0).to(tl.float32)[:, None]
    targets = target_ptr + plane // maps * rows * columns

    total = tl.zeros((CELLS, PHASES), tl.float32)
    g00 = tl.zeros((CELLS,), tl.float32)
    g01 = tl.zeros((CELLS,), tl.float32)
    g10 = tl.zeros((CELLS,), tl.float32)
    g11 = tl.zeros((CELLS,), tl.float32)
    for step in range(steps):
        phase = (step * PHASES + tl.arange(0, PHASES))[None, :]
        across = _share(x[:, None], right_begin[:, None], phase, width, columns)  # [CELLS, PHASES]
        upper = x00 + across * (x01 - x00)
        lower = x10 + across * (x11 - x10)
        upper_slopes = tl.zeros((CELLS, PHASES), tl.float32)
        lower_slopes = tl.zeros((CELLS, PHASES), tl.float32)
        for line in range(tall):
            inside = (line < row_count)[:, None] & (phase < column_count[:, None])
            place = (first_row + line).to(tl.int64)[:, None] * columns + first_column[:, None] + phase
            target = tl.load(targets + place, mask=inside, other=0.0).to(tl.float32)
            down = _share(y, down_begin, line, height, rows)[:, None]
            logits = upper + down * (lower - upper)
            loss, slope = cross_entropy(logits, pos_weight * target, 1.0 - target)
            total += tl.where(inside, loss, 0.0)
            slope = tl.where(inside, slope, 0.0)
            lower_slopes += down * slope
            upper_slopes += (1.0 - down) * slope
        g00 += tl.sum((1.0 - across) * upper_slopes, axis=1)
        g01 += tl.sum(across * upper_slopes, axis=1)
        g10 += tl.sum((1.0 - across) * lower_slopes, axis=1)
        g11 += tl.sum(across * lower_slopes, axis=1)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(total))
    if corners_ptr is not None:
        corner = corners_ptr + plane * 4 * cells + cell
        tl.store(corner, g00, mask=present)
        tl.store(corner + cells, g01, mask=present)
        tl.store(corner + 2 * cells, g10, mask=present)
        tl.store(corner + 3 * cells, g11, mask=present)


@triton.jit(do_not_specialize=("height", "width"))
def _corners_kernel(
    gradient_ptr,  # [B * Q, h, w] float32
    corners_ptr,  # [B * Q, 4, h + 1, w + 1] float32
    scale,
    height,
    width,
    BLOCK: tl.constexpr,
):
    pixels, cells = height * width, (height + 1) * (width + 1)
    tiles = tl.cdiv(pixels, BLOCK)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    # The cell whose high corner in both directions it is; the next one has it for its low corner.
    corner = corners_ptr + plane * 4 * cells + pixel // width * (width + 1) + pixel % width
    total = tl.load(corner + 3 * cells, mask=inside, other=0.0)
    total += tl.load(corner + 2 * cells + 1, mask=inside, other=0.0)
    total += tl.load(corner + cells + width + 1, mask=inside, other=0.0)
    total += tl.load(corner + width + 2, mask=inside, other=0.0)
    tl.store(gradient_ptr + plane * pixels + pixel, total * scale, mask=inside)


@torch.library.custom_op("fastris::upsampled_bce", mutates_args=())
def _upsampled_bce(logits: Tensor, target: Tensor, pos_weight: float, wanted: bool) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and its gradient (B, Q, h, w), both float32; the gradient is empty unless ``wanted``."""
    batch, maps, height, width = logits.shape
    rows, columns = target.shape[-2:]
    cells = (height + 1) * (width + 1)
    phases = min(MAX_PHASES, triton.next_power_of_2(triton.cdiv(columns, width)))
    sizes = (maps, height, width, rows, columns)
    trips = triton.cdiv(rows, height), triton.cdiv(columns, width * phases)
    config = choose(_loss_kernel, LOSS_CONFIG, logits.device, logits.dtype, batch * rows * columns, f"P{phases}")
    blocks = batch * maps * triton.cdiv(cells, config["BLOCK"] // phases)
    loss = torch.empty(blocks, dtype=torch.float32, device=logits.device)
    corners = torch.empty(batch * maps, 4, cells, dtype=torch.float32, device=logits.device) if wanted else None
    tensors = (loss, corners, logits.contiguous(), target.contiguous())
    launch(_loss_kernel, (blocks,), *tensors, pos_weight, *sizes, *trips, PHASES=phases, config=config)
    scale = 1 / (batch * rows * columns)
    if corners is None:
        return loss.sum() * scale, logits.new_empty(0, dtype=torch.float32)
    return loss.sum() * scale, _gradient(logits, corners, scale)


def _gradient(logits: Tensor, corners: Tensor, scale: float) -> Tensor:
    """``scale`` times the sum of what the cells' ``corners`` give to each logit, float32."""
    batch, maps, height, width = logits.shape
    gradient = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    config = choose(_corners_kernel, CORNERS_CONFIG, logits.device, logits.dtype, batch * height * width)
    grid = (batch * maps * triton.cdiv(height * width, config["BLOCK"]),)
    launch(_corners_kernel, grid, gradient, corners, scale, height, width, config=config)
    return gradient


@_upsampled_bce.register_fake
def _(logits: Tensor, target: Tensor, pos_weight: float, wanted: bool) -> tuple[Tensor, Tensor]:
    gradient = logits.new_empty(logits.shape if wanted else 0, dtype=torch.float32)
    return gradient.new_empty(()), gradient


def _setup_context(ctx, inputs, output) -> None:
    gradient = output[1]
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)
    ctx.dtype = inputs[0].dtype


def _backward(ctx, upstream: Tensor, _):
    (gradient,) = ctx.saved_tensors
    return (gradient * upstream).to(ctx.dtype), None, None, None


_upsampled_bce.register_autograd(_backward, setup_context=_setup_context)


def upsampled_bce(logits: Tensor, target: Tensor, pos_weight: float, wanted: bool) -> Tensor:
    """The loss in float32 of logits (B, Q, h, w) and masks (B, 1, H, W), B >= 1; ``wanted``: with its gradient."""
    loss, _ = _upsampled_bce(logits, target, pos_weight, wanted)
    return loss
