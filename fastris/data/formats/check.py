"""Read a whole data set once and report what is wrong with it: the work of `fastris data check`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fastris.data.base import Reference
from fastris.data.formats.annotated import MENDS, AnnotatedDataset, UnusableReference
from fastris.data.formats.usable import Seen

LONG_PHRASE = "over-long phrase"
UNREADABLE_FILE = "unreadable annotation file"

MENDS_OF_CHECK = MENDS | {
    LONG_PHRASE: "training and evaluation cut it to word_len tokens, as published; word_len=0 leaves this check out",
    UNREADABLE_FILE: "do what the message says, or download the file again",
}
"""Problem, as `check` reports it -> what to do about it."""

Track = Callable[[Iterable[int], int, str], Iterable[int]]
"""Wraps an iterable, given its length and a title, to show progress."""


def silent(items: Iterable[int], total: int, title: str) -> Iterable[int]:
    """A `Track` that shows nothing."""
    return items


@dataclass
class SplitReport:
    """The counts of a split, and its problems.

    Attributes:
        references: number of records, usable or not.
        images, sentences: their numbers, over the references that could be read.
        no_target: number of references whose sentences name nothing in the image.
        problems: problem -> (reference's id, what is wrong) of each case.
        left_out: reason -> number of references that the reader left out by its format's rule.
    """

    references: int = 0
    images: int = 0
    sentences: int = 0
    no_target: int = 0
    problems: dict[str, list[tuple[int | str, str]]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    def note(self, problem: str, ref_id: int | str, detail: str) -> None:
        self.problems.setdefault(problem, []).append((ref_id, detail))

    def count(self, reference: Reference, images: set[Any]) -> None:
        images.add(reference.image_id)
        self.images = len(images)
        self.sentences += len(reference.sentences)
        self.no_target += reference.no_target

    def as_dict(self) -> dict[str, Any]:
        """For the JSON report: every reference that has a problem is named."""
        problems = {
            problem: {
                "count": len(cases),
                "mend": MENDS_OF_CHECK[problem],
                "references": [{"ref_id": ref_id, "detail": detail} for ref_id, detail in cases],
            }
            for problem, cases in self.problems.items()
        }
        counts = {name: getattr(self, name) for name in ("references", "images", "sentences", "no_target")}
        return counts | {"problems": problems} | ({"left_out": self.left_out} if self.left_out else {})


def _new_report(dataset: AnnotatedDataset) -> SplitReport:
    return SplitReport(len(dataset), left_out={why: len(refs) for why, refs in dataset.skipped.items()})


def count_split(dataset: AnnotatedDataset, track: Track = silent) -> SplitReport:
    """Count a split from its annotations alone; it must have been opened with `on_error="defer"`."""
    report, images = _new_report(dataset), set[Any]()
    for index in track(range(len(dataset)), len(dataset), f"read {dataset.name} {dataset.split}"):
        try:
            report.count(dataset.reference(index), images)
        except UnusableReference as error:
            report.note(error.problem, error.ref_id, error.detail)
    return report


def check_split(dataset: AnnotatedDataset, word_len: int, track: Track = silent) -> SplitReport:
    """Check every reference of a split by the rule in `usable.py`.

    Args:
        dataset: the split, opened with `on_error="defer"`.
        word_len: sentences of more tokens than this, start and end included, are reported; 0 reports none.
        track: shows progress.
    """
    report, images, seen = _new_report(dataset), set[Any](), Seen()
    for index in track(range(len(dataset)), len(dataset), f"check {dataset.name} {dataset.split}"):
        for error in dataset.problems(index, seen):
            report.note(error.problem, error.ref_id, error.detail)
        try:
            reference = dataset.reference(index)
        except UnusableReference:
            continue
        report.count(reference, images)
        _check_lengths(report, reference, word_len)
    return report


def _check_lengths(report: SplitReport, reference: Reference, word_len: int) -> None:
    """Report the sentences that training and evaluation will cut."""
    from fastris.data.tokens import tokenize

    for sentence in reference.sentences if word_len else ():
        if tokenize(sentence, word_len).truncated[0]:
            report.note(LONG_PHRASE, reference.ref_id, f"over {word_len} tokens: {sentence[:200]!r}")
