"""Load weights of all kinds: published checkpoints, CLIP's weights, safetensors, folders of ``save_pretrained``.

Loading executes no code from the file and checks every tensor's name and shape. :mod:`fastris.runtime.storage` reads
the bytes, :mod:`fastris.models.state_dicts` compares names and shapes, :mod:`fastris.models.pretrained` reads folders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from fastris.models import registry
from fastris.models.ancestry import hub_id_of, published_id
from fastris.models.base import ReferringModel
from fastris.models.config import ModelConfig
from fastris.models.pretrained import (
    ACCEPTED,
    CONFIG,
    FILE_SUFFIXES,
    SAFETENSORS,
    Weights,
    build,
    carried_config,
    download_hub,
    kind_for,
    kind_of,
    load_into,
    read_folder,
    read_safetensors_model,
)
from fastris.models.state_dicts import LoadReport, Reshaped, WeightsError
from fastris.runtime.storage import first_line, load_torch, read_torch, replacing, save_atomic
from fastris.runtime.torch_files import script_weights
from fastris.runtime.torch_values import Record, Refused

__all__ = [
    "LoadReport",
    "Reshaped",
    "Weights",
    "WeightsError",
    "load_clip",
    "load_encoder",
    "load_model",
    "load_torch",
    "load_weights",
    "read_weights",
    "replacing",
    "save_atomic",
]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

Source: TypeAlias = str | Path | Mapping[str, Any] | Weights


def load_weights(model: nn.Module, source: Source, *, strict: bool = True) -> LoadReport:
    """Copy weights into a model such as :class:`fastris.CRIS`: a whole CRIS's, or CLIP's into its ``backbone``.

    So too a whole AlignFormer's, Swin's or BERT's into a :class:`fastris.AlignFormer`.

    Args:
        model: the model; parameters keep their dtype and device, so fp16 weights become fp32 in an fp32 model.
        source: a file, folder or name, or an already loaded checkpoint or state dict; see
            :data:`fastris.models.pretrained.ACCEPTED`.
        strict: raise :class:`WeightsError`, before anything is copied, when a name is missing or unexpected or a shape
            differs; ``False`` copies what fits. From CLIP's weights only CRIS's own ``connect`` layers (and BatchNorm's
            step counters) may be missing; from CRIS's, what a switch adds to the model (``vlba``, ``centre``), each as
            a whole: a warning says so, and the report's ``missing`` has exactly its names.

    Returns the report of what was copied and what was not.
    """
    return load_into(model, read_weights(source), strict)


def load_clip(model: nn.Module, source: Source, *, strict: bool = True) -> LoadReport:
    """:func:`load_weights` for CLIP's weights only, from which a training run of CRIS starts.

    ``source``: ``RN50:openai`` (open_clip's name and tag, which open_clip downloads), OpenAI's ``RN50.pt``, a
    safetensors file, or open_clip's state dict. Raises ValueError when it holds a whole model instead.
    """
    return load_encoder(model, source, "clip_pretrain", strict=strict)


def load_encoder(model: nn.Module, source: Source, option: str, *, strict: bool = True) -> LoadReport:
    """:func:`load_weights` for the weights of one encoder only, from which a training run starts.

    ``option`` is that of ``fastris train``: ``clip_pretrain`` for CRIS, ``swin_pretrain`` or ``bert_pretrain`` for
    AlignFormer. Raises ValueError where the model has no such encoder, and for other weights than that encoder's.
    """
    kind = kind_of(model)
    title, named = kind.config_class.title, option.removesuffix("_pretrain")
    if option not in kind.starts:
        whose = {"clip": "CLIP's", "swin": "Swin's", "bert": "BERT's"}.get(named, f"{named}'s")
        others = f", give {' and '.join(f'{each}=...' for each in kind.starts)}" if kind.starts else ""
        raise ValueError(
            f"{option}: {title} does not start from {whose} weights; leave it out{others}, or give the weights "
            "of a whole model as weight=PATH"
        )
    weights, (whose, part) = read_weights(source), kind.starts[option]
    taken = kind.adopt(weights.tensors)
    if taken is None and kind.recognises(weights.tensors):
        example = ", such as RN50:openai" if option == "clip_pretrain" else f" ({option}), or the whole as weight=PATH"
        raise ValueError(f"{weights.source} holds a whole {title} model; give {whose} weights alone{example}")
    if taken is not None and taken.part != part:
        actual = next(name for name, (_, other) in kind.starts.items() if other == taken.part)
        raise ValueError(f"{option}: {weights.source} holds {kind.starts[actual][0]} weights; give it as {actual}=PATH")
    return load_into(model, weights, strict)


def load_model(source: Source, config: ModelConfig | None = None) -> ReferringModel:
    """Build the model that ``source`` holds, with its weights, in eval mode on the CPU.

    ``source``: a folder written by ``save_pretrained``, a Hugging Face id, a ``.safetensors`` file or a checkpoint.
    The configuration is ``config`` if given, else the one stored with the weights, else the one that the model's
    ``infer_config`` derives from their shapes. Raises FileNotFoundError (what was looked for, what is accepted) or
    ValueError (what does not fit).
    """
    weights = read_weights(source)
    config = config or weights.config
    kind = kind_for(weights, config)
    if not kind.recognises(weights.tensors):
        title, adoptable = kind.config_class.title, kind.adopt(weights.tensors) is not None
        what = f"{_whose(kind, weights)} weights alone" if adoptable else f"no {title} model"
        parts = ", ".join(kind.config_class.parts)
        raise ValueError(f"{weights.source} holds {what}; give a whole {title} model ({parts})")
    return build(kind, weights, config or kind.infer_config(weights.tensors))


def _whose(kind: Any, weights: Weights) -> str:
    """Of which other model the weights are that ``kind`` adopts: "CLIP's"."""
    part = kind.adopt(weights.tensors).part
    return next((whose for whose, other in kind.starts.values() if other == part), "another model's")


def read_weights(source: Source) -> Weights:
    """Read tensors, and the configuration if there is one, from anything in ``ACCEPTED`` or from a loaded checkpoint.

    Paths that exist take precedence over open_clip's and Hugging Face's names. Raises FileNotFoundError when nothing is
    found, ConnectionError when a download fails, ValueError when the content is damaged or is not a state dict.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, Mapping):
        return _from_checkpoint(source, "the given state dict")
    path, name = Path(source).expanduser(), str(source)
    if path.is_dir():
        own = _weights_of_run(path)
        return read_folder(path) if own is None else _read_file(own)
    if path.is_file():
        return replace(_read_file(path), hub_id=published_id(path))
    if ":" in name and "/" not in name:
        file, hub_id = _download_open_clip(name)
        return replace(_read_file(file, source=name), hub_id=hub_id)
    if _HUB_ID.fullmatch(name) and path.suffix not in FILE_SUFFIXES:
        return replace(read_folder(download_hub(name), source=name), hub_id=name)
    if name in registry.presets():
        raise FileNotFoundError(
            f"{name} is a preset, which has no trained weights; train it (fastris train model={name}), or give weights "
            f"instead: {ACCEPTED}"
        )
    raise FileNotFoundError(f"there is no file or folder {name}; accepted are {ACCEPTED}")


