"""``fastris push``: a saved model and its card to the Hugging Face hub. Imports no torch by itself."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fastris.options.declare import REQUIRED, option
from fastris.runtime.plain import printable
from fastris.weights.licences import CHOICE, check_licence

if TYPE_CHECKING:
    from fastris.weights.push import Upload

_REPO = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?/[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?")
_MOST = 96  # characters of an id, on the hub

GUESSES = {
    "repo_id": "repo",
    "hub_model_id": "repo",
    "name": "repo",
    "weight": "model",
    "folder": "model",
    "checkpoint": "model",
    "public": "private",
    "visibility": "private",
    "force": "overwrite",
    "commit_message": "message",
    "dry": "dry_run",
}


@dataclass
class PushConfig:
    """Publishes a saved model on the Hugging Face hub: its weights, its configuration and its model card, nothing else.

    The licence is yours to choose, and none is assumed. Weights that started from OpenAI's CLIP or Microsoft's Swin
    started from files under the MIT licence, from BERT under Apache 2.0: all three allow any licence for what is made
    of them, and ask that their notice is kept. RefCOCO's expressions are about photographs of MS COCO, whose
    annotations are CC BY 4.0 and whose pictures belong to their photographers, some of whom exclude commercial use.
    What that means for weights is not settled; docs/sharing.md has more. Nothing here is legal advice.
    """

    guesses: ClassVar[dict[str, str]] = GUESSES

    model: Path = option(
        REQUIRED, "folder of save_pretrained or of a finished run, or a checkpoint (.pth, .safetensors)"
    )
    repo: str = option(REQUIRED, "USER/NAME or ORGANISATION/NAME on the hub; it is created if it is missing")
    license: str = option(
        "", f"as the hub calls it: {CHOICE}; licence= is the same", default_text="the card's, else asked for"
    )
    license_name: str = option("", "of license=other: its short name")
    license_link: str = option("", "of license=other: where its text is")
    private: bool = option(False, "create the repository for you alone")
    dry_run: bool = option(False, "show the files, their sizes and the card, without network and token")
    overwrite: bool = option(False, "put a new version over the files that the repository holds")
    unfinished: bool = option(False, "publish the best weights so far of a run that has not come to its end")
    message: str = option("", "of the commit on the hub", default_text="Model saved by fastris")

    @staticmethod
    def expand(args: Sequence[str]) -> list[str]:
        """`licence` is `license`, as both are English."""
        return [re.sub(r"^(--)?licence((?:[_-](?:name|link))?)(?==|$)", r"\1license\2", arg) for arg in args]

    def __post_init__(self) -> None:
        self.model = self.model.expanduser()
        if not _REPO.fullmatch(self.repo) or len(self.repo) > _MOST or ".." in self.repo or "--" in self.repo:
            raise ValueError(
                f"repo={self.repo} must be USER/NAME: your name or an organisation's on the hub, then letters, digits, "
                f"'-', '_' and '.', at most {_MOST} characters"
            )
        if self.license or self.license_name or self.license_link:
            check_licence(self.license or "other", self.license_name, self.license_link)


def run(config: PushConfig) -> int:
    """`fastris push`: check, show and publish a model. Raises as :mod:`fastris.weights.push` does."""
    if not config.model.exists():
        raise FileNotFoundError(
            f"model={config.model} does not exist; give the folder that save_pretrained, `fastris convert` or "
            "`fastris train` has written"
        )
    from fastris.training.checkpoints import unfinished
    from fastris.weights.push import Terms, prepare, upload

    reason = "" if config.unfinished else unfinished(config.model)
    if reason:
        raise ValueError(
            f"model={config.model} is a run that {reason}; go on with `fastris train --resume {config.model}`, or pass "
            "unfinished=true to publish its best weights so far"
        )
    terms = Terms(config.license, config.license_name, config.license_link)
    with tempfile.TemporaryDirectory(prefix="fastris-push-") as staging:
        made = prepare(config.model, config.repo, terms, Path(staging))
        _show(made, config)
        if config.dry_run:
            print("dry run: nothing was published")
            return 0
        url = upload(made, private=config.private, overwrite=config.overwrite, message=config.message)
    print(printable(f"published: {url}"))
    print(f'in Python: fastris.Segmenter.from_pretrained("{config.repo}")')
    return 0


def _show(made: Upload, config: PushConfig) -> None:
    """The files with their sizes, what the card lacks and, in a dry run, the card."""
    sizes = {name: file.stat().st_size for name, file in made.files.items()}
    seen = "private" if config.private else "public, if it is new"
    print(f"{made.repo} ({seen}): {len(sizes)} files, {_size(sum(sizes.values()))}")
    for name, size in sizes.items():
        print(f"  {name:<18} {_size(size):>10}")
    for note in made.notes:
        print(f"  note: {note}")
    if config.dry_run:
        lines = "\n".join(printable(line) for line in made.card.splitlines())
        print(f"\n{lines}\n")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
