"""The neck's two identities, held to the published formulas in float64, and their contracts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_path_same, run_with_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastris import reference, use_impl
from fastris.ops.pointwise_conv import coord_conv, pointwise_conv_cat

# widths of the full maps, widths of the half maps: the neck's three uses, then others
WIDTHS = [((4,), (6,)), ((5, 4), ()), ((4, 4), (4,)), ((), (3, 5)), ((1, 2, 3), (4, 5))]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def up2(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")


def make_maps(widths: tuple, layout=torch.contiguous_format, batch: int = 2, height: int = 3, width: int = 5):
    """Inputs by name: full0.., half0.., weight, bias."""
    full, half = widths
    inputs = {f"full{i}": torch.randn(batch, c, 2 * height, 2 * width) for i, c in enumerate(full)}
    inputs |= {f"half{i}": torch.randn(batch, c, height, width) for i, c in enumerate(half)}
    inputs = {name: value.double().contiguous(memory_format=layout) for name, value in inputs.items()}
    channels = sum(full) + sum(half)
    weight = torch.randn(7, channels, 1, 1, dtype=torch.float64) / channels**0.5
    return inputs | {"weight": weight, "bias": torch.randn(7, dtype=torch.float64)}


def split(maps: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return tuple([value for name, value in maps.items() if name.startswith(kind)] for kind in ("full", "half"))


def published_cat(weight: Tensor, bias: Tensor | None = None, **maps: Tensor) -> Tensor:
    full, half = split(maps)
    return F.conv2d(torch.cat([*full, *map(up2, half)], 1), weight, bias)


def fast_cat(weight: Tensor, bias: Tensor | None = None, **maps: Tensor) -> Tensor:
    return pointwise_conv_cat(*split(maps), weight, bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_pointwise_conv_of_parts_equals_that_of_the_concatenation(widths, layout):
    inputs = make_maps(widths, layout)
    expected = run_with_gradients(published_cat, inputs)
    for name, value in run_with_gradients(fast_cat, inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


def test_pointwise_conv_without_bias_equals_that_of_the_concatenation():
    inputs = make_maps(WIDTHS[0])
    del inputs["bias"]
    torch.testing.assert_close(fast_cat(**inputs), published_cat(**inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("widths", [((32,), (32,)), ((16, 16), (24,))])
def test_pointwise_conv_precision_is_within_the_bounds(widths, dtype):
    assert_path_same(fast_cat, published_cat, make_maps(widths), dtype)


def test_pointwise_conv_of_an_empty_batch_is_empty():
    inputs = {name: value[:0] if value.shape[0] == 2 else value for name, value in make_maps(WIDTHS[2]).items()}
    assert fast_cat(**inputs).shape == (0, 7, 6, 10)


def test_pointwise_conv_costs_less_than_that_of_the_concatenation():
    def flops(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function(**make_maps(((8,), (8,))))
        return counter.get_total_flops()

    assert flops(fast_cat) == flops(published_cat) * 5 / 8


def make_coordinates(channels: int = 5, size: int = 3, layout=torch.contiguous_format) -> dict[str, Tensor]:
    x = torch.randn(2, channels, 6, 7, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(4, channels + 2, size, size, dtype=torch.float64) / ((channels + 2) * size**2) ** 0.5
    return {"x": x, "weight": weight, "bias": torch.randn(4, dtype=torch.float64)}


def published_coordinates(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: int) -> Tensor:
    return F.conv2d(reference.append_coordinates(x).to(x.dtype), weight, bias, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "padding", "stride"), [(3, 1, 1), (1, 0, 1), (3, 0, 2), (5, 3, 2), (2, 1, 3)])
def test_split_coordinates_equal_appended_ones(size, padding, stride, layout):
    options = {"padding": padding, "stride": stride}
    inputs = make_coordinates(size=size, layout=layout)
    expected = run_with_gradients(partial(published_coordinates, **options), inputs)
    for name, value in run_with_gradients(partial(coord_conv, **options), inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


def test_split_coordinates_without_bias_equal_appended_ones():
    inputs = make_coordinates()
    del inputs["bias"]
    torch.testing.assert_close(coord_conv(**inputs), published_coordinates(**inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_split_coordinates_precision_is_within_the_bounds(dtype):
    options = {"padding": 1}
    assert_path_same(
        partial(coord_conv, **options), partial(published_coordinates, **options), make_coordinates(32), dtype
    )


@pytest.mark.parametrize("operator", ["pointwise_conv_cat", "coord_conv"])
def test_autocast_answers_as_the_published_formula(operator):
    fast, published, inputs = {
        "pointwise_conv_cat": (fast_cat, published_cat, make_maps(((16,), (16,)))),
        "coord_conv": (coord_conv, published_coordinates, make_coordinates(16)),
    }[operator]
    truth = published(**inputs)
    inputs = {name: value.float() for name, value in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected = fast(**inputs), published(**inputs)
    assert result.dtype is expected.dtype is torch.bfloat16
    error, allowed = (result.double() - truth).abs().max(), (expected.double() - truth).abs().max()
    assert error <= 1.25 * allowed + 2**-8 * truth.abs().max()


@pytest.mark.parametrize(
    ("fast", "inputs"), [(fast_cat, make_maps(WIDTHS[2])), (partial(coord_conv, padding=1), make_coordinates())]
)
def test_compiled_without_graph_breaks_equals_eager(fast, inputs):
    expected = run_with_gradients(fast, inputs)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for name, value in run_with_gradients(compiled, inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


def test_reference_is_the_published_formula():
    maps, coordinates = make_maps(WIDTHS[2]), make_coordinates()
    with use_impl("reference"):
        assert torch.equal(fast_cat(**maps), published_cat(**maps))
        assert torch.equal(coord_conv(**coordinates), published_coordinates(**coordinates))
    assert torch.equal(coord_conv(**coordinates, impl="reference"), published_coordinates(**coordinates))


@pytest.mark.parametrize(
    ("full", "half", "weight", "message"),
    [
        ([], [], (4, 4, 1, 1), "full and half are both empty"),
        ([(2, 4, 6, 8)], [(2, 4, 3, 5)], (4, 8, 1, 1), r"full\[0\] must be \(2, C, 6, 10\), got \(2, 4, 6, 8\)"),
        ([(2, 4, 7, 8)], [(2, 4, 3, 4)], (4, 8, 1, 1), r"full\[0\] must be \(2, C, 6, 8\)"),
        ([(2, 4, 6, 8), (1, 4, 6, 8)], [], (4, 8, 1, 1), r"full\[0\] must be \(1, C, 6, 8\)"),
        ([(2, 4, 6, 8)], [(2, 4, 3, 4)], (4, 9, 1, 1), r"weight must be \(C', 8, 1, 1\)"),
        ([(4, 6, 8)], [], (4, 4, 1, 1), r"full\[0\] must be \(B, C, H, W\)"),
    ],
)
def test_maps_that_do_not_fit_are_named(full, half, weight, message):
    with pytest.raises(ValueError, match=message):
        pointwise_conv_cat(list(map(torch.zeros, full)), list(map(torch.zeros, half)), torch.zeros(weight))


def test_coordinate_weights_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"coord_conv: weight must be \(C', 6, k, k\), got \(3, 4, 3, 3\)"):
        coord_conv(torch.zeros(1, 4, 5, 5), torch.zeros(3, 4, 3, 3))
    with pytest.raises(TypeError, match=r"weight is torch\.float64"):
        coord_conv(torch.zeros(1, 4, 5, 5), torch.zeros(3, 6, 3, 3).double())
