"""Timing: each call has its share, rivals take turns, and a gain must be more than noise."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from fastris.runtime import graph_timing
from fastris.runtime.graph_timing import Timing, buffers_needed, time_calls, time_rivals

CPU = torch.device("cpu")


class FakeClock:
    """Time that passes only where work says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float, made: list | None = None, name: str = ""):
        def call() -> None:
            self.now += seconds
            if made is not None:
                made.append(name)

        return call


def test_a_call_takes_its_share_of_a_round():
    clock = FakeClock()
    timing = time_calls([clock.work(0.25), clock.work(0.5)], CPU, clock=clock)
    assert timing == Timing(0.375, 0.0, graph_timing.MIN_ROUNDS, "clock")


def test_rivals_take_turns_after_a_warm_up():
    clock, made = FakeClock(), []
    rivals = {name: [clock.work(0.125, made, name)] for name in ("a", "b")}
    time_rivals(rivals, CPU, seconds=0.5, clock=clock)
    assert made[:4] == ["a", "a", "b", "b"], "each call is made twice before anything is timed"
    assert made[4:] == ["a", "b"] * (1 + graph_timing.MIN_ROUNDS)


def test_rounds_fill_the_time_that_is_given_within_limits():
    clock = FakeClock()
    assert time_calls([clock.work(2**-6)], CPU, seconds=0.25, clock=clock).rounds == 16
    assert time_calls([clock.work(1e-9)], CPU, seconds=0.2, clock=clock).rounds == graph_timing.MAX_ROUNDS


def test_spread_is_half_the_distance_between_the_quartiles():
    clock, step = FakeClock(), iter([1.0] * 3 + [0.9, 1.0, 1.1] * 10)

    def call() -> None:
        clock.now += next(step)

    timing = time_calls([call], CPU, seconds=30, clock=clock)
    assert timing.seconds == pytest.approx(1.0)
    assert timing.spread == pytest.approx(0.1)


def test_a_gain_within_the_noise_is_none():
    slow, fast = Timing(1.0, 0.05, 9, "graph"), Timing(0.92, 0.05, 9, "graph")
    assert not fast.faster_than(slow)
    assert Timing(0.85, 0.05, 9, "graph").faster_than(slow)
    assert not Timing(0.85, 0.05, 9, "graph").faster_than(slow, least=0.2)
    assert not slow.faster_than(slow)


def test_buffers_rotate_through_twice_the_cache():
    cache = graph_timing.cache_bytes(CPU)
    assert buffers_needed(CPU, cache // 4) == 8
    assert buffers_needed(CPU, 100 * cache) == 2
    assert buffers_needed(CPU, 1) == graph_timing.MOST_BUFFERS


def test_real_work_is_timed_on_this_machine():
    x = [torch.randn(64, 64) for _ in range(2)]
    timing = time_calls([lambda y=y: y @ y for y in x], CPU, seconds=0.01)
    assert 0 < timing.seconds < 1 and timing.rounds >= graph_timing.MIN_ROUNDS


def test_an_error_of_the_work_is_raised():
    def broken() -> None:
        raise ValueError("no work")

    with pytest.raises(ValueError, match="no work"):
        time_calls([broken], CPU)
    with pytest.raises(ValueError, match="at least one call"):
        time_calls([], CPU)


class FakeCuda:
    """What the timing asks of torch.cuda; a capture fails where ``fails`` is set when it ends, as PyTorch 2.11 does."""

    def __init__(self, monkeypatch):
        self.stream, self.fails, self.replays = SimpleNamespace(name="usual", device_index=0), False, 0
        generator = SimpleNamespace(
            clone_state=lambda: "before the capture",
            graphsafe_set_state=lambda state: setattr(self, "restored", state),
        )
        self.restored = None
        self.stream.wait_stream = lambda other: None
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 1.0)
        graph = SimpleNamespace(replay=lambda: setattr(self, "replays", self.replays + 1))
        for name, value in {
            "device": lambda device: nullcontext(),
            "stream": lambda stream: nullcontext(),
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "Event": lambda enable_timing: event,
            "CUDAGraph": lambda: graph,
            "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "synchronize": lambda: None,
            "default_generators": (generator,),
            "graph": self.capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def capture(self, graph):
        usual, self.stream = self.stream, SimpleNamespace(name="the capture's own")
        yield
        if self.fails:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.stream = usual


def test_one_that_cannot_be_captured_has_its_rivals_launched_too_and_leaves_nothing_behind(monkeypatch):
    cuda, device = FakeCuda(monkeypatch), torch.device("cuda", 0)

    def waits() -> None:
        cuda.fails = True

    def works() -> None:
        cuda.fails = False

    assert time_calls([works], device).how == "graph" and cuda.restored is None
    cuda.replays = 0
    timings = time_rivals({"works": [works], "waits": [waits]}, device, seconds=0.01)
    assert {name: timing.how for name, timing in timings.items()} == {"works": "launches", "waits": "launches"}
    assert cuda.replays == 1, "once, after its capture; what is timed is alike for both"
    assert cuda.stream.name == "usual" and cuda.restored == "before the capture"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_are_replayed_on_a_gpu_and_what_waits_for_it_is_launched():
    device = torch.device("cuda")
    x = [torch.randn(256, 256, device=device, requires_grad=True) for _ in range(2)]
    assert time_calls([lambda y=y: torch.autograd.grad((y @ y).sum(), y) for y in x], device).how == "graph"
    stream = torch.cuda.current_stream()
    assert time_calls([lambda y=y: (torch.rand_like(y) + y).sum().item() for y in x], device).how == "launches"
    assert torch.cuda.current_stream() == stream
    assert 0 < torch.rand(9, device=device).mean().item() < 1, "random numbers outlive a capture that failed"
