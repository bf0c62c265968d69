"""Publish a saved model on the Hugging Face hub: weights, configuration and model card, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastris.models.card import listed, read_head, unique, with_head, with_name
from fastris.models.pretrained import CARD, CONFIG, MAX_TEXT, SAFETENSORS
from fastris.runtime.safetensors_files import CHECKSUMS, read_metadata
from fastris.runtime.storage import first_line
from fastris.weights.card import unknown_card
from fastris.weights.convert import write_model
from fastris.weights.licences import check_licence, missing_licence
from fastris.weights.load import load_model, read_weights
from fastris.weights.private import check_public

_NO_DATASETS = ("folder", "synthetic")
"""Names of data that are no data set's on the hub; the card's text keeps them."""


@dataclass(frozen=True)
class Terms:
    """The licence that its owner gives a model; of a card that has one, an empty licence keeps it."""

    licence: str = ""
    name: str = ""
    link: str = ""


@dataclass(frozen=True)
class Upload:
    """What goes up.

    Attributes:
        repo: USER/NAME on the hub.
        files: name there -> the file here.
        card: the text of the model card among them.
        notes: what the card does not say, a line each.
    """

    repo: str
    files: dict[str, Path]
    card: str
    notes: list[str]


def prepare(source: Path, repo: str, terms: Terms, staging: Path) -> Upload:
    """Check a saved model and write what is to be published into the folder ``staging``. Uses no network.

    The weights are loaded as a whole, so that a damaged or foreign file is noticed here. Of a training checkpoint only
    the weights are taken: no optimizer, no recipe, no state.

    Raises:
        ValueError: no licence, a card that names paths of this machine, weights that are damaged or no whole model.
        FileNotFoundError: no model there.
    """
    weights = read_weights(str(source))
    model = load_model(weights)
    card = _card_beside(source) or weights.card or unknown_card(model.config, str(source))
    check_public(CARD, card)
    notes = lacking(card)
    card = finished_card(card, repo, terms, model.config.system)
    own = source / SAFETENSORS
    write_model(model, staging, "folder", "")
    if own.is_file() and set(read_metadata(own)) <= {"format", CHECKSUMS}:
        shutil.copyfile(own, staging / SAFETENSORS)  # as it is, in half precision, too
    (staging / CARD).write_text(card, encoding="utf-8")
    check_public(CONFIG, (staging / CONFIG).read_text(encoding="utf-8"))
    return Upload(repo, {name: staging / name for name in (CARD, CONFIG, SAFETENSORS)}, card, notes)


def finished_card(card: str, repo: str, terms: Terms, system: str) -> str:
    """The card as it is published: with its licence, the entries that the hub sorts by, and the id in its snippet."""
    head, _ = read_head(card)
    licence = terms.licence or str(head.get("license") or "")
    if not licence:
        raise missing_licence()
    if terms.licence:
        check_licence(terms.licence, terms.name, terms.link)
        card = with_head(card, license=licence, license_name=terms.name or None, license_link=terms.link or None)
    tags = unique([*listed(head, "tags"), "referring-image-segmentation", system])
    usual = {"library_name": "fastris", "pipeline_tag": "image-segmentation"}
    data = [name for name in listed(head, "datasets") if name not in _NO_DATASETS]
    card = with_head(
        card, tags=tags, datasets=data or None, **{name: head.get(name) or value for name, value in usual.items()}
    )
    return with_name(card, repo)


def lacking(card: str) -> list[str]:
    """What readers would look for on the card and not find, a line each."""
    head, _ = read_head(card)
    wanted = {
        "base_model": "what the training started from (base_model)",
        "datasets": "the data (datasets)",
        "model-index": "a score with its rule (model-index)",
    }
    return [f"the card does not say {what}" for name, what in wanted.items() if not head.get(name)]


def upload(made: Upload, *, private: bool = False, overwrite: bool = False, message: str = "") -> str:
    """Publish it in one commit, in a repository that is created if it is missing; the commit's address.

    Raises:
        PermissionError: no token, one that the hub does not accept, or a repository of somebody else.
        FileExistsError: the repository holds such files already, and not ``overwrite``.
        ValueError: ``private`` was asked for, and the repository is public.
        ConnectionError: no network, or the hub gave another error.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    token = get_token()
    if not token:
        raise PermissionError(
            "there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    api = HfApi(token=token, library_name="fastris")
    with _told(made.repo):
        _check_owner(made.repo, api.whoami())
        try:
            _check_repository(api.model_info(made.repo), made, private, overwrite)
        except RepositoryNotFoundError:
            api.create_repo(made.repo, private=private or None)
        operations = [CommitOperationAdd(name, file) for name, file in made.files.items()]
        done = api.create_commit(made.repo, operations, commit_message=message or "Model saved by fastris")
    return str(done.commit_url)


def _check_owner(repo: str, me: dict[str, Any]) -> None:
    owner = repo.partition("/")[0]
    own = [str(me.get("name")), *(str(each.get("name")) for each in me.get("orgs") or ())]
    if owner not in own:
        mine = ", ".join(f"{name}/..." for name in own)
        raise PermissionError(f"repo={repo} belongs to {owner}, and the token to {own[0]}; give one of {mine}")


def _check_repository(info: Any, made: Upload, private: bool, overwrite: bool) -> None:
    if private and not info.private:
        raise ValueError(
            f"repo={made.repo} exists and is public, and private=true was asked for; make it private on the hub, or "
            "choose another name"
        )
    there = sorted({file.rfilename for file in info.siblings or ()} & made.files.keys())
    if there and not overwrite:
        raise FileExistsError(
            f"repo={made.repo} holds {', '.join(there)} already; overwrite=true puts a new version over them (the hub "
            "keeps the old one), or choose another name"
        )


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub and of the network into one line each."""
    from huggingface_hub.errors import HfHubHTTPError

    network: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__)  # requests' errors, httpx's, by its version
    try:
        yield
    except (PermissionError, FileExistsError):
        raise
    except ValueError as error:  # the hub's own check of the card's metadata has several lines
        raise ValueError(" ".join(str(error).split())) from error
    except network as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = " ".join(first_line(error).split())[:200]
        if status == 401:
            raise PermissionError(
                "the hub does not accept the token; log in again with `hf auth login`, or set HF_TOKEN to a token that "
                "may write"
            ) from error
        if status == 403:
            raise PermissionError(
                f"the token may not write to repo={repo}; give it write access on the hub, or choose a repository of "
                "your own"
            ) from error
        if status is not None:
            raise ConnectionError(f"the hub refused repo={repo} ({reason}); nothing was published") from error
        raise ConnectionError(
            f"the hub cannot be reached ({reason}), so nothing was published; dry_run=true needs no network"
        ) from error


def _card_beside(source: Path) -> str:
    """The card in a model's or run's folder, or beside a file, which its owner may have edited; empty if none."""
    path = source / CARD if source.is_dir() else source.with_suffix(".md")
    if not path.is_file() or path.stat().st_size > MAX_TEXT:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")
