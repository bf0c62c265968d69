"""Weights in files: published CRIS checkpoints, CLIP's weights, safetensors, folders that ``save_pretrained`` wrote.

Reading runs no code of the file and checks every tensor's name and shape; writing is atomic. Bytes are
:mod:`fastris.runtime.storage`'s business, names and shapes :mod:`fastris.weights.state_dicts`'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastris.models.cris.config import MAX_TEXT, CRISConfig
from fastris.options.declare import REQUIRED, option
from fastris.runtime.plain import printable
from fastris.runtime.safetensors_files import read_safetensors, write_safetensors
from fastris.runtime.storage import first_line, load_torch, read_torch, replacing, save_atomic
from fastris.runtime.torch_files import script_weights
from fastris.runtime.torch_values import Record, Refused
from fastris.weights.card import CARD, card_path, unknown_card, write_card
from fastris.weights.state_dicts import (
    LoadReport,
    Reshaped,
    WeightsError,
    architecture,
    check_plain,
    clip_to_backbone,
    compare,
    infer_config,
    is_clip,
    is_cris,
    misfit_message,
    normalise_names,
)

if TYPE_CHECKING:
    from fastris.models.cris.model import CRIS

__all__ = [
    "ConvertConfig",
    "LoadReport",
    "Reshaped",
    "Weights",
    "WeightsError",
    "infer_config",
    "load_clip",
    "load_model",
    "load_torch",
    "load_weights",
    "read_weights",
    "replacing",
    "run_convert",
    "save_atomic",
]

ACCEPTED = (
    "a folder written by save_pretrained, a Hugging Face id such as user/name, a .safetensors file, a PyTorch "
    "checkpoint (.pth, .pt), OpenAI's CLIP archive RN50.pt, or an open_clip name and tag such as RN50:openai"
)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CONFIG, _SAFETENSORS = "config.json", "model.safetensors"
_FILE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Weights:
    """What a source holds: tensors under names without wrappers' prefixes, and what it carries beside them.

    That is the configuration, None if there is none, and the model card's text, empty if there is none.
    """

    tensors: dict[str, Tensor]
    config: CRISConfig | None
    source: str
    card: str = ""


Source: TypeAlias = str | Path | Mapping[str, Any] | Weights


def load_weights(model: nn.Module, source: Source, *, strict: bool = True) -> LoadReport:
    """Copy weights into a :class:`fastris.CRIS` model: those of a whole CRIS, or CLIP's into its ``backbone``.

    Args:
        model: the model; parameters keep their dtype and device, so fp16 weights become fp32 in an fp32 model.
        source: a file, folder or name (see ``ACCEPTED``), or an already loaded checkpoint or state dict.
        strict: raise :class:`WeightsError`, before anything is copied, when a name is missing or unexpected or a shape
            differs; ``False`` copies what fits. From CLIP's weights only CRIS's own ``connect`` layers (and BatchNorm's
            step counters) may be missing.

    Returns the report of what was copied and what was not.
    """
    weights = read_weights(source)
    clip_only = not is_cris(weights.tensors)
    if clip_only and not is_clip(weights.tensors):
        beginnings = sorted({name.split(".")[0] for name in weights.tensors})[:8]
        raise ValueError(
            f"{weights.source} holds neither CRIS's weights (backbone, neck, decoder, proj) nor CLIP's (visual, "
            f"transformer, ...); its names begin with {', '.join(beginnings)}"
        )
    state = clip_to_backbone(weights.tensors) if clip_only else weights.tensors
    own = normalise_names(model.state_dict(), "model")
    report = compare(state, own, weights.source, clip_only)
    if strict and not report.fits:
        raise WeightsError(misfit_message(report, architecture(state), architecture(own)), report)
    lacking = [name for name, tensor in state.items() if tensor.is_meta]
    if lacking:
        raise ValueError(f"{weights.source}: {lacking[0]} has no values (meta device); save the model with its weights")
    with torch.no_grad():
        for name, tensor in state.items():
            if name in own and own[name].shape == tensor.shape:
                own[name].copy_(tensor)
    return report


def load_clip(model: nn.Module, source: Source, *, strict: bool = True) -> LoadReport:
    """:func:`load_weights` for CLIP alone: the start of a training run.

    ``source``: ``RN50:openai`` (open_clip's name and tag, which open_clip downloads), OpenAI's ``RN50.pt``, a
    safetensors file, or open_clip's state dict. Raises ValueError when it holds a whole CRIS model instead.
    """
    weights = read_weights(source)
    if is_cris(weights.tensors):
        raise ValueError(f"{weights.source} holds a whole CRIS model; give CLIP's weights alone, such as RN50:openai")
    return load_weights(model, weights, strict=strict)


def load_model(source: Source, config: CRISConfig | None = None) -> CRIS:
    """Build the CRIS model that ``source`` holds, with its weights, in eval mode on the CPU.

    ``source``: a folder written by ``save_pretrained``, a Hugging Face id, a ``.safetensors`` file or a checkpoint.
    The configuration is ``config`` if given, else the one that the source carries, else what :func:`infer_config` reads
    off the shapes. Raises FileNotFoundError (what was looked for, what is accepted) or ValueError (what does not fit).
    """
    weights = read_weights(source)
    if not is_cris(weights.tensors):
        what = "CLIP's weights alone" if is_clip(weights.tensors) else "no CRIS model"
        raise ValueError(f"{weights.source} holds {what}; give a whole CRIS model (backbone, neck, decoder, proj)")
    return _build(weights, config or weights.config or infer_config(weights.tensors))


def load_pretrained(source: str | Path, config: CRISConfig | None, strict: bool, **download: Any) -> CRIS:
    """:func:`load_model` for what huggingface_hub's ``from_pretrained`` takes: a folder, or an id on the Hub.

    ``download`` goes to huggingface_hub: ``revision``, ``token``, ``cache_dir``, ... With ``strict=False`` what the
    weights lack keeps its initial value, and what does not fit is left out.
    """
    path = Path(source).expanduser()
    weights = _read_folder(path if path.is_dir() else _download_hub(str(source), **download), source=str(source))
    return _build(weights, config or weights.config or infer_config(weights.tensors), strict)


def _build(weights: Weights, config: CRISConfig, strict: bool = True) -> CRIS:
    """The model with its weights. Names and shapes are compared before its memory is allocated."""
    from fastris.models.cris.model import CRIS

    with torch.device("meta"):
        model = CRIS(config)
    own = model.state_dict()
    report = compare(weights.tensors, own, weights.source)
    if report.fits and len(own) == sum(1 for _ in (*model.parameters(), *model.buffers())):
        model = model.to_empty(device="cpu")  # all of it is in the weights: no values to make up first
    elif strict:
        raise WeightsError(misfit_message(report, architecture(weights.tensors), architecture(own)), report)
    else:
        model = CRIS(config)
    load_weights(model, weights, strict=strict)
    return model.eval()


def read_weights(source: Source) -> Weights:
    """Read tensors, and the configuration if there is one, from anything in ``ACCEPTED`` or from a loaded checkpoint.

    What exists on disk goes before open_clip's and Hugging Face's names. Raises FileNotFoundError when nothing is
    there, ConnectionError when a download fails, ValueError when the content is damaged or is not a state dict.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, Mapping):
        return _from_checkpoint(source, "the given state dict")
    path, name = Path(source).expanduser(), str(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if ":" in name and "/" not in name:
        return _read_file(_download_open_clip(name), source=name)
    if _HUB_ID.fullmatch(name) and path.suffix not in _FILE_SUFFIXES:
        return _read_folder(_download_hub(name), source=name)
    raise FileNotFoundError(f"there is no file or folder {name}; accepted are {ACCEPTED}")


def _read_folder(folder: Path, source: str = "") -> Weights:
    missing = [name for name in (_CONFIG, _SAFETENSORS) if not (folder / name).is_file()]
    if missing:
        files = sorted(file.name for file in folder.iterdir() if file.suffix in _FILE_SUFFIXES)
        hint = f"; it holds {', '.join(files)}: give the path of one of these" if files else ""
        raise FileNotFoundError(f"folder {folder} lacks {' and '.join(missing)}, which save_pretrained writes{hint}")
    return _read_file(folder / _SAFETENSORS, source=source or str(folder))


def _read_file(path: Path, source: str = "") -> Weights:
    source = source or str(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, source)
    content = read_torch(path)
    if isinstance(content, Record):
        try:
            content = script_weights(content)
        except Refused as error:
            raise ValueError(f"{path} {error}") from None
    return _from_checkpoint(content, source)


def _read_safetensors(path: Path, source: str) -> Weights:
    """The configuration is in the file's metadata (``fastris convert``), or beside it (``save_pretrained``)."""
    tensors, metadata = read_safetensors(path)
    text, card = metadata.get("config"), metadata.get("card", "")
    beside = path.with_name(_CONFIG)
    if text is None and path.name == _SAFETENSORS and beside.is_file():
        text = _read_text(beside)
        written = path.with_name(CARD)
        card = _read_text(written) if written.is_file() else ""
    return _weights(tensors, _parse_config(text, source), source, card)


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT:
        raise ValueError(f"{path} is larger than {MAX_TEXT} bytes, which no such file is; save the model again")
    return path.read_text(encoding="utf-8", errors="replace")


def _weights(state: Mapping[str, Any], config: CRISConfig | None, source: str, card: str = "") -> Weights:
    tensors = normalise_names(state, source)
    check_plain(tensors, source)
    return Weights(tensors, config, source, card)


def _parse_config(text: str | None, source: str) -> CRISConfig | None:
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the configuration of {source} is no valid JSON ({first_line(error)[:200]}); save the model again"
        ) from error
    return _carried_config(content, source)


