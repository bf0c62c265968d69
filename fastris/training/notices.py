"""Messages of a training run: its first lines, and its errors, which say what is saved and how to go on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from fastris.data import DataError
from fastris.data.held_out import RECORD, Part
from fastris.data.samples import EpochSampler, TrainSamples
from fastris.runtime import distributed
from fastris.runtime.interrupt import StopSignal
from fastris.training.checkpoints import resume_command, save_options, save_text
from fastris.training.feed import DeadWorker, Unreadable, dead_worker
from fastris.training.log import LogSettings, RunLog, SilentLog
from fastris.training.run import Run


def stop_signal() -> StopSignal:
    """A stop signal that says what the first Ctrl-C does; only the main process says so."""
    text = "finishing this step, then saving; once more stops at once"
    return StopSignal(text if distributed.is_main() else "")


@contextmanager
def open_log(settings: LogSettings, run: Run) -> Iterator[RunLog]:
    """The run's log in the main process; it and the file of options are the first things written to the folder."""
    step, in_epoch = run.position.step, run.position.batch > 0
    log = cast(RunLog, SilentLog())
    with distributed.together():
        if distributed.is_main():
            log = RunLog(
                run.folder,
                last_step=step,
                last_validation=step - 1 if in_epoch else step,
                print_freq=settings.print_freq,
                tensorboard=settings.tensorboard,
                wandb=settings.wandb,
                settings=run.recipe,
                progress=settings.progress,
                metrics=run.model.metric_names,
            )
            if settings.options:
                save_options(settings.options, run.folder)
            if settings.held_out:
                save_text(settings.held_out, run.folder / RECORD)
    with log:
        yield log


def introduce(
    run: Run, samples: TrainSamples, sampler: EpochSampler, batch_size: int, ignored: Sequence[str], log: RunLog
) -> None:
    """Log what is trained, on what and where, and the keys of an options file that were `ignored`."""
    data, position, model = samples.dataset, run.position, run.model
    weights = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    where = str(run.precision.device)
    if (processes := distributed.world_size()) > 1:
        where = f"{processes} processes ({where.partition(':')[0]}), BatchNorm in sync"
    log.note(f"{weights:.1f} M parameters on {where}, amp {run.precision.name}; run in {run.folder}")
    count = f"{run.recipe['references']} references of {data.name} {data.split}"
    log.note(f"{count}, {sampler.batches_per_epoch} batches of {batch_size} an epoch")
    if isinstance(data, Part):
        held = len(data.whole) - len(data)
        log.note(f"{held} references of other images are held out for validation; {run.folder / RECORD} says which")
    for problem, refs in data.skipped.items():
        log.note(f"{len(refs)} references left out: {problem}")
    if ignored:
        told = ", ".join(ignored)
        log.note(f"{told} mean nothing here (torchrun says which processes there are; BatchNorm is in sync)")
    if position.step:
        log.note(f"going on after step {position.step}: epoch {position.epoch + 1}, batch {position.batch + 1}")


@contextmanager
def told_where_it_stands(run: Run) -> Iterator[None]:
    """Within this block, an error that tells of a dead process also says what is saved, and how to go on from it."""
    try:
        yield
    except RuntimeError as error:
        left = f"{run.last} is from step {run.saved_step}; go on with {go_on(run)}"
        if (worker := dead_worker(error)) is not None:
            raise RuntimeError(f"{worker}. {left}") from error
        if (lost := distributed.lost_process(error, left)) is not None:
            raise lost from error
        raise


def go_on(run: Run) -> str:
    """The command that continues the run."""
    command = resume_command(run.folder)
    return command if distributed.world_size() == 1 else f"torchrun's options as before and -m {command}"


def end_if_unreadable(run: Run, failure: Unreadable | DeadWorker | None, save: Callable[[], None]) -> None:
    """End the run, saved as of its last step, if any process has met a sample that cannot be read, or lost a worker."""
    if any(distributed.gather(failure is not None)):
        save()
        left = f"{run.last} is from step {run.saved_step}"
        with distributed.together():
            if isinstance(failure, DeadWorker):
                raise RuntimeError(f"{failure.message}. {left}; go on with {go_on(run)}")
            if failure is not None:
                another = " (with on_error=skip as a new run)" if "pass on_error='skip'" in failure.message else ""
                raise DataError(
                    f"{failure.message}. The next batch needs reference {failure.index}, so the run ends here; "
                    f"{left}. Mend it, then go on with {go_on(run)}{another}"
                ) from RuntimeError(failure.where)
