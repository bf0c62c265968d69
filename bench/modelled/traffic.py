"""The operations of CRIS's training step, stage by stage, and of measured cases: counted on shapes, without numbers.

Every PyTorch operation that runs within :class:`Traffic` is taken as one kernel, which reads each of its inputs and
writes each of its outputs once. A view costs nothing; an expanded tensor counts the elements that exist; a table is
read only where it is looked up. Arithmetic is that of matrix products and convolutions, two operations for each
multiplication.

PyTorch cannot count inside a Triton kernel, so what kernels read, write and multiply is written down, from the formulas
in their docstrings: one entry per launch, with the large tensors that it has to read and write, once each.
:func:`with_kernels` puts them in the place of the operators that they replace.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from fastris import CRIS, CRISConfig, use_impl
from fastris.ops.absorbed_attention import absorbed_attention
from fastris.ops.contrastive import text_to_pixel_contrastive_loss
from fastris.ops.upsample_conv import upsample2x_conv3x3

from ..cases.arms import attention_without_weights
from ..cases.problem import LOW_PRECISION
from ..cases.table import CASES, Case
from ..report import results
from ..timing.roofline import FORMULAS

aten = torch.ops.aten

LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}
"""Operations that read no more of their first argument than they write."""

OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.bernoulli_, aten.normal_, aten.uniform_, aten.random_}
"""Operations that write their first argument without reading it."""

FACTORIES = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
"""Operations that touch no memory."""

PATHS = ("reference", "repaired", "torch")
"""What is counted; repaired is the reference path without the attention weights that nobody reads."""

Counted = list[dict[str, Any]]

RatesOf = Callable[[dict[str, Any]], tuple[Callable[[Counted], float], str] | None]
"""From a result file: what gives the milliseconds of operations on its device, and its rates in words; or None."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One kernel: its arithmetic in a low precision or in a ``wide`` one (float32 and up), and its bytes."""

    name: str
    flops: int
    bytes: int
    wide: bool


