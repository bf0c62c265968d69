"""Which modules look like CRIS's parts, and the proof that one computes what CRIS's part computes. See dropin.py."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastris.dispatch import use_impl
from fastris.nn.decoder import decoder_forward, decoder_layer_forward
from fastris.nn.neck import neck_forward
from fastris.nn.projector import projector_forward

# Of the scale. The proof runs in float64, but the published position tables are float32.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Candidate:
    """A module that has the attributes of one of CRIS's parts: how we would run it, and what its proof needs.

    ``inputs(module)`` makes small random float64 inputs; ``obstacle`` says what already rules the module out.
    """

    name: str
    forward: Callable
    inputs: Callable[[Any], tuple]
    obstacle: str | None = None


def candidate_for(module: nn.Module) -> Candidate | None:
    """The part of CRIS that ``module`` has the attributes of, or None when it resembles none."""
    for attributes, make in _KINDS:
        if all(hasattr(module, name) for name in attributes):
            return make(module)
    return None


def _layer_candidate(layer: Any) -> Candidate:
    attention = (layer.self_attn, layer.multihead_attn)
    norms = (layer.norm1, layer.norm2, layer.norm3, layer.self_attn_norm, layer.cross_attn_norm)
    ffn = (nn.Linear, nn.ReLU, nn.Dropout, nn.LayerNorm, nn.Linear)
    obstacle = None
    if not all(isinstance(a, nn.MultiheadAttention) for a in attention):
        obstacle = "its attentions are not torch.nn.MultiheadAttention"
    elif any(a.batch_first or a.in_proj_weight is None or a.bias_k is not None for a in attention):
        obstacle = "its attentions are batch-first, have keys of another width or extra key biases"
    elif any(a.in_proj_bias is None or a.add_zero_attn for a in attention):
        obstacle = "its attentions have no biases or add a zero key"
    elif not all(isinstance(n, nn.LayerNorm) and n.bias is not None for n in norms):
        obstacle = "its norms are not torch.nn.LayerNorm with weight and bias"
    elif len({n.eps for n in norms} | {layer.ffn[3].eps if _is_chain(layer.ffn, ffn) else norms[0].eps}) > 1:
        obstacle = "its norms differ in eps"
    elif not _is_chain(layer.ffn, ffn):
        obstacle = "its ffn is not Linear, ReLU, Dropout, LayerNorm, Linear"
    return Candidate("TransformerDecoderLayer", decoder_layer_forward, _layer_inputs, obstacle)


def _layer_inputs(layer: Any) -> tuple:
    dim = layer.norm1.normalized_shape[0]
    mask = torch.tensor([[False, False, False, True, True], [False] * 5])
    return _normal(6, 2, dim), _normal(5, 2, dim), _normal(6, 1, dim), _normal(5, 1, dim), mask


def _decoder_candidate(decoder: Any) -> Candidate:
    obstacle = None
    if not isinstance(decoder.layers, nn.ModuleList) or not len(decoder.layers):
        obstacle = "its layers are no filled torch.nn.ModuleList"
    elif not isinstance(decoder.norm, nn.LayerNorm):
        obstacle = "its norm is not torch.nn.LayerNorm"
    elif not all(hasattr(layer, "multihead_attn") and hasattr(layer, "norm1") for layer in decoder.layers):
        obstacle = "its layers are not CRIS's decoder layers"
    return Candidate("TransformerDecoder", decoder_forward, _decoder_inputs, obstacle)


def _decoder_inputs(decoder: Any) -> tuple:
    dim = decoder.norm.normalized_shape[0]
    mask = torch.tensor([[False, False, True, True], [False] * 4])
    return _normal(2, dim, 2, 3), _normal(2, 4, dim), mask


def _projector_candidate(projector: Any) -> Candidate:
    block = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
    vis, obstacle = projector.vis, None
    if not _is_chain(vis, (nn.Upsample, nn.Sequential, nn.Upsample, nn.Sequential, nn.Conv2d)):
        obstacle = "its vis is not Upsample, block, Upsample, block, Conv2d"
    elif not (_is_chain(vis[1], block, norms_too=True) and _is_chain(vis[3], block, norms_too=True)):
        obstacle = "its blocks are not Conv2d, BatchNorm2d, ReLU"
    elif any(conv[0].kernel_size != (3, 3) or conv[0].groups != 1 for conv in (vis[1], vis[3])):
        obstacle = "its block convolutions are not plain 3x3"
    elif vis[4].kernel_size != (1, 1) or vis[4].groups != 1:
        obstacle = "its last convolution is not a plain 1x1"
    elif not isinstance(projector.txt, nn.Linear):
        obstacle = "its txt is not torch.nn.Linear"
    elif projector.txt.out_features != projector.in_dim * projector.kernel_size**2 + 1:
        obstacle = "its txt does not give one kernel and one bias"
    elif vis[4].out_channels % projector.in_dim:
        obstacle = "its maps are not as wide as its text kernel"
    return Candidate("Projector", projector_forward, _projector_inputs, obstacle)


def _projector_inputs(projector: Any) -> tuple:
    return _normal(2, projector.vis[1][0].in_channels, 3, 2), _normal(2, projector.txt.in_features)


_NECK = ("f1_v_proj", "f2_v_proj", "f2_cat", "f3_v_proj", "f3_cat", "f4_proj5", "f4_proj4", "f4_proj3", "aggr")


def _neck_candidate(neck: Any) -> Candidate:
    block = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
    obstacle = None
    if not all(_is_chain(getattr(neck, name), block, norms_too=True) for name in _NECK):
        obstacle = "its blocks are not Conv2d, BatchNorm2d, ReLU"
    elif not hasattr(neck.coordconv[0], "conv1") or not _is_chain(neck.coordconv[0].conv1, block, norms_too=True):
        obstacle = "its coordconv does not begin with a CoordConv"
    return Candidate("FPN", neck_forward, _neck_inputs, obstacle)


def _neck_inputs(neck: Any) -> tuple:
    widths = [getattr(neck, name)[0].in_channels for name in ("f3_v_proj", "f2_v_proj", "f1_v_proj")]
    maps = [_normal(2, width, 2 * scale, 3 * scale) for width, scale in zip(widths, (4, 2, 1), strict=True)]
    return maps, _normal(2, neck.txt_proj[0].in_features)


_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], Candidate]], ...] = (
    (("self_attn", "multihead_attn", "self_attn_norm", "cross_attn_norm", "norm1", "norm2", "norm3", "ffn",
      "dropout1", "dropout2", "dropout3"), _layer_candidate),
    (("layers", "norm", "return_intermediate"), _decoder_candidate),
    (("vis", "txt", "in_dim", "kernel_size"), _projector_candidate),
    (("txt_proj", "norm_layer", "coordconv", *_NECK), _neck_candidate),
)  # fmt: skip


def prove(module: nn.Module, candidate: Candidate) -> str | None:
    """None when the module's own forward equals ours on every probe, else what differed."""
    extra = _parameters(type(module).forward)[len(_parameters(candidate.forward)) :]
    if any(parameter.default is parameter.empty for parameter in extra):
        return f"its forward takes {', '.join(p.name for p in extra)} as well"
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        original = _bare_copy(module)
        inputs = candidate.inputs(original)
        for training, dropped in _probes(original):
            theirs = _run(original, type(module).forward, inputs, training, dropped)
            with use_impl("reference"):
                ours = _run(original, candidate.forward, inputs, training, dropped)
            difference = _difference(theirs, ours)
            if difference:
                when = "in training" if training else "in eval mode"
                return f"{when} {difference}{f' with {dropped} dropping everything' if dropped else ''}"
    except Exception as error:  # whatever a stranger's forward raises on our probe, it is no proof
        return f"its forward could not be tried ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    finally:
        torch.random.set_rng_state(state)
    return None


