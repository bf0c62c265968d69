"""Deformable attention where the contract cannot see: lines between cells, far places, bytes kept, what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from operator_cases import deformable_problem
from torch import Tensor

from fastris import reference
from fastris.bench.counter import saved_storages
from fastris.ops import deformable_samples
from fastris.ops import multiscale_deformable_attention as attention
from fastris.testing import run_with_gradients

SIZES = ((2, 4), (8, 8))
PROBLEM = deformable_problem(2, 7, 2, 4, ((3, 5), (2, 4)), 3)


def inputs_with(offsets: Tensor, sizes=SIZES, width: int = 3) -> dict[str, Tensor]:
    """For offsets (B, Q, H, S, P, 2) of the queries that are the maps' pixels, or the first of them; in float64."""
    batch, queries, heads, levels, points, _ = offsets.shape
    generator = torch.Generator().manual_seed(2)
    centres = reference.pixel_centres(sizes)
    value = torch.randn(batch, len(centres), heads, width, generator=generator, dtype=torch.float64)
    logits = torch.randn(batch, queries, heads, levels * points, generator=generator, dtype=torch.float64)
    points_of = centres[:queries].double()
    return {"value": value, "reference_points": points_of, "offsets": offsets.double(), "logits": logits}


def results(impl: str, inputs: dict[str, Tensor], sizes=SIZES) -> dict[str, Tensor]:
    return run_with_gradients(partial(attention, sizes=sizes, impl=impl), inputs)


def test_on_lines_between_cells_and_on_borders_the_gradients_are_the_published_ones():
    # Sizes are powers of two, so that both forms find a place on a line to be exactly there.
    steps = torch.arange(-4.0, 5.0).repeat(4)
    generator = torch.Generator().manual_seed(1)
    offsets = steps[torch.randint(len(steps), (1, 72, 2, 2, 4, 2), generator=generator)]
    offsets[..., 1] += torch.tensor([0.0, 0.25, 0.0, 0.5])  # on a line in one direction, on points
    inputs = inputs_with(offsets)
    expected = results("reference", inputs)
    for name, found in results("torch", inputs).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("far", [1e3, 1e9, 1e30])
