"""Which model weights are of, so that a run that starts from them needs no `model=`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastris.models.config import ModelConfig
from fastris.models.pretrained import FILE_SUFFIXES, kind_for
from fastris.weights.load import read_weights


def names_weights(name: str) -> bool:
    """Whether a name can only mean weights: it exists here, ends like a checkpoint, or is a path or a hub id."""
    return "/" in name or name.endswith(FILE_SUFFIXES) or Path(name).expanduser().exists()


def architecture_of(source: str) -> ModelConfig | None:
    """The configuration stored with the weights, or else what their shapes tell; None for no whole model of ours.

    ``source``: as for :func:`fastris.weights.load.read_weights`, whose errors it raises. Weights of one encoder alone,
    such as CLIP's, are no whole model.
    """
    weights = read_weights(source)
    kind = kind_for(weights, weights.config)
    if not kind.recognises(weights.tensors):
        return None
    config: ModelConfig = weights.config or kind.infer_config(weights.tensors)
    return config


def differences(held: ModelConfig, wanted: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Field -> (as the weights have it, as it is wanted), of the fields that shape the weights."""
    if held.system != wanted.system:
        return {"system": (held.system, wanted.system)}
    ours, theirs = _flat(held.to_dict()), _flat(wanted.to_dict())
    names = [name for name in {**ours, **theirs} if name not in (*held.not_in_shapes, "input_size", "word_len")]
    return {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)}


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, those of a nested mapping (CLIP's sizes) as ``clip.NAME``."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat.update(
            {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        )
    return flat
