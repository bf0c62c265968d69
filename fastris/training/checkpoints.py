"""The folder of a run: who may write into it, which checkpoint in it a run goes on from, and how that is read."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastris.runtime import distributed
from fastris.runtime.runlock import locked

LAST, PREVIOUS, BEST, LOG, OPTIONS = "last.pth", "previous.pth", "best.pth", "log.csv", "config.yaml"


class SavedState(NamedTuple):
    """What `Run.save_last` has written, read back from `path`; `note` says if another file was damaged."""

    path: Path
    content: dict[str, Any]
    note: str = ""

    @property
    def processes(self) -> int:
        """Number of processes of the run that wrote it."""
        return 1 + len(self.content.get("rng_of_others", []))

    @classmethod
    def read(cls, path: Path) -> SavedState:
        """Read `path`; where it is the `last.pth` of a run and damaged, the `previous.pth` beside it.

        Every byte is held against the file's checksums.

        Raises:
            ValueError: the file is damaged and there is no other one, or it holds no training state.
        """
        from fastris.weights.load import load_torch

        previous, note = path.with_name(PREVIOUS), ""
        try:
            state = load_torch(path)
        except ValueError as error:
            if path.name != LAST or not previous.is_file():
                raise
            try:
                state = load_torch(previous)
            except ValueError as worse:
                raise ValueError(f"{error}. And {worse}; or start a new run in another folder") from worse
            note = f"{error}. Going on from the checkpoint before it, {previous}"
            path = previous
        needed = {"state_dict", "optimizer", "scheduler", "scaler", "rng", "recipe", "step", "batch"}
        lacking = sorted(needed - set(state)) if isinstance(state, dict) else sorted(needed)
        if lacking:
            raise ValueError(
                f"resume: {path} lacks {', '.join(lacking)}, so it is no state of a training run (that is in its "
                f"{LAST}); to start a new run from its weights, give weight={path} instead of resume"
            )
        return cls(path, state, note)


def check_same_recipe(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError that names every setting in which a checkpoint and the run that wants to resume from it differ."""
    names = sorted(saved.keys() | now.keys())
    changed = [
        f"{name}={_shown(saved.get(name))}, now {_shown(now.get(name))}"
        for name in names
        if saved.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"resume: {path} was trained with {'; '.join(changed)}. These settings change the run: give the same ones, "
            f"or start a new run in another folder from its weights with weight={path}"
        )


def _shown(value: Any) -> str:
    return "(not set)" if value is None else repr(value)


@contextmanager
def own_folder(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Within this block `folder` is this run's alone. The main process takes it, on behalf of all of them.

    What killed runs left there half written goes. `patience`: seconds to wait for a run that has the folder; a file
    server may take that long to notice that the machine of a killed one is gone.

    Raises:
        ValueError: another run has it.
        OSError: nothing can be written into it.
    """
    with ExitStack() as stack:
        with distributed.together():
            if distributed.is_main():
                _check_writable(folder)
                if stack.enter_context(locked(folder, ("output_folder", "exp_name"), patience)):
                    _clear(folder)
        yield


def _clear(folder: Path) -> None:
    from fastris.data.held_out import RECORD
    from fastris.runtime.storage import remove_leftovers
    from fastris.weights.card import CARD

    for name in (LAST, PREVIOUS, BEST, LOG, "val.csv", OPTIONS, CARD, RECORD, "curves.html"):
        remove_leftovers(folder / name)


def find_checkpoint(folder: Path, resume: bool | str | None, restarted: bool = False) -> Path | None:
    """The checkpoint to go on from, or None to start a new run in `folder`.

    `resume`: False or None for a new run; True for the folder's `last.pth`; "auto" for that if it is there, else a new
    run; or the path of a checkpoint or of another run's folder. Where `torchrun` has `restarted` the processes, the
    folder's own checkpoint is the one, whatever `resume` says.

    Of a folder that others may write into the answer can be out of date: call it within :func:`own_folder`.

    Raises:
        ValueError: a new run would overwrite the one that the folder holds.
        FileNotFoundError: there is nothing to resume.
    """
    own = _newest(folder)
    holds_run = own.exists() or (folder / BEST).exists() or _has_rows(folder / LOG)
    if restarted and own.exists():
        return own
    if not resume or (resume == "auto" and not own.exists()):
        if holds_run:
            raise ValueError(
                f"output_folder: {folder} already holds a run; go on with it by --resume, or choose another "
                "output_folder or exp_name for a new one"
            )
        return None
    path = own if resume is True or resume == "auto" else Path(resume).expanduser()
    path = _newest(path) if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"resume: there is no checkpoint {path}; give resume=PATH of a {LAST}, or leave it out to start a new run"
        )
    if holds_run and path.resolve().parent != folder.resolve():
        raise ValueError(f"resume: {path} belongs to another run than the one in {folder}; choose a new output_folder")
    return path


def unfinished(folder: Path) -> str:
    """What keeps a run's folder from being that of a finished run, in words; empty for a finished one, or for no run.

    Raises:
        ValueError: its state or its options cannot be read.
    """
    import yaml

    from fastris.runtime.storage import damaged
    from fastris.runtime.torch_files import read_pytorch

    last, options = _newest(folder), folder / OPTIONS
    if not last.is_file() or not options.is_file():
        return "has no weights yet" if (folder / LOG).is_file() and not (folder / BEST).is_file() else ""
    try:
        wanted, state = yaml.safe_load(options.read_text(encoding="utf-8")), read_pytorch(last, values=False)
        epoch, step, stale = (int(state[name]) for name in ("epoch", "step", "stale"))
        epochs, steps, patience = (int(wanted[name] or 0) for name in ("epochs", "max_steps", "patience"))
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise damaged(last, "state of a run", error) from error
    if epoch >= epochs or (steps and step >= steps) or (patience and stale >= patience):
        return ""
    return f"has come to epoch {epoch} of {epochs}, step {step}"


def _newest(folder: Path) -> Path:
    """The folder's `last.pth`, or its `previous.pth` where there is only that."""
    return folder / (PREVIOUS if (folder / PREVIOUS).exists() and not (folder / LAST).exists() else LAST)


def _check_writable(folder: Path) -> None:
    """OSError, before any work is done, where a checkpoint could not be written later. Creates nothing that stays."""
    existing = next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"output_folder: nothing can be written into {existing} ({error.strerror}), so no checkpoint could be "
            "saved; choose another output_folder",
        ) from error


def _has_rows(log: Path) -> bool:
    """Whether the log has rows besides its header, which is all that a run leaves that fails before its first step."""
    return log.exists() and len(log.read_bytes().splitlines()) > 1


def save_options(text: str, folder: Path) -> None:
    """Write a command's options, as YAML, to `config.yaml`: `fastris train .../config.yaml --resume` repeats them."""
    save_text(text, folder / OPTIONS)


def save_text(text: str, file: Path) -> None:
    """Write a text in one step."""
    from fastris.weights.load import replacing

    with replacing(file) as path:
        path.write_text(text, encoding="utf-8")


def resume_command(folder: Path) -> str:
    """The command line that continues the run in `folder`."""
    return f"fastris train {shlex.quote(str(folder / OPTIONS))} --resume"
