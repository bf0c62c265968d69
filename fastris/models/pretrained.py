"""Load models from the files that ``save_pretrained`` and ``fastris convert`` write, on disk or on Hugging Face.

Loading executes no code from the file and checks every tensor's name and shape before it allocates the model's memory.
:mod:`fastris.weights.load` also reads other formats: PyTorch checkpoints, OpenAI's CLIP archives, open_clip names.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastris.models import registry
from fastris.models.ancestry import Ancestor, fingerprint, public_name
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
    without_parts,
)
from fastris.runtime.safetensors_files import read_safetensors
from fastris.runtime.storage import first_line

Kind: TypeAlias = type[Any]
"""A model class, derived from :class:`fastris.models.base.ReferringModel`, whose module imports this one."""

CONFIG, SAFETENSORS, CARD = "config.json", "model.safetensors", "README.md"
"""The files of a model's folder."""

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
MAX_TEXT = 1 << 20
"""Largest size in bytes of a text file beside weights: a configuration's JSON, a model card."""

ACCEPTED = (
    "a folder written by save_pretrained, a Hugging Face id such as user/name, a .safetensors file, a PyTorch "
    "checkpoint (.pth, .pt), OpenAI's CLIP archive RN50.pt, or an open_clip name and tag such as RN50:openai"
)


@dataclass(frozen=True)
class Weights:
    """The content of a weights file or folder.

    Attributes:
        tensors: the state dict, without the prefixes of DDP and torch.compile.
        config: the configuration stored with it, or None.
        source: where it was read from, for messages.
        card: the model card's text, or empty.
        hub_id: the id on the Hugging Face hub, of weights that are known to be from there; else empty.
    """

    tensors: dict[str, Tensor]
    config: ModelConfig | None
    source: str
    card: str = ""
    hub_id: str = ""

    @classmethod
    def checked(cls, state: Mapping[str, Any], config: ModelConfig | None, source: str, card: str = "") -> Weights:
        """Build from a state dict as it was read. Raises ValueError for names or tensors that are not plain."""
        tensors = normalise_names(state, source)
        check_plain(tensors, source)
        return cls(tensors, config, source, card)


def load_pretrained(kind: Kind, source: str | Path, config: Any = None, strict: bool = True, **download: Any) -> Any:
    """Load a model of the class ``kind`` from a folder or a Hugging Face id; ``from_pretrained`` calls this.

    ``download`` goes to huggingface_hub: ``revision``, ``token``, ``cache_dir``, ... With ``strict=False``, tensors
    that are missing in the weights keep their initial values, and those that do not fit are left out. Raises
    FileNotFoundError where there is no model, ValueError for one of another system, WeightsError for a misfit.
    """
    path = Path(source).expanduser()
    here = path.is_dir()
    weights = read_folder(path if here else download_hub(str(source), **download), source=str(source))
    weights = weights if here else replace(weights, hub_id=str(source))
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
    """The model class for these weights: by their configuration if there is one, else by their names."""
    named = isinstance(config, ModelConfig)
    return registry.model_class(config.system if named else registry.system_of_names(weights.tensors))


def build(kind: Kind, weights: Weights, config: Any, strict: bool = True) -> Any:
    """Create a model and load its weights; eval mode. Names and shapes are compared before memory is allocated."""
    with torch.device("meta"):
        model = kind(config)
    own = model.state_dict()
    tensors = without_parts(weights.tensors, own, kind.config_class.training_parts)
    report = compare(tensors, own, weights.source, added=kind.config_class.added_parts)
    if strict and not report.fits:
        raise WeightsError(misfit_message(report, kind.encoder_of(weights.tensors), kind.encoder_of(own)), report)
    if report.fits and not report.missing and len(own) == sum(1 for _ in (*model.parameters(), *model.buffers())):
        model = model.to_empty(device="cpu")  # the weights hold every value, so none needs initialising
    else:
        model = kind(config)
    load_into(model, weights, strict)
    return model.eval()


