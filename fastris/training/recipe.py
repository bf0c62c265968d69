"""The options of training: the published recipe as defaults, and which of them make a run the run that it is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fastris.data import DATASETS, ReferringDataset
from fastris.evaluation.rules import RULES, Sentences, find_rule
from fastris.models.cris.config import PUBLISHED_OTHER_KEYS, CRISConfig
from fastris.options.declare import extra_option, option
from fastris.options.shared import Amp
from fastris.runtime import distributed
from fastris.training.gpu_settings import GPU_SETTINGS, Recompute, find_setting, parts_for


def _model_keys() -> Iterable[str]:
    """Model options that may stand on the command line beside those of :class:`TrainConfig`."""
    own = {field.name for field in fields(TrainConfig)}
    return [field.name for field in fields(CRISConfig) if field.name not in own]


@dataclass
class TrainConfig:
    """Options under the names of the published YAML files, whose recipe is the default; model keys may be given too."""

    model: str = option("", "cris_r50, cris_r101 or tiny; empty: the model keys of a YAML file, else cris_r50")
    clip_pretrain: str | None = option(None, "CLIP weights to start from: path of RN50.pt, or open_clip's RN50:openai")
    weight: str | None = option(None, "CRIS weights to start from (path, folder or Hugging Face id)")
    dataset: str = option("refcoco", "data set: " + ", ".join(DATASETS))
    data_root: str | None = option(None, "folder of the data set's files; synthetic needs none")
    train_split: str = option("train", "split to train on")
    val_split: str = option("val", "split to validate on")
    val_rule: str = option("cris", "prediction and scoring rule of validation: " + ", ".join(RULES))
    val_sentences: Sentences = option("first", "sentences of each object that validation scores; first as published")
    images: str | None = option(None, "folder of the data set's images, where they are not under data_root")
    format: str | None = option(None, "of its files, where data_root holds several: jsonl, refer, lmdb, parquet")
    on_error: Literal["raise", "skip"] = option("raise", "what to do about references that are unusable")
    input_size: int | None = option(
        None, "side of the letterboxed square; none: the model's, 416 as published", "pixels"
    )
    word_len: int | None = option(None, "length a sentence is cut to; none: the model's, 17 as published", "tokens")

    epochs: int = option(50, "passes over the training references, one sentence of each", "epochs")
    batch_size: int = option(
        64, "references per optimizer step; a last batch that is not full is dropped", "references"
    )
    expressions_per_image: int = option(
        1,
        "of a batch's references, so many are about one image, which is encoded once for all of them; above 1 an epoch "
        "is one pass over the images",
        "references",
    )
    gpu: str | None = option(
        None,
        f"settings for a card of that memory ({', '.join(GPU_SETTINGS)}): accumulate, recompute and fused, where those "
        "are not given; BatchNorm's statistics follow the part of the batch that fits at once",
    )
    accumulate: int = option(
        0,
        "parts that a batch is split into to save memory; BatchNorm then sees one part; 0: as gpu says, else 1",
        "parts",
    )
    recompute: Recompute = option(
        "auto", "activations computed again in backward to save memory; changes no number; auto: as gpu says, else none"
    )
    fused: bool | None = option(None, "update weights in one kernel on CUDA; none: as gpu says, else false")
    find_batch: bool = option(False, "search for the largest part of a batch that fits this GPU, say so, and stop")
    base_lr: float = option(1e-4, "learning rate of all but the CLIP encoders")
    lr_multi: float = option(0.1, "factor on base_lr for the CLIP encoders")
    milestones: tuple[int, ...] = option((35,), "finished epochs after which the learning rate drops", "epochs")
    lr_decay: float = option(0.1, "factor on the learning rate at each milestone")
    weight_decay: float = option(0.0, "Adam's weight decay")
    max_norm: float = option(0.0, "gradients are clipped to this norm; 0: no clipping")
    max_skipped: int = option(
        10,
        "batches in a row whose loss or gradient is not finite, after which the run ends; each is left out",
        "batches",
    )
    published_first_epoch_quirk: bool = option(
        False, "train the CLIP encoders at the full base_lr in the first epoch, as the published code does by accident"
    )
    manual_seed: int = option(0, "seed of weights, order, sentences and dropout")
    amp: Amp = option("auto", "mixed precision; auto: bf16 or else fp16 on CUDA, off on the CPU")
    fp16_accumulation: bool = option(
        False, "sum float16 products in float16 (amp=fp16 on CUDA): faster on GeForce cards, fewer digits"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")

    workers: int | None = option(None, "that read training images; 0: no extra one; none: up to 4", "processes")
    workers_val: int | None = option(None, "that read validation images; 0: no extra one; none: up to 4", "processes")
    pictures: int = option(8, "validation predictions drawn after every epoch; 0: none", "expressions")
    batch_size_val: int = option(64, "segmented at once in validation", "expressions")
    evaluate: bool = option(True, "validate after every epoch, and keep the best weights")
    limit_train: int = option(0, "train on the first so many references; 0: all", "references")
    max_steps: int = option(0, "end the run after so many optimizer steps; 0: after the last epoch", "steps")

    output_folder: Path = option(Path("runs/train"), "folder of the run")
    exp_name: str = option("", "subfolder of output_folder for this run")
    resume: bool | str | None = option(False, "go on with the run in the folder; auto: if there is one; or a path")
    save_every_steps: int = option(500, "between writings of last.pth; 0: at the ends of epochs only", "steps")
    print_freq: int = option(100, "between lines on the console; 0: none", "steps")
    progress: bool = option(True, "show a progress bar on a terminal")
    process_timeout: float = option(10.0, "that one of several processes waits for the others", "minutes")
    tensorboard: bool = option(False, "also write TensorBoard files (pip install 'fastris[tensorboard]')")
    wandb: str | None = option(None, "also log to this Weights & Biases project (pip install 'fastris[wandb]')")
    extra: dict[str, Any] = extra_option(_model_keys)

    def __post_init__(self) -> None:
        self.output_folder, self.milestones = Path(self.output_folder), tuple(self.milestones)
        self._follow_gpu()
        find_rule(self.val_rule)
        at_least = {"epochs": 1, "accumulate": 1, "expressions_per_image": 1, "batch_size_val": 1, "workers": 0,
                    "workers_val": 0, "max_norm": 0, "limit_train": 0, "max_steps": 0, "save_every_steps": 0,
                    "print_freq": 0, "pictures": 0, "max_skipped": 1, "base_lr": 0, "lr_multi": 0,
                    "weight_decay": 0}  # fmt: skip
        for name, smallest in at_least.items():
            if not (getattr(self, name) or 0) >= smallest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {smallest}")
        for name in ("base_lr", "lr_multi", "weight_decay", "max_norm", "lr_decay"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number")
        several = self.expressions_per_image
        if self.batch_size % (self.accumulate * several) or self.micro_batch < 2:
            of = f" of {several} references for each image" if several > 1 else ""
            raise ValueError(
                f"batch_size={self.batch_size} with accumulate={self.accumulate} must split into equal parts of 2 "
                f"or more references{of}, because BatchNorm needs two; change one of them"
            )
        if self.process_timeout <= 0:
            raise ValueError(f"process_timeout={self.process_timeout} must be above 0 minutes")
        if self.published_first_epoch_quirk and not self.lr_multi:
            raise ValueError("published_first_epoch_quirk needs lr_multi above 0, got 0")

    def _follow_gpu(self) -> None:
        """Fill in what the user left to `gpu`, so that the saved options say what was done."""
        setting = find_setting(self.gpu) if self.gpu else None
        if self.accumulate == 0:
            several = max(1, self.expressions_per_image)
            self.accumulate = (
                parts_for(self.batch_size, setting.micro_batch, distributed.world_size(), several) if setting else 1
            )
        if self.recompute == "auto":
            self.recompute = setting.recompute if setting else "none"
        if self.fused is None:
            self.fused = setting.fused if setting else False

    @property
    def micro_batch(self) -> int:
        """References in one forward and backward pass, over all processes."""
        return self.batch_size // self.accumulate

    @property
    def folder(self) -> Path:
        """Where the run lives: `output_folder/exp_name`."""
        return self.output_folder.expanduser() / self.exp_name


def model_config(config: TrainConfig) -> CRISConfig:
    """The preset or the YAML file's model keys, with the single options over it.

    Raises:
        ValueError: keys are missing or do not fit together.
    """
    own = {name: getattr(config, name) for name in ("input_size", "word_len") if getattr(config, name) is not None}
    source = "the training configuration"
    has_keys = bool(config.extra.keys() & set(_model_keys()))
    if config.model or not has_keys:
        base = CRISConfig.preset(config.model or "cris_r50").to_dict()
    else:
        base = {"clip_pretrain": config.clip_pretrain}
        source += ", which names no preset (model=cris_r50),"
    return CRISConfig.from_dict(base | config.extra | own, source)


def passed_over(config: TrainConfig) -> list[str]:
    """Keys of a published YAML file that are accepted, but that say nothing to one process on one device."""
    return sorted(config.extra.keys() & PUBLISHED_OTHER_KEYS)


def describe_data(dataset: ReferringDataset, count: int) -> dict[str, Any]:
    """What identifies the first `count` references: name, split, number, and a digest of a sample of their text."""
    sample = [dataset.reference(index) for index in range(0, count, max(1, count // 16))]
    text = repr([(str(r.ref_id), str(r.image_id), r.sentences) for r in sample])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {"dataset": dataset.name, "train_split": dataset.split, "references": count, "text_digest": digest}


def identity(config: TrainConfig, model: CRISConfig, **resolved: Any) -> dict[str, Any]:
    """The settings that a resumed run must share with the one that it goes on with.

    Everything that changes a number on the way: not where files lie, how long to train, or what to log. `resolved`
    replaces options by what they came to (amp=auto became bf16) and adds what only the data knows (its size).
    """
    names = ("accumulate", "batch_size", "base_lr", "lr_multi", "milestones", "lr_decay", "weight_decay", "max_norm",
             "published_first_epoch_quirk", "manual_seed")  # fmt: skip
    if config.fp16_accumulation:
        resolved["fp16_accumulation"] = True
    if config.expressions_per_image > 1:
        resolved["expressions_per_image"] = config.expressions_per_image
    flat = model.to_dict()
    flat.update({f"clip.{name}": value for name, value in flat.pop("clip").items()})
    return {**{name: getattr(config, name) for name in names}, **flat, **resolved}
