"""``python -m bench.switch_memory``: what each switch of CRIS adds to the bytes of a training step.

Counted on tensors without values, as :mod:`bench.memory` counts: the most bytes alive in any part of forward and
backward, the torch path, bf16 autocast. Each part's bytes are a line through two counted batches. What a switch adds is
a line that is nowhere below the difference to a plain CRIS, from two references to :data:`MOST`. The table that
training goes by has these lines; this fails where it says less than any count, that of switches together included.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastris.dispatch import use_impl
from fastris.models import registry
from fastris.nn.recompute import RECOMPUTE_SETTINGS
from fastris.options.declare import option
from fastris.runtime.markdown import markdown_table
from fastris.training.switch_memory import added_by

from . import counter
from .memory import DTYPE, parts_of, told_of_parts
from .options import with_options
from .report.results import save
from .studies import training_parts
from .timing import machine

SWITCHES: dict[str, dict[str, Any]] = {
    "off": {},
    "vlba=neck": {"vlba": "neck"},
    "vlba=trunk": {"vlba": "trunk"},
    "alignment_module=trunk": {"alignment_module": "trunk"},
    "centre_layers=6": {"centre_layers": 6},
    "mask_grounding": {"mask_grounding": 1.0},
    "alignment_loss": {"alignment_loss": 0.5},
    "instance_contrast": {"instance_contrast": 0.1},
}
COMBINED: dict[str, dict[str, Any]] = {
    "vlba=neck with all others": {
        "vlba": "neck",
        "centre_layers": 6,
        "mask_grounding": 1.0,
        "alignment_loss": 0.5,
        "instance_contrast": 0.1,
    },
}
"""What is counted, by name."""

BATCHES = (2, 6)
MOST = 64
"""References up to which a line holds."""
HIDDEN = 3
"""Tokens of each sentence that are taken to be hidden: with mask_rate=0.15 even 17 tokens have fewer on average."""

Lines: TypeAlias = dict[str, tuple[float, float]]
"""Part -> (bytes, bytes for each reference)."""


@dataclass
class SwitchMemoryConfig:
    """Counts what each switch of CRIS adds to the bytes of a training step, for every recompute setting."""

    model: str = option("cris_r50", "a preset of CRIS")
    only: tuple[str, ...] = option((), "names of what to count besides a plain CRIS; all if empty")
    json: Path | None = option(None, "file for all counts, written after each switch")


def run(config: SwitchMemoryConfig) -> int:
    known = SWITCHES | COMBINED
    if unknown := [name for name in config.only if name not in known]:
        raise ValueError(f"only={unknown[0]} is unknown; choose from {', '.join(known)}")
    names = ["off", *(name for name in known if name != "off" and (not config.only or name in config.only))]
    counts: dict[str, Any] = {}
    for name in names:
        print(f"counting {name}", file=sys.stderr, flush=True)
        counts[name] = {
            recompute: count_lines(config.model, known[name], recompute) for recompute in RECOMPUTE_SETTINGS
        }
        counts[name]["parameters"] = count_parameters(config.model, known[name])
        if config.json is not None:
            content = {"machine": machine.prepare(torch.device("cpu")), "model": config.model, "counts": counts}
            save(config.json, content)
    print(table(counts))
    low = below(counts)
    print(*low, sep="\n", file=sys.stderr)
    return int(bool(low))


def count_lines(preset: str, switches: Mapping[str, Any], recompute: str) -> Lines:
    """Lines through the peaks of all parts of a training step; what only one batch knows is left out."""
    small, large = (count_step(preset, switches, recompute, batch) for batch in BATCHES)
    lines = {}
    for part in sorted(small.keys() & large.keys()):
        slope = max(0.0, (large[part] - small[part]) / (BATCHES[1] - BATCHES[0]))
        lines[part] = (small[part] - BATCHES[0] * slope, slope)
    return lines


def count_step(preset: str, switches: Mapping[str, Any], recompute: str, batch: int) -> dict[str, int]:
    """Part -> the most bytes alive while it runs, with the batch, without weights and Adam's state."""
    config: Any = registry.preset(preset)
    config = dataclasses.replace(config, dropout=0.0, **_of_model(switches))
    side = config.input_size
    with shapes_alone(), use_impl("torch"), without_values():
        model: Any = registry.create(config).train()
        model.set_recompute(recompute)
        model.instance_contrast = switches.get("instance_contrast", 0.0)
        tokens = torch.ones(batch, config.word_len, dtype=torch.int64)
        data = (torch.empty(batch, 3, side, side), tokens, torch.empty(batch, 1, side, side))
        told = {"known": torch.empty(batch, 1, side, side, dtype=torch.bool)} if model.asks_known else {}
        given = (*data, *told.values())
        alive = counter.LiveStorages([*model.parameters(), *model.buffers()], given)
        with alive, told_of_parts(model, alive, parts_of(config)[1]):
            with torch.autocast("cpu", dtype=DTYPE):
                loss = model(*data, **told)[2]
            loss.backward()
        return {part: peak + sum(tensor.nbytes for tensor in given) for part, peak in alive.peaks.items()}


