"""A run in two processes, against the same run in one, and what becomes of it when one of them fails."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from process_helpers import run_processes
from torch import nn
from training_helpers import parts_of, rows, train_config, train_set, val_set

from fastris.commands import assemble
from fastris.commands.train import train
from fastris.data.samples import EpochSampler, TrainSamples
from fastris.data.scenes.dataset import SyntheticExpressions
from fastris.ops import contrastive
from fastris.runtime import distributed
from fastris.runtime.sync_batchnorm import CPUSyncBatchNorm, synchronise_batchnorm
from fastris.training import loop as training
from fastris.weights.load import load_torch

OPTIONS = {"batch_size": 4, "epochs": 1, "evaluate": False, "print_freq": 1}


class Vanishing(SyntheticExpressions):
    """The training set, but one image is gone."""

    def __init__(self, reference: int):
        super().__init__("train", scenes=4, size=64)
        self.gone = reference

    def image(self, index):
        if index == self.gone:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", f"{index}.jpg")
        return super().image(index)


def run(folder: Path, changes: dict, data: SyntheticExpressions | None = None) -> str:
    """One of the processes of a run: what it printed, and its warnings."""
    with contextlib.redirect_stderr(io.StringIO()) as printed, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        train(train_config(folder, **{**OPTIONS, **changes}), data or train_set(), val_set())
    return printed.getvalue() + "".join(f"warning: {w.message}" for w in told if w.category is UserWarning)


def exact_run(folder: Path, changes: dict) -> str:
    """As `run`, in float64 and without dropout: two ways to sum the same numbers agree to more digits than Adam,
    which divides by the gradient's size, can blow up."""
    build, sample = assemble.build_model, TrainSamples.__getitem__

    def item(samples, index):
        found = sample(samples, index)
        return found | {"image": found["image"].double(), "mask": found["mask"].double()}

    assemble.build_model = lambda *args, **kwargs: build(*args, **kwargs).double()
    TrainSamples.__getitem__ = item
    extra = train_config(folder).extra | changes.get("extra", {}) | {"dropout": 0.0}
    return run(folder, changes | {"extra": extra})


def assert_nearly_same_run(ours: Path, theirs: Path) -> None:
    mine, others = (load_torch(folder / "last.pth")["state_dict"] for folder in (ours, theirs))
    for name, value in others.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-6, atol=1e-8, msg=name)
    for mine, other in zip(rows(ours / "log.csv"), rows(theirs / "log.csv"), strict=True):
        for column, value in mine.items():
            digits = 1e-6 if column == "iou" else 1e-9  # the training IoU is computed in float32
            assert float(value) == pytest.approx(float(other[column]), rel=digits), column


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert rows(ours / "log.csv") == rows(theirs / "log.csv")
    mine, others = (load_torch(folder / "last.pth") for folder in (ours, theirs))
    assert all(torch.equal(mine["state_dict"][name], value) for name, value in others["state_dict"].items())
    for rng in ("rng", "rng_of_others"):
        assert str(mine[rng]) == str(others[rng])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"max_steps": 2}, marks=pytest.mark.long),
        {"accumulate": 2, "max_norm": 0.5, "published_first_epoch_quirk": True, "epochs": 2, "max_steps": 4},
        pytest.param({"max_steps": 2, "extra": {"vlba": "neck", "centre_layers": 3}}, marks=pytest.mark.long),
        pytest.param({"max_steps": 2, "extra": {"vlba": "trunk", "centre_layers": 3}}, marks=pytest.mark.long),
        pytest.param({"max_steps": 2, "extra": {"alignment_loss": 0.5}}, marks=pytest.mark.long),
    ],
    ids=[
        "plain",
        "accumulated, clipped, with the published quirk, over two epochs",
        "neck and centre",
        "trunk",
        "alignment loss",
    ],
)
def test_two_processes_train_as_one_does(tmp_path, changes):
    assert run_processes(exact_run, 1, tmp_path / "one", changes)
    assert run_processes(exact_run, 2, tmp_path / "two", changes)[0].count("BatchNorm in sync") == 1
    assert_nearly_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_hide_words_and_count_them_together(tmp_path):
    grounding = {"mask_grounding": 1.0, "predictor_layers": 1}
    changes = {"max_steps": 2, "extra": train_config(tmp_path).extra | grounding}
    assert run_processes(run, 2, tmp_path / "two", changes)
    last, found = load_torch(tmp_path / "two" / "last.pth"), rows(tmp_path / "two" / "log.csv")
    assert all(float(row["grounding_loss"]) > 5 for row in found)
    assert last["metrics"]["seen"].sum() >= 2 * 4  # of each sentence of both processes at least one


