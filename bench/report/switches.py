"""What ``python -m bench.studies.switches`` found, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastris.runtime.markdown import markdown_table

from .results import load_json

FORMAT = 1
"""Version of the files that the study writes."""

COLUMNS = {
    "right phrase, mIoU": ("right_phrase", "mIoU"),
    "right phrase, oIoU": ("right_phrase", "oIoU"),
    "another object's phrase, mIoU": ("other_objects_phrase", "mIoU"),
    "hidden words guessed": ("hidden_words", "masked_accuracy"),
    "the most frequent word's share": ("hidden_words", "most_frequent_share"),
}
"""Column -> where a run has it; a fraction of 1."""


def load_switches(path: Path) -> dict[str, Any]:
    """A file of the study. Raises ValueError when it is none, or of another format."""
    mend = f"remove it, and write it anew with python -m bench.studies.switches json={path}"
    content = load_json(path, mend)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT or not {"machine", "settings", "runs"} <= content.keys():
        raise ValueError(f"{path} is not of this version's python -m bench.studies.switches; {mend}")
    return content


def switches_page(content: Mapping[str, Any], source: str) -> str:
    """A row for each arm: the mean over its seeds, from the least to the most of them where it has several."""
    rows = []
    for arm, switches in content["settings"]["arms"].items():
        name = f"`{arm}={switches[arm]}`" if arm in switches else arm
        runs = [each for each in content["runs"] if each["arm"] == arm]
        rows.append((name, *(_percent(runs, part, key) for part, key in COLUMNS.values())))
    return f"{markdown_table(('', *COLUMNS), rows)}\n\n<sub>{' '.join(_notes(content, source))}</sub>"


def _percent(runs: Sequence[Mapping[str, Any]], part: str, key: str) -> str:
    shares = [100 * each[part][key] for each in runs if key in each.get(part, ())]
    if not shares:
        return "-"
    spread = f" ({min(shares):.1f} to {max(shares):.1f})" if len(shares) > 1 else ""
    return f"{fmean(shares):.1f} %{spread}"


def _notes(content: Mapping[str, Any], source: str) -> list[str]:
    """What was done, what the numbers do not say, what is missing, and where they come from."""
    runs, settings, about = content["runs"], content["settings"], content["machine"]
    seeds = sorted({each["seed"] for each in runs})
    done = {(each["arm"], each["seed"]) for each in runs}
    missing = [f"{arm} with seed {seed}" for seed in seeds for arm in settings["arms"] if (arm, seed) not in done]
    drawn = min(settings["scenes"], settings["steps"] * settings["images"])
    notes = [
        f"A tiny CRIS from nothing, {settings['steps']} steps on {drawn} drawn scenes, scored on "
        f"{settings['held_out']} held-out ones: this says nothing about RefCOCO."
    ]
    if len(seeds) > 1:
        notes.append(f"Seeds {', '.join(map(str, seeds))}: the mean, and from the least to the most.")
    else:
        notes.append("One seed: what of a difference is chance is not known.")
    if missing:
        notes.append(f"Not trained yet: {', '.join(missing)}.")
    revisions = dict.fromkeys((each["git"]["revision"] or "unknown")[:10] for each in runs)
    changed = " with changes" if any(each["git"]["dirty"] for each in runs) else ""
    versions, minutes = about["versions"], sum(each["seconds"] for each in runs) / 60
    facts = [
        about["device"]["name"],
        f"{settings['threads']} threads",
        f"{minutes:.0f} minutes altogether",
        f"PyTorch {versions['torch']}",
        f"fastris {versions['fastris']}",
        f"revision {', '.join(revisions)}{changed}",
        about["date"][:10],
    ]
    return [*notes, f"{', '.join(facts)}. Raw data: `{source}`."]
