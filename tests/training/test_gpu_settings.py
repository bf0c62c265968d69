"""Settings for small GPUs, the out-of-memory message, and the search for the largest micro-batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from training_helpers import parts_of, train_config, train_set

from fastris import CRIS, CRISConfig
from fastris.commands import find_batch
from fastris.commands.assemble import memory_use
from fastris.commands.train import TrainConfig, run, train
from fastris.models import registry
from fastris.models.registry import config_class
from fastris.options.declare import load_options
from fastris.training import gpu_settings
from fastris.training import loop as training
from fastris.training.find_batch import largest_that_fits
from fastris.training.gpu_settings import (
    GPU_SETTINGS,
    GpuSetting,
    estimate_gib,
    find_setting,
    next_smaller,
    parts_for,
)
from fastris.training.memory import set_recompute
from fastris.training.optim import build_optimizer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", list(GPU_SETTINGS))
def test_every_setting_keeps_the_published_batch(name: str) -> None:
    config, setting = load_options(TrainConfig, [f"gpu={name}"]), GPU_SETTINGS[name]
    assert config.batch_size == 64 and config.micro_batch * config.accumulate == 64
    assert config.micro_batch == setting.micro_batch
    assert (config.recompute, config.fused) == (setting.recompute, True)


@pytest.mark.parametrize("setting", GPU_SETTINGS.values(), ids=list(GPU_SETTINGS))
def test_every_setting_leaves_a_quarter_of_the_card_by_the_estimate(setting: GpuSetting) -> None:
    assert estimate_gib(setting.micro_batch, setting.recompute) < 0.75 * setting.memory


def test_the_documented_tables_are_the_one_in_use() -> None:
    page = (ROOT / "docs" / "training.md").read_text().splitlines()
    for name, setting in GPU_SETTINGS.items():
        gib = f"{estimate_gib(setting.micro_batch, setting.recompute):.1f}"
        row = next(line for line in gpu_settings.__doc__.splitlines() if line.startswith(f"{name} "))
        assert row.split()[:4] == [name, str(setting.micro_batch), setting.recompute, gib]
        assert f"| `{name}` | {setting.micro_batch} | {setting.recompute} | {gib} GiB |" in page
    assert f"({estimate_gib(64, 'none'):.1f} GiB)" in gpu_settings.__doc__


@pytest.mark.parametrize("file", ["whole_memory.json", "whole_memory_batch2.json"])
@pytest.mark.parametrize("recompute", ["none", "pointwise", "stages"])
def test_the_estimate_uses_the_counted_peaks(file: str, recompute: str) -> None:
    cells = json.loads((ROOT / "bench" / "results" / file).read_text())["cells"]
    (cell,) = (cell for cell in cells if (cell["arm"], cell["recompute"]) == ("torch", recompute))
    for references in {setting.micro_batch for setting in GPU_SETTINGS.values()}:
        fixed, each = max(cell["lines"].values(), key=lambda line: line[0] + references * line[1])
        assert (round(fixed / 2**20), round(each / 2**20)) == gpu_settings.SYSTEMS["cris"].step_mib[recompute]


def test_the_estimate_counts_the_weights_their_gradients_and_two_moments() -> None:
    with torch.device("meta"):
        model = CRIS(CRISConfig.preset("cris_r50"))
    assert round(16 * sum(p.numel() for p in model.parameters()) / 2**30, 2) == gpu_settings.SYSTEMS["cris"].weights_gib


@pytest.mark.parametrize("system", ["alignformer", "magnet"])
def test_settings_of_systems_without_batchnorm_split_their_batch_into_parts_of_any_size(system: str) -> None:
    page = (ROOT / "docs" / "training.md").read_text().splitlines()
    memory, model = gpu_settings.SYSTEMS[system], f"{system}_swin_b"
    assert list(memory.settings) == list(GPU_SETTINGS)
    with torch.device("meta"):
        count = sum(p.numel() for p in registry.create(model).parameters())
    assert round(16 * count / 2**30, 2) == memory.weights_gib
    rows = gpu_settings.__doc__.split(model, 1)[1].splitlines()
    for name, setting in memory.settings.items():
        config = load_options(TrainConfig, [f"model={model}", f"gpu={name}"])
        assert config.micro_batch == setting.micro_batch and config.batch_size == 32
        assert (config.recompute, config.fused) == (setting.recompute, True)
        needed = estimate_gib(setting.micro_batch, setting.recompute, system)
        assert needed < (0.8 if (system, name) == ("magnet", "8gb") else 0.75) * setting.memory
        row = next(line for line in rows if line.startswith(f"{name} "))
        assert row.split()[:4] == [name, str(setting.micro_batch), setting.recompute, f"{needed:.1f}"]
        assert f"| `{name}` | {setting.micro_batch} | {setting.recompute} | {needed:.1f} GiB |" in page
    smallest = load_options(TrainConfig, [f"model={model}", "gpu=8gb"])
    assert smallest.micro_batch == config_class(system).smallest_batch == 1
    assert next_smaller(memory_use(smallest)) is None


def test_alignformers_advice_when_memory_runs_out_is_its_own() -> None:
    use = memory_use(load_options(TrainConfig, ["model=alignformer_swin_b"]))
    text = gpu_settings.what_next(use)
    assert "32 references at once" in text and "gpu=24gb (micro-batch 8, recompute=pointwise" in text
    assert "BatchNorm" not in text and "choose a new output_folder" in text


def test_search_for_alignformers_batch_begins_at_one_reference(capsys) -> None:
    config = load_options(TrainConfig, ["model=alignformer_swin_b", "gpu=8gb"])
    assert find_batch.search(config, lambda number: number <= 1) == 1
    assert "accumulate=32" in find_batch.report(config, 1) and "BatchNorm" not in find_batch.report(config, 1)


@pytest.mark.parametrize("name", list(gpu_settings.SYSTEMS))
def test_smallest_parts_are_the_systems_own(name: str) -> None:
    assert gpu_settings.SYSTEMS[name].smallest_part == config_class(name).smallest_batch


def test_settings_ask_for_less_memory_from_large_to_small() -> None:
    sizes = [(setting.memory, setting.micro_batch) for setting in GPU_SETTINGS.values()]
    needs = [estimate_gib(setting.micro_batch, setting.recompute) for setting in GPU_SETTINGS.values()]
    assert (
        sizes == sorted(sizes)
        and needs == sorted(needs)
        and [f"{memory}gb" for memory, _ in sizes] == list(GPU_SETTINGS)
    )


def test_single_options_go_over_the_setting() -> None:
    config = load_options(TrainConfig, ["gpu=8gb", "accumulate=32", "recompute=none", "fused=false"])
    assert (config.accumulate, config.recompute, config.fused) == (32, "none", False)


def test_without_a_setting_nothing_changes() -> None:
    config = TrainConfig()
    assert (config.accumulate, config.recompute, config.fused) == (1, "none", False)


def test_unknown_setting_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="gpu='10gb' is unknown; choose one of 8gb, 12gb, 16gb, 24gb"):
        load_options(TrainConfig, ["gpu=10gb"])
    assert find_setting("8gb").memory == 8


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "multiple", "parts"),
    [(64, 16, 1, 1, 4), (64, 64, 1, 1, 1), (64, 16, 4, 1, 1), (64, 5, 1, 1, 16), (60, 16, 1, 1, 4), (60, 16, 1, 4, 5)],
)
def test_parts_are_as_few_as_fit(batch: int, micro: int, processes: int, multiple: int, parts: int) -> None:
    assert parts_for(batch, micro, processes, multiple) == parts


def test_batch_without_equal_parts_says_so() -> None:
    with pytest.raises(ValueError, match="batch_size=67 does not split into equal parts of 2 to 16 references"):
        parts_for(67, 16)


def test_processes_share_the_batch_of_a_setting(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    config = load_options(TrainConfig, ["gpu=8gb"])
    assert (config.accumulate, config.micro_batch) == (1, 64)
    assert (
        next_smaller(memory_use(load_options(TrainConfig, ["recompute=stages"]))) is None
    )  # 16 at once need what 8gb needs


def test_recompute_goes_to_the_model_or_says_that_it_cannot() -> None:
    class Offers(nn.Module):
        def set_recompute(self, mode: str) -> None:
            self.mode = mode

    model = Offers()
    set_recompute(model, "pointwise")
    assert model.mode == "pointwise"
    set_recompute(nn.Linear(1, 1), "none")
    with pytest.raises(ValueError, match="recompute=stages needs a model with set_recompute, which Linear"):
        set_recompute(nn.Linear(1, 1), "stages")


def test_fused_optimizer_is_for_cuda_only(tmp_path) -> None:
    config = train_config(tmp_path, fused=True)
    assert not parts_of(config).run.optimizer.defaults["fused"]
    groups = {"head": list(nn.Linear(1, 1).parameters())}
    assert build_optimizer(groups, {"head": 1e-4}, fused=True).defaults["fused"]


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.00 GiB is free. "
    "If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF. See documentation for more."
)


def test_out_of_memory_names_the_next_smaller_setting(tmp_path, monkeypatch) -> None:
    def full(*args):
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(training, "train_step", full)
    config = train_config(tmp_path, batch_size=12, gpu="16gb", recompute="none")
    monkeypatch.setattr("fastris.training.gpu_settings.next_smaller", lambda config: "8gb")
    with pytest.raises(RuntimeError) as caught:
        train(config, train_set())
    text = str(caught.value)
    assert text.startswith("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in text
    assert "12 references at once (batch_size=12, accumulate=1, recompute=none, gpu=16gb) do not fit" in text
    assert "gpu=8gb (micro-batch 16, recompute=stages; leave out" in text and "--find-batch" in text


@pytest.mark.parametrize(
    ("options", "smaller"),
    [
        (["gpu=24gb"], "16gb"),
        (["gpu=16gb"], "12gb"),
        (["gpu=12gb"], "8gb"),
        (["gpu=8gb"], None),
        ([], "24gb"),
        (["recompute=pointwise"], "16gb"),
        (["recompute=stages"], "12gb"),
        (["accumulate=4"], "12gb"),  # 16 references that keep everything need more than 32 by stages
        (["accumulate=16"], None),
        (["gpu=24gb", "accumulate=4"], "8gb"),
        (["gpu=24gb", "accumulate=16"], None),
    ],
)
def test_next_smaller_setting_needs_less_memory(options: list[str], smaller: str | None) -> None:
    assert next_smaller(memory_use(load_options(TrainConfig, options))) == smaller


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("most", [2, 3, 7, 64, 100])
def test_search_finds_the_largest_that_fits_in_few_trials(most: int, step: int) -> None:
    for limit in range(most + 2):
        tried: list[int] = []

        def fits(number: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(number)
            return number <= limit

        allowed = [n for n in range(step, most + 1, step) if 2 <= n <= limit]
        assert largest_that_fits(fits, most, step) == (allowed[-1] if allowed else None)
        assert len(tried) == len(set(tried)) <= 14 and all(n % step == 0 and 2 <= n <= most for n in tried)


def test_search_prints_its_trials_and_the_option_to_use(capsys) -> None:
    config = load_options(TrainConfig, ["gpu=24gb"])
    most = find_batch.search(config, lambda number: number <= 22)
    assert most == 22
    assert "  32 references do not fit" in capsys.readouterr().out
    text = find_batch.report(config, most)
    assert "largest micro-batch that fits is 22" in text and "accumulate=4" in text and "over 16 references" in text
    with pytest.raises(RuntimeError, match="not even the smallest micro-batch fits this GPU with recompute=pointwise"):
        find_batch.search(config, lambda number: False)


@pytest.mark.slow
@pytest.mark.parametrize("several", [pytest.param(1, marks=pytest.mark.long), 2])
def test_probe_takes_real_steps_and_sees_memory_run_out(tmp_path, several: int) -> None:
    config = train_config(tmp_path, batch_size=8, expressions_per_image=several)
    probe = find_batch.probe_of(config)
    before = probe.model.proj.txt.weight.clone()
    forward, seen = probe.model.forward, []

    def small_gpu(image, word, mask):
        seen.append(mask.flatten(0, -4).shape[0])
        if seen[-1] > 5:
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return forward(image, word, mask)

    probe.model.forward = small_gpu
    assert find_batch.search(config, probe.fits) == (5 if several == 1 else 4)
    assert seen[:4] == [2, 2, 4, 4]
    assert not torch.equal(probe.model.proj.txt.weight, before)
    assert all(p.grad is None for p in probe.model.parameters())


def test_search_on_a_cpu_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(find_batch, "probe_of", lambda options: 1 / 0)
    options = [f"output_folder={tmp_path}", "model=tiny", "dataset=synthetic", "device=cpu", "--find-batch"]
    with pytest.raises(ValueError, match="find_batch searches for the limit of a GPU's memory, but device is cpu"):
        run(load_options(TrainConfig, options))


def test_float16_sums_that_would_do_nothing_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="fp16_accumulation=true would do nothing"):
        train(train_config(tmp_path, fp16_accumulation=True), train_set())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_search_on_a_gpu_prints_an_option(tmp_path, capsys) -> None:
    assert find_batch.run(train_config(tmp_path, batch_size=8, device="cuda")) == 0
    assert "use:  accumulate=1" in capsys.readouterr().out
