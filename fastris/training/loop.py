"""Training: the published recipe, in one process or in one for each GPU, and never lost.

:func:`train` reads from top to bottom as a run goes. Every step is a row of `log.csv`; `last.pth` holds a state from
which `--resume` continues as if nothing had happened, `previous.pth` the one before it; `best.pth` holds the weights
with the best validation mIoU. Started by `torchrun`, the same code runs in every process, on its share of each batch;
the main process alone writes and prints.
"""

from __future__ import annotations

import math
import shlex
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastris.data import ReferringDataset, load_split
from fastris.data.samples import EpochSampler, TrainSamples, digest
from fastris.evaluation.evaluate import evaluate
from fastris.evaluation.metrics import Scores, batch_iou
from fastris.models.base import HEAD
from fastris.models.registry import create
from fastris.runtime import distributed
from fastris.runtime.device import Precision, choose_device, choose_workers, layout_for
from fastris.runtime.interrupt import StopSignal
from fastris.training import find_batch, skipped
from fastris.training.expressions import references_of, training_samples
from fastris.training.feed import Feed, count_cut
from fastris.training.gpu_settings import fp16_sums, fused_on, out_of_memory_explained, set_recompute
from fastris.training.log import RunLog, StepRecord, memory_mib
from fastris.training.notices import end_if_unreadable, go_on, introduce, open_log, stop_signal, told_where_it_stands
from fastris.training.optim import build_optimizer, build_scheduler
from fastris.training.recipe import TrainConfig, describe_data, identity, model_config
from fastris.training.run import (
    BEST,
    LAST,
    LOG,
    OPTIONS,
    Run,
    SavedState,
    find_checkpoint,
    own_folder,
    resume_command,
    seed_everything,
)
from fastris.training.trackers import picture_path
from fastris.training.validation import card_of, draw_predictions, pictured