def alignformer_run(folder: Path, changes: dict) -> str:
    """Of a small AlignFormer, in float64 and with every gate open. BERT's dropout draws apart in each process: off."""
    pytest.importorskip("transformers")
    build, sample = assemble.build_model, TrainSamples.__getitem__

    def item(samples, index):
        found = sample(samples, index)
        return found | {"image": found["image"].double(), "mask": found["mask"].double()}

    def built(*args, **kwargs):
        model = build(*args, **kwargs).double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for number, stage in enumerate(model.backbone.layers):
            for gate in (stage.res_gate, stage.sym_res_gate):
                nn.init.normal_(gate[2].weight, std=0.3, generator=torch.Generator().manual_seed(number))
        return model

    assemble.build_model, TrainSamples.__getitem__ = built, item
    return run(folder, {"model": "alignformer_tiny", "extra": {}, **changes})


def magnet_run(folder: Path, changes: dict) -> str:
    """Of a small MagNet, as :func:`alignformer_run`."""
    pytest.importorskip("transformers")
    build, sample = assemble.build_model, TrainSamples.__getitem__

    def item(samples, index):
        found = sample(samples, index)
        return found | {"image": found["image"].double(), "mask": found["mask"].double()}

    def built(*args, **kwargs):
        model = build(*args, **kwargs).double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for number, gate in enumerate(model.language_model.res_gates):
            nn.init.normal_(gate[2].weight, std=0.3, generator=torch.Generator().manual_seed(number))
        return model

    assemble.build_model, TrainSamples.__getitem__ = built, item
    return run(folder, {"model": "magnet_tiny", "extra": {}, **changes})


@pytest.mark.slow
def test_two_processes_train_a_magnet_as_one_does(tmp_path):
    changes = {"max_steps": 2}
    assert run_processes(magnet_run, 1, tmp_path / "one", changes)
    assert run_processes(magnet_run, 2, tmp_path / "two", changes)
    assert_nearly_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_train_an_alignformer_as_one_does(tmp_path):
    changes = {"max_steps": 2}
    assert run_processes(alignformer_run, 1, tmp_path / "one", changes)
    assert run_processes(alignformer_run, 2, tmp_path / "two", changes)
    assert_nearly_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_run_of_two_processes_goes_on_in_one(tmp_path):
    run_processes(exact_run, 1, tmp_path / "one", {})
    run_processes(exact_run, 2, tmp_path / "two", {"max_steps": 2})
    (printed,) = run_processes(exact_run, 1, tmp_path / "two", {"resume": True})
    assert "was saved by 2 process(es) and goes on in 1" in printed
    assert_nearly_same_run(tmp_path / "two", tmp_path / "one")


def interrupted_run(folder: Path, changes: dict, step: int) -> str:
    """Stopped by a signal that the second process alone gets, after `step` of its steps."""
    made = training.train_step

    def step_and_stop(plan, run, batch, *signals):
        result = made(plan, run, batch, *signals)
        if distributed.rank() == 1 and run.position.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    training.train_step = step_and_stop
    return run(folder, changes)


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_that_are_interrupted_in_an_epoch_go_on_exactly(tmp_path):
    run_processes(run, 2, tmp_path / "whole", {"epochs": 2})
    main, other = run_processes(interrupted_run, 2, tmp_path / "parts", {"epochs": 2, "workers": 1}, 1)
    assert "epoch 1  batch 1" in main and "epoch" not in other  # one of them writes and prints
    stopped = load_torch(tmp_path / "parts" / "last.pth")
    assert (stopped["epoch"], stopped["batch"], stopped["step"]) == (0, 2, 2)  # together, in the step after the signal
    run_processes(run, 2, tmp_path / "parts", {"epochs": 2, "workers": 1, "resume": "auto"})
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {
        *("config.yaml", "curves.html", "last.pth", "log.csv", "previous.pth", "val.csv")
    }


