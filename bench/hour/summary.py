"""summary.md: the goals beside what was measured, how every step ended, and what it left out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from fastris.runtime.markdown import markdown_table

from .plan import STEPS

Items = Mapping[str, Mapping[str, Any]]
Steps = Mapping[str, Mapping[str, Any]]

GOAL_BATCH, GOAL_DTYPE = 16, "bfloat16"
LEAST_GOALS = (
    ("similarity head + loss", "similarity_loss", 12.0, 6.0),
    ("up-convolution, 26x26", "upsample_conv_26", 2.5, 2.0),
    ("up-convolution, 52x52", "upsample_conv_52", 2.5, 2.0),
    ("cross-attention", "cross_attention_padded", 4.0, 2.0),
    ("projector + loss", "projector_loss", 3.0, 2.2),
    ("decoder", "decoder", 2.0, 1.3),
)
"""Title, case, and how many times faster than repaired eager and than torch.compile's max-autotune it has to be."""

STEP_GOALS = (1.5, 1.25)
MEMORY_GOAL = 12 * 10**9


def markdown(content: Mapping[str, Any]) -> str:
    """The whole page."""
    mark, steps = content["fingerprint"], content["steps"]
    on_gpu = mark["type"] == "cuda"
    lines = [f"# {'The first hour on ' + mark['name'] if on_gpu else 'A rehearsal on a CPU'}", ""]
    if not on_gpu:
        lines += ["**Measured on a CPU, at small sizes: nothing here says anything about a GPU.**", ""]
    versions = ", ".join(
        f"{name} {mark[name]}" for name in ("python", "torch", "triton", "cuda", "driver") if mark[name]
    )
    lines += [f"{versions}; source {mark['source']}; begun {content['begun']}, written {content['updated']}", ""]
    lines += ["## Steps", "", _steps(steps)]
    if on_gpu:
        lines += ["", "## Goals", "", _goals(steps)]
    for title, text in (
        ("Ceilings", _ceilings(_items(steps, "device"))),
        ("Operators", _operators(_items(steps, "kernels"))),
        ("The training step", _training(_items(steps, "training"))),
        ("The same curve?", _curve(_items(steps, "curve"))),
        ("What failed, and what was skipped or left out", _troubles(steps)),
    ):
        if text:
            lines += ["", f"## {title}", "", text]
    return "\n".join(lines) + "\n"


def _steps(steps: Steps) -> str:
    rows = []
    for step in STEPS:
        entry = steps.get(step.name)
        ended = (entry["status"], f"{entry['seconds']:.0f}", entry["why"]) if entry else ("not reached", "", "")
        rows.append((f"{step.name}: {step.title}", *ended))
    return markdown_table(("step", "ended", "s", ""), rows)


def _items(steps: Steps, name: str) -> Items:
    return steps.get(name, {}).get("items", {})


def _goals(steps: Steps) -> str:
    """Each goal beside what was measured: against repaired eager, and against torch.compile's max-autotune."""
    rows = []
    items = _items(steps, "kernels")
    for title, case, repaired, autotuned in LEAST_GOALS:
        key = f"{case} {GOAL_DTYPE} B={GOAL_BATCH}"
        own = _both(items, key, "triton")
        rows.append(_goal(title, "repaired", repaired, _both(items, key, "repaired"), own))
        rows.append(_goal(title, "max-autotune", autotuned, _both(items, f"{key} compiled", "max_autotune"), own))
    training = _items(steps, "training")
    own = _step_ms(training, "fastris")
    for against, goal in zip(("repaired", "max_autotune"), STEP_GOALS, strict=True):
        rows.append(_goal("training step", against.replace("_", "-"), goal, _step_ms(training, against), own))
    peak = training.get("train_step B=64 fastris, recompute=stages", {}).get("peak_bytes")
    measured = "not measured" if peak is None else f"{peak / 1e9:.1f} GB"
    verdict = "" if peak is None else _verdict(peak <= MEMORY_GOAL)
    rows.append(("peak memory of the step, B=64, recompute=stages", "", "<= 12 GB", measured, verdict))
    table = markdown_table(("", "against", "goal", "measured", ""), rows)
    return f"{GOAL_DTYPE}, B={GOAL_BATCH}, forward + backward, Triton\n\n{table}"


def _goal(title: str, against: str, goal: float, other: float | None, own: float | None) -> tuple[str, ...]:
    if other is None or own is None:
        return title, against, f"{goal:g}x", "not measured", ""
    return title, against, f"{goal:g}x", f"{other / own:.2f}x", _verdict(other / own >= goal)


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**missed**"


