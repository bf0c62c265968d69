"""Write a model as a published ``.pth``, as one safetensors file, or as a folder for ``from_pretrained``."""

from __future__ import annotations

import json
from pathlib import Path

from fastris.models.base import ReferringModel
from fastris.models.pretrained import CONFIG, SAFETENSORS
from fastris.runtime.safetensors_files import write_safetensors
from fastris.runtime.storage import replacing, save_atomic
from fastris.weights.card import card_path

_KINDS = {".safetensors": "safetensors", ".pth": "pth", ".pt": "pth"}
_EXPORTED = {".onnx": "onnx", ".pt2": "torch"}


def target_kind(target: Path, to: str = "auto") -> str:
    """The kind of file to write, ``pth``, ``safetensors`` or ``folder``: ``to``, or for ``auto`` by the suffix.

    What follows the last dot of a folder's name may begin with a digit (``model-v1.2``). Raises ValueError for other
    suffixes, which no kind of file here has, unless there is a folder of that name.
    """
    if to != "auto":
        return to
    suffix = target.suffix.lower()
    if suffix in _KINDS:
        return _KINDS[suffix]
    if suffix[1:2].isalpha() and not target.is_dir():
        other = _EXPORTED.get(suffix)
        does = f"`fastris export format={other}` does" if other else "`fastris export` writes .onnx and .pt2"
        raise ValueError(
            f"target {target} ends in {target.suffix}, which convert does not write; {does}; here give a name that "
            "ends in .safetensors or .pth, or pass to=folder"
        )
    return "folder"


def written_files(target: Path, kind: str) -> list[Path]:
    """The paths of the model's files and its card. Raises FileExistsError where a folder would replace a file."""
    if kind != "folder":
        return [target, card_path(target, kind)]
    if target.is_file():
        raise FileExistsError(f"target {target} is a file, but a folder is to be written; choose another target")
    return [target / CONFIG, target / SAFETENSORS, card_path(target, kind)]


def write_model(model: ReferringModel, target: Path, kind: str, card: str) -> None:
    """Write weights and configuration without what only training uses, each file in one step.

    A folder's card is left to :func:`.card.write_card`.
    """
    config, state = model.config.for_others().to_dict(), model.state_for_others()
    if kind == "pth":
        published = {f"module.{name}": tensor for name, tensor in state.items()}
        save_atomic({"config": config, "card": card, "state_dict": published}, target)
    elif kind == "safetensors":
        write_safetensors(target, state, {"config": json.dumps(config), "card": card})
    else:
        write_safetensors(target / SAFETENSORS, state, {})
        with replacing(target / CONFIG) as temporary:
            temporary.write_text(json.dumps(config, sort_keys=True, indent=2), encoding="utf-8")
