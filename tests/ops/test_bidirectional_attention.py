"""Bidirectional attention where the contract's problems do not go: masks, single words and pixels, silent biases."""

from __future__ import annotations

import pytest
import torch
from bounds import run_with_gradients
from torch import Tensor

from fastris import ops
from fastris.dispatch import use_impl
from fastris.nn.fusion import Fusion, Residuals
from fastris.ops.absorbed_scores import covariance_pays, product, split_product
from fastris.reference import BidirectionalAttentionWeights

SILENT = ("query_bias", "value_bias", "out_bias", "sym_value_bias")
FORMS = {"covariance": (96, 8, 6), "maps": (5, 16, 12)}
"""Pixels, width and text width, by the form of the fast path that they take."""


def inputs_of(pixels: int, width: int, text_width: int, batch: int = 2, words: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"query": (width, width), "key": (width, text_width), "value": (width, text_width)}
    sizes |= {"out": (width, width), "sym_value": (text_width, width), "sym_out": (text_width, text_width)}
    inputs = {"pixels": (batch, pixels, width), "words": (batch, words, text_width), "project_weight": (3, width)}
    shapes = inputs | {f"{part}_weight": size for part, size in sizes.items()}
    shapes |= {f"{part}_bias": size[:1] for part, size in sizes.items()}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value / value.shape[-1] ** 0.5 if "weight" in name else value for name, value in found.items()}


def call(impl: str, valid: Tensor, **options):
    """The operator on named inputs, of which ``project_weight`` may be missing."""

    def function(pixels: Tensor, words: Tensor, project_weight: Tensor | None = None, **weights: Tensor):
        own = BidirectionalAttentionWeights(**weights)
        options_too = {"project_weight": project_weight, "impl": impl, **options}
        return ops.bidirectional_attention(pixels, words, valid, own, **options_too)

    return function


def lengths(*real: int, words: int = 5) -> Tensor:
    return torch.arange(words) < torch.tensor(real)[:, None]


