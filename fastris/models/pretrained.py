"""A model from the files that ``save_pretrained`` and ``fastris convert`` write, on disk or on Hugging Face.

Reading runs no code of the file and checks every tensor's name and shape before the model's memory is allocated.
:mod:`fastris.weights.load` adds checkpoints, archives and names of other people's files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastris.models import registry
from fastris.models.config import ModelConfig
from fastris.models.state_dicts import (
    Adopted,
    LoadReport,
    WeightsError,
    check_plain,
    compare,
    copy_fitting,
    misfit_message,
    normalise_names,
)
from fastris.runtime.safetensors_files import read_safetensors
from fastris.runtime.storage import first_line

Kind: TypeAlias = type[Any]
"""A class of models, under :class:`fastris.models.base.ReferringModel`, which stands above this module."""

CONFIG, SAFETENSORS, CARD = "config.json", "model.safetensors", "README.md"
"""The files of a model's folder."""

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
MAX_TEXT = 1 << 20
"""Bytes of a text beside weights: a configuration's JSON, a model card."""

ACCEPTED = (
    "a folder written by save_pretrained, a Hugging Face id such as user/name, a .safetensors file, a PyTorch "
    "checkpoint (.pth, .pt), OpenAI's CLIP archive RN50.pt, or an open_clip name and tag such as RN50:openai"
)


@dataclass(frozen=True)
class Weights:
    """What a source holds: tensors under names without wrappers' prefixes, and what it carries beside them.

    That is the configuration, None if there is none, and the model card's text, empty if there is none.
    """

    tensors: dict[str, Tensor]
    config: ModelConfig | None
    source: str
    card: str = ""

    @classmethod
    def checked(cls, state: Mapping[str, Any], config: ModelConfig | None, source: str, card: str = "") -> Weights:
        """Of a state dict as it was read. ValueError for names and tensors that are not plain ones."""
        tensors = normalise_names(state, source)
        check_plain(tensors, source)
        return cls(tensors, config, source, card)


def load_pretrained(kind: Kind, source: str | Path, config: Any = None, strict: bool = True, **download: Any) -> Any:
    """A model of the class ``kind`` from what ``from_pretrained`` takes: a folder, or an id on the Hub.

    ``download`` goes to huggingface_hub: ``revision``, ``token``, ``cache_dir``, ... With ``strict=False`` what the
    weights lack keeps its initial value, and what does not fit is left out.
    """
    path = Path(source).expanduser()
    weights = read_folder(path if path.is_dir() else download_hub(str(source), **download), source=str(source))
    config = config or weights.config
    if not hasattr(kind, "config_class"):
        kind = kind_for(weights, config)
    if isinstance(config, ModelConfig) and config.system != kind.config_class.system:
        raise ValueError(
            f"{source} holds a {config.title} model, and {kind.__name__} loads {kind.config_class.title}; load it with "
            "fastris.Segmenter.from_pretrained, or with fastris.weights.load.load_model"
        )
    return build(kind, weights, config or kind.infer_config(weights.tensors), strict)


def kind_for(weights: Weights, config: Any) -> Kind:
    """The class of the model that the weights are of: by the configuration if there is one, else by their names."""
    named = isinstance(config, ModelConfig)
    return registry.model_class(config.system if named else registry.system_of_names(weights.tensors))


def build(kind: Kind, weights: Weights, config: Any, strict: bool = True) -> Any:
    """The model with its weights, in eval mode. Names and shapes are compared before its memory is allocated."""
    with torch.device("meta"):
        model = kind(config)
    own = model.state_dict()
    report = compare(weights.tensors, own, weights.source)
    if report.fits and len(own) == sum(1 for _ in (*model.parameters(), *model.buffers())):
        model = model.to_empty(device="cpu")  # all of it is in the weights: no values to make up first
    elif strict:
        raise WeightsError(misfit_message(report, kind.encoder_of(weights.tensors), kind.encoder_of(own)), report)
    else:
        model = kind(config)
    load_into(model, weights, strict)
    return model.eval()