def load_into(model: nn.Module, weights: Weights, strict: bool = True) -> LoadReport:
    """Copy weights into a model: a whole model's, or another model's for the part that starts from it (CLIP's).

    A module that is no ``ReferringModel``, such as the published CRIS, is treated as CRIS. Returns what was
    loaded. Raises ValueError for weights of neither kind and, if ``strict``, WeightsError for a misfit; parts that a
    switch adds may be missing as a whole, with a warning.
    """
    kind = kind_of(model)
    # Another model's first: a Swin that classifies has a part "classifier", as AlignFormer has.
    taken = kind.adopt(weights.tensors)
    if taken is None and kind.recognises(weights.tensors):
        taken = Adopted(weights.tensors, "")
    if taken is None:
        beginnings = sorted({name.split(".")[0] for name in weights.tensors})[:8]
        raise ValueError(
            f"{weights.source} holds neither {kind.config_class.title}'s weights "
            f"({', '.join(kind.config_class.parts)}) nor {_starts(kind)}; its "
            f"names begin with {', '.join(beginnings)}"
        )
    own = normalise_names(model.state_dict(), "model")
    state = without_parts(taken.fitting(own), own, kind.config_class.training_parts)
    taken = taken._replace(state=state)
    added = kind.config_class.added_parts
    report = compare(taken.state, own, weights.source, taken.part, taken.optional, added)
    if strict and not report.fits:
        raise WeightsError(misfit_message(report, kind.encoder_of(taken.state), kind.encoder_of(own)), report)
    copy_fitting(taken.state, own, weights.source)
    _remember(model, weights, taken.part, report)
    if report.notice:
        warnings.warn(report.notice, stacklevel=3)
    return report


def _remember(model: Any, weights: Weights, part: str, report: LoadReport) -> None:
    """Note in a model of ours where its weights come from."""
    if not hasattr(model, "ancestry"):
        return
    name = public_name(weights.source, weights.hub_id)
    if part:
        whose = next((whose for whose, other in type(model).starts.values() if other == part), "another model's")
        others = tuple(each for each in model.ancestry if each.whose != whose)
        model.ancestry = (*others, Ancestor(name, weights.hub_id, whose))
    else:
        all_of_it = report.fits and not report.missing
        found = fingerprint(model) if all_of_it else ""
        model.ancestry = (Ancestor(name, weights.hub_id, card=weights.card, fingerprint=found),)


def _starts(kind: Kind) -> str:
    """Of which other models the weights are that a model may start from: "CLIP's"."""
    return " or ".join(whose for whose, _ in kind.starts.values()) or "any that it could start from"


def kind_of(model: nn.Module) -> Kind:
    """The class of a model inside DDP and torch.compile wrappers; CRIS for a module that is no ReferringModel."""
    inner: Any = model
    while not hasattr(type(inner), "recognises"):
        wrapped = inner._modules.get("_orig_mod", inner._modules.get("module"))
        if wrapped is None:
            return registry.model_class(registry.DEFAULT)
        inner = wrapped
    return type(inner)


def read_folder(folder: Path, source: str = "") -> Weights:
    """Read a folder that ``save_pretrained`` wrote. Raises FileNotFoundError, naming the missing files."""
    missing = [name for name in (CONFIG, SAFETENSORS) if not (folder / name).is_file()]
    if missing:
        files = sorted(file.name for file in folder.iterdir() if file.suffix in FILE_SUFFIXES)
        hint = f"; it holds {', '.join(files)}: give the path of one of these" if files else ""
        raise FileNotFoundError(f"folder {folder} lacks {' and '.join(missing)}, which save_pretrained writes{hint}")
    return read_safetensors_model(folder / SAFETENSORS, source or str(folder))


def read_safetensors_model(path: Path, source: str) -> Weights:
    """Read a .safetensors file with its configuration, which is in the metadata or in config.json beside the file.

    ``fastris convert`` writes the first kind, ``save_pretrained`` the second.
    """
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
    """The configuration in ``content``, which was stored beside weights; None if it is not of a known system.

    Raises ValueError for one of a known system that is not valid.
    """
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
    """Download the files that ``push_to_hub`` writes, or find them in huggingface_hub's cache; the folder's path.

    Raises FileNotFoundError where there is no such model or no connection.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, SAFETENSORS, CARD], **options))
    except (OSError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"there is no folder or file {name} here, and Hugging Face gave no model of that id "
            f"({first_line(error)}); accepted are {ACCEPTED}"
        ) from error
