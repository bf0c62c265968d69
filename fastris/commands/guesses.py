"""Names that other programs give to our options, for the hint after a wrong guess; and `--resume FOLDER` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastris.options.values import FALSE, TRUE

_NAMES = {
    "data_root": "data data_dir data_path data_folder dataset_root root path",
    "dataset": "dataset_name data_name",
    "device": "gpus cuda accelerator",
    "workers": "num_workers n_workers nproc",
    "input_size": "size img_size image_size imgsz resolution",
    "word_len": "max_length max_len max_tokens seq_len",
    "batch_size": "bs batch bsz train_batch_size",
}
_TRAIN = _NAMES | {
    "base_lr": "lr learning_rate rate lr0 initial_lr",
    "weight": "weights checkpoint ckpt pretrained load from_weights init finetune_from",
    "epochs": "num_epochs n_epochs epoch max_epochs num_train_epochs",
    "max_steps": "steps iterations iters num_steps max_iters",
    "optimizer": "optim opt",
    "schedule": "scheduler lr_scheduler sched lr_schedule",
    "warmup": "warmup_steps warmup_epochs warmup_ratio warm_up",
    "weight_decay": "wd decay",
    "max_norm": "grad_clip clip_grad gradient_clipping clip_norm max_grad_norm gradient_clip_val",
    "freeze": "frozen freeze_backbone freeze_layers freeze_encoder frozen_stages unfreeze",
    "ema": "ema_decay model_ema use_ema average",
    "patience": "early_stopping early_stop early_stopping_patience",
    "split": "val_fraction validation_split val_size test_size val_ratio holdout held_out",
    "augment": "augmentation augmentations aug flip hflip color_jitter",
    "preset": "recipe mode finetune",
    "manual_seed": "seed random_seed",
    "output_folder": "out output output_dir out_dir save_dir project folder",
    "exp_name": "name run_name experiment",
    "amp": "precision fp16 bf16 half mixed_precision dtype",
    "accumulate": "accumulation gradient_accumulation_steps accum grad_accum accumulation_steps",
    "print_freq": "log_every log_interval",
    "val_split": "val validation valid",
    "train_split": "train",
}
_EVAL = _NAMES | {
    "model": "weight weights checkpoint ckpt pretrained",
    "out": "output output_folder output_dir save_dir folder",
    "rule": "val_rule metric threshold",
    "sentences": "val_sentences",
    "split": "val_split test_split subset",
    "amp": "precision fp16 bf16 half dtype",
}


def _by_guess(names: dict[str, str]) -> dict[str, str]:
    return {guess: name for name, guesses in names.items() for guess in guesses.split()}


TRAIN_GUESSES, EVAL_GUESSES = _by_guess(_TRAIN), _by_guess(_EVAL)
"""Guess -> the option that does that."""


def run_to_go_on_with(args: Sequence[str]) -> list[str]:
    """The arguments of `fastris train`; where they are `--resume RUN`, those that this run was saved with come first.

    RUN is a run's folder or a checkpoint in it. Arguments beside it change what they name. Those that say another
    model, data or folder ask for a run of their own, and an options file says everything itself: these stay alone.
    """
    args, run = list(args), ""
    for number, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in ("resume", "--resume") and equals:
            run = value
        elif name == "--resume":
            run = args[number + 1] if number + 1 < len(args) and "=" not in args[number + 1] else ""
    if run.lower() in {"", "auto", "none", "null", "~", *TRUE, *FALSE} or run.startswith("--"):
        return args
    names = {arg.partition("=")[0].lstrip("-").replace("-", "_") for arg in args if "=" in arg or arg.startswith("--")}
    files = [arg for arg in args if "=" not in arg and arg.lower().endswith((".yaml", ".yml"))]
    place = Path(run).expanduser()
    folder = place if place.is_dir() else place.parent
    own = {"model", "weight", "preset", "dataset", "data_root", "output_folder", "exp_name"} & names
    if files or own or not place.exists() or not (folder / "config.yaml").is_file():
        return args
    return [str(folder / "config.yaml"), *args, f"output_folder={folder}", "exp_name=",
            "resume=true" if place.is_dir() else f"resume={place}"]  # fmt: skip
