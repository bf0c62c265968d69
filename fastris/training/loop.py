"""The training loop: epochs, steps, checkpoints and validations, in one process or in one for each GPU.

:func:`train` reads from top to bottom as a run goes; what it works on are :class:`.parts.Parts`. Every step is a row of
`log.csv`; `last.pth` holds a state from which `--resume` continues as if nothing had happened, `previous.pth` the one
before it; `best.pth` holds the weights with the best validation mIoU. Started by `torchrun`, the same code runs in
every process, on its share of each batch; the main process alone writes and prints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastris.evaluation.metrics import Scores, batch_iou
from fastris.models.base import HEAD, Origin
from fastris.runtime import distributed
from fastris.runtime.interrupt import StopSignal
from fastris.training import skipped
from fastris.training.card import card_of
from fastris.training.expressions import references_of
from fastris.training.feed import Feed, count_cut
from fastris.training.log import RunLog, StepRecord, memory_mib
from fastris.training.memory import out_of_memory_explained
from fastris.training.notices import end_if_unreadable, go_on, introduce, open_log, told_where_it_stands
from fastris.training.parts import Batches, Parts, Plan
from fastris.training.paths import agree_on_kernels
from fastris.training.run import Run
from fastris.training.validation import validate

if TYPE_CHECKING:
    from fastris.models.base import ReferringModel


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` returns: where the run stands, and its model (on the training device, as of the last step)."""

    folder: Path
    model: ReferringModel
    epoch: int
    step: int
    best_iou: float
    scores: Scores | None
    interrupted: bool


def train(parts: Parts) -> TrainResult:
    """Train until the plan is done. Ctrl-C finishes the step and saves.

    Where a run has several processes each of them must call it alike.

    Raises:
        ValueError: a sample cannot be read (the run was saved just before it).
        OSError: the disk is full, or the folder cannot be written to.
        RuntimeError: the loss or a weight stopped being finite; `last.pth` is from before that. Or a process that reads
            images, or another process of the run, has died.
    """
    plan, run, batches, position, scores = parts.plan, parts.run, parts.batches, parts.run.position, None
    with parts.stop as stop, open_log(parts.log, run) as log, told_where_it_stands(run):
        introduce(run, batches.samples, batches.sampler, plan.batch_size, parts.ignored, log)
        for notice in parts.notices:
            log.note(notice)
        agree_on_kernels(run.precision.device, _dtypes_of(parts))
        if parts.is_new:
            _save(run, log)
        try:
            while position.epoch < plan.epochs and not plan.out_of_steps(position.step):
                if plan.out_of_patience(position.stale):
                    log.note(f"ends early: the last {position.stale} validations were no better (patience)")
                    break
                finished = train_epoch(parts, log, stop)
                _save(run, log)
                stop.requested = any(distributed.gather(stop.requested))
                if stop.requested:
                    break
                if parts.validation is not None:
                    with stop.at_once():
                        scores = validate(run, parts.validation)
                    _keep_if_best(run, scores, log)
                if finished:
                    run.finish_epoch()
                _save(run, log)
        except KeyboardInterrupt:
            stop.requested = True
            if distributed.world_size() > 1:  # the others may wait for this one: do not return as if all were well
                log.note(f"stopped; {run.last} is from step {run.saved_step}. Go on with {go_on(run)}")
                raise
    return TrainResult(run.folder, run.model, position.epoch, run.saved_step, position.best_iou, scores, stop.requested)


def _dtypes_of(parts: Parts) -> list[torch.dtype]:
    """What the run computes in; a validation computes in float32."""
    own, validated = parts.run.precision.dtype, [] if parts.validation is None else [torch.float32]
    return list(dict.fromkeys([own, *validated]))


