"""Pages of results that are no table of cases: memory of the whole step, modelled cards, looking once, the demo."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastris.ops.upsample_conv import CPU_PART_BYTES, GPU_PART_BYTES
from fastris.runtime.markdown import markdown_table

from ..options import BASELINE
from ..timing.harness import Outcome
from .results import MIB, OTHERS, Spread, gains, is_measured, kept_bytes, load_json, number
from .tables import caption

# Memory: what a count holds, and which batch it forecasts for a card.

BATCH = 2
DTYPE = torch.bfloat16
WHOLE_GOALS = {"pointwise": 240, "stages": 135}
"""Recompute setting -> MiB kept per image, at most, with the weights' copies, by every arm but the baseline."""

CARD_SIZES = (8, 12, 16, 24)
"""Memory of the cards in GiB."""

CONTEXT = 512 * 2**20
"""Bytes of a card that PyTorch's allocator does not get: CUDA's context, kernels, a desktop. Estimated."""

WORKSPACE = GPU_PART_BYTES - CPU_PART_BYTES + 256 * 2**20
"""Bytes that come and go within an operation: on a GPU the projector's larger tap images, and cuDNN's and cuBLAS's
workspaces, estimated."""

PUBLISHED_BATCH = 64
CRIS_R50 = {
    "model": "CRIS-RN50 at 416x416",
    "dtype": "bfloat16",
    "words": 17,
    "goals": WHOLE_GOALS,
    "share": None,
    "published_batch": PUBLISHED_BATCH,
}
"""What a count is of, where a file does not say. ``goals``: setting -> MiB kept per image at most; ``share``: of what
the baseline keeps, where there is no such goal; ``parts``: part -> the share for it alone, where there is one;
``published_batch``: the batch that training is published with."""

GIB = 2**30

TIME_GOAL = 1.15
"""A step with ``"stages"`` takes at most this many times one with ``"none"``."""


@dataclass
class WholeCell(Outcome):
    """One arm's count with one recompute setting: ``stages`` of a batch of :data:`BATCH`, stage -> :class:`Kept` as a
    dict; ``fixed`` bytes for weights and optimizer state; ``lines`` part -> (bytes, bytes per image) at its peak."""

    stages: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    fixed: int = 0
    lines: dict[str, tuple[float, float]] = field(default_factory=dict)

    def step_bytes(self, batch: int) -> float:
        """Forecast of a training step's bytes on a card, without what the allocator does not get."""
        return self.fixed + WORKSPACE + max(start + batch * slope for start, slope in self.lines.values())

    def largest_batch(self, gib: float) -> int:
        """The largest batch whose step fits on a card of ``gib``; 0 where one image does not."""
        room = gib * GIB - CONTEXT - WORKSPACE - self.fixed
        batch = min(((room - start) / slope for start, slope in self.lines.values() if slope > 0), default=0)
        return max(0, int(batch)) if all(start <= room for start, _ in self.lines.values()) else 0

    def mib_per_image(self, *stages: str) -> float:
        """MiB kept for backward per image in these stages, or in all."""
        return kept_bytes(vars(self), *stages) / BATCH / MIB


def load_counts(path: Path) -> dict[str, Any]:
    """A file that ``python -m bench.memory json=FILE`` wrote. Raises ValueError when it is none."""
    mend = f"write it anew with python -m bench.memory json={path}"
    content = load_json(path, mend)
    if not isinstance(content, dict) or "cells" not in content:
        raise ValueError(f"{path} holds no counts; {mend}")
    return content


def memory_page(content: Mapping[str, Any], source: str) -> str:
    """What is kept, what fits, and what recomputing costs where it was timed."""
    cells = [WholeCell(**cell) for cell in content["cells"]]
    parts = [kept_table(cells, content.get("of", CRIS_R50)), fits_table(cells, content.get("of", CRIS_R50))]
    parts += [time_table(taken, content["timed_batch"], name) for name, taken in content.get("seconds", {}).items()]
    about = content["machine"]
    facts = about["device"]["name"], f"{about['threads']} threads", f"PyTorch {about['versions']['torch']}"
    return "\n\n".join([*parts, f"<sub>{', '.join(facts)}, {about['date'][:10]}. Raw data: `{source}`.</sub>"])


