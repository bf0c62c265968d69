"""Where a model's weights come from, for its card: what they were loaded from, and whether they changed since.

Only what others may know is kept: a published id, or a file's name without its folders.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastris.models.card import changed_card, listed, metadata_of, model_card, unique

_PLACES = 16
"""Values of a tensor that its fingerprint looks at: a training step changes nearly all of them."""

_MICROSOFT = {
    "swin_base_patch4_window12_384_22k.pth": "microsoft/swin-base-patch4-window12-384-in22k",
    "swin_base_patch4_window7_224_22k.pth": "microsoft/swin-base-patch4-window7-224-in22k",
}
"""Microsoft's own files of Swin, and their ids on the Hugging Face hub."""


@dataclass(frozen=True)
class Ancestor:
    """What some or all of a model's weights were loaded from.

    Attributes:
        name: the source, as others may read it.
        hub_id: its id on the Hugging Face hub; empty if it has none that is known.
        whose: of which other model it is, such as "CLIP's"; empty for a whole model of ours.
        card: its model card, or empty.
        fingerprint: of the model just after loading; empty where the source did not give all of the weights.
    """

    name: str
    hub_id: str = ""
    whose: str = ""
    card: str = ""
    fingerprint: str = ""

    @property
    def in_words(self) -> str:
        """The source in words: "CLIP's RN50:openai"."""
        also = f" (on the hub: {self.hub_id})" if self.hub_id not in ("", self.name) else ""
        return f"{self.whose} {self.name}{also}".strip()

    @property
    def base_models(self) -> list[str]:
        """The ids of what training started from: its own, or else, of a model that has none, those on its card."""
        return [self.hub_id] if self.hub_id else listed(metadata_of(self.card), "base_model")

    @property
    def datasets(self) -> list[str]:
        """The data sets that its card says it was trained on."""
        return listed(metadata_of(self.card), "datasets")


def public_name(source: str, hub_id: str = "") -> str:
    """A source as others may read it: an id on the hub, open_clip's name and tag, or a file's name alone."""
    if hub_id == source or re.fullmatch(r"[\w-]+:[\w-]+", source):
        return source
    path = Path(source).expanduser()
    return "a local folder" if path.is_dir() else path.name if path.suffix else "weights in memory"


def published_id(path: Path) -> str:
    """The id on the Hugging Face hub of a file as OpenAI or Microsoft published it; empty for any other file.

    OpenAI's archives of CLIP are known by name and SHA-256, Microsoft's files of Swin by name.
    """
    if path.name in _MICROSOFT:
        return _MICROSOFT[path.name]
    if not re.fullmatch(r"RN\d+(x\d+)?\.pt", path.name):
        return ""
    import open_clip

    entry = open_clip.get_pretrained_cfg(path.stem, "openai") or {}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return hub_id_of(entry) if f"/{digest.hexdigest()}/" in str(entry.get("url")) else ""


def hub_id_of(entry: Mapping[str, Any]) -> str:
    """The id on the hub that open_clip has for its weights; empty if it has none."""
    return "/".join(str(entry.get("hf_hub") or "").split("/")[:2])


def fingerprint(model: Any) -> str:
    """A digest of a ReferringModel's configuration, and of some values of every weight that goes to others."""
    digest = hashlib.sha256(json.dumps(model.config.for_others().to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in model.state_for_others().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().reshape(-1)
        some = values[:: max(1, len(values) // _PLACES)].contiguous().cpu()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def saved_card(model: Any) -> str:
    """The card of a ReferringModel as it is saved: the one it was loaded with, with a note if it has changed since."""
    ancestry = model.ancestry
    whole = next((each for each in ancestry if not each.whose), None)
    if whole is None or not whole.card or len(ancestry) > 1:
        lines = [f"- {each.in_words}" for each in ancestry]
        told = "The training started from\n\n" + "\n".join(lines) + "\n\n" if lines else ""
        body = f"## Training\n\n{told}How these weights were trained is not on record."
        return model_card(model.config, body, base_models=base_models(ancestry), datasets=datasets(ancestry))
    if whole.fingerprint == fingerprint(model):
        return whole.card
    try:
        return changed_card(whole.card, whole.in_words, whole.base_models)
    except ValueError:  # its metadata cannot be read: the text still tells
        return f"{whole.card.rstrip()}\n\nThe weights were changed after they were loaded from {whole.in_words}.\n"


def base_models(ancestry: Sequence[Ancestor]) -> list[str]:
    """The ids on the hub of what training started from."""
    return unique(each for ancestor in ancestry for each in ancestor.base_models)


def datasets(ancestry: Sequence[Ancestor]) -> list[str]:
    """The data sets that the weights had seen before."""
    return unique(each for ancestor in ancestry for each in ancestor.datasets)


def to_plain(ancestry: Sequence[Ancestor]) -> list[dict[str, str]]:
    """As plain values, for a checkpoint."""
    return [asdict(each) for each in ancestry]


def from_plain(content: Any) -> tuple[Ancestor, ...]:
    """Back from :func:`to_plain`; of anything else, nothing."""
    entries = content if isinstance(content, list) else []
    names = set(Ancestor.__dataclass_fields__)
    return tuple(Ancestor(**each) for each in entries if isinstance(each, dict) and each.keys() == names)