def _both(items: Items, key: str, arm: str) -> float | None:
    return items.get(key, {}).get("arms", {}).get(arm, {}).get("both", {}).get("seconds")


def _step_ms(items: Items, arm: str) -> float | None:
    return items.get(f"train_step B={GOAL_BATCH} {arm}", {}).get("median_ms")


def _ceilings(items: Items) -> str:
    rows = [
        (
            key.removeprefix("ceilings "),
            f"{item['matrix_flops_per_s'] / 1e12:.3g}",
            f"{item['copy_bytes_per_s'] / 1e12:.3g}",
        )
        for key, item in items.items()
        if "matrix_flops_per_s" in item
    ]
    return markdown_table(("products", "TFLOP/s", "copy, TB/s (read + written)"), rows) if rows else ""


def _operators(items: Items) -> str:
    """Microseconds of forward + backward, by arm, and the gain over repaired."""
    rows = []
    for key, item in items.items():
        times = {arm: _both(items, key, arm) for arm in ("repaired", "torch", "triton", "max_autotune")}
        if any(times.values()):
            repaired, triton = times["repaired"], times["triton"]
            gain = repaired / triton if repaired and triton else None
            how = ", ".join(sorted({timing["how"] for arm in item["arms"].values() for timing in arm.values()}))
            cells = [_number(time, 1e6, ".1f") for time in times.values()]
            rows.append((key, *cells, _number(gain, 1.0, ".2f", "x"), how))
    columns = ("", "repaired", "torch", "Triton", "max-autotune", "Triton against repaired", "timed by")
    table = markdown_table(columns, rows)
    return f"forward + backward, in microseconds; float32 is IEEE float32\n\n{table}" if rows else ""


def _training(items: Items) -> str:
    rows = []
    for key, item in items.items():
        if "median_ms" in item:
            repaired = items.get(key.removesuffix(item["arm"]) + "repaired", {}).get("median_ms")
            tenths = statistics.quantiles(item["ms"], n=10, method="inclusive")
            spread, peak = f"{tenths[1]:.2f} to {tenths[7]:.2f}", _number(item.get("peak_bytes"), 1e-9, ".2f")
            gain = _number(repaired and repaired / item["median_ms"], 1.0, ".2f", "x")
            rows.append((key, f"{item['median_ms']:.2f}", spread, peak, gain))
        elif item.get("out_of_memory"):
            rows.append((key, "out of memory", "", "", ""))
    columns = ("", "ms", "20th to 80th percentile", "peak, GB", "against repaired")
    return markdown_table(columns, rows) if rows else ""


def _curve(items: Items) -> str:
    rows = []
    for path, item in items.items():
        if losses := item.get("losses"):
            rows.append(f"- {path}: {len(losses)} steps, loss {losses[0]:.4f} to {statistics.fmean(losses[-10:]):.4f}")
    verdict = items.get("same curve")
    if verdict and verdict["status"] == "ok":
        left, right = verdict["compared"]
        parts = f"{verdict['first']:.1e} apart at the beginning, {verdict['windows']:.1e} in windows"
        rows.append(f"- {left} and {right}: the same curve ({parts})")
    elif verdict:
        rows.append(f"- {verdict['status']}: {verdict['why']}")
    return "\n".join(rows)


def _troubles(steps: Steps) -> str:
    rows = []
    for step in STEPS:
        entry = steps.get(step.name)
        if entry is None:
            continue
        skipped: dict[str, list[str]] = {}
        for key, item in entry["items"].items():
            if item["status"] in ("failed", "cut"):
                rows.append(f"- {step.name}, {key}: **{item['status']}**: {_cell(item.get('why', ''))}")
            elif item["status"] == "skipped":
                skipped.setdefault(item["why"], []).append(key)
            if "instead" in item:
                skipped.setdefault(item["instead"], []).append(f"{key} in place of the whole model")
        rows += [f"- {step.name}, skipped: {_some(keys)}: {_cell(why)}" for why, keys in skipped.items()]
        if entry["left_out"]:
            rows.append(f"- {step.name}, left out for want of time: {_some(entry['left_out'])}")
    return "\n".join(rows)


def _some(keys: Iterable[str], most: int = 4) -> str:
    keys = list(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _number(value: float | None, scale: float, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value * scale:{form}}{unit}"


def _cell(text: str) -> str:
    return " ".join(text.split())[:300]