def kept_per_image(content: Mapping[str, Any]) -> dict[str, float]:
    """MiB kept for backward per image by the whole model, by arm and recompute setting: "torch stages"."""
    cells = [WholeCell(**cell) for cell in content["cells"]]
    return {f"{cell.arm} {cell.recompute}": cell.mib_per_image() for cell in cells if not cell.message}


def kept_table(cells: Sequence[WholeCell], of: Mapping[str, Any] = CRIS_R50) -> str:
    """MiB kept for backward per image by the whole model ``of`` which they are, see :data:`CRIS_R50`."""
    rows = []
    baseline = next((cell.mib_per_image() for cell in cells if cell.arm == BASELINE and not cell.message), None)
    for cell in cells:
        total, copies = cell.mib_per_image(), sum(kept["weight_copies"] for kept in cell.stages.values()) / BATCH / MIB
        parts = ", ".join(f"{name} {cell.mib_per_image(name):.0f}" for name in cell.stages)
        goal, wanted = of["goals"].get(cell.recompute), f"at most {of['goals'].get(cell.recompute)}"
        if goal is None and of["share"] and baseline is not None and cell.arm != BASELINE:
            goal, wanted = of["share"] * baseline, f"at most {of['share']:g}x {BASELINE}"
            wanted += f" (is {total / baseline:.2f}x)"
        met = "-" if goal is None else "yes" if total <= goal else "no"
        figures = (f"{total:.0f} ({parts})", f"{copies:.0f}") if not cell.message else (cell.message, "-")
        rows.append((cell.arm, cell.recompute, *figures, wanted if goal else "-", met))
    columns = ("arm", "recompute", "MiB per image", "of them copies of weights", "goal", "met")
    precision = of["dtype"] if of["dtype"] == "float32" else f"{of['dtype']} autocast"
    title = f"Kept for backward per image by the whole of {of['model']}, B={BATCH}, {precision}, {of['words']} words."
    return "\n\n".join([f"{title}\n\n{markdown_table(columns, rows)}", *_shares_of_parts(cells, of.get("parts", {}))])


def _shares_of_parts(cells: Sequence[WholeCell], goals: Mapping[str, float]) -> list[str]:
    """A line for each part that has a goal of its own: which share of the baseline's bytes every setting keeps."""
    counted = [cell for cell in cells if not cell.message]
    kept = {part: {(c.arm, c.recompute): c.mib_per_image(part) for c in counted} for part in goals}
    lines = []
    for part, goal in goals.items():
        whole = next((mib for (arm, _), mib in kept[part].items() if arm == BASELINE), 0.0)
        if whole:
            shares = (
                f"{arm}, {recompute}: {mib / whole:.2f}x ({'yes' if mib <= goal * whole else 'no'})"
                for (arm, recompute), mib in kept[part].items()
                if arm != BASELINE
            )
            lines.append(f"Goal for the {part}: at most {goal:g}x {BASELINE}. {'; '.join(shares)}.")
    return lines


def fits_table(cells: Sequence[WholeCell], of: Mapping[str, Any] = CRIS_R50) -> str:
    """The largest batch that fits on each card."""
    rows, batch = [], of["published_batch"]
    for cell in cells:
        if not cell.message:
            fits = (str(cell.largest_batch(card)) for card in CARD_SIZES)
            needs, met = cell.step_bytes(batch) / GIB, cell.largest_batch(12) >= batch
            rows.append((cell.arm, cell.recompute, *fits, f"{needs:.1f}", "yes" if met else "no"))
    published = f"B={batch}"
    sizes = (f"{size} GB" for size in CARD_SIZES)
    columns = ("arm", "recompute", *sizes, f"{published} needs GiB", f"{published} in 12 GB")
    title = "Largest batch of one training step with Adam, forecast from counted bytes, tried on no card."
    return f"{title}\n\n{markdown_table(columns, rows)}"


