"""Recognise modules that may be CRIS's projector, and the layout of their parameters and outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.dropin.observe import observed
from fastris.dropin.parts import BLOCK, Part, arguments, at, is_chain, is_wrapper, leaves, normal, owns_parameters
from fastris.models.cris.projector import Reading, projector_forward, published_reading, score, text_projection
from fastris.ops.similarity import KERNEL_SIZES


class _Layers(NamedTuple):
    """A projector's layers ``vis`` and text projection, as :func:`fastris.models.cris.projector.score` takes them."""

    vis: Any
    text: Any


_Find = Callable[[Any], _Layers]


def _by_name(projector: Any) -> _Layers:
    return _Layers(projector.vis, text_projection(projector))


def projectors(projector: Any) -> list[Part]:
    """Candidates by the names ``vis`` and ``txt`` or ``txt_fc``; ``in_dim`` and ``kernel_size`` may be missing."""
    published = hasattr(projector, "in_dim") and hasattr(projector, "kernel_size")
    obstacle = _layers_obstacle(*_by_name(projector))
    if obstacle and not published:
        return []  # many modules have attributes called vis and txt
    if obstacle:
        return [_part(_by_name, projector_forward, obstacle)]
    why = _numbers_obstacle(projector) if published else _NO_NUMBERS
    readings = _observed_readings(projector, _by_name)
    if not readings or (why is None and published_reading(projector) in readings):
        return [_part(_by_name, projector_forward, why)]
    return [_part(_by_name, _forward(_by_name, reading)) for reading in readings]


def renamed_projectors(module: nn.Module) -> list[Part]:
    """Candidates by submodules: two 3x3 convolutions with norms, a 1x1 convolution and a Linear, in this order."""
    paths = _paths(module)
    if paths is None or len(arguments(module)) < 2 or is_wrapper(module):
        return []

    def find(projector: Any) -> _Layers:
        convolutions, norms, activations, text = (tuple(at(projector, p) for p in group) for group in paths)
        first, second = activations or (F.relu, F.relu)
        blocks = (convolutions[0], norms[0], first), (convolutions[1], norms[1], second)
        return _Layers((None, blocks[0], None, blocks[1], convolutions[2]), text[0])

    return [_part(find, _forward(find, reading)) for reading in _observed_readings(module, find)]


def _paths(module: nn.Module) -> tuple[tuple[str, ...], ...] | None:
    """Paths of (three convolutions, two norms, two activations or none, one Linear); None for other submodules."""
    kinds = (nn.Conv2d, (nn.BatchNorm2d, nn.SyncBatchNorm), nn.ReLU, nn.Linear)
    found = leaves(module)
    groups = [[(path, leaf) for path, leaf in found if isinstance(leaf, kind)] for kind in kinds]
    convolutions, norms, activations, texts = ([leaf for _, leaf in group] for group in groups)
    if (len(convolutions), len(norms), len(texts)) != (3, 2, 1) or owns_parameters(
        module, *convolutions, *norms, *texts
    ):
        return None
    if [c.kernel_size for c in convolutions] != [(3, 3), (3, 3), (1, 1)] or any(c.groups != 1 for c in convolutions):
        return None
    paths = [tuple(path for path, _ in group) for group in groups]
    if len(activations) != 2:
        paths[2] = paths[2] * 2 if len(activations) == 1 else ()
    return tuple(paths)


def _part(find: _Find, forward: Callable, obstacle: str | None = None) -> Part:
    return Part("Projector", forward, partial(_inputs, find=find), _takes, obstacle)


def _forward(find: _Find, reading: Reading) -> Callable:
    def forward(projector: Any, x: Tensor, word: Tensor) -> Any:
        return score(*find(projector), reading, x, word)

    return forward


def _inputs(projector: Any, find: _Find) -> tuple:
    vis, text = find(projector)
    return normal(2, vis[1][0].in_channels, 3, 2), normal(2, _linear(text).in_features)


def _takes(x: Tensor, word: Tensor) -> bool:
    return x.ndim == 4 and word.ndim == 2


def _linear(text: Any) -> nn.Linear:
    return text if isinstance(text, nn.Linear) else text[0]


