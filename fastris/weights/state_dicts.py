"""State dicts by name and shape: whose weights these are, which CRIS they describe, and what about them does not fit.

Nothing here opens a file; :mod:`fastris.weights.load` does.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastris.models.cris.config import CLIPConfig, CRISConfig

CONNECT = "backbone.visual.attnpool.connect."
"""CRIS's own layers inside the image encoder, which CLIP's weights do not have."""

_BATCH_COUNTER = ".num_batches_tracked"
_NO_WEIGHTS = frozenset({"input_resolution", "context_length", "vocab_size", "attn_mask"})
_LISTED = 30
_RESNETS: dict[tuple[tuple[int, ...], int], str] = {
    ((3, 4, 6, 3), 64): "RN50",
    ((3, 4, 23, 3), 64): "RN101",
    ((4, 6, 10, 6), 80): "RN50x4",
    ((6, 8, 18, 8), 96): "RN50x16",
    ((3, 15, 36, 10), 128): "RN50x64",
}
_VITS = {768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H", 1408: "ViT-g", 1664: "ViT-bigG"}


class Reshaped(NamedTuple):
    """A weight that file and model both have, in two shapes."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} is {self.found}, the model's is {self.expected}"


@dataclass(frozen=True)
class LoadReport:
    """How a set of weights and a model fit, by state-dict name.

    ``missing``: the model has it, the weights do not. ``unexpected``: the other way round. ``reshaped``: both have it,
    in two shapes. ``kept``: absent from CLIP's weights and allowed to be (``connect`` and BatchNorm's step counters),
    so the model keeps its own values. ``loaded``: how many tensors both have in one shape.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[Reshaped, ...] = ()
    kept: tuple[str, ...] = ()
    loaded: int = 0
    source: str = "weights"

    @property
    def fits(self) -> bool:
        """Whether every weight found its place and every place its weight."""
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.loaded} tensors loaded"]
        for title, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.reshaped),
            ("not in CLIP's weights, left as they were", self.kept),
        ):
            if names:
                parts.append(f"{len(names)} {title}: {_listing(names)}")
        return "; ".join(parts)


class WeightsError(ValueError):
    """Weights that do not fit the model; ``report`` holds every name, of which the message shows the first few."""

    def __init__(self, message: str, report: LoadReport):
        super().__init__(message)
        self.report = report


def normalise_names(state: Mapping[str, Any], source: str = "weights") -> dict[str, Tensor]:
    """The same tensors without what DDP (``module.``) and torch.compile (``_orig_mod.``) put into their names.

    Raises ValueError for an entry that is no tensor, for an empty state dict and for two names that become one.
    """
    if not state:
        raise ValueError(f"{source} holds an empty state dict; save model.state_dict() into it")
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{source}: state dict entry {key!r} must be a tensor under a name, got {type(value)}")
        name = key.replace("_orig_mod.", "").removeprefix("module.")
        if name in plain:
            raise ValueError(f"{source} holds {name} twice, with and without a wrapper's prefix; remove one of them")
        plain[name] = value
    return plain


def check_plain(state: Mapping[str, Tensor], source: str) -> None:
    """ValueError, with the name, for a tensor that is not dense, real and as large in memory as its shape says.

    One value can be expanded to a shape of 10^12, and many names can share one memory: models built to such shapes
    would ask for memory that no file has.
    """
    held: dict[int, int] = {}
    claimed = 0
    for name, tensor in state.items():
        what = _oddity(tensor)
        if what:
            raise ValueError(
                f"{source}: {name} is {what}; make it a dense, contiguous, real tensor where it was made and save again"
            )
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            held[storage._cdata] = storage.nbytes()
            claimed += tensor.numel() * tensor.element_size()
    if claimed > 4 * sum(held.values()) + (1 << 20):
        raise ValueError(
            f"{source}: its {len(state)} tensors share memory: they stand for {claimed} bytes and have "
            f"{sum(held.values())}; save each of them with .clone()"
        )


def _oddity(tensor: Tensor) -> str:
    """What about a tensor is not plain, in words; empty if it is a plain one."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    if tensor.is_complex():
        return f"complex ({tensor.dtype})"
    memory = 0 if tensor.is_meta else tensor.untyped_storage().nbytes()
    expanded = any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    if expanded or (not tensor.is_meta and tensor.numel() * tensor.element_size() > memory):
        return f"expanded to {tuple(tensor.shape)} from fewer values"
    return ""


def is_cris(names: Iterable[str]) -> bool:
    """Whether these are the weights of a whole CRIS model, under the published names."""
    return any(name.startswith(("backbone.", "neck.", "decoder.", "proj.")) for name in names)


def is_clip(names: Iterable[str]) -> bool:
    """Whether these are the weights of a CLIP model, under OpenAI's and open_clip's names."""
    return any(name.startswith("visual.") for name in names)


