"""The pages on training for the hub: their commands parse, and their times follow from the model of the cards."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from fastris.commands.cli import COMMANDS
from fastris.data.formats.published import REFERENCES
from fastris.options.declare import load_options

ROOT = Path(__file__).parents[2]
PAGES = ("recipe.md", "sharing.md")


def commands(page: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.startswith("fastris ")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_parses(page):
    lines = commands(page)
    assert lines
    for line in lines:
        name, *args = shlex.split(line, comments=True)[1:]
        load_options(getattr(importlib.import_module(COMMANDS[name].module), COMMANDS[name].config), args)
    words = re.findall(r"`fastris (\w+)", (ROOT / "docs" / page).read_text())
    assert set(words) <= COMMANDS.keys()


def test_times_of_the_recipe_follow_from_the_modelled_cards():
    text = (ROOT / "docs" / "recipe.md").read_text()
    steps = REFERENCES["refcoco"]["train"] // 64 * 50
    assert (
        f"50 of them are {steps:,}" in text
        and f"{steps:,} steps of 64" in (ROOT / "fastris" / "commands" / "train_options.py").read_text()
    )
    results = json.loads((ROOT / "bench" / "results" / "modelled_cards.json").read_text())
    measured = next(c for c in results["checks"] if (c["case"], c["arm"]) == ("train_step, B=2", "torch"))
    off = round(measured["measured_ms"] / measured["modelled_ms"], 2)
    assert f"times {off}" in text
    rows = dict(re.findall(r"^\| ((?:RTX|H200)[^|]*?) \| (.*) \|$", text, re.MULTILINE))
    cards = {card for stage in results["paths"]["torch"].values() for card in stage["ms"]}
    assert rows.keys() == cards
    for card, row in rows.items():
        batch = sum(stage["ms"][card] for stage in results["paths"]["torch"].values())
        hours = 4 * batch * steps / 3.6e6
        assert row == f"{batch:.3g} | {hours:.1f} | {off * hours:.1f}", card
