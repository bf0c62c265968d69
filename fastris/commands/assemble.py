"""The options of `fastris train` become the parts of a run, here and nowhere else: each part has its function."""

from __future__ import annotations

import hashlib
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from fastris.commands.fitting import cut_batch, misfit, open_data, used_references
from fastris.commands.train_options import TrainConfig, model_keys
from fastris.data import ReferringDataset
from fastris.data.held_out import Part, record_of
from fastris.data.samples import EpochSampler, digest
from fastris.models import registry
from fastris.models.base import ReferringModel, is_head
from fastris.models.config import ModelConfig
from fastris.runtime import distributed
from fastris.runtime.device import Precision, choose_device, choose_workers, layout_for
from fastris.runtime.float16_sums import allow_fp16_accumulation, fp16_accumulation_obstacle
from fastris.runtime.randomness import seed_everything
from fastris.training.averaging import AveragedWeights
from fastris.training.checkpoints import SavedState
from fastris.training.expressions import training_samples
from fastris.training.freezing import freeze
from fastris.training.gpu_settings import MemoryUse
from fastris.training.log import LogSettings
from fastris.training.memory import set_recompute
from fastris.training.notices import stop_signal
from fastris.training.optim import CosineSchedule, build_optimizer, build_poly_scheduler, build_scheduler
from fastris.training.optim import Schedule as LRSchedule
from fastris.training.parts import Batches, Parts, Plan
from fastris.training.run import Run
from fastris.training.validation import Validation


def assemble(
    options: TrainConfig,
    train_set: ReferringDataset | None = None,
    val_set: ReferringDataset | None = None,
    *,
    precision: Precision | None = None,
    checkpoint: Path | None = None,
) -> Parts:
    """The parts of a run in its first state, or in the one that `checkpoint` holds. Writes nothing.

    Args:
        train_set, val_set: in place of the data sets that the options name.
        precision: as :func:`choose_precision` gives it, where it is known already.

    Raises:
        ValueError: options that do not fit each other or the data; a checkpoint of another run.
        FileNotFoundError: no weights or data where the options say.
    """
    precision = precision or choose_precision(options)
    with distributed.together():
        train_set, val_set = open_data(options, train_set, val_set)
        options, notices = cut_batch(options, train_set)
        validation = None if val_set is None else make_validation(options, val_set)
    saved = None if checkpoint is None else distributed.from_main(lambda: SavedState.read(checkpoint))
    with distributed.together():
        model = make_model(options, precision.device, with_weights=saved is None and distributed.is_main())
        batches = make_batches(options, train_set, model.config, tells_known=model.asks_known)
        run = make_run(options, precision, model, train_set, batches.sampler.batches_per_epoch)
        if saved is not None:
            run.restore(saved)
    run.replicate()
    return Parts(
        make_plan(options),
        run,
        batches,
        validation,
        log_settings(options, val_set),
        memory_use(options),
        stop_signal(),
        is_new=saved is None,
        ignored=tuple(passed_over(options)),
        notices=notices,
    )


def choose_precision(options: TrainConfig) -> Precision:
    """The device that the run computes on, and in which precision."""
    return Precision.choose(options.amp, choose_device(options.device))


def fp16_sums(options: TrainConfig, precision: Precision) -> AbstractContextManager[None]:
    """The context of a run in which float16 products are summed as `fp16_accumulation` says.

    Raises:
        ValueError: that setting would do nothing: on this device, or in this precision.
    """
    if not options.fp16_accumulation:
        return nullcontext()
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": torch.float32}
    obstacle = fp16_accumulation_obstacle(precision.device, names[precision.name])
    if obstacle:
        raise ValueError(f"fp16_accumulation=true would do nothing: {obstacle}. Leave it out, or give amp=fp16 on CUDA")
    return allow_fp16_accumulation(True, precision.device)


def make_plan(options: TrainConfig) -> Plan:
    """How long to train, and how a step is made."""
    return Plan(
        epochs=options.epochs,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        max_norm=options.max_norm,
        max_skipped=options.max_skipped,
        max_steps=options.max_steps,
        patience=options.patience,
        save_every_steps=options.save_every_steps,
    )


def make_validation(options: TrainConfig, val_set: ReferringDataset) -> Validation:
    """How the run is validated on `val_set`."""
    return Validation(
        val_set,
        rule=options.val_rule,
        sentences=options.val_sentences,
        pictures=options.pictures,
        batch_size=options.batch_size_val,
        workers=choose_workers(options.workers_val),
        progress=options.progress,
    )