def start(folder: Path) -> tuple[float, list[float]]:
    with distributed.joined(torch.device("cpu"), 1):
        run = parts_of(train_config(folder, **OPTIONS)).run
    return sum(weight.double().sum().item() for weight in run.model.parameters()), torch.rand(3).tolist()


def test_processes_start_from_the_same_weights_and_draw_their_own_dropout_the_same_again(tmp_path):
    (weights, draws), (other_weights, other_draws) = found = run_processes(start, 2, tmp_path)
    assert weights == other_weights and set(draws).isdisjoint(other_draws)
    assert run_processes(start, 2, tmp_path) == found


def paths_taken(folder: Path) -> set[str]:
    taken, resolve = set(), contrastive.resolve

    def note(operator, *how):
        taken.add((operator, path := resolve(operator, *how)))
        return path

    contrastive.resolve = note
    run(folder, {"max_steps": 1, "evaluate": True})
    return taken


@pytest.mark.slow
def test_text_kernel_and_loss_stay_in_one_pass_under_ddp_and_validation_is_logged_once(tmp_path):
    assert run_processes(paths_taken, 2, tmp_path) == [{("text_to_pixel_contrastive_loss", "torch")}] * 2
    assert [row["step"] for row in rows(tmp_path / "val.csv")] == ["1"]


def test_batch_that_processes_cannot_share_is_one_error(tmp_path):
    main, other = run_processes(run, 2, tmp_path / "run", {"batch_size": 6, "accumulate": 2, "limit_train": 12})
    assert main.startswith("ValueError: batch_size=6 must be a multiple of 4")
    assert other.startswith("StoppedElsewhere: process 0 of 2 ended the run: ValueError: batch_size=6")
    assert not (tmp_path / "run").exists()


def failing_run(folder: Path, how: str) -> str:
    """The second process raises, or is killed, in the middle of the third step."""

    def fail(plan, run, batch, *signals):
        if distributed.rank() == 1 and run.position.step == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("no memory left")
        return made(plan, run, batch, *signals)

    made, training.train_step = training.train_step, fail
    return run(folder, {"save_every_steps": 1})


@pytest.mark.parametrize(("how", "end"), [("raised", "MemoryError: no memory left"), ("killed", -signal.SIGKILL)])
def test_process_that_dies_ends_the_others_with_a_reason_and_no_wait(tmp_path, how, end):
    started = time.monotonic()
    main, other = run_processes(failing_run, 2, tmp_path, how)
    assert time.monotonic() - started < 60
    assert other == end
    assert main.startswith("LostProcess: lost contact with another process of the run, which has ended or hangs")
    assert "last.pth is from step 2; go on with torchrun" in main
    assert load_torch(tmp_path / "last.pth")["step"] == 2


def run_with_nan(folder: Path, changes: dict, reference: int) -> tuple[str, str]:
    sample, made = TrainSamples.__getitem__, training.train_step
    weights = []

    def item(samples, index):
        found = sample(samples, index)
        return found | {"image": found["image"] * (float("nan") if index == reference else 1)}

    def step(plan, run, batch, *signals):
        result = made(plan, run, batch, *signals)
        weights.append(sum(value.double().sum().item() for value in run.model.state_dict().values()))
        return result

    TrainSamples.__getitem__, training.train_step = item, step
    return run(folder, changes), str(weights)


def test_batch_with_nan_in_one_process_is_left_out_by_all_of_them(tmp_path):
    (printed, weights), (_, other_weights) = run_processes(run_with_nan, 2, tmp_path, {}, 5)
    assert weights == other_weights and "nan" not in weights
    sampler = EpochSampler(12, 0, 4)
    (number,) = (batch for batch in range(3) if 5 in sampler.whole_batch(batch))
    batch = sampler.whole_batch(number)
    assert f"the loss is nan in epoch 1, batch {number + 1} (references {batch}), so it is left out" in printed
    assert load_torch(tmp_path / "last.pth")["step"] == 2


