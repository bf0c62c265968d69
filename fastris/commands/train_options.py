"""The options of `fastris train`, with the published recipe as defaults, and their checks. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastris.data.options import DataOptions
from fastris.evaluation.rules import RULES, Sentences, find_rule
from fastris.models import registry
from fastris.options.declare import extra_option, option
from fastris.options.shared import Amp
from fastris.runtime.processes import world_size
from fastris.training.gpu_settings import GPU_SETTINGS, Recompute, find_setting, parts_for


def model_keys() -> Iterable[str]:
    """Model options that may stand on the command line beside those of :class:`TrainConfig`."""
    own = {field.name for field in fields(TrainConfig)}
    return [name for name in registry.model_keys() if name not in own]


@dataclass
class TrainConfig(DataOptions):
    """Options under the names of the published YAML files, whose recipe is the default; model keys may be given too."""

    model: str = option("", "cris_r50, cris_r101 or tiny; empty: the model keys of a YAML file, else cris_r50")
    clip_pretrain: str | None = option(None, "CLIP weights to start from: path of RN50.pt, or open_clip's RN50:openai")
    weight: str | None = option(None, "CRIS weights to start from (path, folder or Hugging Face id)")
    train_split: str = option("train", "split to train on")
    val_split: str = option("val", "split to validate on")
    val_rule: str = option("cris", "prediction and scoring rule of validation: " + ", ".join(RULES))
    val_sentences: Sentences = option("first", "sentences of each object that validation scores; first as published")
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
    extra: dict[str, Any] = extra_option(model_keys)

    def __post_init__(self) -> None:
        super().__post_init__()
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
            self.accumulate = parts_for(self.batch_size, setting.micro_batch, world_size(), several) if setting else 1
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
