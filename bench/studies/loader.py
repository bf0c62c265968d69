"""``python -m bench.studies.loader``: images a second that workers read, decode and warp, beside what a step needs.

The tree is made up, of JPEGs of COCO's size (640 x 480) with polygons as masks, and read once before the clock runs,
so the numbers are those of decoding with the files in memory, not of a disk.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from fastris.data import ReferringDataset, load_dataset
from fastris.data.samples import TrainSamples, worker_init
from fastris.options.declare import option

from ..options import with_options

HEIGHT, WIDTH = 480, 640
WORDS = ("left", "right", "red", "small", "the", "person", "with", "shirt", "dog", "near")


@dataclass
class LoaderConfig:
    """Measures how many samples a second the training loader delivers."""

    images: int = option(200, "JPEGs that are made", "images")
    references: int = option(3, "of each image", "references")
    workers: int = option(1, "that read them; 0: this process", "processes")
    seconds: float = option(10.0, "measured at least", "s")
    quality: int = option(90, "of the JPEGs; COCO's take 160 kB, as these do at 90")
    input_size: int = option(416, "side of the letterboxed square", "pixels")
    need: float = option(0.0, "images a training step consumes: batch size / seconds a step takes; 0: do not compare")


def make_tree(root: Path, images: int, references: int, quality: int) -> Path:
    """A folder in the layout of people's own data: pictures with the detail of photos, and polygons of 40 corners."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    with (root / "train.jsonl").open("w") as file:
        for number in range(images):
            coarse = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
            noisy = np.clip(smooth + rng.normal(0, 14, smooth.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / "images" / f"{number}.jpg", quality=quality)
            for _ in range(references):
                angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
                centre = rng.uniform(150, 330, 2)
                ring = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(40, 140, (40, 1))
                sentence = " ".join(rng.choice(WORDS, 5))
                row = {"image": f"{number}.jpg", "mask": [ring.ravel().tolist()], "sentences": [sentence]}
                file.write(json.dumps(row) + "\n")
    return root


def rate(step: Callable[[int], Any], seconds: float, samples_per_step: int = 1) -> float:
    """Samples a second over at least `seconds`, after one step that does not count."""
    step(0)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds or not count:
        count += 1
        step(count)
    return count * samples_per_step / (time.perf_counter() - started)


def measure(config: LoaderConfig, dataset: ReferringDataset) -> dict[str, float]:
    """Samples a second: decoding alone, whole samples, both in this process, and what the loader delivers."""
    samples, number = TrainSamples(dataset, config.input_size), len(dataset)
    for index in range(number):
        dataset.image(index)
    found = {
        "image decoded": rate(lambda index: dataset.image(index % number), config.seconds / 4),
        "mask decoded": rate(lambda index: dataset.mask(index % number), config.seconds / 4),
        "whole sample": rate(lambda index: samples[index % number], config.seconds / 4),
    }
    batch = min(8, number)
    order = (np.arange(100_000 * batch) % number).reshape(-1, batch).tolist()
    loader = DataLoader(samples, batch_sampler=order, num_workers=config.workers, worker_init_fn=worker_init)
    batches = iter(loader)
    for _ in range(2 * config.workers):
        next(batches)  # what the workers prepared while they started
    found["loader"] = rate(lambda _: next(batches), config.seconds, batch)
    return found


def run(config: LoaderConfig) -> int:
    """Print the rates; 1 if the loader is slower than `need`."""
    for name, least in (("images", 1), ("references", 1), ("workers", 0), ("seconds", 0), ("need", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
    with tempfile.TemporaryDirectory() as name:
        root = make_tree(Path(name), config.images, config.references, config.quality)
        size = sum(file.stat().st_size for file in (root / "images").iterdir()) / config.images
        found = measure(config, load_dataset("folder", "train", root))
    print(f"{config.images} JPEGs of {WIDTH} x {HEIGHT}, {size / 1000:.0f} kB each; {os.cpu_count()} CPU cores")
    for what, value in found.items():
        where = "in this process" if what != "loader" or not config.workers else f"with {config.workers} workers"
        print(f"  {what:<14} {value:8.1f} images/s {where}")
    per_worker = found["loader"] / max(1, config.workers)
    print(f"{per_worker:.1f} images/s per worker")
    if not config.need:
        return 0
    enough = found["loader"] >= config.need
    wanted = int(np.ceil(config.need / per_worker))
    print(f"a step needs {config.need:.1f} images/s: {'enough' if enough else f'too slow, give it {wanted} workers'}")
    return int(not enough)


def main(arguments: list[str]) -> int:
    return with_options("bench.studies.loader", LoaderConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
