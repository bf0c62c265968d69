"""State dicts of CRIS and CLIP: tell them apart by names, rename CLIP's weights, infer a CRIS configuration."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fastris.models.cris.config import CLIPConfig, CRISConfig
from fastris.models.state_dicts import Adopted

CONNECT = "backbone.visual.attnpool.connect."
"""Prefix of the layers that CRIS adds to the image encoder, which CLIP's weights do not have."""

_BATCH_COUNTER = ".num_batches_tracked"
# Entries of OpenAI's TorchScript archives that are no weights.
_NO_WEIGHTS = frozenset({"input_resolution", "context_length", "vocab_size", "attn_mask"})
_RESNETS: dict[tuple[tuple[int, ...], int], str] = {
    ((3, 4, 6, 3), 64): "RN50",
    ((3, 4, 23, 3), 64): "RN101",
    ((4, 6, 10, 6), 80): "RN50x4",
    ((6, 8, 18, 8), 96): "RN50x16",
    ((3, 15, 36, 10), 128): "RN50x64",
}
_VITS = {768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H", 1408: "ViT-g", 1664: "ViT-bigG"}


def is_clip(names: Iterable[str]) -> bool:
    """Whether these are the weights of a CLIP model, under OpenAI's and open_clip's names."""
    return any(name.startswith("visual.") for name in names)


def clip_to_backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename CLIP's weights to CRIS's names: the prefix ``backbone.`` is added to every key.

    Drops the settings and the causal mask that TorchScript archives store among the weights, and the prefix ``text.``
    of some open_clip models. The attention pool's positions keep the grid that they were trained on: the model resizes
    them in its forward pass.
    """
    renamed = {}
    for name, tensor in state.items():
        if name in _NO_WEIGHTS:
            continue
        name = name.removeprefix("text.")
        renamed[f"backbone.{name}"] = tensor.reshape(()) if name == "logit_scale" and tensor.numel() == 1 else tensor
    return renamed


def adopt_clip(state: Mapping[str, Tensor]) -> Adopted | None:
    """CLIP's weights, renamed for CRIS's ``backbone``; None where they are not CLIP's.

    Two kinds of entries may be missing: CRIS's own ``connect`` layers, and BatchNorm's step counters, which files older
    than PyTorch 0.4.1 lack and CRIS does not use.
    """
    if not is_clip(state):
        return None
    return Adopted(clip_to_backbone(state), "backbone.", _may_be_missing)


def _may_be_missing(name: str) -> bool:
    return name.startswith(CONNECT) or name.endswith(_BATCH_COUNTER)


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


def infer_config(state: Mapping[str, Tensor], **known: Any) -> CRISConfig:
    """Derive a CRIS model's configuration from its weights' shapes (published names, wrappers' prefixes removed).

    ``num_head``, ``word_len``, ``input_size``, ``dropout`` and ``intermediate`` cannot be derived: they take their
    published values (8, 17, 416, 0.1, False) unless given in ``known``. Only ``num_head`` changes what the model
    computes, so a warning is issued where it is guessed for a width other than the published 512. CLIP's text heads
    are taken as 64 wide, as in all of OpenAI's models.

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
        "vlba": {0: "off", 4: "trunk"}.get(_count(state, r"vlba\.(\d{1,9})\."), "neck"),
        "centre_layers": _count(state, r"centre\.layers\.(\d{1,9})\."),
        "alignment_module": "trunk" if _count(state, r"cam\.(\d{1,9})\.") else "off",
    }
    return CRISConfig(clip=clip, **{**dims, **known})


def _count(names: Iterable[str], pattern: str) -> int:
    """The number of blocks: the largest number that ``pattern`` finds in the names plus one, 0 if it finds none."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)
