"""`curves.html` in a run's folder: loss, IoU, learning rate and speed, from the run's own CSV files."""

from __future__ import annotations

import csv
from pathlib import Path

from fastris.pictures.curves import Chart, page
from fastris.runtime.storage import replacing

CURVES = "curves.html"
SHOWN = ("epoch", "step", "mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90")


def draw_curves(folder: Path) -> Path | None:
    """Draw what `log.csv` and `val.csv` hold; nothing, and None, before the first step."""
    steps, validations = _rows(folder / "log.csv"), _rows(folder / "val.csv")
    if not steps:
        return None
    iou = {"validation": _points(validations, "mIoU", 100), "training": _points(steps, "iou", 100)}
    rates = {"head": _points(steps, "lr"), "encoders": _points(steps, "lr_backbone")}
    if rates["head"] == rates["encoders"]:
        rates = {"all": rates["head"]}
    charts = [
        Chart("Loss", {"training": _points(steps, "loss")}),
        Chart("mIoU", iou, " %"),
        Chart("Learning rate", rates),
        Chart("Throughput", {"images/s": _points(steps, "images_per_s")}),
    ]
    facts = f"{steps[-1]['step']} steps, epoch {steps[-1]['epoch']}; {steps[-1]['time']}"
    if validations:
        best = max(validations, key=lambda row: float(row["mIoU"]))
        last = validations[-1]
        facts += f". Best mIoU {_percent(best['mIoU'])} % after epoch {best['epoch']}, by rule {last['rule']} on "
        facts += f"{last['dataset']} {last['split']}, {last['expressions']} expressions"
    table = [[row[name] if name in ("epoch", "step") else _percent(row[name]) for name in SHOWN] for row in validations]
    with replacing(folder / CURVES) as path:
        path.write_text(page(folder.resolve().name, facts, charts, SHOWN, table[::-1][:200]), encoding="utf-8")
    return folder / CURVES


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _points(rows: list[dict[str, str]], name: str, factor: float = 1.0) -> list[tuple[float, float]]:
    return [(float(row["step"]), factor * float(row[name])) for row in rows if row[name] not in ("", "-")]


def _percent(text: str) -> str:
    return f"{100 * float(text):.2f}" if text not in ("", "-") else "-"
