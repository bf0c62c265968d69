"""The one place that decides which path an operator takes, and says why.

Every operator has three paths: ``reference`` (the published formula), ``torch`` (the same function after exact algebra)
and ``triton`` (that algebra with its heavy steps in fused kernels). The choice is, in this order: the operator's own
``impl=`` argument, the innermost :func:`use_impl` block of the running thread or asyncio task, the environment variable
``FASTRIS_IMPL``, and ``auto``. ``auto`` takes ``triton`` where that is faster, as measured on the GPU or else by a
conservative table (:mod:`fastris.tuned`), and where it was proved to run and to be right on the GPU at hand
(:mod:`fastris.preflight`: the first use in a process is the proof); it takes ``torch`` elsewhere, and never fails.
Under ``torch.compile`` with PyTorch before 2.15 ``torch`` stands for ``reference``. Under ``torch.export`` ``auto``
does: what is exported is made of standard operators, which any program runs, for any number of samples.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from fastris import preflight, tuned
from fastris.operators import OPERATORS

IMPLS = ("auto", "reference", "torch", "triton")
MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 6)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _find_triton() -> str | None:
    """Why Triton is unusable in this process, or None. Reads package metadata; imports nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"Triton {version} is too old; install triton>={'.'.join(map(str, MIN_TRITON))}"
    return None


class _Block:
    """One :func:`use_impl` block while it is open."""

    __slots__ = ("impl",)

    def __init__(self, impl: str):
        self.impl = impl


# The open blocks, innermost last, and the last one's choice: a plain text, which torch.compile can watch.
_open_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("fastris_open_blocks", default=())
_block_impl: ContextVar[str] = ContextVar("fastris_block_impl", default="auto")
# The block that a function under compilation has entered itself: while tracing, a context variable cannot be set.
_traced_block: str | None = None
# torch.compile before 2.15 cannot read context variables either: for it, the block last entered or left anywhere.
_last_block = "auto"
# Under torch.compile, PyTorch 2.11 gives wrong gradients for the torch path's autograd functions; 2.15 is right.
_compiles_functions = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15)
_process_impl = os.environ.get("FASTRIS_IMPL") or "auto"
_missing_triton = _find_triton()
_interpreting = os.environ.get("TRITON_INTERPRET") == "1"
_device_obstacles: dict[int, str | None] = {}
# What auto was found to take Triton for, whatever PyTorch's switches say: (operator, device, dtype, bucket of batches).
_taken: set[tuple[str, torch.device, torch.dtype, str]] = set()
_every_device_has_triton = False


def _check_impl(impl: str, where: str) -> str:
    if impl not in IMPLS:
        raise ValueError(f"{where} must be one of {', '.join(IMPLS)}, got {impl!r}")
    return impl


@contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Run the operators called in this block by one path: auto, reference, torch or triton.

    The choice holds for the running thread and asyncio task. Other tasks and threads do not see it, except for what is
    started inside the block with a copy of its context: a new task, or ``asyncio.to_thread``. Blocks nest; leaving one,
    by an exception too, takes back its choice and no other's, in whatever order they are left. A generator that yields
    inside a block leaves it open for its caller, until it goes on. The backward pass follows the forward's choice,
    wherever it runs. An operator's own ``impl=`` argument still wins.

    A function under ``torch.compile`` runs by the block that it is called in, compiled once for each, in every thread
    and task alike, and blocks inside it count too. With PyTorch before 2.15, which cannot watch the choice of a task or
    thread, it follows the block last entered or left in the process: call it by one path at a time there.

    Raises ValueError for an unknown name.
    """
    global _traced_block
    _check_impl(impl, "impl")
    if torch.compiler.is_dynamo_compiling():
        outer, _traced_block = _traced_block, impl
        try:
            yield
        finally:
            _traced_block = outer
        return
    block = _Block(impl)
    _set_blocks((*_open_blocks.get(), block))
    try:
        yield
    finally:  # maybe in another context, as a forgotten generator is closed: then the block is none of its own
        _set_blocks(tuple(each for each in _open_blocks.get() if each is not block))


def _set_blocks(blocks: tuple[_Block, ...]) -> None:
    global _last_block
    impl = blocks[-1].impl if blocks else "auto"
    _open_blocks.set(blocks)
    _block_impl.set(impl)
    _last_block = impl


def requested_impl(impl: str = "auto") -> str:
    """The path asked for: ``impl`` if it names one, else the block's, else the process's, else auto.

    While ``torch.export`` traces, that is ``reference`` where nothing else is asked for.
    """
    if impl != "auto":
        return _check_impl(impl, "impl")
    block = _compiled_block() if torch.compiler.is_dynamo_compiling() else _block_impl.get()
    if block != "auto":
        return block
    asked = _check_impl(_process_impl, "the environment variable FASTRIS_IMPL")
    return "reference" if asked == "auto" and torch.compiler.is_exporting() else asked


def _compiled_block() -> str:
    """The block's choice as torch.compile can read it, and compile again when it changes."""
    if _traced_block is not None:
        return _traced_block
    return _block_impl.get() if _compiles_functions else _last_block