def clip_to_backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's weights under CRIS's names: ``visual.*`` and the text encoder's keys move below ``backbone.``.

    The settings and the causal mask that TorchScript archives hold among the weights are left out; the ``text.`` prefix
    that some open_clip models have goes. The attention pool's positions stay on the grid that they were trained on: the
    model resizes them as it runs.
    """
    renamed = {}
    for name, tensor in state.items():
        if name in _NO_WEIGHTS:
            continue
        name = name.removeprefix("text.")
        renamed[f"backbone.{name}"] = tensor.reshape(()) if name == "logit_scale" and tensor.numel() == 1 else tensor
    return renamed


def architecture(state: Mapping[str, Tensor]) -> str:
    """The name of the CLIP model that these weights, CLIP's or CRIS's, look like: RN50, RN101, ViT-B/32, ..."""
    visual = {n.split("visual.", 1)[1]: tuple(t.shape) for n, t in state.items() if n.partition("visual.")[1]}
    if any(name.startswith("trunk.") for name in visual):
        return "a timm image encoder"
    stem = visual.get("conv1.weight", ())
    if "class_embedding" in visual and len(stem) == 4:
        return f"{_VITS.get(stem[0], f'a ViT of width {stem[0]}')}/{stem[-1]}"
    depths = tuple(_count(visual, rf"layer{stage}\.(\d{{1,9}})\.") for stage in (1, 2, 3, 4))
    width = visual.get("layer1.0.conv1.weight", (0,))[0]
    if not any(depths):
        return "an unknown image encoder"
    return _RESNETS.get((depths, width), f"a CLIP ResNet of depths {depths} and width {width}")


def compare(
    state: Mapping[str, Tensor], model: Mapping[str, Tensor], source: str, clip_only: bool = False
) -> LoadReport:
    """Match weights with a model's state dict by name and shape.

    ``clip_only``: ``state`` comes from CLIP, so only ``backbone`` is compared, and ``connect`` may be missing. So may
    BatchNorm's step counters: files older than PyTorch 0.4.1 lack them, and they take no part in CRIS's arithmetic.
    """
    wanted = {name: t for name, t in model.items() if not clip_only or name.startswith("backbone.")}
    absent = [name for name in wanted if name not in state]
    kept = [n for n in absent if clip_only and (n.startswith(CONNECT) or n.endswith(_BATCH_COUNTER))]
    shared = [name for name in wanted if name in state]
    reshaped = [
        Reshaped(n, tuple(state[n].shape), tuple(wanted[n].shape)) for n in shared if state[n].shape != wanted[n].shape
    ]
    return LoadReport(
        missing=tuple(name for name in absent if name not in set(kept)),
        unexpected=tuple(name for name in state if name not in wanted),
        reshaped=tuple(reshaped),
        kept=tuple(kept),
        loaded=len(shared) - len(reshaped),
        source=source,
    )


def misfit_message(report: LoadReport, found: str, expected: str) -> str:
    """The message for weights that do not fit; ``found`` and ``expected`` are what their image encoders look like."""
    lines = [f"the weights in {report.source} do not fit the model"]
    if found != expected:
        lines[0] += f": their image encoder looks like {found}, the model's is {expected}; use weights of {expected}"
    if report.missing:
        lines.append(f"  missing ({len(report.missing)}): {_listing(report.missing)}")
    if report.unexpected:
        lines.append(f"  unexpected ({len(report.unexpected)}): {_listing(report.unexpected)}")
    if report.reshaped:
        lines.append(f"  of another shape ({len(report.reshaped)}): {_listing(report.reshaped)}")
    return "\n".join(lines)


def infer_config(state: Mapping[str, Tensor], **known: Any) -> CRISConfig:
    """Read a CRIS model's dimensions off its weights (under the published names, prefixes removed).

    Shapes do not tell ``num_head``, ``word_len``, ``input_size``, ``dropout`` and ``intermediate``: they are taken as
    published (8, 17, 416, 0.1, False) unless given in ``known``. Only ``num_head`` changes what the model computes, so
    guessing it for a width other than the published 512 is said in a warning. CLIP's text heads are 64 wide, as in all
    of OpenAI's models.

    Raises ValueError when these are not the weights of a CRIS model, naming what is missing.
    """

    def size(name: str, axis: int) -> int:
        if name not in state or state[name].ndim <= axis:
            raise ValueError(f"this is no CRIS state dict: {name} is missing, so the model's dimensions are unknown")
        return state[name].shape[axis]

    vis_dim = size("decoder.norm.weight", 0)
    text_width = size("backbone.positional_embedding", 1)
    clip = CLIPConfig(
        embed_dim=size("backbone.text_projection", 1),
        vision_layers=tuple(_count(state, rf"backbone\.visual\.layer{stage}\.(\d{{1,9}})\.") for stage in (1, 2, 3, 4)),
        image_resolution=32 * round((size("backbone.visual.attnpool.positional_embedding", 0) - 1) ** 0.5),
        vision_width=size("backbone.visual.layer1.0.conv1.weight", 0),
        context_length=size("backbone.positional_embedding", 0),
        vocab_size=size("backbone.token_embedding.weight", 0),
        transformer_width=text_width,
        transformer_heads=max(1, text_width // 64),
        transformer_layers=_count(state, r"backbone\.transformer\.resblocks\.(\d{1,9})\."),
    )
    if vis_dim != 512 and "num_head" not in known:
        warnings.warn(
            "num_head of the decoder cannot be read from weights; taking 8 as published. Masks are wrong if the model "
            "was trained with another number: then give its configuration",
            stacklevel=2,
        )
    levels = [f"neck.f{level}_v_proj.0.weight" for level in (3, 2, 1)]
    dims: dict[str, Any] = {
        "word_dim": size("proj.txt.weight", 1),
        "vis_dim": vis_dim,
        "fpn_in": tuple(size(level, 1) for level in levels),
        "fpn_out": tuple(size(level, 0) for level in levels),
        "num_layers": _count(state, r"decoder\.layers\.(\d{1,9})\."),
        "dim_ffn": size("decoder.layers.0.ffn.0.weight", 0),
        "word_len": min(17, clip.context_length),
    }
    return CRISConfig(clip=clip, **{**dims, **known})


def _count(names: Iterable[str], pattern: str) -> int:
    """How many blocks are numbered in these names: the largest number plus one, 0 if there is none."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _listing(names: Iterable[Any]) -> str:
    shown = [str(name) for name in names]
    rest = len(shown) - _LISTED
    return ", ".join(shown[:_LISTED]) + (f", and {rest} more" if rest > 0 else "")
