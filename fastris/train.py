"""Training: the published recipe, in one process, on one device, and never lost.

:func:`train` reads from top to bottom as a run goes. Every step is a row of `log.csv`; `last.pth` holds a state from
which `--resume` continues as if nothing had happened; `best.pth` holds the weights with the best validation mIoU.
"""

from __future__ import annotations

import math
import shlex
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastris import find_batch
from fastris.data import ReferringDataset, load_dataset
from fastris.data.samples import EpochSampler, TrainSamples, worker_init
from fastris.data.tokens import PAD, tokenize
from fastris.evaluate import evaluate
from fastris.expressions import training_samples
from fastris.gpu_settings import fused_on, out_of_memory_explained, set_recompute
from fastris.interrupt import StopSignal, leave_signals_to_parent
from fastris.metrics import Scores, batch_iou
from fastris.models.config import CLIP_PRESETS, CLIPConfig
from fastris.optim import Precision, build_optimizer, build_scheduler, choose_device, choose_workers
from fastris.recipe import TrainConfig, describe_data, identity, model_config, passed_over
from fastris.runlog import RunLog, StepRecord, memory_mib
from fastris.runstate import (
    BEST,
    LAST,
    LOG,
    OPTIONS,
    Run,
    find_checkpoint,
    resume_command,
    save_options,
    seed_everything,
)
from fastris.trackers import picture_path
from fastris.validation import card_of, draw_predictions, pictured

