"""``fastris predict``: pictures and phrases in, masks and a table out."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastris.inference.images import FORMATS
from fastris.inference.masks import check_threshold
from fastris.inference.sources import Question, questions, split_pictures
from fastris.options.declare import REQUIRED, option
from fastris.runtime.plain import printable
from fastris.weights.shipped import NAME, shipped_model

if TYPE_CHECKING:
    import numpy as np

    from fastris.inference.prediction import Prediction
    from fastris.inference.segmenter import Segmenter
    from fastris.inference.write import Lines

_DTYPES = Literal["float32", "bfloat16", "float16"]


@dataclass
class PredictConfig:
    """Finds what each phrase names in pictures: mask, probability and overlay as PNG, or as data; and a table.

    fastris predict photo.jpg "the red cup" "man on the left" model=demo/model
    fastris predict photos/ "the red cup" model=demo/model format=coco
    fastris predict *.jpg "the red cup" model=demo/model
    fastris predict questions.jsonl model=demo/model

    IMAGE is a picture, a folder of pictures, a pattern in quotes ("photos/**/*.jpg"), a list (.jsonl with image and
    phrases on each line, .csv or .tsv with the columns image and phrase), or - for stdin: a picture, names, or JSON
    lines. Names of pictures right behind it are pictures, too.

    Only name=value whose name is an option below is an option, so "the sign 1+1=2" is a phrase. A phrase that could be
    mistaken for an option (it begins with - or with an option's name and =, or ends in .yaml) goes after --, as does
    everything that follows it:  fastris predict photo.jpg model=demo/model -- "out=3 on the board" "--"
    """

    image: str = option(REQUIRED, f"picture, folder, pattern, list or -: {', '.join(FORMATS)}", positional=True)
    phrases: tuple[str, ...] = option(
        (), "what to look for; quote each phrase", positional=True, default_text="the list's"
    )
    model: str | None = option(
        None,
        "model folder (`fastris demo` trains and writes one), CRIS checkpoint (.pth, .safetensors) or Hugging Face id; "
        "without it a tiny model that knows drawn shapes only: no weights trained on photographs come with fastris",
        default_text="shapes",
    )
    out: str = option("predictions", "folder for the pictures, predictions.jsonl and predictions.json")
    format: Literal["png", "rle", "coco", "polygon", "boxes"] = option(
        "png", "masks as pictures, or in predictions.jsonl as COCO's run lengths, outlines or boxes; coco: a COCO file"
    )
    threshold: float = option(
        None, "pixels above it belong to the mask", "probability, 0..1", default_text="the system's"
    )
    urls: bool = option(False, "fetch pictures that are given by http or https address")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: _DTYPES | None = option(None, "of weights and arithmetic", default_text="the model's")
    compile: bool = option(False, "run the model through torch.compile: minutes at first, for many pictures")
    cuda_graph: bool = option(False, "replay CUDA graphs")
    progress: bool = option(True, "show a progress bar for several pictures, on a terminal")

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_threshold(self.threshold)


def run(config: PredictConfig) -> int:
    """Predict, write pictures or data of each phrase to ``config.out``, and print a table."""
    pictures, phrases = split_pictures(config.phrases)
    asked = questions([config.image, *pictures], phrases, config.urls)
    if config.model is None:
        shipped_model()  # before anything slow
    # A wrong picture is told before PyTorch is imported, which takes seconds.
    only = asked[0].read() if len(asked) == 1 else None
    from fastris.inference.segmenter import Segmenter
    from fastris.inference.write import Lines, read_records

    out = Path(config.out).expanduser()
    lines = Lines(out)
    known = read_records(out) if config.format == "png" else []  # before the model: it takes long to load
    segmenter = Segmenter.from_pretrained(
        config.model,
        device=config.device,
        threshold=config.threshold,
        dtype=config.dtype,
        compile=config.compile,
        cuda_graph=config.cuda_graph,
    )
    run = _Run(config, segmenter, lines, out)
    try:
        if only is None:
            run.answer_all(asked)
        else:
            lines_of_it = run.write(asked[0], segmenter.predict_checked(only, asked[0].phrases))
            _print_table(run.records, lines_of_it, only, out)
    finally:  # what is written is noted, should a later phrase find the disk full
        run.close(known)
    if run.failed:
        raise ValueError(f"{run.failed} of {len(asked)} pictures gave an error; {lines.path} has all of them")
    return 0


class _Run:
    """One run of the command: its settings, and what it has written so far."""

    def __init__(self, config: PredictConfig, segmenter: Segmenter, lines: Lines, out: Path):
        self.config, self.segmenter, self.lines, self.out = config, segmenter, lines, out
        parameter = next(segmenter.model.parameters())
        self.settings = {
            "model": config.model or NAME,
            "system": getattr(segmenter.model.config, "title", type(segmenter.model).__name__),
            "threshold": segmenter.threshold,
            "presence": {"slope": segmenter.scale.slope, "offset": segmenter.scale.offset},
            "format": config.format,
            "device": str(parameter.device),
            "dtype": str(parameter.dtype).removeprefix("torch."),
        }
        self.records: list[dict[str, Any]] = []  # of predictions.json
        self.coco: list[dict[str, Any]] = []
        self.failed = 0
        self.begun = False

    def write(self, question: Question, prediction: Prediction) -> list[dict[str, Any]]:
        """Write one picture's phrases; returns what predictions.jsonl says of them."""
        from fastris.inference.write import describe_phrase, write_phrase

        image, model, form = question.image, self.config.model or NAME, self.config.format
        lines = []
        for i in range(len(prediction)):
            if form == "png":
                record, line = write_phrase(prediction, i, self.out, image=image, model=model, stem=question.stem)
                self.records.append(record)
            else:
                line = describe_phrase(prediction, i, form, image=image)
            if form == "coco":
                self.coco.append(line)
            self._note(line)
            lines.append(line)
        return lines

    def answer_all(self, asked: Sequence[Question]) -> None:
        """Predict many pictures, printing a line a phrase; a picture that gives an error is told and passed over."""
        started, phrases = time.perf_counter(), 0
        with _progress(len(asked), self.config.progress) as advance, _warnings_once():
            for question in asked:
                try:
                    prediction = self.segmenter.predict_checked(question.read(), question.phrases)
                except (ValueError, OSError) as error:
                    self.failed += 1
                    told = str(error) if question.image in str(error) else f"{question.image}: {error}"
                    self._note({"image": question.image, "error": told})
                    warnings.warn(told, stacklevel=2)
                else:
                    lines = self.write(question, prediction)
                    phrases += len(lines)
                    print(*map(_row, lines), sep="\n")
                advance()
        seconds, done = time.perf_counter() - started, len(asked) - self.failed
        print(
            f"{done} pictures, {phrases} phrases in {seconds:.1f} s: {done / seconds:.1f} pictures/s, "
            f"written to {printable(self.out)}"
        )

    def close(self, known: list[dict[str, Any]]) -> None:
        """Write the tables of the whole run."""
        from fastris.inference.write import write_coco, write_records

        if self.records:
            write_records(self.out, known, self.records)
        if self.coco:
            write_coco(self.out, self.coco, self.settings)

    def _note(self, line: dict[str, Any]) -> None:
        if not self.begun:
            self.lines.begin(self.settings)
            self.begun = True
        self.lines.add(line)


def _row(line: dict[str, Any]) -> str:
    told = f"{line['share']:>6.1%}  {line['score']:>5.2f}" if line["found"] else "nothing found"
    return f"{printable(line['image'])}  {printable(line['phrase'])}  {told}"


def _print_table(records: list[dict[str, Any]], lines: list[dict[str, Any]], rgb: np.ndarray, out: Path) -> None:
    phrases = [printable(line["phrase"]) for line in lines]
    width = max(len("phrase"), *map(len, phrases))
    image = printable(lines[0]["image"])
    print(f"{image}: {rgb.shape[1]} x {rgb.shape[0]} pixels, written to {printable(out)}")
    print(f"{'phrase':<{width}}  {'share':>6}  {'score':>5}  {'files' if records else 'box'}")
    for i, (phrase, line) in enumerate(zip(phrases, lines, strict=True)):
        what = ", ".join(map(str, line["box"]))
        if records:
            what = printable(records[i]["mask"]).removesuffix("mask.png") + "{mask,probability,overlay}.png"
        print(f"{phrase:<{width}}  {line['share']:>6.1%}  {line['score']:>5.2f}  {what}")
    for phrase, line in zip(phrases, lines, strict=True):
        if not line["area"]:
            threshold = records[0]["threshold"] if records else "the threshold"
            print(
                f"nothing found for '{phrase}': probabilities reach {line['highest_probability']:.2f}, not {threshold}"
            )
        elif not line["found"]:
            print(f"nothing found for '{phrase}': only {line['area']} pixels, its presence is {line['presence']:.2f}")


@contextmanager
def _warnings_once() -> Iterator[None]:
    """Show a warning that comes with every picture, such as that of a word that the model does not know, once."""
    told: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_new(message: Any, *rest: Any, **named: Any) -> None:
            if str(message) not in told:
                told.add(str(message))
                show(message, *rest, **named)

        warnings.showwarning = show_new
        yield


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Any]:
    """A progress bar on the terminal's stderr; yields what advances it."""
    if not (show and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task("pictures", total=total)
        yield lambda: bar.update(task, advance=1)