def resolve(
    operator: str, device: torch.device, dtype: torch.dtype, impl: str = "auto", batch: int | None = None
) -> str:
    """The path that ``operator`` takes for tensors of ``device`` and ``dtype``: reference, torch or triton.

    ``batch``, the number of samples, decides with ``auto`` whether the kernels pay; None stands for many. Where they
    come into question for the first time, they are proved first; ``auto`` says once if they fail.
    Raises RuntimeError, with the reason, when ``triton`` is asked for and cannot run, or failed its proof.
    """
    requested = requested_impl(impl)
    if requested == "reference":
        return requested
    traced = torch.compiler.is_dynamo_compiling()
    if requested == "auto" and not traced and (operator, device, dtype, tuned.bucket_of(batch)) in _taken:
        return "triton"
    torch_path = _torch_path()
    if requested == "torch":
        return torch_path
    obstacle = triton_obstacle(device, dtype)
    if requested == "triton":
        failure = _failure_while_tracing if traced else _failure
        obstacle = obstacle or failure(operator, device, dtype, requested)
        if obstacle:
            raise RuntimeError(f'{operator}: impl="triton" cannot run: {obstacle}. Use impl="torch" or impl="auto".')
        return "triton"
    if obstacle or _interpreting:
        return torch_path
    # Asked for here and not before: torch.compile guards on the bucket of a batch whose size is left open.
    takes = (_takes_while_tracing if traced else _takes)(operator, device, dtype, tuned.bucket_of(batch))
    return "triton" if takes else torch_path


def resolve_without_kernels(impl: str = "auto") -> str:
    """The path of an operator that has no kernels: reference where that is asked for, else torch."""
    return "reference" if requested_impl(impl) == "reference" else _torch_path()


def _torch_path() -> str:
    return "torch" if _compiles_functions or not torch.compiler.is_compiling() else "reference"


def _takes(operator: str, device: torch.device, dtype: torch.dtype, bucket: str) -> bool:
    """Whether ``auto`` takes kernels that nothing general stands against: faster, as far as is known, and proved."""
    if not _preference(operator, device, dtype, bucket).triton or _failure(operator, device, dtype, "auto"):
        return False
    index = preflight.index_of(device)
    if all(tuned.preference(operator, index, name, bucket).triton for name in tuned.precisions_of(dtype)):
        _taken.add((operator, device, dtype, bucket))
    return True


def forget() -> None:
    """Decide anew what was decided, by what is known of the GPUs now; proofs are not made again."""
    _taken.clear()
    tuned.forget()