def hold(found: dict[str, Tensor], expected: dict[str, Tensor], scale: float = 1.0) -> None:
    """Equal to 1e-10, of each tensor's scale or of ``scale`` where that is larger."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        error = (found[name] - want).abs().max()
        assert error <= 1e-10 * max(scale, float(want.abs().max())), f"{name}: {error}"


def test_each_form_is_taken_where_it_costs_less():
    assert [covariance_pays(*FORMS[form][:2], FORMS[form][2]) for form in FORMS] == [True, False]
    stages = [(14400, 128), (3600, 256), (900, 512), (225, 1024)]
    assert [covariance_pays(n, c, 768) for n, c in stages] == [True, True, True, False]
    assert [covariance_pays(n, c, 512) for n, c in ((676, 256), (676, 512), (169, 1024))] == [True, False, False]


@pytest.mark.parametrize("form", FORMS)
def test_biases_that_change_nothing_have_gradients_of_exactly_zero(form):
    inputs = {name: value.double() for name, value in inputs_of(*FORMS[form]).items()}
    found, expected = (run_with_gradients(call(impl, lengths(5, 2)), inputs) for impl in ("torch", "reference"))
    hold(found, expected)
    assert not any(found[f"gradient of {name}"].any() for name in SILENT)
    assert all(found[f"gradient of {name}"].any() for name in ("key_bias", "sym_out_bias"))
    moved = inputs | {name: inputs[name] + 3 for name in SILENT}
    assert all(map(torch.equal, call("torch", lengths(5, 2))(**inputs), call("torch", lengths(5, 2))(**moved)))


@pytest.mark.parametrize("lone_word_is_zero", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_one_word_and_none_are_what_the_formula_says(form, lone_word_is_zero):
    inputs, valid = inputs_of(*FORMS[form], batch=3), lengths(1, 0, 3)
    for dtype in (torch.float64, torch.float32):
        own = {name: value.to(dtype) for name, value in inputs.items()}
        fast, published = (call(impl, valid, lone_word_is_zero=lone_word_is_zero) for impl in ("torch", "reference"))
        if dtype is torch.float64:
            hold(run_with_gradients(fast, own), run_with_gradients(published, own))
        attended, heard = fast(**own)
        assert attended[2].any() and heard[0, 0].any() and not heard[~valid].any()
        assert float(attended[:2].abs().max()) <= (0 if lone_word_is_zero else 1e-3)


def test_lone_word_is_zero_even_where_pixels_are_not_finite():
    inputs = inputs_of(*FORMS["maps"])
    inputs["pixels"][0, 0, 0] = float("nan")
    attended, _ = call("torch", lengths(1, 2), lone_word_is_zero=True)(**inputs)
    assert not attended[0].any() and attended[1].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_padding_words_have_no_weight_whatever_they_hold(form):
    inputs, valid = inputs_of(*FORMS[form]), lengths(4, 2)
    other = inputs | {"words": torch.where(valid[..., None], inputs["words"], 50.0)}
    one, two = (run_with_gradients(call("torch", valid), each) for each in (inputs, other))
    gradient = one["gradient of words"]
    assert gradient[valid].any() and not gradient[~valid].any()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    for as_numbers in (valid.long(), valid.float(), valid.double()):
        assert torch.equal(call("torch", as_numbers)(**inputs)[0], one["output 0"])


def test_single_pixel_gets_zeros_and_its_gradients_are_zero():
    inputs = {name: value.double() for name, value in inputs_of(1, 8, 6).items()}
    found, expected = (run_with_gradients(call(impl, lengths(5, 2)), inputs) for impl in ("torch", "reference"))
    hold(found, expected)
    assert not found["output 0"].any() and not found["gradient of pixels"].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_mean_far_from_zero_costs_no_more_accuracy_than_as_published(form):
    inputs = inputs_of(*FORMS[form])
    inputs["pixels"] = inputs["pixels"] + 30 * torch.randn(FORMS[form][1], generator=torch.Generator().manual_seed(5))
    inputs = {name: value for name, value in inputs.items() if name not in SILENT}
    silent = {name: torch.zeros(FORMS[form][2 if "sym" in name else 1]) for name in SILENT}

    def on(impl: str):
        return lambda **given: call(impl, lengths(5, 2))(
            **given, **{k: v.to(given["words"]) for k, v in silent.items()}
        )

    truth = run_with_gradients(on("reference"), {k: v.double() for k, v in inputs.items()})
    fast, published = (run_with_gradients(on(impl), inputs) for impl in ("torch", "reference"))
    for name, true in truth.items():
        ours, theirs = ((each[name].double() - true).abs().max() / true.abs().max() for each in (fast, published))
        assert ours <= max(1e-5, 1.25 * theirs), (name, ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_scores_pick_one_word_and_stay_finite(form):
    inputs = {name: value.double() for name, value in inputs_of(*FORMS[form]).items() if name not in SILENT}
    inputs["key_weight"] = 300 * inputs["key_weight"]
    silent = {name: torch.zeros(FORMS[form][2 if "sym" in name else 1]).double() for name in SILENT}

    def on(impl: str):
        return lambda **given: call(impl, lengths(5, 2))(**given, **silent)

    found, expected = (run_with_gradients(on(impl), inputs) for impl in ("torch", "reference"))
    hold(found, expected)


def test_one_side_alone_can_be_differentiated():
    inputs = {name: value.double().requires_grad_() for name, value in inputs_of(*FORMS["covariance"]).items()}
    for side in range(2):
        outputs = call("torch", lengths(5, 2))(**inputs)
        gradients = torch.autograd.grad(outputs[side].square().sum(), list(inputs.values()), allow_unused=True)
        expected = torch.autograd.grad(
            call("reference", lengths(5, 2))(**inputs)[side].square().sum(), list(inputs.values()), allow_unused=True
        )
        for name, got, want in zip(inputs, gradients, expected, strict=True):
            if name in SILENT:
                assert not got.any()
            elif want is not None:
                torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * max(1.0, float(want.abs().max())), msg=name)


def test_few_bytes_are_kept():
    inputs = {name: value.requires_grad_() for name, value in inputs_of(400, 16, 48).items()}
    kept: dict[str, int] = {}
    for impl in ("torch", "reference"):
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            call(impl, lengths(5, 2))(**inputs)
        kept[impl] = sum(storages.values())
    assert kept["torch"] <= 0.25 * kept["reference"], kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_split_products_round_one_side_alone(dtype):
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(2, 3, 50, generator=generator) * 1e-6, torch.randn(2, 50, 40, generator=generator)
    exact = left.double() @ right.to(dtype).double()
    errors = [(each(left, right, dtype) - exact).abs().max() / exact.abs().max() for each in (product, split_product)]
    assert errors[0] > 1e-4 and errors[1] < 3e-5, errors
    onto = torch.ones(2, 3, 40)
    torch.testing.assert_close(product(left, right, dtype, onto), product(left, right, dtype) + 1)


def test_dtypes_may_differ_under_autocast():
    inputs = inputs_of(*FORMS["covariance"])
    inputs["pixels"] = inputs["pixels"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (call(impl, lengths(5, 2))(**inputs) for impl in ("torch", "reference"))
    assert [each.dtype for each in found] == [each.dtype for each in expected] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("form", FORMS)
def test_fusion_is_the_published_one_though_half_of_its_projection_is_absorbed(form):
    pixels, width, text_width = FORMS[form]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        fusion = Fusion(width, text_width, lone_word_is_zero=False).double()
    own = inputs_of(pixels, width, text_width)
    sources = [own[name].double().requires_grad_() for name in ("pixels", "words")]
    valid = lengths(5, 2)

    def published() -> Residuals:
        """With the modules themselves, on (B, C, N)."""
        mask = valid[..., None].double()
        with use_impl("reference"):
            seen, heard = fusion.attend(*sources, valid)
        read = torch.cat([fusion.vis_project(sources[0].mT), seen.mT], dim=1)
        said = torch.cat([mask.mT * fusion.lang_project(sources[1].mT), heard.mT], dim=1)
        return Residuals(fusion.project_mm(read).mT, mask * fusion.sym_project_mm(said).mT)

    leaves = [*sources, *fusion.parameters()]
    results = []
    for residuals in (fusion(*sources, valid), published()):
        gradients = torch.autograd.grad([each.sin().sum() for each in residuals], leaves)
        results.append({str(n): each.detach() for n, each in enumerate([*residuals, *gradients])})
    hold(*results)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"words must be \(2, L, T\), got", lambda x: x | {"words": x["words"][:1]}),
        (r"words must not be empty", lambda x: x | {"words": x["words"][:, :0]}),
        (r"pixels must not be empty", lambda x: x | {"pixels": x["pixels"][:, :0]}),
        (r"key_weight must be \(8, 6\)", lambda x: x | {"key_weight": x["key_weight"].T}),
        (r"sym_value_bias must be \(6\)", lambda x: x | {"sym_value_bias": x["query_bias"]}),
        (r"project_weight must be \(C', 8\)", lambda x: x | {"project_weight": torch.ones(8, 3)}),
        (r"words is torch.float64 but", lambda x: x | {"words": x["words"].double()}),
    ],
)
def test_what_does_not_fit_is_named(message, change):
    with pytest.raises((TypeError, ValueError), match=f"bidirectional_attention: {message}"):
        call("torch", lengths(5, 2))(**change(inputs_of(*FORMS["covariance"])))


def test_mask_that_does_not_fit_is_named():
    inputs = inputs_of(*FORMS["covariance"])
    with pytest.raises(ValueError, match=r"valid must be \(2, 5\), got \(2, 4\)"):
        call("torch", lengths(5, 2)[:, :4])(**inputs)
    with pytest.raises(TypeError, match="valid must be a tensor, got list"):
        call("torch", [1, 1])(**inputs)