def train_epoch(parts: Parts, log: RunLog, stop: StopSignal) -> bool:
    """Train from where the run stands to the epoch's end (True), or to a stop signal or `max_steps` (False)."""
    run, epochs, position = parts.run, parts.plan.epochs, parts.run.position
    samples, sampler = parts.batches.samples, parts.batches.sampler
    samples.set_epoch(position.epoch)
    sampler.set_epoch(position.epoch, position.batch)
    log.start_epoch(position.epoch + 1, epochs, sampler.batches_per_epoch, position.batch)
    run.train()
    with distributed.together():
        feed = Feed(samples, sampler, parts.batches.workers, run.precision.device)
    end_if_unreadable(run, feed.failure, lambda: _save(run, log))
    with feed:
        _train_on(feed, parts, log, stop)
    log.end_epoch()
    if position.batch < sampler.batches_per_epoch:
        return False
    log.note(
        f"epoch {position.epoch + 1}/{epochs} done: mean loss {position.mean_loss:.4f}, "
        f"mean training IoU {100 * position.mean_iou:.1f} %"
    )
    if position.skipped:
        log.note(f"{position.skipped} of its batches were left out; {skipped.SKIPPED} lists them")
    if position.truncated:
        log.note(f"{position.truncated} of its expressions were longer than {samples.word_len} tokens and were cut")
    return True


def _train_on(feed: Feed, parts: Parts, log: RunLog, stop: StopSignal) -> None:
    """All steps of :func:`train_epoch`."""
    plan, run, samples, position = parts.plan, parts.run, parts.batches.samples, parts.run.position
    started = time.perf_counter()
    for batch in feed:
        signals = (count_cut(samples, batch), stop.requested, feed.failure is not None)
        with out_of_memory_explained(parts.memory):
            result = train_step(plan, run, batch, *signals)
        cut, stopping, unreadable = result.sums
        if result.applied:
            position.advance(result.loss, result.iou, int(cut))
            run.follow()
            log.step(_record(plan.batch_size, run, result, started))
            run.finish_batch()
            if plan.saves_after(position.step):
                _save(run, log)
        else:
            left_out = _references_in(parts.batches, position.batch)
            position.skip()
            run.finish_batch()
            log.note(skipped.leave_out(run, samples.dataset, left_out, result.loss, result.norm, plan.max_skipped))
        stop.requested = stop.requested or stopping > 0
        alone = distributed.world_size() == 1  # else a signal that came late counts in the next step, for all at once
        if stopping or (alone and stop.requested) or plan.out_of_steps(position.step):
            break
        if unreadable:
            end_if_unreadable(run, feed.failure, lambda: _save(run, log))
        started = time.perf_counter()


def _references_in(batches: Batches, number: int) -> list[int]:
    """The references of the epoch's batch of that number, over all processes."""
    return references_of(batches.samples, batches.sampler.whole_batch(number))


class StepResult(NamedTuple):
    """What a step found, over the whole batch, the same in all processes.

    Attributes:
        loss: mean over the batch; iou: its training IoU, a fraction of 1; norm: of the gradient before clipping.
        applied: whether the weights were changed. They are not where the loss or the gradient is not finite.
        sums: what the processes handed to :func:`train_step`, summed.
        metrics: what the model tells of the step besides its loss.
    """

    loss: float
    iou: float
    norm: float
    applied: bool
    sums: tuple[float, ...] = ()
    metrics: Mapping[str, float] = MappingProxyType({})