def _weights_of_run(folder: Path) -> Path | None:
    """The weights of a training run in its folder, the best rather than the last; None for another folder."""
    if (folder / SAFETENSORS).exists() or (folder / CONFIG).exists():
        return None
    return next((folder / name for name in ("best.pth", "last.pth") if (folder / name).is_file()), None)


def _read_file(path: Path, source: str = "") -> Weights:
    source = source or str(path)
    if path.suffix == ".safetensors":
        return read_safetensors_model(path, source)
    content = read_torch(path)
    if isinstance(content, Record):
        try:
            content = script_weights(content)
        except Refused as error:
            raise ValueError(f"{path} {error}") from None
    return _from_checkpoint(content, source)


def _from_checkpoint(content: Any, source: str) -> Weights:
    """Unwrap ``{"state_dict": ..., "config": ...}``, as fastris writes it, ``{"model": ...}``, or take a state dict."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds a {type(content).__name__}; it must hold a dict with 'state_dict', or one")
    state = next((content[name] for name in ("state_dict", "model") if isinstance(content.get(name), Mapping)), content)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        names = ", ".join(str(key)[:80] for key in list(content)[:10])
        raise ValueError(f"{source} must hold a dict with 'state_dict', or a state dict; its entries are: {names}")
    card = content.get("card")
    card = card if isinstance(card, str) else ""
    return Weights.checked(state, carried_config(content.get("config"), source), source, card)


def _download_open_clip(name_and_tag: str) -> tuple[Path, str]:
    """Download the weights ``name:tag`` with open_clip, or find them in its cache; the file, and its id on the hub."""
    import open_clip

    name, _, tag = name_and_tag.partition(":")
    entry = open_clip.get_pretrained_cfg(name, tag)
    if not entry:
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f"it has {', '.join(tags)}" if tags else "for CRIS: RN50, RN101, RN50x4, RN50x16"
        unknown = f"tag {tag!r} for {name}" if tags else f"model {name!r}"
        raise ValueError(f"open_clip has no {unknown}; {known}, as in RN50:openai")
    layers = (open_clip.get_model_config(name) or {}).get("vision_cfg", {}).get("layers")
    if layers is not None and not isinstance(layers, list):
        raise ValueError(f"{name} is a Vision Transformer, but CRIS is built on CLIP's ResNets; take RN50:openai")
    failures = []
    for from_hub in (False, True):  # OpenAI's own files first: the cache of OpenAI's package has them too
        try:
            return Path(open_clip.download_pretrained(entry, prefer_hf_hub=from_hub)), hub_id_of(entry)
        except (OSError, RuntimeError) as error:
            failures.append(first_line(error))
    raise ConnectionError(
        f"could not download {name_and_tag} ({failures[0]}); without a network, fetch "
        f"{entry.get('url') or name + '.pt'} elsewhere and give the path of the file"
    )
