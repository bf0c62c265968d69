"""``fastris eval``: a model and a data set in, scores on the console and in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastris.commands.guesses import EVAL_GUESSES
from fastris.data.base import DataError, ReferringDataset
from fastris.data.options import DataOptions, has_split, load_split
from fastris.evaluation.rules import RULES, Sentences, find_rule
from fastris.options.declare import REQUIRED, option
from fastris.options.shared import Amp
from fastris.runtime.plain import check_at_least, printable
from fastris.runtime.processes import is_main


@dataclass
class EvalConfig(DataOptions):
    """Scores a model: mIoU, oIoU and Pr@50-90, with the rule, the split and the sentence rule beside the numbers.

    The rule is that of the model's own system unless another is given: cris for CRIS, and so on.
    Numbers compare only under one rule:
      cris      threshold 0.35, at each image's own size, as CRIS published
      cgformer  threshold 0.5, otherwise the same
      lavt      threshold 0.5, at 480 x 480, where every image weighs the same in oIoU
      alignformer  as lavt, for models that squash the image to 480 x 480
      magnet    the same, with aligned corners; magnet448 at 448 x 448
      gres      as lavt, with gIoU, cIoU, N-acc and T-acc: a mask below 50 pixels says that there is no target
    """

    guesses: ClassVar[Mapping[str, str]] = EVAL_GUESSES

    model: str = option(REQUIRED, "folder of a model or a run, checkpoint (.pth, .safetensors), or Hugging Face id")
    split: str = option("val", "split of the data set: val, testA, ...; held_out: what training held out")
    sentences: Sentences = option("all", "sentences of each object that are scored")
    rule: str | None = option(None, "prediction and scoring rule: " + ", ".join(RULES), default_text="the system's")
    out: Path | None = option(
        None, "folder for metrics.json and per_sample.csv; none: runs/eval/DATASET_SPLIT_SENTENCES_RULE"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    amp: Amp = option("off", "precision of the forward pass; off (float32) as published")
    batch_size: int = option(32, "segmented at once", "expressions")
    images_per_batch: int = option(8, "encoded at once", "images")
    workers: int | None = option(None, "that read images and masks; 0: no extra one; none: up to 4", "processes")
    input_size: int | None = option(None, "side of the letterboxed square; none: the model's", "pixels")
    word_len: int | None = option(None, "length that a sentence is cut to; none: the model's", "tokens")
    progress: bool = option(True, "show a progress bar on a terminal")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule is not None:
            find_rule(self.rule)
        check_at_least(0, workers=self.workers)
        check_at_least(1, batch_size=self.batch_size, images_per_batch=self.images_per_batch)


def _open(config: EvalConfig) -> ReferringDataset:
    """The split that is scored; `held_out` is what the run of the model's weights has held out of its training."""
    from fastris.data.held_out import HELD_OUT, RECORD, find_record, held_out_again, split_of

    if config.split != HELD_OUT:
        return load_split(config, config.split)
    if (record := find_record(config.model)) is not None:
        return held_out_again(load_split(config, split_of(record)), record)
    if has_split(config, config.split):
        return load_split(config, config.split)
    raise DataError(
        f"split={HELD_OUT}: beside model={config.model} lies no {RECORD}, which a training run with split=0.2 writes; "
        "give the folder of such a run, or a split of the data"
    )


def run(config: EvalConfig) -> None:
    """`fastris eval`: score a model on a data set, print the scores, and write them with every sample's numbers.

    Started by `torchrun`, each process scores its share, and the first one prints and writes.
    """
    from fastris.evaluation.evaluate import evaluate
    from fastris.inference.folding import for_inference
    from fastris.runtime.device import choose_device, choose_workers
    from fastris.runtime.distributed import joined
    from fastris.weights.load import load_model

    device = choose_device(config.device)
    with joined(device, timeout=10):
        dataset = _open(config)
        result = evaluate(
            for_inference(load_model(config.model)),
            dataset,
            sentences=config.sentences,
            rule=config.rule,
            device=device,
            amp=config.amp,
            workers=choose_workers(config.workers),
            batch_size=config.batch_size,
            images_per_batch=config.images_per_batch,
            input_size=config.input_size,
            word_len=config.word_len,
            progress=config.progress,
        )
    if not is_main():
        return
    name = f"{config.dataset}_{config.split}_{config.sentences}_{result.scores.rule}"
    folder = result.save(config.out or Path("runs/eval") / name, model=config.model, data_root=config.data_root)
    print(result.summary())
    files = printable(f"{folder / 'metrics.json'} and {folder / 'per_sample.csv'}")
    print(f"saved {files} (intersection and union of every expression)")