def load_into(model: nn.Module, weights: Weights, strict: bool = True) -> LoadReport:
    """Copy weights into a model: those of the whole of it, or of the encoders that it takes over from another one.

    A module that is none of ours, such as the published CRIS, goes by CRIS's names.
    """
    kind = kind_of(model)
    taken = Adopted(weights.tensors, "") if kind.recognises(weights.tensors) else kind.adopt(weights.tensors)
    if taken is None:
        beginnings = sorted({name.split(".")[0] for name in weights.tensors})[:8]
        raise ValueError(
            f"{weights.source} holds neither {kind.config_class.title}'s weights "
            f"({', '.join(kind.config_class.parts)}) nor {kind.starts_from or 'any that it could start from'}; its "
            f"names begin with {', '.join(beginnings)}"
        )
    own = normalise_names(model.state_dict(), "model")
    report = compare(taken.state, own, weights.source, taken.part, taken.optional)
    if strict and not report.fits:
        raise WeightsError(misfit_message(report, kind.encoder_of(taken.state), kind.encoder_of(own)), report)
    copy_fitting(taken.state, own, weights.source)
    return report


def kind_of(model: nn.Module) -> Kind:
    """The class behind what DDP and torch.compile wrap around a model; CRIS for modules that are none of ours."""
    inner: Any = model
    while not hasattr(type(inner), "recognises"):
        wrapped = inner._modules.get("_orig_mod", inner._modules.get("module"))
        if wrapped is None:
            return registry.model_class(registry.DEFAULT)
        inner = wrapped
    return type(inner)


def read_folder(folder: Path, source: str = "") -> Weights:
    """What ``save_pretrained`` has written into a folder; FileNotFoundError that says what it lacks."""
    missing = [name for name in (CONFIG, SAFETENSORS) if not (folder / name).is_file()]
    if missing:
        files = sorted(file.name for file in folder.iterdir() if file.suffix in FILE_SUFFIXES)
        hint = f"; it holds {', '.join(files)}: give the path of one of these" if files else ""
        raise FileNotFoundError(f"folder {folder} lacks {' and '.join(missing)}, which save_pretrained writes{hint}")
    return read_safetensors_model(folder / SAFETENSORS, source or str(folder))


def read_safetensors_model(path: Path, source: str) -> Weights:
    """The configuration is in the file's metadata (``fastris convert``), or beside it (``save_pretrained``)."""
    tensors, metadata = read_safetensors(path)
    text, card = metadata.get("config"), metadata.get("card", "")
    beside = path.with_name(CONFIG)
    if text is None and path.name == SAFETENSORS and beside.is_file():
        text = _read_text(beside)
        written = path.with_name(CARD)
        card = _read_text(written) if written.is_file() else ""
    return Weights.checked(tensors, _parse_config(text, source), source, card)


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT:
        raise ValueError(f"{path} is larger than {MAX_TEXT} bytes, which no such file is; save the model again")
    return path.read_text(encoding="utf-8", errors="replace")


def _parse_config(text: str | None, source: str) -> ModelConfig | None:
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the configuration of {source} is no valid JSON ({first_line(error)[:200]}); save the model again"
        ) from error
    return carried_config(content, source)


def carried_config(content: Any, source: str) -> ModelConfig | None:
    """The configuration that lies beside weights, if it is a model's of a known system at all."""
    if not isinstance(content, Mapping):
        return None
    title = "referring"
    try:
        system = registry.system_of(content)
        if system is None:
            return None
        kind = registry.config_class(system)
        title = kind.title
        return kind.from_dict(content, source=f"the configuration of {source}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"the configuration of {source} does not describe a {title} model: {error}") from error


def download_hub(name: str, **options: Any) -> Path:
    """Have huggingface_hub fetch, or find in its cache, the files that ``push_to_hub`` writes."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, SAFETENSORS, CARD], **options))
    except (OSError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"there is no folder or file {name} here, and Hugging Face gave no model of that id "
            f"({first_line(error)}); accepted are {ACCEPTED}"
        ) from error