def _layers_obstacle(vis: Any, text: Any) -> str | None:
    if not is_chain(vis, (nn.Upsample, nn.Sequential, nn.Upsample, nn.Sequential, nn.Conv2d)):
        return "its vis is not Upsample, block, Upsample, block, Conv2d"
    if not (is_chain(vis[1], BLOCK) and is_chain(vis[3], BLOCK)):
        return "its blocks are not Conv2d, BatchNorm2d, ReLU"
    if any(conv[0].kernel_size != (3, 3) or conv[0].groups != 1 for conv in (vis[1], vis[3])):
        return "its block convolutions are not plain 3x3"
    if vis[4].kernel_size != (1, 1) or vis[4].groups != 1:
        return "its last convolution is not a plain 1x1"
    if not (isinstance(text, nn.Linear) or is_chain(text, (nn.Linear, nn.Dropout))):
        return "its text projection is neither Linear nor Linear, Dropout"
    return None


_NO_NUMBERS = "its text projection does not give kernels and a bias for each"


def _numbers_obstacle(projector: Any) -> str | None:
    """Why the sizes do not fit if ``in_dim`` and ``kernel_size`` have their published meaning; None if they do."""
    if not isinstance(projector.in_dim, int) or projector.kernel_size not in KERNEL_SIZES:
        return f"its text kernel is {projector.kernel_size} wide, and fastris has 1, 3 and 5"
    outputs = _linear(text_projection(projector)).out_features
    kernels, rest = divmod(outputs, projector.in_dim * projector.kernel_size**2 + 1)
    maps, channels = divmod(projector.vis[4].out_channels, projector.in_dim)
    if not kernels or rest:
        return _NO_NUMBERS
    if not maps or channels:
        return "its maps are not as wide as its text kernel"
    if kernels > 1 and maps > 1:
        return "it has several maps and several text kernels"
    return None


def _observed_readings(projector: nn.Module, find: _Find) -> list[Reading]:
    """The layouts that fit one run of a copy of the module: mostly one, [] if it is no projector.

    The numbers of logit maps and channels give the meaning of the text projection's outputs, the logits' size gives the
    padding, and the gradients of each logit map show which map and which bias it depends on.
    """
    seen = observed(projector, partial(_inputs, find=find))
    if seen is None:
        return []
    copy, (x, _), answer = seen
    form, parts = (Tensor, [answer]) if isinstance(answer, Tensor) else (type(answer), answer)
    if form not in (Tensor, tuple, list) or not _are_maps(parts, form):
        return []
    logits = [one[:, i] for one in parts for i in range(one.shape[1])]
    extra, odd = divmod(parts[0].shape[2] - 4 * x.shape[2], 2)
    vis, text = find(copy)
    readings = []
    for kernels, size, biases in _numbers(_linear(text).out_features, vis[4].out_channels, len(logits)):
        padding = size // 2 + extra
        if odd or padding < 0 or (extra > 0 and size > 1):
            continue
        blocks = vis[4].out_channels // len(logits)
        own = range(len(logits))
        order = _read_rows(logits, vis[4].weight, blocks) or own if kernels == 1 < len(logits) else [0] * len(logits)
        places = _read_rows(logits, _linear(text).weight, 1, start=-biases) or (own if biases > 1 else [0] * len(own))
        readings.append(Reading(kernels, size, tuple(order), tuple(places), padding, form))
    return readings


def _are_maps(parts: Any, form: type) -> bool:
    """One tensor (B, Q, h, w), or several (B, 1, h, w) of one size."""
    if not all(isinstance(one, Tensor) and one.ndim == 4 for one in parts):
        return False
    single = all(one.shape[1] == 1 for one in parts) and len({one.shape for one in parts}) == 1
    return form is Tensor or (single and len(parts) > 1)


def _numbers(outputs: int, channels: int, count: int) -> list[tuple[int, int, int]]:
    """All (kernels, size, biases) with which ``outputs`` numbers per sentence make ``count`` logit maps."""
    fits = []
    for size in KERNEL_SIZES:
        taps = size * size
        if outputs == count * (channels * taps + 1):
            fits.append((count, size, count))
        width, rest = divmod(channels, count)
        if count > 1 and not rest:
            fits += [(1, size, biases) for biases in (1, count) if outputs == width * taps + biases]
    return fits


def _read_rows(logits: list[Tensor], weight: Tensor, height: int, start: int = 0) -> list[int]:
    """Which block of ``height`` rows of ``weight``, from row ``start``, each logit map depends on; [] if on several."""
    found = []
    for one in logits:
        (gradient,) = torch.autograd.grad(one.sum(), weight, retain_graph=True, allow_unused=True)
        if gradient is None:
            return []
        blocks = gradient.flatten(1).abs().amax(1)[start:].unflatten(0, (-1, height)).amax(1)
        used = blocks.nonzero().flatten().tolist()
        if len(used) != 1:
            return []
        found += used
    return found