def make_model(options: TrainConfig, device: torch.device, with_weights: bool) -> ReferringModel:
    """The model on its device, from the run's seed; from here on each process draws random numbers of its own."""
    seed_everything(options.manual_seed)
    model = place_model(options, device, with_weights)
    if distributed.rank():  # each process drops out other elements
        seed_everything(digest(options.manual_seed, distributed.rank()))
    return model


def place_model(options: TrainConfig, device: torch.device, with_weights: bool) -> ReferringModel:
    """:func:`build_model` on a device, in the layout and with the recomputation that a run there has."""
    model = build_model(options, with_weights=with_weights)
    model.to(device).to(memory_format=layout_for(device))
    set_recompute(model, options.recompute)
    freeze(model, options.frozen)
    if options.instance_contrast and not model.contrasts_instances:
        raise ValueError(
            f"instance_contrast={options.instance_contrast} would do nothing: {model.config.title} has no loss that "
            "contrasts instances. Leave it out"
        )
    model.instance_contrast = options.instance_contrast
    return model


def build_model(options: TrainConfig, with_weights: bool = True) -> ReferringModel:
    """The model that the options describe, with the weights that they start from (none if `with_weights` is false).

    Warns where the model says that it should not start without any.
    """
    from fastris.weights.load import load_encoder, load_weights

    model: ReferringModel = registry.create(model_config(options))
    if not with_weights:
        return model
    given = {name: getattr(options, name) for name in ("clip_pretrain", "swin_pretrain", "bert_pretrain")}
    given = {name: source for name, source in given.items() if (source or "none").lower() != "none"}
    for name, source in given.items():
        load_encoder(model, source, name)
    if options.weight:
        try:
            load_weights(model, options.weight)
        except ValueError as error:
            raise misfit(options, model.config) or error from None
    elif not given.keys() >= model.starts.keys() and (advice := model.config.without_weights()):
        warnings.warn(advice, stacklevel=2)
    return model


def model_config(options: TrainConfig) -> ModelConfig:
    """The preset or the YAML file's model keys, with the single options over it.

    Raises:
        ValueError: keys are missing or do not fit together.
    """
    own = {name: getattr(options, name) for name in ("input_size", "word_len") if getattr(options, name) is not None}
    source = "the training configuration"
    has_keys = bool(options.extra.keys() & set(model_keys()))
    if options.model or not has_keys:
        base = registry.preset(options.model or "cris_r50").to_dict()
    else:
        base = {"clip_pretrain": options.clip_pretrain} if options.clip_pretrain else {}
        source += ", which names no preset (model=cris_r50),"
    return registry.read_config(base | options.extra | own, source)


def make_batches(
    options: TrainConfig, train_set: ReferringDataset, model: ModelConfig, *, tells_known: bool = False
) -> Batches:
    """The samples that the run trains on, and which of them make a batch.

    `tells_known`: they tell where a letterbox's border is, as the model's `asks_known` has it.

    Raises:
        ValueError: they do not fill one batch.
    """
    samples = training_samples(
        train_set,
        model,
        options.manual_seed,
        several=options.expressions_per_image,
        batch_size=options.batch_size,
        references=options.limit_train or None,
        augment=options.augment,
        tells_known=tells_known,
    )
    count = used_references(options, train_set)
    if count < options.batch_size:
        raise ValueError(
            f"batch_size={options.batch_size} is larger than the {count} training references "
            f"({train_set.name} {train_set.split}), so there is no full batch; give at most {count}"
        )
    sampler = EpochSampler(
        min(len(samples), count),
        options.manual_seed,
        options.batch_size // options.expressions_per_image,
        processes=distributed.world_size(),
        rank=distributed.rank(),
        parts=options.accumulate,
    )
    return Batches(samples, sampler, choose_workers(options.workers))


def make_run(
    options: TrainConfig,
    precision: Precision,
    model: ReferringModel,
    train_set: ReferringDataset,
    steps_per_epoch: int,
) -> Run:
    """Model, optimizer, schedule and loss scaler, with what identifies the run."""
    optimizer = make_optimizer(options, model, precision.device)
    data = describe_data(train_set, used_references(options, train_set))
    return Run(
        folder=options.folder,
        model=model,
        optimizer=optimizer,
        scheduler=make_scheduler(options, optimizer, steps_per_epoch),
        rates_by_step=options.schedule != "steps",
        average=AveragedWeights(model, options.ema) if options.ema else None,
        frozen=options.frozen,
        data_id=hub_data(options),
        scaler=precision.scaler(),
        precision=precision,
        layout=layout_for(precision.device),
        recipe=identity(options, model.config, amp=precision.name, **data),
    )


