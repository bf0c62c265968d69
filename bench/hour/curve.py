"""Step 8: real training steps in float32, by plain PyTorch, by the kernels, and by the published formulas: one curve?

The runs are those of ``fastris train``: the tiny CRIS on drawn scenes, without dropout, from the same weights in the
same order. Rounding makes two such runs drift apart; how far is seen from the published formulas, so the curves are
compared step by step at the beginning and by the means of windows after it. Without open_clip the decoder and the
projector learn a made-up task in their place.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.dispatch import triton_obstacle, use_impl
from fastris.models.cris import Projector, TransformerDecoder
from fastris.runtime.float32_precision import ieee_float32

from .problems import Place, Skip, missing, whole_model_obstacle

PATHS = ("torch", "triton", "reference")
GPU_STEPS, CPU_STEPS = 200, 20
FIRST, WINDOW = 5, 20
FIRST_APART = 1e-3
"""Largest relative difference of the first losses: a wrong gradient shows in the second step already."""

APART = 0.05
"""Largest relative difference of a window's mean, or twice that of the published formulas if that is more."""

OPTIONS = (
    *("dataset=synthetic", "model=tiny", "dropout=0.0", "amp=off", "base_lr=1e-3", "lr_multi=1.0", "batch_size=16"),
    *("evaluate=false", "save_every_steps=0", "workers=2"),
)


def items(place: Place) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for path in PATHS:
        yield path, partial(train, place, path)
    yield "same curve", partial(same_curve, place)


def train(place: Place, path: str) -> dict[str, Any]:
    """The losses of a training run by one path."""
    if path == "triton" and (why := triton_obstacle(place.device, torch.float32)):
        raise Skip(why)
    steps = GPU_STEPS if place.is_gpu else CPU_STEPS
    why_not = whole_model_obstacle() or tokenizer_obstacle()
    losses = train_parts(place.device, path, steps) if why_not else train_whole(place.device, path, steps)
    found: dict[str, Any] = {"path": path, "losses": losses, "float32_products": "ieee"}
    return place.labelled({**found, "instead": f"decoder and projector: {why_not}"} if why_not else found)


def tokenizer_obstacle() -> str:
    absent = missing("ftfy", "cv2")
    return f"real training reads phrases and draws scenes, and needs {absent}, which is missing" if absent else ""


def train_whole(device: torch.device, path: str, steps: int) -> list[float]:
    """``fastris train`` by one path, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*OPTIONS, f"max_steps={steps}", f"device={device}", f"output_folder={folder}/run"]
        command = [sys.executable, "-m", "fastris", "train", *options]
        subprocess.run(command, env={**os.environ, "FASTRIS_IMPL": path}, check=True)
        with Path(folder, "run", "log.csv").open(newline="", encoding="utf-8") as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]


class Parts(nn.Module):
    """CRIS behind its encoders, at a quarter of the width: a decoder of two layers, and the projector with its loss."""

    def __init__(self, dim: int = 128, word_dim: int = 64):
        super().__init__()
        self.decoder = TransformerDecoder(2, dim, 4, 2 * dim, 0.0)
        self.projector = Projector(word_dim, dim // 2)
        with torch.no_grad():  # small logits at first: a good part of a short training would go into shrinking them
            self.projector.txt.weight.mul_(0.1)
            self.projector.txt.bias.zero_()

    def forward(self, maps: Tensor, words: Tensor, state: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
        return self.projector(self.decoder(maps, words, padding).reshape(maps.shape), state, mask)[0]


def train_parts(device: torch.device, path: str, steps: int, batch: int = 8, side: int = 13) -> list[float]:
    """Decoder and projector learn to find a rectangle in which some channels are brighter or, if the sentence says so,
    darker."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), ieee_float32(), use_impl(path):
        torch.manual_seed(0)
        model = Parts().to(device).train()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(steps):
            loss = model(*(tensor.to(device) for tensor in made_up(generator, batch, side)))
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.item())
    return losses


def made_up(generator: torch.Generator, batch: int, side: int) -> tuple[Tensor, ...]:
    """Maps, words, sentences, padding and masks, as :class:`Parts` takes them."""
    maps = torch.randn(batch, 128, side, side, generator=generator)
    words, state = (torch.randn(*shape, generator=generator) for shape in ((batch, 9, 128), (batch, 64)))
    corners = torch.randint(0, side // 2, (batch, 2), generator=generator)
    along = torch.arange(side)
    rows, columns = ((along >= c[:, None]) & (along < c[:, None] + side // 2) for c in corners.T)
    inside = (rows[:, :, None] & columns[:, None, :])[:, None].float()
    maps[:, :32] += 2 * inside * state[:, :1, None, None].sign()
    padding = torch.arange(9)[None] >= torch.randint(3, 10, (batch, 1), generator=generator)
    return maps, words, state, padding, F.interpolate(inside, scale_factor=4)


def same_curve(place: Place) -> dict[str, Any]:
    """Hold the kernels' curve to plain PyTorch's. Raises RuntimeError where they part."""
    curves = {path: place.done[path]["losses"] for path in PATHS if place.done.get(path, {}).get("losses")}
    own = "triton" if "triton" in curves else "reference"
    if "torch" not in curves or own not in curves:
        raise Skip(f"it takes two curves, and there is {', '.join(curves) or 'none'}")
    noise = apart(curves["torch"], curves["reference"])["windows"] if "reference" in curves else 0.0
    found = apart(curves["torch"], curves[own])
    limit = APART if own == "reference" else max(APART, 2 * noise)
    print(f"torch against {own}: {found}, at most {FIRST_APART} and {limit:.3f}")
    if not (found["first"] <= FIRST_APART and found["windows"] <= limit):  # a loss that is NaN is not the same either
        first, windows = found["first"], found["windows"]
        raise RuntimeError(f"torch and {own} part: {first:.1e} at the beginning, {windows:.1e} in windows of {WINDOW}")
    return place.labelled({"compared": ["torch", own], **found, "limits": {"first": FIRST_APART, "windows": limit}})


def apart(left: Sequence[float], right: Sequence[float]) -> dict[str, float]:
    """Relative differences of two curves: the largest of the first losses, and the largest of a window's mean."""
    pairs = list(zip(left, right, strict=True))
    windows = [pairs[begin : begin + WINDOW] for begin in range(0, len(pairs), WINDOW)]
    means = [(statistics.fmean(a for a, _ in window), statistics.fmean(b for _, b in window)) for window in windows]
    return {"first": _largest_difference(pairs[:FIRST]), "windows": _largest_difference(means)}


def _largest_difference(pairs: Sequence[tuple[float, float]]) -> float:
    differences = [abs(a - b) / abs(a) for a, b in pairs]
    return math.nan if any(map(math.isnan, differences)) else max(differences)
