"""``python -m bench.studies.switches``: MagNet's two training parts as switches on a CRIS: none, each, and both.

The tiny CRIS learns drawn scenes as ``fastris demo`` trains it, and "none" is that very training. All four arms of a
seed start from the same weights in what they share, and see the same scenes and phrases in the same order. Which words
are hidden is drawn apart from that, for each arm anew. What is compared is what one and the same CRIS finds after it,
without its training parts; drawn scenes of a tiny model say nothing about RefCOCO.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastris.commands import demo
from fastris.options.declare import option
from fastris.runtime.interrupt import StopSignal
from fastris.training.from_scratch import Track

from ..options import with_options
from ..report import results
from ..report.switches import FORMAT, load_switches, switches_page
from ..timing import machine
from .training_parts import BOTH, SWITCHES

RESULT = Path(__file__).resolve().parents[1] / "results" / "switches.json"
PRESET = "tiny"
LESSON = demo.LESSONS[PRESET]
ARMS: dict[str, Mapping[str, float]] = {
    "none": SWITCHES["off"],
    "mask_grounding": SWITCHES["mask_grounding=1.0"],
    "alignment_loss": SWITCHES["alignment_loss=0.5"],
    "both": SWITCHES[BOTH],
}
"""What is trained, by name: weights of losses, fields of the model's configuration."""

FREE = ("seed", "out", "compact", "progress")
"""Options of the demo in which the runs of one file may differ, or that change nothing of them."""

LINES = 10
"""How often a run tells how far it is."""


@dataclass
class SwitchesConfig:
    """Trains a tiny CRIS on drawn scenes without MagNet's training parts, with each, and with both, and scores it.

    About 20 minutes for one seed on two idle CPU cores. Each run is written when it ends; runs that the file holds are
    taken from it, so that the same command goes on after Ctrl-C.
    """

    seeds: tuple[int, ...] = option((0,), "seeds of scenes, weights and order, e.g. seeds=0,1; four runs for each")
    steps: int = option(LESSON.steps, "training steps; the demo's by default, as all that follows", "steps")
    scenes: int = option(demo.DemoConfig.scenes, "training scenes", "scenes")
    held_out: int = option(demo.DemoConfig.held_out, "scenes that are scored", "scenes")
    images: int = option(LESSON.images, "scenes in a step; three expressions are asked about each", "scenes")
    threads: int = option(demo.DemoConfig.threads, "CPU threads", "threads")
    json: Path = option(RESULT, "file for all that was found; runs that it holds are not trained again")

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different numbers of at least 0, got {','.join(map(str, self.seeds))}")
        self.lesson(self.seeds[0])

    def lesson(self, seed: int) -> demo.DemoConfig:
        """The demo that an arm is. Raises ValueError, naming the option."""
        return demo.DemoConfig(
            model=PRESET,
            steps=self.steps,
            scenes=self.scenes,
            held_out=self.held_out,
            images=self.images,
            threads=self.threads,
            seed=seed,
            progress=False,
        )


def run(config: SwitchesConfig) -> int:
    """Train what the file does not hold yet, write it after each run, and print the table. Ctrl-C keeps what is done.

    Raises ValueError for a file whose runs are not to be compared with those that are asked for.
    """
    about = machine.prepare(torch.device("cpu"), config.threads)
    content = opened(config, about)
    wanted = [(seed, arm) for seed in config.seeds for arm in ARMS]
    done = {(each["seed"], each["arm"]) for each in content["runs"]}
    code = 0
    with StopSignal("") as stop:
        try:
            for seed, arm in wanted:
                if (seed, arm) in done:
                    tell(f"{arm}, seed {seed}: taken from {config.json}")
                    continue
                with stop.at_once():
                    found = train_arm(config, arm, seed, stop)
                content["runs"].append(found | {"date": about["date"], "git": about["git"]})
                results.save(config.json, content)
        except KeyboardInterrupt:
            left = len(wanted) - len({(each["seed"], each["arm"]) for each in content["runs"]} & set(wanted))
            tell(f"stopped: {left} of {len(wanted)} runs are to come; the same command goes on")
            code = 130
    if content["runs"]:
        print(switches_page(content, os.path.relpath(config.json)))
    return code


def opened(config: SwitchesConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds, or what a new one, which is written now, begins with.

    Raises ValueError where its runs were trained otherwise, or by other versions or on another processor.
    """
    lesson = {name: value for name, value in asdict(config.lesson(config.seeds[0])).items() if name not in FREE}
    settings = lesson | {"arms": {arm: dict(switches) for arm, switches in ARMS.items()}}
    if not config.json.exists():
        content: dict[str, Any] = {"format": FORMAT, "machine": dict(about), "settings": settings, "runs": []}
        results.save(config.json, content)  # a file that cannot be written is better known now
        return content
    content = load_switches(config.json)
    then, now = what_counts(content["machine"], content["settings"]), what_counts(about, settings)
    for name in now:
        if now[name] != then.get(name):
            raise ValueError(
                f"{config.json} holds runs with {name} {then.get(name)}, which are not to be compared with those of "
                f"{now[name]}; give json=ANOTHER_FILE"
            )
    return content


def what_counts(about: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same for all runs of a file, by name."""
    versions = {name: about["versions"][name] for name in ("fastris", "torch")}
    return {**settings, **versions, "processor": about["device"]["name"]}


def train_arm(config: SwitchesConfig, arm: str, seed: int, stop: StopSignal) -> dict[str, Any]:
    """Train and score one arm: the demo's metrics, and the switches of the model that was trained."""
    lesson = config.lesson(seed)
    learnt = demo.learn(lesson, ARMS[arm], stop=stop, track=told_as(f"{arm}, seed {seed}"))
    found: Any = learnt.model.config
    switches = {name: getattr(found, name) for name in ARMS["both"] if getattr(found, name)}
    kinds = demo.by_kind(learnt.held_out, learnt.right)
    metrics = demo.metrics(lesson, learnt, kinds)
    tell(f"{arm}, seed {seed}: {learnt.right.scores}; {learnt.seconds:.0f} s")
    return {"arm": arm, "switches": switches, **metrics}


def told_as(name: str) -> Track:
    """Tells on stderr, a few times, how far a sequence is, and the mean of the last losses."""

    def track(sequence: Sequence[Any], title: str, losses: list[float] | None = None) -> Iterable[Any]:
        every, started = max(1, len(sequence) // LINES), time.monotonic()
        for number, item in enumerate(sequence, start=1):
            yield item
            if number % every == 0:
                recent = f", loss {sum(losses[-50:]) / len(losses[-50:]):.4f}" if losses else ""
                seconds = time.monotonic() - started
                tell(f"{name}: {title} {number}/{len(sequence)}{recent}, {seconds:.0f} s")

    return track


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    return with_options("bench.studies.switches", SwitchesConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