def test_image_that_vanishes_from_one_process_ends_all_at_the_step_before_it(tmp_path):
    order = [index for batch in EpochSampler(12, 0, 4, processes=2, rank=1) for index in batch]
    main, other = run_processes(run, 2, tmp_path, {}, Vanishing(order[2]))
    assert other.startswith(f"DataError: [Errno 2] No such file or directory: '{order[2]}.jpg'. The next batch needs")
    assert "last.pth is from step 1. Mend it, then go on with torchrun" in other and "Traceback" not in other
    assert main.startswith("StoppedElsewhere: process 1 of 2 ended the run: DataError")
    assert load_torch(tmp_path / "last.pth")["step"] == 1


def run_on_a_full_disk(folder: Path) -> str:
    save = torch.save

    def full(content, file, **options):
        if isinstance(content, dict) and content["step"] == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file, **options)

    torch.save = full
    return run(folder, {"save_every_steps": 1})


def test_checkpoint_that_the_main_process_cannot_write_ends_all(tmp_path):
    main, other = run_processes(run_on_a_full_disk, 2, tmp_path)
    assert main.startswith("OSError: [Errno 28] could not write") and "free some space" in main
    assert other.startswith("StoppedElsewhere: process 0 of 2 ended the run: OSError")
    assert load_torch(tmp_path / "last.pth")["step"] == 1


SHARES = (3, 1)  # of four samples


def normalise(shapes: list[tuple[int, ...]]) -> list[list[torch.Tensor]]:
    """Outputs, gradients and statistics of BatchNorms over this process's share, with the share's own loss."""
    start = sum(SHARES[: distributed.rank()])
    mine = slice(start, start + SHARES[distributed.rank()]) if distributed.world_size() > 1 else slice(None)
    found = []
    with distributed.joined(torch.device("cpu"), 1):
        for shape in shapes:
            generator = torch.Generator().manual_seed(7)
            x, weight = (torch.randn(4, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
            x = (x * 3 + 100)[mine].requires_grad_()
            model = nn.Sequential((nn.BatchNorm2d if len(shape) > 1 else nn.BatchNorm1d)(shape[0])).double()
            if distributed.world_size() > 1:
                synchronise_batchnorm(model, x.device)
                assert isinstance(model[0], CPUSyncBatchNorm)
            y = model(x)
            (y.square() * weight[mine]).sum().backward()
            parameters = [distributed.sum_over_processes(parameter.grad) for parameter in model.parameters()]
            after = model.eval()(x).detach()
            found.append([y.detach(), x.grad, after, *parameters, *model.buffers()])
    return found


def test_batch_norm_over_unequal_shares_is_batch_norm_over_the_batch():
    shapes = [(5,), (3, 4, 2)]
    (whole,) = run_processes(normalise, 1, shapes)
    halves = run_processes(normalise, 2, shapes)
    for number in range(len(shapes)):
        for rank, start in enumerate((0, 3)):
            expected = [t[start : start + SHARES[rank]] for t in whole[number][:3]] + whole[number][3:]
            for name, mine, other in zip(
                ("y", "dx", "eval", "dweight", "dbias", "mean", "var", "count"),
                halves[rank][number],
                expected,
                strict=True,
            ):
                torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12, msg=name)


def exchange() -> list:
    told = []
    with distributed.joined(torch.device("cpu"), 1):
        told.append(distributed.from_main(lambda: {"a": [torch.arange(3), (torch.tensor(True), "text")], "none": None}))
        try:
            distributed.from_main(lambda: 1 / 0)
        except (ZeroDivisionError, distributed.StoppedElsewhere) as error:
            told.append(type(error).__name__)
        told.append(distributed.gather(distributed.rank()))
    return [*told, dist.is_initialized()]


def test_what_the_main_process_finds_or_fails_at_reaches_all():
    main, other = run_processes(exchange, 2)
    assert str(main[0]) == str(other[0])
    assert (main[1], other[1]) == ("ZeroDivisionError", "StoppedElsewhere")
    assert main[2:] == other[2:] == [[0, 1], False]


def join_late(seconds: float) -> list[int]:
    if distributed.rank() == 1:
        time.sleep(seconds)
    with distributed.joined(torch.device("cpu"), 0.5):
        return distributed.gather(distributed.rank())


def test_restarted_processes_do_not_call_their_dead_predecessors():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun keeps it
    agent = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for late in (0.0, 0.7, 0.7):
        assert run_processes(join_late, 2, late, **agent) == [[0, 1], [0, 1]]