def _parameters(function: Callable) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _probes(module: nn.Module) -> list[tuple[bool, str | None]]:
    dropouts = [name for name, child in module.named_modules() if _dropout_of(child) is not None]
    return [(False, None), (True, None), *((True, name) for name in dropouts)]


def _dropout_of(module: nn.Module) -> float | None:
    """The dropout probability that a module holds, None when it holds none."""
    if isinstance(module, nn.Dropout):
        return module.p
    return module.dropout if isinstance(module, nn.MultiheadAttention) else None


def _bare_copy(module: nn.Module) -> nn.Module:
    """A deep copy in float64 on the CPU without hooks, with random parameters and statistics."""
    bare = _local_norms(copy.deepcopy(module)).cpu().double()
    for child in bare.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(child, hooks).clear()
    for parameter in bare.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data.normal_(std=fan_in**-0.5).add_(1.0 if parameter.ndim == 1 else 0.0)
        parameter.requires_grad_(True)
    for name, buffer in bare.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif buffer.is_floating_point():
            buffer.normal_()
    return bare


class _LocalNorm(nn.modules.batchnorm._BatchNorm):
    """What SyncBatchNorm computes in one process, for any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def _local_norms(module: nn.Module) -> nn.Module:
    """Replace SyncBatchNorm in place: in a distributed run it would wait for other processes, and needs a GPU."""
    for name, child in module.named_children():
        if isinstance(child, nn.SyncBatchNorm):
            local = _LocalNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            local.load_state_dict(child.state_dict())
            setattr(module, name, local)
        else:
            _local_norms(child)
    return module


def _run(original: nn.Module, forward: Callable, inputs: tuple, training: bool, dropped: str | None) -> list[Tensor]:
    """Everything that one pass leaves: outputs, gradients of inputs and parameters, statistics."""
    module = copy.deepcopy(original).train(training)
    for name, child in module.named_modules():
        if isinstance(child, nn.Dropout):
            child.p = float(name == dropped)
        elif isinstance(child, nn.MultiheadAttention):
            child.dropout = float(name == dropped)
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in _tensors(inputs)]
    outputs = list(_tensors(forward(module, *_like(inputs, iter(leaves)))))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    targets = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
    gradients = torch.autograd.grad(outputs, targets, upstream, allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, targets, strict=True)]
    return [*outputs, *filled, *module.buffers()]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested structure; anything else in it is a TypeError, as we could not compare it."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    raise TypeError(f"a {type(value).__name__} among tensors")


def _like(structure: Any, leaves: Any) -> Any:
    if isinstance(structure, Tensor):
        return next(leaves)
    return type(structure)(_like(item, leaves) for item in structure)


def _difference(theirs: list[Tensor], ours: list[Tensor]) -> str | None:
    if len(theirs) != len(ours):
        return f"it returns {len(theirs) - len(ours):+d} tensors more than CRIS's"
    for mine, yours in zip(theirs, ours, strict=True):
        if mine.shape != yours.shape:
            return f"it returns the shape {tuple(mine.shape)} where CRIS's returns {tuple(yours.shape)}"
        scale = yours.double().abs().max().clamp_min(1.0) if yours.numel() else torch.tensor(1.0)
        if not torch.isfinite(mine).all() or (mine.double() - yours.double()).abs().max() > TOLERANCE * scale:
            return "its values or gradients differ from CRIS's"
    return None


def _is_chain(module: Any, kinds: tuple[type, ...], norms_too: bool = False) -> bool:
    """A Sequential of exactly these kinds; with ``norms_too`` SyncBatchNorm stands for BatchNorm2d."""
    if not isinstance(module, nn.Sequential) or len(module) != len(kinds):
        return False
    allowed = [(k, nn.SyncBatchNorm) if norms_too and k is nn.BatchNorm2d else k for k in kinds]
    return all(isinstance(child, kind) for child, kind in zip(module, allowed, strict=True))
