"""Recognise modules that are almost CRIS's parts; the report then says which attributes they lack. See patch.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

_BLOCKS = ("f1_v_proj", "f2_v_proj", "f3_v_proj", "f2_cat", "f3_cat", "f4_proj5", "f4_proj4", "f4_proj3")


class _Kind(NamedTuple):
    """A part of CRIS. A module resembles it if it has ``enough`` of the ``telling`` attributes.

    These are rare elsewhere. A class name that contains one of ``class_names`` counts as one attribute more.
    """

    name: str
    attributes: tuple[str, ...]
    telling: tuple[str, ...]
    enough: int
    class_names: tuple[str, ...]


_KINDS = (
    _Kind(
        "TransformerDecoderLayer",
        (
            "self_attn", "multihead_attn", "self_attn_norm", "cross_attn_norm", "norm1", "norm2", "norm3", "ffn",
            "dropout1", "dropout2", "dropout3",
        ),
        ("self_attn_norm", "cross_attn_norm", "multihead_attn", "ffn"),
        3,
        ("decoderlayer",),
    ),
    _Kind(
        "FPN",
        (*_BLOCKS, "txt_proj", "norm_layer", "aggr", "coordconv"),
        (*_BLOCKS, "coordconv"),
        3,
        ("fpn", "neck"),
    ),
)  # fmt: skip


def near_miss(module: nn.Module) -> str | None:
    """The report's line for a module that resembles a part of CRIS but lacks some of its attributes; else None."""
    for kind in _KINDS:
        named = any(name in type(module).__name__.lower() for name in kind.class_names)
        if sum(hasattr(module, name) for name in kind.telling) + named >= kind.enough:
            return _lacking_message(module, kind.name, kind.attributes)
    if _holds_layers(module):
        return _lacking_message(module, "TransformerDecoder", ("layers", "norm", "return_intermediate"))
    children = list(module.children())
    if any(map(_is_pixel_head, children)) and any(isinstance(c, nn.Linear) for c in _with_inner(children)):
        text = "txt_fc" if hasattr(module, "txt_fc") else "txt"
        return _lacking_message(module, "Projector", ("vis", text, "in_dim", "kernel_size"))
    return None


def _lacking_message(module: nn.Module, name: str, attributes: Sequence[str]) -> str | None:
    lacking = [attribute for attribute in attributes if not hasattr(module, attribute)]
    if not lacking:
        return None
    names = ", ".join(f"`{attribute}`" for attribute in lacking)
    return f"{name}-like, not supported: {type(module).__name__} lacks {names}"


def _holds_layers(module: nn.Module) -> bool:
    """Whether the module has a ModuleList of CRIS's decoder layers, or of modules almost like them."""
    layer, _ = _KINDS
    return not isinstance(module, (nn.ModuleList, nn.Sequential)) and any(
        isinstance(child, nn.ModuleList)
        and len(child) > 0
        and all(sum(hasattr(one, name) for name in layer.telling) >= layer.enough for one in child)
        for child in module.children()
    )


def _is_pixel_head(module: nn.Module) -> bool:
    """Whether it is a Sequential of upsampling, block, upsampling, block and a convolution."""
    kinds = (nn.Upsample, nn.Sequential, nn.Upsample, nn.Sequential, nn.Conv2d)
    return (
        isinstance(module, nn.Sequential)
        and len(module) == len(kinds)
        and all(isinstance(child, kind) for child, kind in zip(module, kinds, strict=True))
    )


def _with_inner(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        yield module
        yield from module.children() if isinstance(module, nn.Sequential) else ()
