"""What a visitor of the page has: a picture, what each model has seen of it, and what was answered so far.

Each model encodes the picture once and keeps that; a phrase is asked once, and its map is kept. Another threshold or
another opacity is a matter of drawing (:mod:`fastris.app.drawing`), and asks no model.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastris.app.limits import Limits, phrases_of, read_upload
from fastris.inference.prediction import Prediction

if TYPE_CHECKING:
    from fastris.inference.segmenter import Look, Segmenter

KEPT = 256
"""Answers about one picture that are kept."""


class Answer(NamedTuple):
    """What a model said to one phrase.

    Attributes:
        logits: its map (h, w) float32; None where the model refused the phrase, and the notes say why.
        seconds: what the answer took, the encoded picture being there.
        notes: what the model warned of.
    """

    logits: np.ndarray | None
    seconds: float
    notes: tuple[str, ...]


class Model:
    """A model that answers on the page, and what it is called there.

    Attributes:
        name: as the user gave it.
        shares: whether one encoding of the picture serves all phrases.
    """

    def __init__(self, name: str, segmenter: Segmenter):
        self.name, self.segmenter = name, segmenter
        self.shares = bool(getattr(segmenter.model, "shares_image", True))
        in_words = getattr(segmenter.model, "in_words", None)
        self.title = in_words() if in_words is not None else type(segmenter.model).__name__

    def look(self, rgb: np.ndarray) -> Seen:
        """Encode a picture, and take the time."""
        look, seconds = self.timed(lambda: self.segmenter.look_checked(rgb))
        return Seen(self, look, seconds)

    def warm_up(self) -> None:
        """Do everything once, so that the times of the first picture are those of any."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.look(np.full((32, 32, 3), 128, np.uint8)).ask(("the circle",))

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """The result of some work on the model's device, and the seconds until it was there."""
        import torch

        device = next(self.segmenter.model.parameters()).device
        started = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result, time.perf_counter() - started


@dataclass
class Seen:
    """What one model has seen of a picture, how long that took in seconds, and what it has answered."""

    model: Model
    look: Look
    seconds: float
    answers: dict[str, Answer] = field(default_factory=dict)

    def ask(self, phrases: Sequence[str]) -> None:
        """Ask each phrase that was not asked before, one after the other, so that each has its own time."""
        for phrase in phrases:
            if phrase in self.answers:
                self.answers[phrase] = self.answers.pop(phrase)  # the last that is forgotten
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.answers[phrase] = self._answer(phrase, caught)
        for phrase in list(self.answers)[: max(0, len(self.answers) - KEPT)]:
            del self.answers[phrase]

    def _answer(self, phrase: str, caught: list[warnings.WarningMessage]) -> Answer:
        started = time.perf_counter()
        try:
            found, seconds = self.model.timed(lambda: self.look(phrase))
        except ValueError as error:
            return Answer(None, time.perf_counter() - started, (str(error),))
        notes = tuple(str(each.message) for each in caught if issubclass(each.category, UserWarning))
        return Answer(found.logits[0], seconds, notes)

    def answered(self, phrases: Sequence[str]) -> tuple[int, ...]:
        """The numbers of those phrases, from 0 on, that the model took."""
        return tuple(number for number, phrase in enumerate(phrases) if self.answers[phrase].logits is not None)

    def prediction(self, phrases: Sequence[str], threshold: float) -> Prediction:
        """The prediction for phrases that were answered, at any threshold; the model is not asked."""
        maps = [self.answers[phrase].logits for phrase in phrases]
        logits = np.stack([each for each in maps if each is not None])
        scale = self.model.segmenter.scale
        return Prediction(self.look.image, tuple(phrases), logits, self.look.warp, threshold, scale)


@dataclass(frozen=True)
class Visit:
    """One picture on the page, and what is asked about it.

    Attributes:
        path: the uploaded file.
        name: what the visitor calls it.
        seen: of each model.
        about: what there is to say about the picture.
        phrases: what is asked at present; each model has an answer to each.
        remarks: what there is to say about the phrases.
        folder: for the files of downloads; it goes when nobody has this visit any more.
    """

    path: str
    name: str
    seen: tuple[Seen, ...]
    about: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    folder: TemporaryDirectory[str] = field(default_factory=lambda: TemporaryDirectory(prefix="fastris-files-"))

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say, each thing once."""
        told = [note for seen in self.seen for phrase in self.phrases for note in seen.answers[phrase].notes]
        return tuple(dict.fromkeys([*self.about, *self.remarks, *told]))


class App:
    """The models that answer, and what may be asked of them. They work one at a time, whoever asks."""

    def __init__(self, models: Sequence[Model], limits: Limits):
        self.models, self.limits = tuple(models), limits
        self._busy = Lock()

    def answer(self, visit: Visit | None, path: str, name: str, text: str) -> Visit:
        """What the models say to the phrases in ``text`` about the picture in the file ``path``.

        ``visit``: what the visitor has so far. A picture that the models know is not encoded again, and a phrase that
        they know is not asked again. Raises ValueError or OSError for a picture or phrases that cannot be taken.
        """
        phrases, remarks = phrases_of(text)
        with self._busy:
            if visit is None or visit.path != path:
                rgb, about = read_upload(Path(path), name, self.limits)
                visit = Visit(path, name, tuple(model.look(rgb) for model in self.models), about)
            for seen in visit.seen:
                seen.ask(phrases)
        return replace(visit, phrases=phrases, remarks=remarks)
