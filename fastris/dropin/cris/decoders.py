"""Recognise modules that may be CRIS's decoder or its layers, by their attributes or by the order of their calls.

Each function returns candidates (:class:`.parts.Part`), which :mod:`.proof` then proves or rejects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.dropin.observe import observed
from fastris.dropin.parts import (
    FLOAT32_TABLES,
    Part,
    arguments,
    at,
    is_chain,
    is_wrapper,
    leaves,
    normal,
    owns_parameters,
)
from fastris.models.cris.decoder import (
    decoder_forward,
    decoder_layer_forward,
    decoder_layer_forward_with_weights,
    maskless,
    normed,
    run_layers,
)

LAYER = (
    "self_attn", "multihead_attn", "self_attn_norm", "cross_attn_norm", "norm1", "norm2", "norm3", "ffn",
    "dropout1", "dropout2", "dropout3",
)  # fmt: skip

_View = Callable[[Any], Any]


def layers(layer: Any) -> list[Part]:
    """Candidates for a decoder layer with the published attribute names."""
    return _layer_parts(layer, _as_it_is, _ffn_obstacle(layer) or _layer_obstacle(layer))


def renamed_layers(module: nn.Module) -> list[Part]:
    """Candidates for a decoder layer with other names, by its order of norms, attentions, dropouts and Linears."""
    found = [leaf for _, leaf in leaves(module) if isinstance(leaf, _STEPS)]
    counts = [sum(isinstance(leaf, kind) for leaf in found) for kind in _STEPS]
    if counts != [6, 2, 4, 2] or owns_parameters(module, *found) or len(arguments(module)) < 4:
        return []
    if is_wrapper(module):
        return []
    order = _order_of_calls(module)
    if order is None:
        return []

    def view(layer: Any) -> _Layer:
        step = [at(layer, path) for path in order]
        return _Layer._make([*step[:9], step[13], (step[9], F.relu, *step[10:13])])

    return _layer_parts(module, view, _layer_obstacle(view(module)))


_STEPS = (nn.LayerNorm, nn.MultiheadAttention, nn.Dropout, nn.Linear)
_ATTEND = (nn.LayerNorm, nn.MultiheadAttention, nn.LayerNorm, nn.Dropout)
_SEQUENCE = (*_ATTEND, *_ATTEND, nn.LayerNorm, nn.Linear, nn.Dropout, nn.LayerNorm, nn.Linear, nn.Dropout)


class _Layer(NamedTuple):
    """A layer's modules under the published names, in the order of their calls; ``ffn`` is called before dropout3."""

    norm1: Any
    self_attn: Any
    self_attn_norm: Any
    dropout1: Any
    norm2: Any
    multihead_attn: Any
    cross_attn_norm: Any
    dropout2: Any
    norm3: Any
    dropout3: Any
    ffn: Any


def _order_of_calls(module: nn.Module) -> list[str] | None:
    """The paths of a layer's steps in the order of their calls in a run; None unless it is the published order."""
    calls: list[tuple[str, nn.Module]] = []

    def watch(copy: nn.Module) -> None:
        for path, leaf in leaves(copy):
            if isinstance(leaf, _STEPS):
                leaf.register_forward_pre_hook(lambda step, _inputs, path=path: calls.append((path, step)))

    dim = next(leaf for _, leaf in leaves(module) if isinstance(leaf, nn.MultiheadAttention)).embed_dim
    given = _inputs_of_width(dim)[: 5 if len(arguments(module)) > 4 else 4]
    if observed(module, lambda _: given, watch) is None or len(calls) != len(_SEQUENCE):
        return None
    if not all(isinstance(step, kind) for (_, step), kind in zip(calls, _SEQUENCE, strict=True)):
        return None
    return [path for path, _ in calls]


