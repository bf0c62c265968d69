"""``fastris train``: train a model as options say, with the published recipe as default. Imports no torch by itself."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from fastris.commands.train_options import TrainConfig
from fastris.data.options import selection
from fastris.evaluation.rules import find_rule

if TYPE_CHECKING:
    from fastris.data import ReferringDataset
    from fastris.training.loop import TrainResult

__all__ = ["TrainConfig", "run", "train"]


def train(
    options: TrainConfig, train_set: ReferringDataset | None = None, val_set: ReferringDataset | None = None
) -> TrainResult:
    """Train a model as `options` say, on their data sets or on the ones given. Ctrl-C finishes the step and saves.

    In a process that `torchrun` started it is one of the processes of a run, each of which must call it alike.

    Raises:
        ValueError: options that do not fit, a folder that already holds a run or that another process is running one
            in, data that cannot fill one batch, a sample that cannot be read (the run was saved just before it).
        FileNotFoundError: nothing to resume, no weights or data where the options say.
        OSError: the disk is full, or the folder cannot be written to.
        RuntimeError: the loss or a weight stopped being finite; `last.pth` is from before that. Or a process that reads
            images, or another process of the run, has died.
    """
    from fastris.commands.assemble import assemble, choose_precision, fp16_sums
    from fastris.runtime import distributed
    from fastris.training import loop
    from fastris.training.checkpoints import find_checkpoint, own_folder

    precision = choose_precision(options)
    with fp16_sums(options, precision), distributed.joined(precision.device, options.process_timeout):
        restarted = any(distributed.gather(distributed.restarted()))
        with own_folder(options.folder, patience=min(120, 30 * options.process_timeout) if restarted else 0):
            checkpoint = distributed.from_main(lambda: find_checkpoint(options.folder, options.resume, restarted))
            return loop.train(assemble(options, train_set, val_set, precision=precision, checkpoint=checkpoint))


def run(options: TrainConfig) -> int:
    """Train, and print where everything is and what to do next. 130 if it was interrupted, else 0.

    With `find_batch`, search for the largest micro-batch that fits instead, and print that.
    """
    if options.find_batch:
        from fastris.commands import find_batch

        return find_batch.run(options)
    from fastris.runtime import distributed

    result = train(options)
    if distributed.is_main():
        print(_stopped(result) if result.interrupted else _done(options, result))
    return 130 if result.interrupted else 0


def _stopped(result: TrainResult) -> str:
    """Of a run that was interrupted: what is saved, and how to go on."""
    from fastris.training.checkpoints import LAST, resume_command

    last, command = result.folder / LAST, resume_command(result.folder)
    return f"stopped; {last} is from step {result.step}. Go on with:\n  {command}"


def _done(options: TrainConfig, result: TrainResult) -> str:
    """Of a run that has ended: its best score, its files, and the commands that use its weights."""
    from fastris.training.checkpoints import BEST, LAST, LOG, OPTIONS
    from fastris.training.curves import CURVES

    folder = result.folder
    has_best = (folder / BEST).exists()
    name = find_rule(options.val_rule).best_by
    weights = folder / (BEST if has_best else LAST)
    model = shlex.quote(str(weights))
    score = f", best validation {name} {100 * result.best_iou:.2f} %" if has_best else ", not validated"
    return (
        f"done: {result.epoch} epochs, {result.step} steps{score}\n"
        f"  {'best' if has_best else 'last'} weights  {weights}\n"
        f"  last state    {folder / LAST}\n"
        f"  every step    {folder / LOG}\n"
        f"  curves        {folder / CURVES}\n"
        f"  options       {folder / OPTIONS}\n"
        f"evaluate:  {eval_command(options, weights)}\n"
        f'predict:   fastris predict IMAGE "the phrase" model={model}\n'
        f"in Python: fastris.Segmenter.from_pretrained({str(weights)!r})"
    )


def eval_command(options: TrainConfig, weights: Path) -> str:
    """The command that scores weights on what the run was validated on, and as it was: the score is the same."""
    from fastris.data.held_out import HELD_OUT, find_record

    held_out = find_record(str(weights)) is not None
    given = {
        "model": weights,
        **selection(options),
        "split": HELD_OUT if held_out else options.val_split,
        "sentences": options.val_sentences,
        "rule": options.val_rule,
        "on_error": options.on_error,
    }
    usual = {"sentences": "all", "rule": options.recipe.val_rule, "on_error": "raise"}
    told = {name: "true" if value is True else str(value) for name, value in given.items() if value is not None}
    wanted = [f"{name}={shlex.quote(value)}" for name, value in told.items() if value != usual.get(name)]
    return " ".join(["fastris eval", *wanted])