def time_table(seconds: Mapping[str, list[float]], batch: int, dtype: str) -> str:
    """What the settings cost, as the median over the rounds of the ratio within each."""
    rows = []
    for setting, taken in seconds.items():
        ratios = [own / none for own, none in zip(taken, seconds["none"], strict=True)]
        ratio, spread = statistics.median(ratios), f"{min(ratios):.2f}-{max(ratios):.2f}"
        met = "-" if setting != "stages" else "yes" if ratio <= TIME_GOAL else "no"
        rows.append((setting, f"{statistics.median(taken):.2f}", f"{ratio:.2f}x [{spread}]", met))
    rounds = len(seconds["none"])
    title = f"Forward and backward, B={batch}, {dtype}, channels_last, {rounds} rounds; goal {TIME_GOAL:g}x."
    return f"{title}\n\n{markdown_table(('recompute', 's, median', 'times none [min-max]', 'met'), rows)}"


# Modelled cards.

CARDS_FORMAT = 1
"""Version of the files that ``python -m bench.modelled.cards`` writes."""


def load_model(path: Path) -> dict[str, Any]:
    """A file of that command. Raises ValueError when it is of another format."""
    content = load_json(path)
    if not isinstance(content, dict) or content.get("format") != CARDS_FORMAT or "paths" not in content:
        raise ValueError(f"{path} is not of this version's python -m bench.modelled.cards; write it again")
    return content


def step_ms(content: Mapping[str, Any], card: str) -> dict[str, float]:
    """Path -> modelled milliseconds of the whole step on a card."""
    return {path: sum(stage["ms"][card] for stage in stages.values()) for path, stages in content["paths"].items()}


def card_names(content: Mapping[str, Any]) -> list[str]:
    return [card["name"] for card in content["assumptions"]["cards"]]


def cards_page(content: Mapping[str, Any], source: str) -> str:
    """All tables: the step, its stages, the assumptions, and how far off the model is where something was measured."""
    return "\n\n".join(
        [
            f"**Modelled, not measured:** {content['modelled']}, ms per step (images per second).",
            _steps(content),
            "<details><summary>Assumptions, stages, and how far off the model is on a measured device</summary>",
            _assumptions(content),
            _stages(content),
            _checks(content),
            f"Raw numbers: `{source}`.",
            "</details>",
        ]
    )


def _steps(content: Mapping[str, Any]) -> str:
    paths, batch = list(content["paths"]), content["batch"]
    rows = []
    for card in card_names(content):
        times = step_ms(content, card)
        cells = [f"{number(ms)} ({1000 * batch / ms:.0f}/s)" for ms in times.values()]
        other, own = (min(ms for path, ms in times.items() if path.startswith(OTHERS) is is_) for is_ in (True, False))
        rows.append((card, *cells, f"{times[paths[0]] / own:.2f}x, {other / own:.2f}x"))
    return markdown_table(("*modelled*", *paths, f"gain over {paths[0]}, over the best other path"), rows)


def _assumptions(content: Mapping[str, Any]) -> str:
    made = content["assumptions"]
    rows = []
    for card in made["cards"]:
        rates = (f"{card[kind] / 1e12:.1f}" for kind in ("matrix_rate", "wide_rate"))
        rows.append((card["name"], *rates, f"{card['bandwidth']:g}", card["memory"], card["source"]))
    head = ("card", "bf16 TFLOP/s, dense, float32 sums", "float32 TFLOP/s", "GB/s", "GB", "source")
    text = (
        f"Every operation takes the longest of: its products at {made['matrix_share']:.0%} of the matrix rate, its "
        f"bytes at {made['bandwidth_share']:.0%} of the bandwidth, {1e6 * made['launch_seconds']:.0f} us for a launch. "
        "Nothing is fused but what the path fuses itself, each input is read and each output written once, caches keep "
        "nothing, the grouped convolution reaches the same share as any other, dropout is left out, and the processor "
        "keeps up with launches. The triton column takes the kernels' traffic from their documentation."
    )
    return f"{text}\n\n{markdown_table(head, rows)}"