def count_parameters(preset: str, switches: Mapping[str, Any]) -> int:
    """Weights of the model."""
    config: Any = registry.preset(preset)
    with shapes_alone(), without_values():
        model = registry.create(dataclasses.replace(config, **_of_model(switches)))
        return sum(parameter.numel() for parameter in model.parameters())


def _of_model(switches: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in switches.items() if name != "instance_contrast"}


class _Shapes(FakeTensorMode):
    """The mode in which tensors have no values; a copy of such a tensor is of the same mode."""

    def __deepcopy__(self, memo: Any) -> _Shapes:
        return self


@functools.cache
def shapes_alone() -> _Shapes:
    """One mode for all, because some tensors are kept from one step to the next."""
    return _Shapes()


@contextmanager
def without_values() -> Iterator[None]:
    """Hidden words without drawing any, and storages told apart though none has an address."""
    with (
        mock.patch.object(training_parts, "HIDDEN", HIDDEN),
        training_parts.without_hidden_words(),
        mock.patch.object(counter, "_address", counter._key),
        mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor),
    ):
        yield


def peak(lines: Mapping[str, Any], references: int) -> float:
    """Bytes of the largest part."""
    return max(fixed + each * references for fixed, each in lines.values())


def more_than_plain(counts: Mapping[str, Any], name: str, recompute: str) -> dict[int, float]:
    """References -> MiB that a switch adds to the peak, less the gradients of its weights, which count with those."""
    switched, plain = counts[name], counts["off"]
    gradients = 4 * (switched["parameters"] - plain["parameters"])
    return {
        number: (peak(switched[recompute], number) - peak(plain[recompute], number) - gradients) / 2**20
        for number in range(BATCHES[0], MOST + 1)
    }


def added(counts: Mapping[str, Any], name: str, recompute: str) -> tuple[int, int]:
    """MiB that a switch adds, (whatever the batch, for each reference), rounded up: nowhere below the counts."""
    more = more_than_plain(counts, name, recompute)
    each = max(0, math.ceil((more[MOST] - more[MOST // 2]) / (MOST - MOST // 2)))
    return max(0, math.ceil(max(value - each * n for n, value in more.items()))), each


def below(counts: Mapping[str, Any]) -> list[str]:
    """Where the table of training says less than was counted."""
    found, known, plain = [], SWITCHES | COMBINED, counts["off"]
    for name, each in counts.items():
        told = added_by(known[name])
        if told.parameters < each["parameters"] - plain["parameters"]:
            found.append(f"{name}: {each['parameters'] - plain['parameters']} weights more, not {told.parameters:.0f}")
        for recompute, (fixed, slope) in told.step_mib.items():
            for references, more in more_than_plain(counts, name, recompute).items():
                if fixed + slope * references < more:
                    found.append(f"{name}, recompute={recompute}: {references} references need {more:.0f} MiB more")
                    break
    return found


def table(counts: Mapping[str, Any]) -> str:
    """What each switch adds: weights, and MiB for each recompute setting."""
    plain, rows = counts["off"], []
    for name, each in counts.items():
        lines = ["{} + {} each".format(*added(counts, name, recompute)) for recompute in RECOMPUTE_SETTINGS]
        rows.append((name, f"{each['parameters'] - plain['parameters']:,}", *lines))
    return markdown_table(("switch", "weights", *(f"{recompute}, MiB" for recompute in RECOMPUTE_SETTINGS)), rows)


def main(arguments: list[str]) -> int:
    return with_options("bench.switch_memory", SwitchMemoryConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