def make_optimizer(options: TrainConfig, model: ReferringModel, device: torch.device) -> Optimizer:
    """Over the model's parameter groups: `head` at `base_lr`, all others at `base_lr * lr_multi`."""
    groups = {name: [each for each in group if each.requires_grad] for name, group in model.parameter_groups().items()}
    rates = {name: options.base_lr if is_head(name) else options.base_lr * options.lr_multi for name in groups}
    fused = bool(options.fused) and device.type == "cuda"
    return build_optimizer(groups, rates, options.weight_decay, fused=fused, optimizer=options.optimizer)


def make_scheduler(options: TrainConfig, optimizer: Optimizer, steps_per_epoch: int) -> LRSchedule:
    """The learning rates of a run: by epochs, or by the steps of all its epochs, whether or not max_steps ends it."""
    if options.schedule == "poly":
        return build_poly_scheduler(optimizer, options.epochs * steps_per_epoch)
    if options.schedule == "cosine":
        steps = options.epochs * steps_per_epoch
        return CosineSchedule(optimizer, steps, round(options.warmup * steps))
    quirk = 1 / options.lr_multi if options.published_first_epoch_quirk else 1.0
    first_epoch = {str(group["name"]): quirk for group in optimizer.param_groups if not is_head(group["name"])}
    return build_scheduler(optimizer, options.milestones, options.lr_decay, first_epoch=first_epoch)


def describe_data(dataset: ReferringDataset, count: int) -> dict[str, Any]:
    """What identifies the first `count` references: name, split, number, and a digest of a sample of their text."""
    sample = [dataset.reference(index) for index in range(0, count, max(1, count // 16))]
    text = repr([(str(r.ref_id), str(r.image_id), r.sentences) for r in sample])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {"dataset": dataset.name, "train_split": dataset.split, "references": count, "text_digest": digest}


def hub_data(options: TrainConfig) -> str:
    """The id of the options' data set on the Hugging Face hub; empty for files of this machine."""
    root = options.data_root or ""
    return "/".join(root.removeprefix("hf://").split("@")[0].split("/")[:2]) if root.startswith("hf://") else ""


def identity(options: TrainConfig, model: ModelConfig, **resolved: Any) -> dict[str, Any]:
    """The settings that a resumed run must share with the one that it goes on with.

    Everything that changes a number on the way: not where files lie, how long to train, or what to log. `resolved`
    replaces options by what they came to (amp=auto became bf16) and adds what only the data knows (its size).
    """
    names = ("accumulate", "batch_size", "base_lr", "lr_multi", "milestones", "lr_decay", "weight_decay", "max_norm",
             "published_first_epoch_quirk", "manual_seed")  # fmt: skip
    if options.fp16_accumulation:
        resolved["fp16_accumulation"] = True
    if options.optimizer != "adam":
        resolved["optimizer"] = options.optimizer
    if options.schedule != "steps":  # whose rates depend on the number of steps, and so on that of epochs
        resolved |= {"schedule": options.schedule, "epochs": options.epochs}
    resolved |= {name: value for name in ("warmup", "freeze", "ema", "augment") if (value := getattr(options, name))}
    if options.instance_contrast:
        resolved["instance_contrast"] = options.instance_contrast
    if options.expressions_per_image > 1:
        resolved["expressions_per_image"] = options.expressions_per_image
    flat: dict[str, Any] = {}
    for name, value in model.to_dict().items():
        nested = isinstance(value, dict)
        flat.update({f"{name}.{key}": part for key, part in value.items()} if nested else {name: value})
    return {**{name: getattr(options, name) for name in names}, **flat, **resolved}


def log_settings(options: TrainConfig, val_set: ReferringDataset | None) -> LogSettings:
    """What is logged, and where to."""
    return LogSettings(
        options_text(options),
        options.print_freq,
        options.tensorboard,
        options.wandb,
        options.progress,
        held_out=record_of(val_set) if isinstance(val_set, Part) else "",
    )


def options_text(options: TrainConfig) -> str:
    """The options as YAML, from which `fastris train .../config.yaml --resume` repeats them; without `resume`."""
    import yaml

    values = asdict(options)
    values.update(values.pop("extra"))
    values.pop("resume")
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def memory_use(options: TrainConfig) -> MemoryUse:
    """What decides how much memory a step needs."""
    return MemoryUse(
        options.batch_size,
        options.accumulate,
        options.recompute,
        options.gpu,
        processes=distributed.world_size(),
        system=options.system,
        switches=options.switches,
    )


def passed_over(options: TrainConfig) -> list[str]:
    """Keys of a published YAML file that are accepted, but that say nothing to one process on one device."""
    return sorted(options.extra.keys() & registry.published_besides())