def _layer_parts(layer: nn.Module, view: _View, obstacle: str | None) -> list[Part]:
    """Candidates for each way to call the layer and to return: with or without a mask, with or without weights.

    ``view(layer)`` gives access to its modules under the published names.
    """
    takes = arguments(layer)
    without = len(takes) == 4 or (len(takes) > 4 and takes[4].default is not takes[4].empty)
    forwards = (
        ("TransformerDecoderLayer", decoder_layer_forward),
        ("TransformerDecoderLayer with attention weights", decoder_layer_forward_with_weights),
    )
    parts = []
    if len(takes) != 4:
        for name, forward in forwards:
            masked = _seen_by(view, forward)
            parts.append(Part(name, masked, _inputs_by(view), _layer_takes, obstacle, optional=(4,)))
    if without:
        for name, forward in forwards:
            unmasked = maskless(_seen_by(view, forward))
            parts.append(Part(f"{name}, no mask", unmasked, _inputs_by(view, 4), _layer_takes, obstacle))
    return parts


def _as_it_is(layer: Any) -> Any:
    return layer


def _seen_by(view: _View, forward: Callable) -> Callable:
    """``forward`` for a layer that is read through ``view``.

    It is ``forward`` itself where the layer has the published names, so that several layers share one proof.
    """
    if view is _as_it_is:
        return forward

    def through_view(
        layer: Any, vis: Tensor, txt: Tensor, vis_pos: Tensor, txt_pos: Tensor, pad_mask: Tensor | None
    ) -> Any:
        return forward(view(layer), vis, txt, vis_pos, txt_pos, pad_mask)

    return through_view


def _ffn_obstacle(layer: Any) -> str | None:
    if not is_chain(layer.ffn, (nn.Linear, nn.ReLU, nn.Dropout, nn.LayerNorm, nn.Linear)):
        return "its ffn is not Linear, ReLU, Dropout, LayerNorm, Linear"
    return None


def _layer_obstacle(layer: Any) -> str | None:
    attentions = (layer.self_attn, layer.multihead_attn)
    norms = [layer.norm1, layer.norm2, layer.norm3, layer.self_attn_norm, layer.cross_attn_norm, layer.ffn[3]]
    if not all(isinstance(a, nn.MultiheadAttention) for a in attentions):
        return "its attentions are not torch.nn.MultiheadAttention"
    if any(a.batch_first or a.in_proj_weight is None or a.bias_k is not None for a in attentions):
        return "its attentions are batch-first, have keys of another width or extra key biases"
    if any(a.in_proj_bias is None or a.add_zero_attn for a in attentions):
        return "its attentions have no biases or add a zero key"
    if not all(isinstance(n, nn.LayerNorm) and n.bias is not None for n in norms):
        return "its norms are not torch.nn.LayerNorm with weight and bias"
    if len({n.eps for n in norms}) > 1:
        return "its norms differ in eps"
    if not all(isinstance(d, nn.Dropout) for d in (layer.dropout1, layer.dropout2, layer.dropout3)):
        return "its dropouts are not torch.nn.Dropout"
    return None


def _inputs_by(view: _View, count: int = 5) -> Callable[[Any], tuple]:
    return lambda layer: _inputs_of_width(view(layer).norm1.normalized_shape[0])[:count]


def _inputs_of_width(dim: int) -> tuple:
    mask = torch.tensor([[False, False, False, True, True], [False] * 5])
    return normal(6, 2, dim), normal(5, 2, dim), normal(6, 1, dim), normal(5, 1, dim), mask


def _layer_takes(vis: Tensor, txt: Tensor, vis_pos: Tensor, txt_pos: Tensor, pad_mask: Tensor | None = None) -> bool:
    """Whether the batch shares its positions and the mask is bool: nn.MultiheadAttention also takes other kinds."""
    return (
        vis.ndim == txt.ndim == 3
        and vis_pos.shape == (vis.shape[0], 1, vis.shape[2])
        and txt_pos.shape == (txt.shape[0], 1, txt.shape[2])
        and (pad_mask is None or (pad_mask.dtype is torch.bool and pad_mask.ndim == 2))
    )