def _stages(content: Mapping[str, Any]) -> str:
    paths, card = content["paths"], card_names(content)[0]
    rows = []
    for name in next(iter(paths.values())):
        counted = [stages[name] for stages in paths.values()]
        cells = [(f"{s['flops'] / 1e9:.0f}", f"{s['bytes'] / 1e9:.2f}", number(s["ms"][card])) for s in counted]
        rows.append((name, *map(", ".join, cells)))
    text = f"Stage by stage, forward and backward: GFLOP, GB through memory, and *modelled* ms on the {card}."
    return f"{text}\n\n{markdown_table(('stage', *paths), rows)}"


def _checks(content: Mapping[str, Any]) -> str:
    if not content["checks"]:
        return "No device has been measured to check the model against."
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for check in content["checks"]:
        cases.setdefault((check["device"], check["case"]), {})[check["arm"]] = check
    arms = list(dict.fromkeys(check["arm"] for check in content["checks"]))
    first, last = arms[0], arms[-1]
    rows = []
    for (_, name), found in cases.items():
        gain = "- / -"
        if first in found and last in found:
            gain = " / ".join(f"{number(found[first][kind] / found[last][kind])}x" for kind in KINDS)
        rows.append((name, *(_off(found[arm]) if arm in found else "" for arm in arms), gain))
    devices = "; ".join(dict.fromkeys(f"{check['device']} ({check['rates']})" for check in content["checks"]))
    text = (
        f"Modelled / measured ms on {devices}, how many times longer it took than modelled, and the gain of {last} "
        f"over {first}, modelled / measured."
    )
    return f"{text}\n\n{markdown_table(('case', *arms, 'gain'), rows)}"


KINDS = ("modelled_ms", "measured_ms")


def _off(check: Mapping[str, Any]) -> str:
    modelled, measured = (check[kind] for kind in KINDS)
    return f"{number(modelled)} / {number(measured)} ({measured / modelled:.2f}x)"


# Looking once, and the demo.


def look_once_page(result: Mapping[str, Any], source: str) -> str:
    """Expressions per second, and images per second, of every arm."""
    arms = list(dict.fromkeys(arm for case in result["cases"] for arm in case["arms"]))
    rows = []
    for case in result["cases"]:
        count, kind = case["sizes"]["expressions"], case["title"].partition(":")[0].lower()
        gain = gains(case).get("look once")
        factor = "-" if gain is None else f"**{number(gain.median)}x** ({number(gain.low)} to {number(gain.high)})"
        cells = [_rates(case["arms"].get(arm), count) for arm in arms]
        rows.append((f"{kind}, {count} per image", *cells, factor))
    notes = (
        "Expressions per second (images per second) with several expressions about each image. Published: one by one, "
        "by the published formulas. The gain is looking once over that, with the middle 60 % of the rounds."
    )
    sources = f"<sub>{caption(result)} Raw data: `{source}`.</sub>"
    return "\n\n".join([notes, markdown_table(("", *arms, "gain"), rows), sources])


def _rates(cell: Mapping[str, Any] | None, count: int) -> str:
    if cell is None:
        return ""
    if not is_measured(cell):
        return f"**{cell['status'].upper()}**"
    images = 1000 / Spread.of(cell["ms"]).median
    return f"{number(count * images)} ({number(images)})"


def demo_page(metrics: Mapping[str, Any], source: str) -> str:
    """The demo's test of language: how well masks follow the right phrase, and another object's."""

    def percent(share: float) -> str:
        return f"{100 * share:.1f} %"

    columns = ("mIoU", "oIoU", "Pr@50")
    names = {"right_phrase": "the right phrase", "other_objects_phrase": "another object's phrase"}
    rows = [(text, *(percent(metrics[name][column]) for column in columns)) for name, text in names.items()]
    kinds = ", ".join(f"{kind}s {percent(value)}" for kind, value in metrics["right_phrase_by_kind"].items())
    right = metrics["right_phrase"]
    notes = [
        f"mIoU by kind of phrase: {kinds}.",
        f"{right['expressions']} expressions, rule {right['rule']}, {right['sentences']} sentences;",
        f"seed {metrics['seed']}, {metrics['steps']} steps, {metrics['seconds']:.0f} s",
        f"on {metrics['threads']} CPU cores, PyTorch {metrics['torch']}. Raw data: `{source}`.",
    ]
    return f"{markdown_table(('', *columns), rows)}\n\n<sub>{' '.join(notes)}</sub>"
