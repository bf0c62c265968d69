"""The options of `fastris train`, with the published recipe as defaults, and their checks. Imports no torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from fastris.commands.guesses import TRAIN_GUESSES, run_to_go_on_with
from fastris.commands.presets import DEFAULTS, PRESETS
from fastris.data.options import DataOptions
from fastris.evaluation.rules import RULES, Sentences, find_rule
from fastris.models import registry
from fastris.models.config import ModelConfig
from fastris.models.recipe import Optimizer, Recipe, Schedule
from fastris.options.declare import extra_option, option
from fastris.options.shared import Amp
from fastris.runtime.processes import world_size
from fastris.training.gpu_settings import GPU_SETTINGS, Recompute, find_setting, parts_for
from fastris.training.switch_memory import switched_on


def recipe_option(name: str, help: str, unit: str = "") -> Any:
    """An option whose default is the system's own recipe, which the help page quotes of each system."""
    recipes = {(config := registry.config_class(system)).title: config.recipe for system in registry.SYSTEMS}
    published = ", ".join(f"{title} {getattr(recipe, name)}" for title, recipe in recipes.items())
    return option(None, f"{help}; {published}", unit, default_text="the system's")


def preset_option(name: str, help: str, unit: str = "") -> Any:
    """An option that a preset may give, and whose own default is in :data:`fastris.commands.presets.DEFAULTS`."""
    values = ", ".join(f"{preset} {given[name]}" for preset, given in PRESETS.items() if name in given)
    default = DEFAULTS[name]
    text = str(default).lower() if isinstance(default, bool) else str(default) or "none"
    return option(None, f"{help}; {values}" if values else help, unit, default_text=text)


def stages_of_systems() -> dict[str, tuple[str, ...]]:
    """What `freeze` accepts, by the system's title; systems with the same stages share an entry."""
    found: dict[tuple[str, ...], list[str]] = {}
    for system in registry.SYSTEMS:
        config = registry.config_class(system)
        if config.stages:
            found.setdefault(tuple(config.stages), []).append(config.title)
    return {" and ".join(titles): stages for stages, titles in found.items()}


def model_keys() -> Iterable[str]:
    """Model options that may stand on the command line beside those of :class:`TrainConfig`."""
    own = {field.name for field in fields(TrainConfig)}
    return [name for name in registry.model_keys() if name not in own]


