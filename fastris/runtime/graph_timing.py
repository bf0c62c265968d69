"""How long a piece of work takes on a device: without its launch overhead, with cold caches, beside its rivals.

On CUDA a candidate's calls are captured into one CUDA graph, and replays of it are timed by events: the host's launches
are out of the figure. Each call has buffers of its own, together more than the device's cache holds
(:func:`buffers_needed`), so that a call finds nothing in the cache that the last round left there. Candidates take
turns, so that a clock that drifts drifts for all. Where one of them cannot be captured all are timed launch by
launch, since launches are much of a small call's time; the :class:`Timing` says so. On a CPU a clock stands in for
the events.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Calls = Sequence[Callable[[], object]]
"""The same work on different buffers; what a call returns is thrown away."""
Clock = Callable[[], float]

UNKNOWN_CACHE_BYTES = 32 * 2**20
"""What stands for a cache whose size the device does not tell: a CPU's."""
MOST_BUFFERS = 64
MIN_ROUNDS, MAX_ROUNDS = 5, 400


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        seconds: the median over rounds, each the mean of its calls.
        spread: half the distance between the quartiles, as a fraction of the median: the noise.
        rounds: how many there were.
        how: "graph", "launches" (CUDA work that, or whose rival, could not be captured), or "clock" (not on CUDA).
    """

    seconds: float
    spread: float
    rounds: int
    how: str

    def faster_than(self, other: Timing, least: float = 0.0) -> bool:
        """Whether this wins by more than both spreads together, and by the fraction ``least`` of the other's time."""
        margin = max(least * other.seconds, self.spread * self.seconds + other.spread * other.seconds)
        return self.seconds < other.seconds - margin


def cache_bytes(device: torch.device) -> int:
    """Bytes of the device's last cache."""
    if device.type != "cuda":
        return UNKNOWN_CACHE_BYTES
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or UNKNOWN_CACHE_BYTES


def buffers_needed(device: torch.device, bytes_per_call: int) -> int:
    """How many sets of buffers make one round push its own beginning out of the cache: 2 to 64, twice the cache."""
    return min(MOST_BUFFERS, max(2, math.ceil(2 * cache_bytes(device) / max(1, bytes_per_call))))


def time_calls(calls: Calls, device: torch.device, *, seconds: float = 0.2, clock: Clock = time.perf_counter) -> Timing:
    """The timing of one candidate alone; see :func:`time_rivals`."""
    return time_rivals({"": calls}, device, seconds=seconds, clock=clock)[""]


def time_rivals(
    rivals: Mapping[str, Calls], device: torch.device, *, seconds: float = 0.2, clock: Clock = time.perf_counter
) -> dict[str, Timing]:
    """Timings by name, from rounds in which the candidates take turns.

    Every call is made at least twice before it is timed, so that what compiles has compiled. Each candidate's rounds
    last about ``seconds`` in all, and there are 5 to 400 of them. What a call raises is raised here.

    Args:
        rivals: name -> the candidate's calls. Backward passes are welcome.
        clock: for a device that is not CUDA: the seconds since some moment.
    """
    runs = {name: _Run(calls, device, clock) for name, calls in rivals.items()}
    if any(run.how == "launches" for run in runs.values()):
        for run in runs.values():
            run.launch()
    found: dict[str, list[float]] = {name: [run.once()] for name, run in runs.items()}
    longest = max(times[0] * len(runs[name].calls) for name, times in found.items())
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, math.ceil(seconds / max(longest, 1e-9))))
    for times in found.values():
        times.clear()  # the first is an estimate
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run.once())
    return {name: _summed_up(times, runs[name].how) for name, times in found.items()}


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """One call of ``work``, which has run before, as a CUDA graph on the current device.

    Raises what it raises, and RuntimeError where it cannot be captured. Then nothing of the capture is left: PyTorch
    would leave random numbers that wait for its end, which no operator could draw, and before 2.15 its stream.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[stream.device_index]
    unharmed = generator.clone_state()
    try:
        with torch.cuda.graph(graph):
            work()
    except BaseException:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(unharmed)
        torch.cuda.synchronize()
        raise
    return graph


def _summed_up(times: list[float], how: str) -> Timing:
    low, middle, high = statistics.quantiles(times, n=4)
    return Timing(middle, (high - low) / 2 / middle if middle else 0.0, len(times), how)


class _Run:
    """One candidate, warmed up and ready: :meth:`once` makes every call once."""

    def __init__(self, calls: Calls, device: torch.device, clock: Clock):
        if not calls:
            raise ValueError("calls must hold at least one call, got none")
        self.calls, self.clock, self.how = calls, clock, "clock"
        self.device = device
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            self._make()
            self._make()
            return
        with torch.cuda.device(device):
            self._warm_up()
            self.graph = self._capture()
        self.how = "launches" if self.graph is None else "graph"

    def _make(self) -> None:
        for call in self.calls:
            call()

    def _warm_up(self) -> None:
        """On a stream of its own, as capturing demands: what libraries set up for a stream must be set up before."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._make()
            self._make()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        try:
            graph = captured(self._make)
        except RuntimeError:  # work that waits for the device, for one
            return None
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def launch(self) -> None:
        """From now on call by call, and no graph."""
        self.graph, self.how = None, "launches"

    def once(self) -> float:
        """Seconds that one call takes, on average over one of each."""
        if self.device.type != "cuda":
            started = self.clock()
            self._make()
            return (self.clock() - started) / len(self.calls)
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._make() if self.graph is None else self.graph.replay()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(self.calls)