def _carried_config(content: Any, source: str) -> CRISConfig | None:
    """The configuration that lies beside weights, if it is a CRIS model's at all."""
    if not isinstance(content, Mapping) or "clip" not in content:
        return None
    try:
        return CRISConfig.from_dict(content, source=f"the configuration of {source}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"the configuration of {source} does not describe a CRIS model: {error}") from error


def _from_checkpoint(content: Any, source: str) -> Weights:
    """Unwrap ``{"state_dict": ..., "config": ...}``, as published and as fastris writes it; or a bare state dict."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds a {type(content).__name__}; it must hold a dict with 'state_dict', or one")
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        names = ", ".join(str(key)[:80] for key in list(content)[:10])
        raise ValueError(f"{source} must hold a dict with 'state_dict', or a state dict; its entries are: {names}")
    card = content.get("card")
    card = card if isinstance(card, str) else ""
    return _weights(state, _carried_config(content.get("config"), source), source, card)


def _download_open_clip(name_and_tag: str) -> Path:
    """Have open_clip fetch, or find in its cache, the weights of ``name:tag``; its registry knows where they are."""
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
            return Path(open_clip.download_pretrained(entry, prefer_hf_hub=from_hub))
        except (OSError, RuntimeError) as error:
            failures.append(first_line(error))
    raise ConnectionError(
        f"could not download {name_and_tag} ({failures[0]}); without a network, fetch "
        f"{entry.get('url') or name + '.pt'} elsewhere and give the path of the file"
    )


def _download_hub(name: str, **options: Any) -> Path:
    """Have huggingface_hub fetch, or find in its cache, the two files that ``push_to_hub`` writes."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=[_CONFIG, _SAFETENSORS, CARD], **options))
    except (OSError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"there is no folder or file {name} here, and Hugging Face gave no model of that id "
            f"({first_line(error)}); accepted are {ACCEPTED}"
        ) from error


@dataclass
class ConvertConfig:
    """Rewrite a CRIS model as a published .pth, as one safetensors file, or as a folder for from_pretrained."""

    source: str = option(REQUIRED, "checkpoint, safetensors file, folder or Hugging Face id", positional=True)
    target: str = option(REQUIRED, "what to write", positional=True)
    to: Literal["auto", "pth", "safetensors", "folder"] = option(
        "auto", "kind of target: pth as published, one safetensors file, or a folder; auto goes by the target's suffix"
    )
    config: str = option("", "YAML file of the model; needed only for what shapes do not tell, such as num_head")
    overwrite: bool = option(False, "replace a target that exists")


def run_convert(options: ConvertConfig) -> int:
    """Rewrite a CRIS model as a published ``.pth``, a safetensors file or a ``save_pretrained`` folder.

    Every weight is checked against the model first. The target carries the configuration; a published checkpoint's
    optimizer and epoch stay behind. Raises ValueError, FileNotFoundError or FileExistsError.
    """
    target = Path(options.target).expanduser()
    kind = _target_kind(target, options.to)
    occupied = [file for file in _written_files(target, kind) if file.exists()]
    if occupied and not options.overwrite:
        raise FileExistsError(f"{occupied[0]} exists; choose another target or pass overwrite=true")
    weights = read_weights(options.source)
    config = CRISConfig.from_yaml(options.config) if options.config else weights.config
    model = load_model(weights, config)
    card = weights.card or unknown_card(model.config, options.source)
    _write_model(model, target, kind, card)
    print(printable(f"wrote {target} ({kind}): {_in_words(model)}"))
    print(printable(f"model card {write_card(card_path(target, kind), card)}"))
    if config is None:
        given = model.config
        print(
            f"its configuration was read from the shapes; num_head={given.num_head}, word_len={given.word_len}, "
            f"input_size={given.input_size} and dropout={given.dropout} are the published values: "
            "pass config=FILE.yaml if the model was trained with others"
        )
    return 0


def _target_kind(target: Path, to: str) -> str:
    if to != "auto":
        return to
    return {".safetensors": "safetensors", ".pth": "pth", ".pt": "pth"}.get(target.suffix, "folder")


def _written_files(target: Path, kind: str) -> list[Path]:
    if kind != "folder":
        return [target, card_path(target, kind)]
    if target.is_file():
        raise FileExistsError(f"target {target} is a file, but a folder is to be written; choose another target")
    return [target / _CONFIG, target / _SAFETENSORS, card_path(target, kind)]


def _write_model(model: CRIS, target: Path, kind: str, card: str) -> None:
    config, state = model.config.to_dict(), model.state_dict()
    if kind == "pth":
        published = {f"module.{name}": tensor for name, tensor in state.items()}
        save_atomic({"config": config, "card": card, "state_dict": published}, target)
    elif kind == "safetensors":
        write_safetensors(target, state, {"config": json.dumps(config), "card": card})
    else:
        write_safetensors(target / _SAFETENSORS, state, {})
        with replacing(target / _CONFIG) as temporary:
            temporary.write_text(json.dumps(config, sort_keys=True, indent=2), encoding="utf-8")


def _in_words(model: CRIS) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"CRIS on {architecture(model.state_dict())}, {millions:.1f} M parameters"