def decoders(decoder: Any) -> list[Part]:
    """Candidates for a decoder, by the names ``layers`` and ``norm``, with or without ``return_intermediate``."""
    obstacle = None
    published = hasattr(decoder, "return_intermediate")
    if not isinstance(decoder.layers, nn.ModuleList) or not len(decoder.layers):
        obstacle = "its layers are no filled torch.nn.ModuleList"
    elif not isinstance(decoder.norm, nn.LayerNorm):
        obstacle = "its norm is not torch.nn.LayerNorm"
    elif not all(hasattr(layer, name) for layer in decoder.layers for name in LAYER):
        obstacle = None if all(renamed_layers(layer) for layer in decoder.layers) else _STRANGE
    if obstacle and not published:
        return []  # most of PyTorch's own stacks of layers also have ``layers`` and ``norm``
    return [
        Part("TransformerDecoder", forward, inputs, _decoder_takes, obstacle, optional, FLOAT32_TABLES)
        for forward, inputs, optional in _decoder_forms(decoder, published)
    ]


_STRANGE = "its layers are not CRIS's decoder layers"


def _decoder_forms(decoder: Any, published: bool) -> list[tuple[Callable, Callable, tuple[int, ...]]]:
    """(forward, inputs, optional inputs) for every way in which such a decoder may be called and may return."""
    answers: tuple[Callable, ...] = (_last, _last_and_nothing, _last_and_all, _last_and_weights, _all)
    layer = next(iter(decoder.layers), None) if isinstance(decoder.layers, nn.ModuleList) else None
    masked_layers = layer is None or len(arguments(layer)) != 4
    takes = arguments(decoder)
    forms: list[tuple[Callable, Callable, tuple[int, ...]]] = []
    if published and masked_layers:
        forms.append((decoder_forward, _decoder_inputs, (2,)))
        if decoder.return_intermediate is True or len(takes) == 3:
            answers = answers[1:4]
    if len(takes) != 2:
        forms += [(_masked(answer, masked_layers), _decoder_inputs, (2,)) for answer in answers]
    else:
        forms += [(_unmasked(answer, masked_layers), _unmasked_inputs, ()) for answer in answers]
    return forms


def _masked(answer: Callable, masked_layers: bool) -> Callable:
    def forward(decoder: Any, vis: Tensor, txt: Tensor, pad_mask: Tensor | None) -> Any:
        mask = (pad_mask,) if masked_layers else ()
        return answer(decoder, list(run_layers(decoder, vis, txt, *mask)))

    return forward


def _unmasked(answer: Callable, masked_layers: bool) -> Callable:
    def forward(decoder: Any, vis: Tensor, txt: Tensor) -> Any:
        mask = (None,) if masked_layers else ()
        return answer(decoder, list(run_layers(decoder, vis, txt, *mask)))

    return forward


def _last(decoder: Any, steps: list) -> Any:
    return normed(decoder, steps[-1][0])


def _all(decoder: Any, steps: list) -> Any:
    return [normed(decoder, pixels) for pixels, _ in steps]


def _last_and_nothing(decoder: Any, steps: list) -> Any:
    return _last(decoder, steps), []


def _last_and_all(decoder: Any, steps: list) -> Any:
    maps = _all(decoder, steps)
    return maps[-1], maps


def _last_and_weights(decoder: Any, steps: list) -> Any:
    return _last(decoder, steps), [weights for _, weights in steps]


def _decoder_inputs(decoder: Any) -> tuple:
    dim = decoder.norm.normalized_shape[0]
    mask = torch.tensor([[False, False, True, True], [False] * 4])
    return normal(2, dim, 2, 3), normal(2, 4, dim), mask


def _unmasked_inputs(decoder: Any) -> tuple:
    return _decoder_inputs(decoder)[:2]


def _decoder_takes(vis: Tensor, txt: Tensor, pad_mask: Tensor | None = None) -> bool:
    return vis.ndim == 4 and txt.ndim == 3 and vis.shape[1] == txt.shape[2]