def train_step(plan: Plan, run: Run, batch: dict[str, Tensor], *signals: float) -> StepResult:
    """One optimizer step on a batch, of which `batch` is this process's share; `signals` are summed over processes."""
    device = run.precision.device
    image, tokens, mask = (batch[name].to(device, non_blocking=True) for name in ("image", "tokens", "mask"))
    image = image.contiguous(memory_format=run.layout)
    parts = plan.accumulate
    total_loss = total_iou = torch.zeros((), device=device)
    run.model.zero_grad(set_to_none=True)  # also of parameters that no group updates
    run.statistics.keep()
    told = _told(run.model, batch)
    given: list[Any] = [image, tokens, mask, *told.values()]
    for number, part in enumerate(zip(*(each.chunk(parts) for each in given), strict=True), 1):
        with run.keeping_gradients_here(more_to_come=number < parts):
            with run.precision.autocast():
                logits, target, loss = run.replica(*part[:3], **dict(zip(told, part[3:], strict=True)))
            run.scaler.scale(loss / parts).backward()
        total_loss = total_loss + loss.detach() / parts
        total_iou = total_iou + batch_iou(logits, target) / parts
    run.scaler.unscale_(run.optimizer)
    norm = _gradient_norm(run)
    found = torch.stack([total_loss.double(), total_iou.double(), norm.double()])
    found = torch.cat([found, torch.tensor(signals, dtype=torch.float64, device=device)])
    loss, iou, norm_, *sums = distributed.sum_over_processes(found).tolist()
    loss, iou, norm_ = (value / distributed.world_size() for value in (loss, iou, norm_))
    # A gradient that is not finite is the loss scaler's own business where there is one: it lowers its scale.
    applied = math.isfinite(loss) and (math.isfinite(norm_) or run.scaler.is_enabled())
    if applied:
        if plan.max_norm:
            torch.nn.utils.clip_grads_with_norm_(_updated(run), plan.max_norm, norm)
        run.scaler.step(run.optimizer)
    else:
        run.statistics.restore()
    run.scaler.update()
    return StepResult(loss, iou, norm_, applied, tuple(sums), run.model.take_metrics())


def _told(model: ReferringModel, batch: dict[str, Tensor]) -> dict[str, Origin | Tensor]:
    """What the model's loss asks for besides image, tokens and mask, by the name of its argument.

    Which expressions share an image or a reference, where it compares expressions; what of the images is no border of a
    letterbox, where it looks at the background.
    """
    device, told = next(model.parameters()).device, dict[str, Origin | Tensor]()
    if model.instance_contrast:
        references, images = batch["index"], batch["image_id"]
        if references.ndim == 2:  # several expressions about each image
            images = images[:, None].expand_as(references)
        told["origin"] = Origin(images.flatten().to(device), references.flatten().to(device))
    if model.asks_known and "known" in batch:
        told["known"] = batch["known"].to(device, non_blocking=True)
    return told


def _gradient_norm(run: Run) -> Tensor:
    gradients = [parameter.grad for parameter in _updated(run) if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _updated(run: Run) -> list[Tensor]:
    """The parameters in a group of the optimizer, in the model's order; the loss scaler has unscaled only these."""
    grouped = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    return [parameter for parameter in run.model.parameters() if id(parameter) in grouped]


def _record(batch_size: int, run: Run, result: StepResult, started: float) -> StepRecord:
    position, rates = run.position, run.learning_rates
    images_per_s = batch_size / (time.perf_counter() - started)
    return StepRecord(
        step=position.step,
        epoch=position.epoch + 1,
        batch=position.batch,
        loss=result.loss,
        iou=result.iou,
        lr=rates[HEAD],
        lr_backbone=next((rate for name, rate in rates.items() if name != HEAD), rates[HEAD]),
        images_per_s=round(images_per_s, 2),
        memory_mib=memory_mib(run.precision.device),
        metrics=dict(result.metrics),
    )


def _save(run: Run, log: RunLog) -> None:
    with distributed.together():
        log.sync()  # the rows first: a checkpoint must not know of steps that the log has lost
        card = card_of(run, None) if distributed.is_main() else ""
    run.save_last(card)


def _keep_if_best(run: Run, scores: Scores, log: RunLog) -> None:
    position = run.position
    log.validation(position.step, position.epoch + 1, scores)
    position.stale = 0 if scores.best_by > position.best_iou else position.stale + 1
    if scores.best_by >= position.best_iou:
        position.best_iou = scores.best_by
        run.save_best(scores.as_dict(), card_of(run, scores))