@dataclass
class TrainConfig(DataOptions):
    """Options under the names of the published YAML files; each system's own recipe is the default.

    The model's keys may be given too, over those of its preset: model=cris_r50 dropout=0.2

    No weights trained on photographs are released. CRIS checkpoints trained elsewhere go in as weight=best_model.pth.
    From CLIP, CRIS-RN50 on RefCOCO takes 50 epochs of 42,404 references, 33,100 steps of 64: modelled, not measured, 15
    hours on an RTX 3060 and 4 on an RTX 4090. docs/recipe.md has the lines, the memory and the score to expect.
    """

    guesses: ClassVar[Mapping[str, str]] = TRAIN_GUESSES
    expand = staticmethod(run_to_go_on_with)

    model: str = option(
        "",
        f"a preset: {', '.join(registry.presets())}; or trained weights to start from, as weight; empty: the model "
        "that weight holds, else the model keys of a YAML file, else cris_r50",
    )
    clip_pretrain: str | None = option(None, "CLIP weights to start from: path of RN50.pt, or open_clip's RN50:openai")
    swin_pretrain: str | None = option(
        None, "Swin's weights to start from: Microsoft's .pth, or timm's or transformers' (path or Hugging Face id)"
    )
    bert_pretrain: str | None = option(
        None, "BERT's weights to start from: path or Hugging Face id, such as google-bert/bert-base-uncased"
    )
    weight: str | None = option(
        None,
        "trained weights to start from (checkpoint, folder or Hugging Face id), and with them architecture, words and "
        "input size",
    )
    preset: str = option(
        "",
        f"settings in place of the system's recipe: {', '.join(PRESETS)}, for your own pictures; options given win",
    )
    train_split: str = option("train", "split to train on")
    val_split: str = option("val", "split to validate on")
    split: float = preset_option(
        "split",
        "share of the training images, with all about them, that is held out and validated on where the data has no "
        "val_split; fastris eval knows it as split=held_out",
    )
    val_rule: str = recipe_option("val_rule", "prediction and scoring rule of validation: " + ", ".join(RULES))
    val_sentences: Sentences = recipe_option("val_sentences", "sentences of each object that validation scores")
    input_size: int | None = option(None, "side of the square that a model sees; none: the model's", "pixels")
    word_len: int | None = option(None, "length a sentence is cut to; none: the model's", "tokens")

    epochs: int = recipe_option("epochs", "passes over the training references, one sentence of each", "epochs")
    batch_size: int = recipe_option(
        "batch_size", "references per optimizer step; a last batch that is not full is dropped", "references"
    )
    expressions_per_image: int = option(
        1,
        "of a batch's references, so many are about one image, which is encoded once for all of them; above 1 an epoch "
        "is one pass over the images",
        "references",
    )
    augment: bool = preset_option(
        "augment",
        "mirror half of the pictures, with left and right swapped in the phrase, where that is clear, and vary "
        "colours, where the phrase names none; for English phrases",
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
    optimizer: Optimizer = recipe_option("optimizer", "adam, or adamw, which decays weights apart from the gradient")
    base_lr: float = recipe_option("base_lr", "learning rate of all but CRIS's CLIP encoders")
    lr_multi: float = recipe_option("lr_multi", "factor on base_lr for CRIS's CLIP encoders; no other system has any")
    schedule: Schedule = recipe_option(
        "schedule",
        "of the learning rate: steps, at milestones; poly, (1 - step / all steps of all epochs)^0.9; or cosine, half a "
        "cosine over all steps, after warmup",
    )
    warmup: float = preset_option(
        "warmup", "share of all steps in which the learning rate rises from 0, with schedule=cosine"
    )
    milestones: tuple[int, ...] = option((35,), "finished epochs after which the learning rate drops", "epochs")
    lr_decay: float = option(0.1, "factor on the learning rate at each milestone")
    weight_decay: float = recipe_option("weight_decay", "the optimizer's weight decay")
    instance_contrast: float = option(
        0.0,
        "weight of a contrast between sentences and the mean pixels of objects and backgrounds in the loss; 0.1 is a "
        "good start, 0 leaves it out as published",
    )
    freeze: str = preset_option(
        "freeze",
        "stages that are not trained: their names with commas, or how many of them from the first on; "
        + "; ".join(f"{title}: {', '.join(stages)}" for title, stages in stages_of_systems().items()),
    )
    ema: float = preset_option(
        "ema", "decay of a moving average of the weights, which is then validated and kept as the best; 0: none"
    )
    patience: int = preset_option(
        "patience", "after so many without a better score the run ends; 0: it never does", "validations"
    )
    max_norm: float = preset_option("max_norm", "gradients are clipped to this norm; 0: no clipping")
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
    resume: bool | str | None = option(
        False, "go on with the run in the folder; auto: if there is one; or with that of a path, which alone is enough"
    )
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
        self._follow_weights()
        self._follow_preset()
        self._follow_system()
        self._follow_gpu()
        self._check_finetuning()
        find_rule(self.val_rule)
        at_least = {"epochs": 1, "accumulate": 1, "expressions_per_image": 1, "batch_size_val": 1, "workers": 0,
                    "workers_val": 0, "max_norm": 0, "limit_train": 0, "max_steps": 0, "save_every_steps": 0,
                    "print_freq": 0, "pictures": 0, "patience": 0, "max_skipped": 1, "base_lr": 0, "lr_multi": 0,
                    "weight_decay": 0, "instance_contrast": 0}  # fmt: skip
        for name, smallest in at_least.items():
            if not (getattr(self, name) or 0) >= smallest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {smallest}")
        for name in ("base_lr", "lr_multi", "weight_decay", "max_norm", "lr_decay", "instance_contrast"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number")
        several = self.expressions_per_image
        smallest = self._system().smallest_batch
        if self.batch_size % (self.accumulate * several) or self.micro_batch < smallest:
            of = f" of {several} references for each image" if several > 1 else ""
            because = ", because BatchNorm needs two" if smallest > 1 else ""
            raise ValueError(
                f"batch_size={self.batch_size} with accumulate={self.accumulate} must split into equal parts of "
                f"{smallest} or more references{of}{because}; change one of them"
            )
        if self.process_timeout <= 0:
            raise ValueError(f"process_timeout={self.process_timeout} must be above 0 minutes")
        if self.published_first_epoch_quirk and (not self.lr_multi or self.schedule != "steps"):
            raise ValueError(
                f"published_first_epoch_quirk needs lr_multi above 0 and schedule=steps, got lr_multi={self.lr_multi} "
                f"and schedule={self.schedule}"
            )

    def _follow_weights(self) -> None:
        """Fill in the model keys of the weights that the run starts from, unless the options describe a model.

        So the saved options have them, and a run that goes on needs the weights' file no more.
        """
        if self.model and self.model not in registry.presets():
            from fastris.weights.architecture import names_weights

            if not names_weights(self.model):
                registry.system_of_preset(self.model)  # raises, and lists the presets
            if self.weight:
                raise ValueError(
                    f"model={self.model} and weight={self.weight} both name weights; give those to start from alone"
                )
            self.model, self.weight = "", self.model
        if self.weight and not self.model and not self._describes_model():
            from fastris.weights.architecture import architecture_of

            if (held := architecture_of(self.weight)) is not None:
                keys = held.to_dict() | self.extra
                for name in ("input_size", "word_len"):  # options of their own
                    value = keys.pop(name)
                    setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
                self.extra = keys

    def _describes_model(self) -> bool:
        """Whether the model keys given are a whole model's, as those of a published YAML file are."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sizes = {name: getattr(self, name) for name in ("input_size", "word_len") if getattr(self, name)}
                clip = {"clip_pretrain": self.clip_pretrain} if self.clip_pretrain else {}
                registry.read_config(clip | self.extra | sizes)
            return bool(self.extra)
        except ValueError:
            return False

    def _follow_preset(self) -> None:
        """Fill in what the user left to the preset, then what that leaves: the saved options say what was done."""
        if self.preset and self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is unknown; choose from {', '.join(PRESETS)}, or leave it out")
        chosen = dict(PRESETS.get(self.preset, {}))
        if self.schedule not in (None, "cosine"):  # what only goes with what the user has changed
            chosen.pop("warmup", None)
        if not self.evaluate:
            chosen.pop("patience", None)
        for given in (chosen, DEFAULTS):
            for name, value in given.items():
                if getattr(self, name) is None:
                    setattr(self, name, value)

    def _check_finetuning(self) -> None:
        stages = self._system().stages
        self.freeze = ",".join(self._stages(stages))
        if not 0 <= self.warmup < 1 or (self.warmup and self.schedule != "cosine"):
            raise ValueError(
                f"warmup={self.warmup} must be a share of the steps, 0 or more and below 1, with schedule=cosine "
                f"(schedule={self.schedule})"
            )
        if not 0 <= self.split < 1:
            raise ValueError(f"split={self.split} must be a share of the images below 1, such as 0.2, or 0 for none")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must be a decay below 1, such as 0.999, or 0 for no average")
        if self.patience and not self.evaluate:
            raise ValueError(f"patience={self.patience} needs validations; leave it out, or give evaluate=true")

    def _stages(self, stages: Mapping[str, Any]) -> list[str]:
        """The names of the stages that `freeze` means, in order."""
        found: set[str] = set()
        for word in (part.strip() for part in self.freeze.split(",")):
            if word.isdecimal() and int(word) <= len(stages):
                found |= set(list(stages)[: int(word)])
            elif word in stages:
                found.add(word)
            elif word.lower() not in ("", "none"):
                raise ValueError(
                    f"freeze={self.freeze}: {word} is no stage of {self._system().title}, which has "
                    f"{', '.join(stages) or 'none'}; give some of these names, or how many of them from the first on"
                )
        return [name for name in stages if name in found]

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of the stages that are not trained."""
        return tuple(self.freeze.split(",")) if self.freeze else ()

    def _follow_system(self) -> None:
        """Fill in what the user left to the system's own recipe, so that the saved options say what was done."""
        for name, value in asdict(self._system().recipe).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _system(self) -> type[ModelConfig]:
        return registry.config_class(self.system)

    @property
    def system(self) -> str:
        """The name of the system that is trained."""
        found = registry.system_of_preset(self.model) if self.model else registry.system_of(self.extra)
        return found or registry.DEFAULT

    @property
    def switches(self) -> dict[str, Any]:
        """What is switched on that a plain CRIS has not, and needs memory in training."""
        return switched_on({**self.extra, "instance_contrast": self.instance_contrast})

    def _follow_gpu(self) -> None:
        """Fill in what the user left to `gpu`, so that the saved options say what was done."""
        left = self.accumulate == 0 or self.recompute == "auto"
        setting = find_setting(self.gpu, self.system, self.switches if left else None) if self.gpu else None
        if self.accumulate == 0:
            self.accumulate = self.parts_of(setting.micro_batch, world_size()) if setting else 1
        if self.recompute == "auto":
            self.recompute = setting.recompute if setting else "none"
        if self.fused is None:
            self.fused = setting.fused if setting else False

    def parts_of(self, most: int, processes: int = 1) -> int:
        """The fewest equal parts of the batch in which no process holds more than ``most`` references."""
        several = max(1, self.expressions_per_image)
        return parts_for(self.batch_size, most, processes, several, self._system().smallest_batch)

    @property
    def micro_batch(self) -> int:
        """References in one forward and backward pass, over all processes."""
        return self.batch_size // self.accumulate

    @property
    def recipe(self) -> Recipe:
        """The system's own recipe, whatever this run's."""
        return self._system().recipe

    @property
    def smallest_batch(self) -> int:
        """References in the smallest batch that the system trains on."""
        return self._system().smallest_batch

    @property
    def folder(self) -> Path:
        """Where the run lives: `output_folder/exp_name`."""
        return self.output_folder.expanduser() / self.exp_name
