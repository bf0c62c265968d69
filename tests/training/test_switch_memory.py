"""Settings for small GPUs of a CRIS with switches: from what was counted, and a plain CRIS's as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_helpers import train_config

from fastris.bench import switch_memory as study
from fastris.commands.assemble import memory_use
from fastris.commands.train import TrainConfig
from fastris.options.declare import load_options
from fastris.training import gpu_settings
from fastris.training.gpu_settings import GPU_SETTINGS, estimate_gib, memory_of, next_smaller, what_next
from fastris.training.switch_memory import ADDED, added_by, switched_on

ROOT = Path(__file__).parents[2]
COUNTS = json.loads((ROOT / "bench" / "results" / "switch_memory.json").read_text())["counts"]


def options_of(*given: str) -> TrainConfig:
    return load_options(TrainConfig, ["model=cris_r50", *given])


@pytest.mark.parametrize("name", list(COUNTS))
def test_estimates_are_nowhere_below_what_was_counted(name: str) -> None:
    assert list(COUNTS) == [*study.SWITCHES, *study.COMBINED]
    memory, counted = memory_of("cris", switched_on((study.SWITCHES | study.COMBINED)[name])), COUNTS[name]
    for recompute in memory.step_mib:
        for references in range(2, 65):
            needed = 12 * counted["parameters"] + study.peak(counted[recompute], references)  # weights, Adam; the rest
            assert memory.gib(references, recompute) - gpu_settings._OTHER_GIB >= needed / 2**30


def test_nothing_is_left_to_the_margin_between_two_counts_of_a_plain_cris() -> None:
    assert not study.below(COUNTS)


@pytest.mark.parametrize("name", list(ADDED))
def test_the_table_says_no_more_than_the_lines_of_the_counts(name: str) -> None:
    counted = {"centre_layers": "centre_layers=6"}.get(name, name)
    for recompute, line in ADDED[name].step_mib.items():
        assert line == study.added(COUNTS, counted, recompute)
    assert ADDED[name].parameters == COUNTS[counted]["parameters"] - COUNTS["off"]["parameters"]


def test_a_plain_cris_has_the_settings_that_it_had() -> None:
    off = {
        "vlba": "off",
        "alignment_module": False,
        "centre_layers": 0,
        "mask_grounding": 0.0,
        "instance_contrast": 0.0,
    }
    assert memory_of("cris", off) is gpu_settings.SYSTEMS["cris"]
    for name, setting in GPU_SETTINGS.items():
        config = options_of(f"gpu={name}", "vlba=off", "mask_rate=0.15")
        assert (config.micro_batch, config.recompute) == (setting.micro_batch, setting.recompute)
        assert memory_use(config).switches == {}


def test_the_documented_table_is_the_one_in_use() -> None:
    page = (ROOT / "docs" / "training.md").read_text().splitlines()
    header = next(line for line in page if "`vlba=trunk`" in line)
    columns = [cell.strip(" `").split() for cell in header.strip("|").split("|")][1:]
    for name in GPU_SETTINGS:
        cells = []
        for given in columns:
            config = options_of(f"gpu={name}", *given)
            gib = estimate_gib(config.micro_batch, config.recompute, switches=memory_use(config).switches)
            cells.append(f"{config.micro_batch}, {config.recompute}, {gib:.1f} GiB")
        assert f"| `{name}` | {' | '.join(cells)} |" in page


@pytest.mark.parametrize("switch", ["vlba=trunk", "alignment_module=trunk"])
def test_a_trunk_that_hears_the_words_takes_smaller_parts(switch: str) -> None:
    smaller = 0
    for name, plain in GPU_SETTINGS.items():
        config = options_of(f"gpu={name}", switch)
        on = memory_use(config).switches
        needed = estimate_gib(config.micro_batch, config.recompute, switches=on)
        too_much = estimate_gib(plain.micro_batch, plain.recompute, switches=on) >= 0.75 * plain.memory
        assert needed < 0.75 * plain.memory
        assert needed > estimate_gib(config.micro_batch, config.recompute)
        assert too_much == ((config.micro_batch, config.recompute) != (plain.micro_batch, plain.recompute))
        assert config.micro_batch * config.accumulate == 64 and config.micro_batch <= plain.micro_batch
        smaller += too_much
    assert smaller >= 2


def test_switches_of_a_file_count_as_those_of_the_command_line(tmp_path) -> None:
    config = train_config(tmp_path, instance_contrast=0.1)
    config.extra |= {"vlba": "trunk", "mask_grounding": 1.0, "predictor_layers": 8}
    assert memory_use(config).switches == {
        "vlba": "trunk", "mask_grounding": 1.0, "predictor_layers": 8, "instance_contrast": 0.1
    }  # fmt: skip
    twice, once = added_by({"mask_grounding": 1.0, "predictor_layers": 8}), added_by({"mask_grounding": 0.5})
    assert twice.parameters == 2 * once.parameters and added_by({"vlba": "elsewhere"}).parameters == 0


def test_a_card_too_small_for_the_switches_is_one_error(monkeypatch) -> None:
    monkeypatch.setitem(ADDED, "vlba=trunk", ADDED["vlba=trunk"].plus(ADDED["vlba=trunk"], 20))
    with pytest.raises(ValueError, match=r"gpu=8gb has no setting for a model with these switches: even 2 references"):
        options_of("gpu=8gb", "vlba=trunk")
    given = options_of("gpu=8gb", "vlba=trunk", "accumulate=32", "recompute=stages")  # nothing is left to choose
    assert given.micro_batch == 2 and next_smaller(memory_use(given)) is None


def test_advice_when_memory_runs_out_goes_by_the_switches() -> None:
    use = memory_use(options_of("gpu=24gb", "alignment_module=trunk"))
    setting = memory_of("cris", use.switches).settings[next_smaller(use)]
    assert f"(micro-batch {setting.micro_batch}, recompute={setting.recompute}" in what_next(use)