def test_places_far_outside_read_zeros_and_get_no_gradient(far):
    offsets = torch.full((2, 3, 2, 2, 1, 2), far)
    offsets[:, 1] *= -1
    offsets[:, 2, ..., 0] = 0  # outside in y alone
    found = results("torch", inputs_with(offsets))
    assert all(each.isfinite().all() for each in found.values())
    assert not any(each.any() for each in found.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_place_that_is_not_finite_spoils_its_own_query_and_head_alone(bad):
    inputs = PROBLEM.make()
    clean = PROBLEM.call("torch")(**inputs).unflatten(2, (2, 4))
    inputs["offsets"][1, 3, 1, 0, 2, 1] = bad
    found = run_with_gradients(PROBLEM.call("torch"), inputs)
    output = found["output 0"].unflatten(2, (2, 4))
    assert not output[1, 3, 1].isfinite().any()
    output[1, 3, 1] = clean[1, 3, 1]
    assert torch.equal(output, clean)
    assert found["gradient of value"].isfinite().all()  # that sample is nowhere


def test_work_in_parts_gives_the_bits_of_work_at_once(monkeypatch):
    inputs = PROBLEM.make()
    whole = run_with_gradients(PROBLEM.call("torch"), inputs)
    for chunk in (1, 7 * 6, 2 * 7 * 6):  # a head at a time, and a sample at a time
        monkeypatch.setattr(deformable_samples, "CHUNK", chunk)
        parts = run_with_gradients(PROBLEM.call("torch"), inputs)
        rounded = "gradient of reference_points"  # alone a sum over all parts
        torch.testing.assert_close(parts.pop(rounded), whole[rounded])
        assert all(torch.equal(each, whole[name]) for name, each in parts.items())


@pytest.mark.parametrize("sides", [(15, 30, 60), (4, 8, 15, 30)], ids=["AlignFormer", "MagNet, smaller"])
def test_at_most_15_percent_of_the_published_forms_bytes_are_kept_at_480x480(sides):
    sizes, levels, heads, points, batch = tuple((side, side) for side in sides), len(sides), 8, 4, 2
    pixels = sum(height * width for height, width in sizes)
    samples = levels, points
    shapes = (batch, pixels, heads, 32), (batch, pixels, heads, *samples, 2), (batch, pixels, heads, levels * points)
    value, offsets, logits = (torch.zeros(shape, requires_grad=True) for shape in shapes)
    centres, kept = reference.pixel_centres(sizes), {}
    for impl in ("reference", "torch"):
        with saved_storages(()) as saved:
            output = attention(value, sizes, centres, offsets, logits, impl=impl)
        kept[impl] = sum(saved.values())
        del output
    assert kept["torch"] == sum(each.nbytes for each in (value, offsets, logits, centres))
    assert kept["torch"] <= 0.15 * kept["reference"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_places_and_weights_are_computed_in_float32(dtype):
    inputs = {name: tensor.to(dtype) for name, tensor in PROBLEM.make().items()}
    wide = PROBLEM.call("torch")(**{name: tensor.float() for name, tensor in inputs.items()})
    assert torch.equal(PROBLEM.call("torch")(**inputs), wide.to(dtype))
    inputs["reference_points"] = inputs["reference_points"].float()  # may stay as they were made
    assert torch.equal(PROBLEM.call("torch")(**inputs), wide.to(dtype))


def test_under_autocast_dtypes_may_differ_and_the_result_is_float32():
    inputs = PROBLEM.make()
    inputs |= {"value": inputs["value"].bfloat16(), "logits": inputs["logits"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        found, published = (PROBLEM.call(impl)(**inputs) for impl in ("torch", "reference"))
    assert found.dtype is published.dtype is torch.float32
    torch.testing.assert_close(found, published, atol=1e-2, rtol=1e-2)


def bad_arguments():
    value, points = torch.zeros(2, 72, 2, 3), torch.zeros(5, 2)
    offsets, logits = torch.zeros(2, 5, 2, 2, 4, 2), torch.zeros(2, 5, 2, 8)
    good = {"value": value, "sizes": SIZES, "reference_points": points, "offsets": offsets, "logits": logits}
    yield ValueError, r"value must be \(B, M, H, D\), got \(72, 2, 3\)", good | {"value": value[0]}
    yield (
        ValueError,
        r"sizes \[\(2, 4\), \(8, 9\)\] have 80 pixels, but value has 72",
        good | {"sizes": [(2, 4), (8, 9)]},
    )
    yield ValueError, r"sizes must hold a height and width of at least 1", good | {"sizes": []}
    yield ValueError, r"sizes must hold a height and width of at least 1", good | {"sizes": [(-2, -36)]}
    yield ValueError, r"sizes must be pairs \(height, width\)", good | {"sizes": [2, 4]}
    yield ValueError, r"reference_points must be \(Q, 2\)", good | {"reference_points": points[None]}
    yield TypeError, r"reference_points must be floating point", good | {"reference_points": points.long()}
    yield ValueError, r"offsets must be \(2, 5, 2, 2, P, 2\)", good | {"offsets": offsets[:, :4]}
    yield ValueError, r"logits must be \(2, 5, 2, 8\)", good | {"logits": logits[..., :6]}
    yield ValueError, r"offsets must have no empty", good | {"offsets": offsets[..., :0, :], "logits": logits[..., :0]}
    yield TypeError, r"logits is torch\.float64 but value is torch\.float32", good | {"logits": logits.double()}
    yield TypeError, r"offsets must be a tensor, got NoneType", good | {"offsets": None}


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    ("kind", "message", "arguments"), list(bad_arguments()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_what_does_not_fit_is_named(kind, message, arguments, impl):
    with pytest.raises(kind, match=f"multiscale_deformable_attention: {message}"):
        attention(**arguments, impl=impl)