def ever_pays(operator: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``auto`` would take the kernels for batches of some size, if they are right."""
    return any(_preference(operator, device, dtype, bucket).triton for bucket in tuned.BUCKETS)


def _preference(operator: str, device: torch.device, dtype: torch.dtype, bucket: str) -> tuned.Preference:
    return tuned.preference(operator, preflight.index_of(device), tuned.precision_of(dtype), bucket)


def _failure(operator: str, device: torch.device, dtype: torch.dtype, requested: str) -> str | None:
    """How the kernels failed their proof, or None. Under the interpreter and for a record of launches there is none."""
    if _interpreting or _every_device_has_triton:
        return None
    try:
        found = preflight.settled[operator, device.index, dtype]
    except KeyError:
        tuned.tuning_of(preflight.index_of(device))  # with its tiles: they are what is proved
        found = preflight.verdict(operator, device, dtype)
    if found is None or (found is preflight.POSTPONED and requested == "triton"):
        return None
    if requested == "auto":
        preflight.tell(operator, device, dtype, found)
    return str(found)


def _constant(function: Callable) -> Callable:
    """As torch.compiler.assume_constant_result, which would import the compiler here."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# torch.compile calls these two while it traces and keeps what they answer, as a verdict holds for the process.
@_constant
def _failure_while_tracing(operator: str, device: torch.device, dtype: torch.dtype, requested: str) -> str | None:
    return _failure(operator, device, dtype, requested)


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on ``device`` in ``dtype``, or None when they can."""
    if dtype not in KERNEL_DTYPES:
        return f"the kernels compute in float32, float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if _missing_triton:
        return _missing_triton
    if _every_device_has_triton:
        return None
    if _interpreting:
        if dtype is torch.bfloat16:
            return "Triton's interpreter (TRITON_INTERPRET=1) computes wrong numbers in bfloat16"
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and the kernels run on CUDA (on a CPU only under TRITON_INTERPRET=1)"
    return _device_obstacle(device)


@contextmanager
def every_device_has_triton() -> Iterator[None]:
    """Let ``triton`` be taken on any device inside the block: for who records launches in place of making them."""
    global _every_device_has_triton
    before, _every_device_has_triton = _every_device_has_triton, True
    try:
        yield
    finally:
        _every_device_has_triton = before


def prove(operator: str, device: torch.device, dtype: torch.dtype) -> preflight.Failure | None:
    """What is wrong with the kernels as they are launched on ``device``, or None; proved now unless it is known."""
    tuned.tuning_of(preflight.index_of(device))
    return preflight.prove(operator, device, dtype)


def unproved_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no proof of the kernels is wanted on ``device`` in ``dtype``, or None where the first use makes one."""
    if (obstacle := triton_obstacle(device, dtype)) is not None:
        return obstacle
    if _every_device_has_triton:
        return "launches are recorded and not made"
    return "Triton's interpreter is for tests, which run it on purpose" if _interpreting else None


@_constant
def _device_obstacle(device: torch.device) -> str | None:
    """Of a GPU; there are fake tensors of such that are not there."""
    if device.index in _device_obstacles:
        return _device_obstacles[device.index]
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU here"
    index = preflight.index_of(device)
    if index not in _device_obstacles:
        if index >= torch.cuda.device_count():
            return f"PyTorch finds no {device} here"
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        too_old = torch.version.hip is None and capability < MIN_CAPABILITY
        _device_obstacles[index] = (
            f"{properties.name} has compute capability {capability[0]}.{capability[1]}, "
            f"and the kernels need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
            if too_old
            else None
        )
    return _device_obstacles[index]


@_constant
def _takes_while_tracing(operator: str, device: torch.device, dtype: torch.dtype, bucket: str) -> bool:
    return _takes(operator, device, dtype, bucket)


def chosen_paths(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[tuple[str, str, str]]:
    """(operator, path, reason) for every operator, for tensors of ``device`` and ``dtype``. Never raises.

    Where the batch matters the path is that of large ones, and the reason says what smaller ones take.
    """
    device = torch.device(device)
    try:
        requested = requested_impl()
    except ValueError as error:
        return [(operator, "none", str(error)) for operator in OPERATORS]
    general = triton_obstacle(device, dtype)
    rows = []
    for operator, entry in OPERATORS.items():
        known = None if unproved_obstacle(device, dtype) else preflight.known(operator, device, dtype)
        obstacle = general or (known and str(known))
        if not entry.kernels:
            path = "reference" if requested == "reference" else "torch"
            rows.append((operator, path, "it has no kernel of its own: PyTorch's fused functions are its fast path"))
        elif requested in ("reference", "torch"):
            rows.append((operator, requested, f"asked for by use_impl or FASTRIS_IMPL={requested}"))
        elif requested == "triton":
            rows.append((operator, "none" if obstacle else "triton", obstacle or "asked for"))
        elif obstacle:
            rows.append((operator, "torch", obstacle))
        elif _interpreting:
            rows.append((operator, "torch", "auto does not choose Triton's interpreter, which is for tests"))
        else:
            rows.append((operator, *_preferred_path(operator, device, dtype)))
    return rows


def _preferred_path(operator: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What ``auto`` prefers for large batches, and why; and for the others, where that differs."""
    found = {bucket: _preference(operator, device, dtype, bucket) for bucket in tuned.BUCKETS}
    paths = {bucket: "triton" if each.triton else "torch" for bucket, each in found.items()}
    path, why = paths[tuned.LARGE], found[tuned.LARGE].why
    for bucket, each in found.items():
        if paths[bucket] != path:
            why += f"; {paths[bucket]} for {bucket}: {each.why}"
    return path, why