if TYPE_CHECKING:
    from fastris.models.cris.model import CRIS


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` returns: where the run stands, and its model (on the training device, as of the last step)."""

    folder: Path
    model: CRIS
    epoch: int
    step: int
    best_iou: float
    scores: Scores | None
    interrupted: bool


def train(
    config: TrainConfig, train_set: ReferringDataset | None = None, val_set: ReferringDataset | None = None
) -> TrainResult:
    """Train a model as `config` says, on its data sets or on the ones given. Ctrl-C finishes the step and saves.

    In a process that `torchrun` started it is one of the processes of a run, each of which must call it alike.

    Raises:
        ValueError: options that do not fit, a folder that already holds a run or that another process is running one
            in, data that cannot fill one batch, a sample that cannot be read (the run was saved just before it).
        FileNotFoundError: nothing to resume, no weights or data where the options say.
        OSError: the disk is full, or the folder cannot be written to.
        RuntimeError: the loss or a weight stopped being finite; `last.pth` is from before that. Or a process that reads
            images, or another process of the run, has died.
    """
    device = choose_device(config.device)
    with fp16_sums(config, device), distributed.joined(device, config.process_timeout):
        restarted = any(distributed.gather(distributed.restarted()))
        with own_folder(config.folder, patience=min(120, 30 * config.process_timeout) if restarted else 0):
            return _train(config, train_set, val_set, restarted)


def _train(
    config: TrainConfig, train_set: ReferringDataset | None, val_set: ReferringDataset | None, restarted: bool
) -> TrainResult:
    checkpoint = distributed.from_main(lambda: find_checkpoint(config.folder, config.resume, restarted))
    with distributed.together():
        train_set = load_split(config, config.train_split) if train_set is None else train_set
        if config.evaluate and val_set is None:
            val_set = load_split(config, config.val_split)
    run, samples, sampler = prepare(config, train_set, checkpoint)
    position, scores = run.position, None
    with stop_signal() as stop, open_log(config, run) as log, told_where_it_stands(run):
        introduce(config, run, samples, sampler, log)
        if checkpoint is None:
            _save(run, log)
        try:
            while position.epoch < config.epochs and not _out_of_steps(config, run):
                finished = train_epoch(config, run, samples, sampler, log, stop)
                _save(run, log)
                stop.requested = any(distributed.gather(stop.requested))
                if stop.requested:
                    break
                if config.evaluate and val_set is not None:
                    with stop.at_once():
                        scores = _evaluate(config, run, val_set)
                    _keep_if_best(run, scores, log)
                if finished:
                    run.finish_epoch()
                _save(run, log)
        except KeyboardInterrupt:
            stop.requested = True
            if (
                distributed.world_size() > 1
            ):  # the others may wait for this one, so it does not return as if all were well
                log.note(f"stopped; {run.last} is from step {run.saved_step}. Go on with {go_on(run)}")
                raise
    return TrainResult(run.folder, run.model, position.epoch, run.saved_step, position.best_iou, scores, stop.requested)


def prepare(
    config: TrainConfig, train_set: ReferringDataset, checkpoint: Path | None
) -> tuple[Run, TrainSamples, EpochSampler]:
    """A run in its first state, or in the one that `checkpoint` holds, and the samples and batches it trains on."""
    saved = None if checkpoint is None else distributed.from_main(lambda: SavedState.read(checkpoint))
    with distributed.together():
        run, samples, sampler = _prepare_alone(config, train_set, saved)
    run.replicate()
    return run, samples, sampler


def _prepare_alone(
    config: TrainConfig, train_set: ReferringDataset, saved: SavedState | None
) -> tuple[Run, TrainSamples, EpochSampler]:
    """All of :func:`prepare` that needs no other process."""
    device = choose_device(config.device)
    precision = Precision.choose(config.amp, device)
    seed_everything(config.manual_seed)
    model = build_model(config, with_weights=saved is None and distributed.is_main())
    model.to(device).to(memory_format=layout_for(device))
    set_recompute(model, config.recompute)
    if distributed.rank():  # each process drops out other elements
        seed_everything(digest(config.manual_seed, distributed.rank()))

    samples = training_samples(config, train_set, model.config)
    count = min(len(train_set), config.limit_train or len(train_set))
    if count < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the {count} training references "
            f"({train_set.name} {train_set.split}), so there is no full batch; give at most {count}"
        )
    sampler = EpochSampler(
        min(len(samples), count),
        config.manual_seed,
        config.batch_size // config.expressions_per_image,
        processes=distributed.world_size(),
        rank=distributed.rank(),
        parts=config.accumulate,
    )

    optimizer = build_optimizer(model, config.base_lr, config.lr_multi, config.weight_decay, fused_on(config, device))
    quirk = 1 / config.lr_multi if config.published_first_epoch_quirk else 1.0
    scheduler = build_scheduler(optimizer, config.milestones, config.lr_decay, first_epoch_factor=quirk)
    recipe = identity(config, model.config, amp=precision.name, **describe_data(train_set, count))
    run = Run(config.folder, model, optimizer, scheduler, precision.scaler(), precision, recipe)
    if saved is not None:
        run.restore(saved)
    return run, samples, sampler


def train_epoch(
    config: TrainConfig, run: Run, samples: TrainSamples, sampler: EpochSampler, log: RunLog, stop: StopSignal
) -> bool:
    """Train from where the run stands to the epoch's end (True), or to a stop signal or `max_steps` (False)."""
    position = run.position
    samples.set_epoch(position.epoch)
    sampler.set_epoch(position.epoch, position.batch)
    batches = sampler.batches_per_epoch
    log.start_epoch(position.epoch + 1, config.epochs, batches, position.batch)
    run.model.train()
    with distributed.together():
        feed = Feed(samples, sampler, choose_workers(config.workers), run.precision.device)
    end_if_unreadable(run, feed.failure, lambda: _save(run, log))
    with feed:
        _train_on(feed, config, run, samples, sampler, log, stop)
    log.end_epoch()
    if position.batch < batches:
        return False
    log.note(
        f"epoch {position.epoch + 1}/{config.epochs} done: mean loss {position.mean_loss:.4f}, "
        f"mean training IoU {100 * position.mean_iou:.1f} %"
    )
    if position.skipped:
        log.note(f"{position.skipped} of its batches were left out; {skipped.SKIPPED} lists them")
    if position.truncated:
        log.note(f"{position.truncated} of its expressions were longer than {samples.word_len} tokens and were cut")
    return True


def _train_on(
    feed: Feed,
    config: TrainConfig,
    run: Run,
    samples: TrainSamples,
    sampler: EpochSampler,
    log: RunLog,
    stop: StopSignal,
) -> None:
    """All steps of :func:`train_epoch`."""
    position = run.position
    started = time.perf_counter()
    for batch in feed:
        signals = (count_cut(samples, batch), stop.requested, feed.failure is not None)
        with out_of_memory_explained(config):
            result = train_step(config, run, batch, *signals)
        cut, stopping, unreadable = result.sums
        if result.applied:
            position.advance(result.loss, result.iou, int(cut))
            log.step(_record(config, run, result, started))
            if config.save_every_steps and position.step % config.save_every_steps == 0:
                _save(run, log)
        else:
            batch_ids = references_of(samples, sampler.whole_batch(position.batch))
            position.skip()
            log.note(skipped.leave_out(run, samples.dataset, batch_ids, result.loss, result.norm, config.max_skipped))
        stop.requested = stop.requested or stopping > 0
        alone = distributed.world_size() == 1  # else a signal that came late counts in the next step, for all at once
        if stopping or (alone and stop.requested) or _out_of_steps(config, run):
            break
        if unreadable:
            end_if_unreadable(run, feed.failure, lambda: _save(run, log))
        started = time.perf_counter()


class StepResult(NamedTuple):
    """What a step found, over the whole batch, the same in all processes.

    Attributes:
        loss: mean over the batch; iou: its training IoU, a fraction of 1; norm: of the gradient before clipping.
        applied: whether the weights were changed. They are not where the loss or the gradient is not finite.
        sums: what the processes handed to :func:`train_step`, summed.
    """

    loss: float
    iou: float
    norm: float
    applied: bool
    sums: tuple[float, ...] = ()


def train_step(config: TrainConfig, run: Run, batch: dict[str, Tensor], *signals: float) -> StepResult:
    """One optimizer step on a batch, of which `batch` is this process's share; `signals` are summed over processes."""
    device = run.precision.device
    image, tokens, mask = (batch[name].to(device, non_blocking=True) for name in ("image", "tokens", "mask"))
    image = image.contiguous(memory_format=layout_for(device))
    parts = config.accumulate
    total_loss = total_iou = torch.zeros((), device=device)
    run.optimizer.zero_grad(set_to_none=True)
    run.statistics.keep()
    for number, part in enumerate(zip(image.chunk(parts), tokens.chunk(parts), mask.chunk(parts), strict=True), 1):
        with run.keeping_gradients_here(more_to_come=number < parts):
            with run.precision.autocast():
                logits, target, loss = run.replica(*part)
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
        if config.max_norm:
            torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), config.max_norm, norm)
        run.scaler.step(run.optimizer)
    else:
        run.statistics.restore()
    run.scaler.update()
    return StepResult(loss, iou, norm_, applied, tuple(sums))


def _gradient_norm(run: Run) -> Tensor:
    gradients = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def build_model(config: TrainConfig, with_weights: bool = True) -> CRIS:
    """The model that the options describe, with the weights that they start from (none if `with_weights` is false).

    Warns where the model says that it should not start without any.
    """
    from fastris.weights.load import load_clip, load_weights

    model = create(model_config(config))
    if not with_weights:
        return model
    clip = (config.clip_pretrain or "none").lower() != "none"
    if clip:
        load_clip(model, str(config.clip_pretrain))
    if config.weight:
        load_weights(model, config.weight)
    elif not clip and (advice := model.config.without_weights()):
        warnings.warn(advice, stacklevel=2)
    return model


def run(config: TrainConfig) -> int:
    """`fastris train`: train, say where everything is and what to do next. 130 if it was interrupted, else 0."""
    if config.find_batch:
        return find_batch.run(config)
    result = train(config)
    folder = result.folder
    if not distributed.is_main():
        return 130 if result.interrupted else 0
    if result.interrupted:
        print(f"stopped; {folder / LAST} is from step {result.step}. Go on with:\n  {resume_command(folder)}")
        return 130
    has_best = (folder / BEST).exists()
    name = "gIoU" if config.val_rule == "gres" else "mIoU"
    weights = folder / (BEST if has_best else LAST)
    data = f"dataset={config.dataset}" + (f" data_root={shlex.quote(config.data_root)}" if config.data_root else "")
    model = shlex.quote(str(weights))
    score = f", best validation {name} {100 * result.best_iou:.2f} %" if has_best else ", not validated"
    print(
        f"done: {result.epoch} epochs, {result.step} steps{score}\n"
        f"  {'best' if has_best else 'last'} weights  {weights}\n"
        f"  last state    {folder / LAST}\n"
        f"  every step    {folder / LOG}\n"
        f"  options       {folder / OPTIONS}\n"
        f"evaluate:  fastris eval model={model} {data} split={config.val_split}\n"
        f'predict:   fastris predict IMAGE "the phrase" model={model}'
    )
    return 0


def _record(config: TrainConfig, run: Run, result: StepResult, started: float) -> StepRecord:
    position, rates = run.position, run.learning_rates
    images_per_s = config.batch_size / (time.perf_counter() - started)
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
    )


def _out_of_steps(config: TrainConfig, run: Run) -> bool:
    return bool(config.max_steps) and run.position.step >= config.max_steps


def _save(run: Run, log: RunLog) -> None:
    with distributed.together():
        log.sync()  # the rows first: a checkpoint must not know of steps that the log has lost
    run.save_last()


def _evaluate(config: TrainConfig, run: Run, val_set: ReferringDataset) -> Scores:
    result = evaluate(
        run.model,
        val_set,
        sentences=config.val_sentences,
        rule=config.val_rule,
        keep=pictured(val_set, config.pictures, config.val_sentences),
        device=run.precision.device,
        workers=choose_workers(config.workers_val),
        batch_size=config.batch_size_val,
        progress=config.progress and distributed.is_main(),
    )
    epoch, step = run.position.epoch + 1, run.position.step
    with distributed.together():
        draw_predictions(picture_path(run.folder, epoch), val_set, result, f"epoch {epoch}, step {step}")
    return distributed.from_main(lambda: result.scores)


def _keep_if_best(run: Run, scores: Scores, log: RunLog) -> None:
    position = run.position
    log.validation(position.step, position.epoch + 1, scores)
    if scores.best_by >= position.best_iou:
        position.best_iou = scores.best_by
        run.save_best(scores.as_dict(), card_of(run, scores))
