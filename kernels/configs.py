"""Launch tables: which tile sizes a kernel uses on which card, and how measured ones take their place.

Cards differ, for our purposes, in the shared memory that one block may use. Each kernel file holds a table from the
class of the card to its configuration, and asks :func:`choose` for every launch. There is no autotuning at run time, so
a new sentence length never stalls training. The compile gate (``python -m fastris.kernels.gate``) proves that every
entry and every alternative fits every card of its class.

The contract for who measures configurations:

* ``with watched() as seen: operator(...)`` collects what the operator's launches asked for, backward included: a dict
  from :class:`Choice` to the :class:`Config` of the table. ``config.alternatives`` are the others worth a try there.
  The gate has built them as training in half precision launches them. A Choice is a bucket: sizes are powers of two.
* ``with replaced({choice: config}): operator(...)`` launches with another configuration inside the block, in every
  thread (the backward pass runs in another one). ``replace({...}, device=index)`` does so for good, for one GPU or,
  with None, for all; ``replace({})`` takes everything back. A size that was not measured takes the nearest measured one
  of the same kernel, variant and dtype.
* Both are plain data: ``Choice.text()`` / ``Choice.parse`` and ``Config.as_dict()`` / ``Config.from_dict`` for a file.
* Any alternative gives the same values up to the order of float32 sums, and the same dropout masks. A Config of other
  tile names is refused; whether others than the alternatives fit a card is for the caller to find out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

# Shared memory that one block may opt in to, in bytes.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
HIP_SHARED_LIMIT = 65_536


@dataclass(frozen=True)
class Config:
    """Tile sizes (constexpr arguments by name) and launch options of one kernel; ``alternatives`` may be tuned to."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2
    alternatives: tuple[Config, ...] = field(default=(), compare=False, repr=False)

    def __getitem__(self, block: str) -> int:
        """The tile size of that name."""
        return dict(self.blocks)[block]

    def as_dict(self) -> dict[str, Any]:
        """What a JSON file keeps of it; without the alternatives."""
        return {"blocks": dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        return cls(tuple((str(k), int(v)) for k, v in data["blocks"].items()), data["num_warps"], data["num_stages"])


@dataclass(frozen=True)
class Choice:
    """What a configuration is chosen for.

    Attributes:
        kernel: "<operator> <kernel>", see :func:`kernel_name`.
        variant: what the kernel's table depends on beside the card and the dtype, as "N16" columns; often empty.
        dtype: of the products, as "bfloat16".
        size: pixels of the whole batch, rounded up to a power of two.
    """

    kernel: str
    variant: str
    dtype: str
    size: int

    def text(self) -> str:
        return "/".join((self.kernel, self.variant, self.dtype, str(self.size)))

    @classmethod
    def parse(cls, text: str) -> Choice:
        kernel, variant, dtype, size = text.split("/")
        return cls(kernel, variant, dtype, int(size))


# (kernel, variant, dtype) -> [(size, Config)], for a GPU's index or, under None, for every device.
_Replacements = dict[tuple[str, str, str], list[tuple[int, Config]]]
_replacements: dict[int | None, _Replacements] = {}
_watchers: list[dict[Choice, Config]] = []
_pretended_class: str | None = None


def kernel_name(kernel: Any) -> str:
    """``_taps_kernel`` of similarity.py is "similarity taps"; a file and its _backward file share their first word.

    A setting that no kernel takes, as "upsample_conv parts", is its own name.
    """
    if isinstance(kernel, str):
        return kernel
    operator = kernel.fn.__module__.rpartition(".")[2].removesuffix("_backward")
    name = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel").replace("_", " ")
    return f"{operator} {name}"


def choose(
    kernel: Any, config: Config, device: torch.device, dtype: torch.dtype, size: int, variant: str = ""
) -> Config:
    """``config``, the table's, or what replaces it for ``kernel`` at ``size`` pixels; see the module's contract."""
    if not _replacements and not _watchers:
        return config
    choice = Choice(kernel_name(kernel), variant, str(dtype).removeprefix("torch."), _bucket(size))
    for seen in _watchers:
        seen[choice] = config
    index = device.index
    if index is None and device.type == "cuda":
        index = torch.cuda.current_device()
    measured = None
    for key in (index, None):
        measured = measured or _replacements.get(key, {}).get((choice.kernel, choice.variant, choice.dtype))
    if not measured:
        return config
    _, chosen = min(measured, key=lambda pair: (abs(math.log2(pair[0] / choice.size)), pair[0]))
    if {name for name, _ in chosen.blocks} != {name for name, _ in config.blocks}:
        raise ValueError(f"{choice.text()}: its tiles are {dict(config.blocks)}, not {dict(chosen.blocks)}")
    return chosen


def _bucket(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


@contextmanager
def watched() -> Iterator[dict[Choice, Config]]:
    """Collect what launches inside the block choose by their tables, in every thread."""
    seen: dict[Choice, Config] = {}
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers[:] = [each for each in _watchers if each is not seen]


def replace(configs: Mapping[Choice, Config], device: int | None = None) -> None:
    """From now on launch with ``configs``, on the GPU of index ``device`` or on all; in place of earlier ones there."""
    table: _Replacements = {}
    for choice, config in configs.items():
        table.setdefault((choice.kernel, choice.variant, choice.dtype), []).append((choice.size, config))
    if table:
        _replacements[device] = table
    else:
        _replacements.pop(device, None)


@contextmanager
def replaced(configs: Mapping[Choice, Config], device: int | None = None) -> Iterator[None]:
    """:func:`replace` for the block alone, in place of what was replaced before."""
    before = _replacements.pop(device, None)
    replace(configs, device)
    try:
        yield
    finally:
        _replacements.pop(device, None)
        if before is not None:
            _replacements[device] = before


def shared_class(limit: int) -> str:
    """``large`` (A100, H100, B200), ``small`` (consumer cards from Ampere on) or ``tiny`` (64 KiB: AMD)."""
    if limit >= 160_000:
        return "large"
    return "small" if limit >= 99_000 else "tiny"


@functools.cache
def _device_class(index: int) -> str:
    if torch.version.hip is not None:
        return "tiny"
    return shared_class(torch.cuda.get_device_properties(index).shared_memory_per_block_optin)


def device_class(device: torch.device) -> str:
    """The shared-memory class of ``device``; of a CPU the one pretended, else, as for the interpreter, ``small``."""
    if device.type != "cuda":
        return _pretended_class or "small"
    return _device_class(device.index if device.index is not None else torch.cuda.current_device())


@contextmanager
def pretended_class(shared: str) -> Iterator[None]:
    """Take tensors on the CPU for tensors on a card of class ``shared``, for who records launches."""
    global _pretended_class
    before, _pretended_class = _pretended_class, shared
    try:
        yield
    finally:
        _pretended_class = before