class Traffic(TorchDispatchMode):
    """Collects the operations that run in its block, on numbers or on shapes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function.overloadpacket
        moved = 0 if packet in FACTORIES else _bytes_moved(function, args, kwargs, result)
        flops = count_flops(packet, args, kwargs, result)
        if moved or flops:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            wide = all(t.itemsize > 2 for t in tensors if t.is_floating_point())
            self.operations.append(Operation(str(packet), flops, moved, wide))
        return result


def count_flops(packet: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Arithmetic of one operation; 0 for all but matrix products, convolutions and attention."""
    formula = FORMULAS.get(packet)
    if formula is not None:
        return shape_wrapper(formula)(*args, **kwargs, out_val=result)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _bytes_moved(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    written = _written(function, args, kwargs)
    old = {_storage(tensor) for tensor in given}
    new = [tensor for tensor in made if _storage(tensor) not in old]
    if not new and not written:
        return 0  # a view
    packet = function.overloadpacket
    read = given[1:] if packet in LOOKUPS or packet in OVERWRITES else given
    read = [tensor for tensor in read if not any(tensor is out for out in tree_leaves(kwargs.get("out")))]
    looked_up = existing_bytes(new) if packet in LOOKUPS else 0
    return existing_bytes(read) + looked_up + existing_bytes(new) + existing_bytes(written)


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that the operation changes."""
    changed = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name, args[place] if place < len(args) else None)
        changed += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return changed


def existing_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, each once; an axis that is only expanded holds one element."""
    found = {}
    for tensor in tensors:
        count = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            count *= size if stride else min(size, 1)
        found[_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()] = count * tensor.itemsize
    return sum(found.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def count_stages(batch: int, preset: str = "cris_r50") -> dict[str, dict[str, Counted]]:
    """Path -> stage -> operations of one training step under bf16 autocast, without dropout, as on a GPU."""
    return {path: _stages_by(path, batch, preset) for path in PATHS}


def _stages_by(path: str, batch: int, preset: str) -> dict[str, Counted]:
    config = dataclasses.replace(CRISConfig.preset(preset), dropout=0.0)
    found: dict[str, Counted] = {}
    with shapes_of(path, gpu=True):
        model = CRIS(config).train()
        parameters = sum(p.numel() for p in model.parameters())
        images = torch.empty(batch, 3, config.input_size, config.input_size)
        mask = torch.empty(batch, 1, config.input_size, config.input_size)
        tokens = torch.ones(batch, config.word_len, dtype=torch.int64)

        def stage(name: str, work: Callable[..., Any], *given: Tensor) -> list[Tensor]:
            inputs = [g.detach().requires_grad_(g.is_floating_point() and name != "image encoder") for g in given]
            outputs, found[name] = count_training(work, inputs, torch.bfloat16)
            return outputs

        maps = stage("image encoder", model.backbone.encode_image, images)
        words, state = stage("text encoder", model.backbone.encode_text, tokens)
        (fused,) = stage("neck", lambda *given: model.neck(given[:3], given[3]), *maps, state)
        (decoded,) = stage("decoder", lambda pixels, text: model.decoder(pixels, text, tokens == 0), fused, words)
        stage("projector + loss", lambda x, text: model.proj(x, text, mask), decoded.view(fused.shape), state)
    found["Adam"] = [adam(parameters)]
    return found


def count_training(
    work: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], Counted]:
    """Outputs, and the operations of forward and backward, of shapes alone."""
    low = dtype in LOW_PRECISION
    with Traffic() as traffic:
        with torch.autocast("cpu", dtype=dtype) if low else nullcontext():
            made = work(*inputs)
        outputs = list(made) if isinstance(made, (tuple, list)) else [made]
        ends = [output for output in outputs if output.requires_grad]
        if ends[0].ndim == 0:  # a loss comes first
            ends[0].backward()
        else:
            torch.autograd.backward(ends, [torch.empty_like(end) for end in ends])
    return outputs, merged(traffic.operations)


def merged(operations: Sequence[Operation]) -> Counted:
    """Equal operations once, with their count."""
    return [{**dataclasses.asdict(o), "count": count} for o, count in Counter(operations).items()]


def adam(parameters: int) -> dict[str, Any]:
    """A fused Adam step: reads parameter, gradient and both moments, writes all but the gradient, in float32."""
    return {"name": "fused Adam", "flops": 0, "bytes": 7 * 4 * parameters, "wide": True, "count": 1}


@contextmanager
def shapes_of(path: str, gpu: bool) -> Iterator[None]:
    """Tensors without numbers, operators by ``path``; with ``gpu``, as they run there although they lie on a CPU."""
    upsample: Any = importlib.import_module("fastris.ops.upsample_conv")
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(use_impl("torch" if path == "torch" else "reference"))
        if path == "repaired":
            stack.enter_context(attention_without_weights())
        if gpu:
            stack.enter_context(mock.patch.object(upsample, "CPU_PART_BYTES", upsample.GPU_PART_BYTES))
            # On CUDA, autocast runs these two in float32; on a CPU it does not.
            for name in ("layer_norm", "softmax"):
                stack.enter_context(mock.patch.object(F, name, _in_float32(getattr(F, name))))
        yield


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def widened(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    return widened


def count_case(case: Case, path: str, dtype: torch.dtype, gpu: bool) -> Counted:
    """Operations of one step of a case of bench/cases/table.py, without dropout."""
    with shapes_of(path, gpu):
        problem = case.build(**{**case.sizes, **case.check})
        problem.dtype = dtype
        problem.inputs = {name: tensor.to(dtype) for name, tensor in problem.inputs.items()}
        leaves = problem.leaves() if problem.training else {}
        work = lambda *_: problem.forward()  # noqa: E731
        if not problem.training:
            with Traffic() as traffic, torch.no_grad():  # inference mode would hide what composite operations do
                work()
            return merged(traffic.operations)
        _, counted = count_training(work, [], torch.float32)  # the problem turns autocast on by itself
        if problem.optimizer:
            counted.append(adam(sum(leaf.numel() for leaf in leaves.values())))
        return counted


def checks(folder: Path, rates_of: RatesOf) -> list[dict[str, Any]]:
    """The model of every measured case and arm that it has a path for, beside the median that was measured."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = results.load(path)
        except ValueError:
            continue
        found += _checks_of(result, rates_of) if result.get("cases") else []
    return found


def _checks_of(result: dict[str, Any], rates_of: RatesOf) -> Iterator[dict[str, Any]]:
    machine, dtype = result["machine"], getattr(torch, result["settings"]["dtype"])
    known = {case.name: case for case in CASES}
    known_device = rates_of(result)
    if known_device is None:
        return
    time_of, described = known_device
    for entry in result["cases"]:
        case = known.get(entry["name"])
        if case is None or set(case.sizes) != set(entry["sizes"]) or case.passes != entry["passes"]:
            continue  # of another version, or of one pass alone
        case = dataclasses.replace(case, sizes=_as_sizes(entry["sizes"]))
        for arm, cell in entry["arms"].items():
            if arm in PATHS and results.is_measured(cell):
                operations = count_case(case, arm, dtype, machine["device"]["type"] != "cpu")
                yield {
                    "device": ", ".join((machine["device"]["name"], f"{machine['threads']} threads", str(dtype)[6:])),
                    "rates": described,
                    "case": results.case_name(entry),
                    "arm": arm,
                    "modelled_ms": time_of(operations),
                    "measured_ms": results.Spread.of(cell["ms"]).median,
                }


def _as_sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    """As in the table of cases, where JSON has lists for tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}


LOW, WIDE = 2, 4
"""Bytes of bfloat16 and float32."""

TAPS = 9
WORDS_BUCKET = 32
"""CRIS's 17 words are padded to this many: see kernels/cross_attention.py."""


def with_kernels(stages: Mapping[str, Counted], batch: int) -> dict[str, Counted]:
    """The stages of the torch path with the kernels' launches in place of the operators that they replace."""
    found = {name: list(counted) for name, counted in stages.items()}
    config = CRISConfig.preset("cris_r50")
    side, dim = config.input_size // 16, config.vis_dim
    with shapes_of("torch", gpu=True):
        attention = _counted_attention(batch, side * side, dim, config)
        upsampling = [
            _counted_upsampling(batch, dim, outputs, size) for outputs, size in ((dim, side), (dim // 2, 2 * side))
        ]
        similarity = _counted_similarity(batch, dim // 2, 4 * side)
    kernels = merged(attention_kernels(batch, side * side, dim, config.num_head * WORDS_BUCKET))
    for _ in range(config.num_layers):
        found["decoder"] += _without(attention) + kernels
    found["projector + loss"] += _without([*upsampling[0], *upsampling[1], *similarity]) + merged(
        [
            *upsampling_kernels(batch, dim, dim, side),
            *upsampling_kernels(batch, dim, dim // 2, 2 * side),
            *similarity_kernels(batch, dim // 2, 4 * side),
        ]
    )
    return found


def attention_kernels(batch: int, pixels: int, dim: int, columns: int) -> list[Operation]:
    """kernels/cross_attention.py and cross_attention_backward.py; the residual x is float32 under autocast."""
    x, branch, weights = (batch * pixels * n for n in (dim * WIDE, dim * LOW, columns * LOW))
    product = 2 * batch * pixels * columns * dim
    return [
        Operation("scores", product, x + weights, False),
        Operation("output", 2 * product, 2 * x + weights, False),  # multiplies twice: for the norm, and to apply it
        Operation("branch backward", 2 * product, x + weights + branch, False),
        Operation("weights backward", product, branch + 2 * weights, False),
        Operation("query backward", 2 * product, 3 * x + weights + branch, False),
        Operation("bmm of d(values)", product, weights + branch, False),
        Operation("bmm of d(keys)", product, weights + branch, False),
    ]


def upsampling_kernels(batch: int, channels: int, outputs: int, side: int) -> list[Operation]:
    """kernels/upsample_conv.py: a product into nine tap images and a gather; backward the adjoint and two products."""
    x, weight = batch * side**2 * channels * LOW, TAPS * channels * outputs * LOW
    taps, output = batch * side**2 * TAPS * outputs * LOW, 4 * batch * side**2 * outputs * LOW
    product = 2 * batch * side**2 * channels * TAPS * outputs
    return [
        Operation("taps", product, x + weight + taps, False),
        Operation("gather", 0, taps + output, False),
        Operation("adjoint gather", 0, output + taps, False),
        Operation("d(x)", product, taps + weight + x, False),
        Operation("d(weight)", product, taps + x + weight, False),
    ]


def similarity_kernels(batch: int, channels: int, side: int) -> list[Operation]:
    """kernels/similarity.py, contrastive.py and similarity_backward.py: features read twice, their gradient written."""
    pixels = batch * side**2
    features, taps, number = pixels * channels * LOW, pixels * TAPS * WIDE, pixels * WIDE
    product = 2 * pixels * channels * TAPS
    return [
        Operation("taps", product, features + taps, False),
        Operation("shifted sum and loss", 0, taps + 5 * number, False),  # two factors; logits, loss and slope
        Operation("d(features)", product, number + features, False),
        Operation("d(kernel)", product, features + number, False),
    ]


def _counted_attention(batch: int, pixels: int, dim: int, config: CRISConfig) -> Counted:
    shape = batch, config.num_head, config.word_len
    x, positions, affine = torch.empty(batch, pixels, dim), torch.empty(pixels, dim), torch.empty(5, dim)
    keys, values = (torch.empty(*shape, dim, dtype=torch.bfloat16) for _ in range(2))
    silent = torch.zeros(batch, dtype=torch.bool)

    def attend(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor, affine: Tensor) -> Tensor:
        return absorbed_attention(x, positions, keys, bias, values, affine, silent, 0.0, 0.0, 1e-5)

    return _count(attend, x, keys, torch.empty(shape), values, affine)


def _counted_upsampling(batch: int, channels: int, outputs: int, side: int) -> Counted:
    x = torch.empty(batch, channels, side, side, dtype=torch.bfloat16)
    return _count(upsample2x_conv3x3, x, torch.empty(outputs, channels, 3, 3, dtype=torch.bfloat16))


def _counted_similarity(batch: int, channels: int, side: int) -> Counted:
    x = torch.empty(batch, channels, side, side, dtype=torch.bfloat16)
    kernel, mask = torch.empty(batch, channels, 3, 3), torch.empty(batch, 1, side, side)
    return _count(lambda x, kernel: text_to_pixel_contrastive_loss(x, kernel.to(x.dtype), mask), x, kernel)


def _count(work: Callable[..., Any], *tensors: Tensor) -> Counted:
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    return count_training(work, inputs, torch.float32)[1]


def _without(part: Counted) -> Counted:
    """Operations that, added to others, take these out of their sums."""
    return [{**operation, "count": -operation["count"]} for operation in part]