if TYPE_CHECKING:
    from fastris.models.cris import CRIS


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

    Raises:
        ValueError: options that do not fit, a folder that already holds a run, data that cannot fill one batch.
        FileNotFoundError: nothing to resume, no weights or data where the options say.
        RuntimeError: the loss or a weight stopped being finite; `last.pth` is from before that.
    """
    checkpoint = find_checkpoint(config.folder, config.resume)
    train_set = _load(config, config.train_split) if train_set is None else train_set
    if config.evaluate and val_set is None:
        val_set = _load(config, config.val_split)
    run, samples, sampler = prepare(config, train_set, checkpoint)
    position, scores = run.position, None
    with StopSignal("finishing this step, then saving; once more stops at once") as stop, _open_log(config, run) as log:
        save_options(config, run.folder)
        _introduce(config, run, samples, sampler, log)
        if checkpoint is None:
            _save(run, log)
        try:
            while position.epoch < config.epochs and not _out_of_steps(config, run):
                finished = train_epoch(config, run, samples, sampler, log, stop)
                _save(run, log)
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
    return TrainResult(run.folder, run.model, position.epoch, run.saved_step, position.best_iou, scores, stop.requested)


def prepare(
    config: TrainConfig, train_set: ReferringDataset, checkpoint: Path | None
) -> tuple[Run, TrainSamples, EpochSampler]:
    """A run in its first state, or in the one that `checkpoint` holds, and the samples and batches it trains on."""
    device = choose_device(config.device)
    precision = Precision.choose(config.amp, device)
    seed_everything(config.manual_seed)
    model = build_model(config, with_weights=checkpoint is None).to(device)
    set_recompute(model, config.recompute)

    samples = training_samples(config, train_set, model.config)
    count = min(len(train_set), config.limit_train or len(train_set))
    if count < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the {count} training references "
            f"({train_set.name} {train_set.split}), so there is no full batch; give at most {count}"
        )
    sampler = EpochSampler(
        min(len(samples), count), config.manual_seed, config.batch_size // config.expressions_per_image, drop_last=True
    )

    optimizer = build_optimizer(model, config.base_lr, config.lr_multi, config.weight_decay, fused_on(config, device))
    quirk = 1 / config.lr_multi if config.published_first_epoch_quirk else 1.0
    scheduler = build_scheduler(optimizer, config.milestones, config.lr_decay, first_epoch_backbone_factor=quirk)
    recipe = identity(config, model.config, amp=precision.name, **describe_data(train_set, count))
    run = Run(config.folder, model, optimizer, scheduler, precision.scaler(), precision, recipe)
    if checkpoint is not None:
        run.restore(checkpoint)
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
    started = time.perf_counter()
    for batch in _loader(config, samples, sampler, run.precision.device):
        with out_of_memory_explained(config):
            loss, iou = train_step(config, run, batch)
        if not math.isfinite(loss):
            raise RuntimeError(_not_finite(run, loss, batch["index"].tolist()))
        position.advance(loss, iou, _count_cut(samples, batch))
        log.step(_record(run, loss, iou, len(batch["index"]) / (time.perf_counter() - started)))
        if config.save_every_steps and position.step % config.save_every_steps == 0:
            _save(run, log)
        if stop.requested or _out_of_steps(config, run):
            break
        started = time.perf_counter()
    log.end_epoch()
    if position.batch < batches:
        return False
    log.note(
        f"epoch {position.epoch + 1}/{config.epochs} done: mean loss {position.loss_sum / batches:.4f}, "
        f"mean training IoU {100 * position.iou_sum / batches:.1f} %"
    )
    if position.truncated:
        log.note(f"{position.truncated} of its expressions were longer than {samples.word_len} tokens and were cut")
    return True


def train_step(config: TrainConfig, run: Run, batch: dict[str, Tensor]) -> tuple[float, float]:
    """One optimizer step on a batch: its mean loss and its training IoU (a fraction of 1)."""
    device = run.precision.device
    image, tokens, mask = (batch[name].to(device, non_blocking=True) for name in ("image", "tokens", "mask"))
    parts = config.accumulate
    total_loss = total_iou = torch.zeros((), device=device)
    run.optimizer.zero_grad(set_to_none=True)
    for part in zip(image.chunk(parts), tokens.chunk(parts), mask.chunk(parts), strict=True):
        with run.precision.autocast():
            logits, target, loss = run.model(*part)
        run.scaler.scale(loss / parts).backward()
        total_loss = total_loss + loss.detach() / parts
        total_iou = total_iou + batch_iou(logits, target) / parts
    if config.max_norm:
        run.scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.max_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return total_loss.item(), total_iou.item()


def build_model(config: TrainConfig, with_weights: bool = True) -> CRIS:
    """The model that the options describe, with the weights that they start from (none if `with_weights` is false).

    Warns if a model of one of CLIP's own sizes starts without any weights.
    """
    from fastris.checkpoint import load_clip, load_weights
    from fastris.models.cris import CRIS

    model = CRIS(model_config(config))
    if not with_weights:
        return model
    clip = (config.clip_pretrain or "none").lower() != "none"
    if clip:
        load_clip(model, str(config.clip_pretrain))
    if config.weight:
        load_weights(model, config.weight)
    elif not clip and any(model.config.clip == CLIPConfig.preset(name) for name in CLIP_PRESETS):
        warnings.warn(
            "the CLIP encoders start from random weights, which is not the published recipe; to start from CLIP give "
            "clip_pretrain=RN50:openai (or RN101:openai), or the path of OpenAI's RN50.pt",
            stacklevel=2,
        )
    return model


def run(config: TrainConfig) -> int:
    """`fastris train`: train, say where everything is and what to do next. 130 if it was interrupted, else 0."""
    if config.find_batch:
        return find_batch.run(config)
    result = train(config)
    folder = result.folder
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


def _load(config: TrainConfig, split: str) -> ReferringDataset:
    return load_dataset(config.dataset, split, config.data_root, on_error=config.on_error)


def _loader(config: TrainConfig, samples: TrainSamples, sampler: EpochSampler, device: torch.device) -> DataLoader:
    """A new loader each epoch, so that its workers know the epoch; it draws from no global random numbers."""
    return DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=choose_workers(config.workers),
        pin_memory=device.type == "cuda",
        worker_init_fn=_init_worker,
        generator=torch.Generator(),
    )


def _init_worker(worker_id: int) -> None:
    leave_signals_to_parent()
    worker_init(worker_id)


def _open_log(config: TrainConfig, run: Run) -> RunLog:
    step, in_epoch = run.position.step, run.position.batch > 0
    return RunLog(
        run.folder,
        last_step=step,
        last_validation=step - 1 if in_epoch else step,
        print_freq=config.print_freq,
        tensorboard=config.tensorboard,
        wandb=config.wandb,
        settings=run.recipe,
        progress=config.progress,
    )


def _count_cut(samples: TrainSamples, batch: dict[str, Tensor]) -> int:
    """Expressions of the batch that lost words: their row is full, and a sentence that was cut gives this very row."""
    cut = 0
    for index, row in zip(batch["index"].flatten().tolist(), batch["tokens"].flatten(0, -2), strict=True):
        if row[-1] != PAD:
            rows, truncated = tokenize(samples.dataset.reference(index).sentences, samples.word_len)
            cut += any(flag and torch.equal(row, other) for other, flag in zip(rows, truncated, strict=True))
    return cut


def _record(run: Run, loss: float, iou: float, images_per_s: float) -> StepRecord:
    position, rates = run.position, run.learning_rates
    return StepRecord(
        step=position.step,
        epoch=position.epoch + 1,
        batch=position.batch,
        loss=loss,
        iou=iou,
        lr=rates["head"],
        lr_backbone=rates["backbone"],
        images_per_s=round(images_per_s, 2),
        memory_mib=memory_mib(run.precision.device),
    )


def _introduce(config: TrainConfig, run: Run, samples: TrainSamples, sampler: EpochSampler, log: RunLog) -> None:
    data, position, model = samples.dataset, run.position, run.model
    weights = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    log.note(f"{weights:.1f} M parameters on {run.precision.device}, amp {run.precision.name}; run in {run.folder}")
    count = f"{run.recipe['references']} references of {data.name} {data.split}"
    log.note(f"{count}, {sampler.batches_per_epoch} batches of {config.batch_size} an epoch")
    for problem, refs in data.skipped.items():
        log.note(f"{len(refs)} references left out: {problem}")
    if keys := passed_over(config):
        log.note(f"one process on one device has no use for {', '.join(keys)} (BatchNorm is in sync by itself)")
    if position.step:
        log.note(f"going on after step {position.step}: epoch {position.epoch + 1}, batch {position.batch + 1}")


def _out_of_steps(config: TrainConfig, run: Run) -> bool:
    return bool(config.max_steps) and run.position.step >= config.max_steps


def _save(run: Run, log: RunLog) -> None:
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
        progress=config.progress,
    )
    epoch, step = run.position.epoch + 1, run.position.step
    draw_predictions(picture_path(run.folder, epoch), val_set, result, f"epoch {epoch}, step {step}")
    return result.scores


def _keep_if_best(run: Run, scores: Scores, log: RunLog) -> None:
    position = run.position
    log.validation(position.step, position.epoch + 1, scores)
    if scores.best_by >= position.best_iou:
        position.best_iou = scores.best_by
        run.save_best(scores.as_dict(), card_of(run, scores))


def _not_finite(run: Run, loss: float, indices: list[int]) -> str:
    position = run.position
    return (
        f"the loss is {loss} at step {position.step + 1} (epoch {position.epoch + 1}, batch {position.batch + 1}), in "
        f"the batch of references {indices}; {run.folder / LAST} is from step {run.saved_step}, before it. Try a lower "
        "base_lr, max_norm=1 or amp=off"
    )
