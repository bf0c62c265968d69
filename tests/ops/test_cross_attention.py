"""Cross-attention with absorbed text: the published values and gradients, everywhere and for fewer bytes."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_path_same, run_with_gradients
from cross_attention_cases import Case, masked_formula

from fastris.ops.cross_attention import cross_attention
from fastris.reference import AttentionWeights

CASE = Case(2, 13, 5, 64, 2, real=(5, 1))
LARGER = Case(3, 36, 9, 128, 4, real=(9, 4, 7))
PROJECTED = Case(2, 13, 9, 64, 8, real=(9, 3))
SILENT = Case(3, 5, 4, 64, 2, real=(4, 0, 2))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_of_one_sample_stay_exact(dtype):
    case = Case(3, 7, 5, 64, 2, real=(5, 3, 4))
    inputs = case.inputs()
    inputs["text"][1] *= 4000.0  # logits of +-1e4
    assert_path_same(case.call("torch"), case.call("reference"), inputs, dtype)


@pytest.mark.parametrize(
    "case", [SILENT, Case(3, 5, 9, 64, 8, real=(9, 0, 2)), Case(2, 5, 4, 64, 2, real=(0, 0))], ids=str
)
def test_all_masked_text_row_stays_finite(case):
    results = run_with_gradients(case.call("torch"), case.inputs())
    assert all(torch.isfinite(value).all() for value in results.values())


def test_all_masked_text_row_attends_to_nothing_and_leaves_the_others_alone():
    inputs, output = SILENT.inputs(), SILENT.call("torch")(**SILENT.inputs())
    bias = inputs["out_proj_bias"]
    norm = torch.nn.functional.layer_norm(bias, bias.shape, inputs["post_norm_weight"], inputs["post_norm_bias"])
    torch.testing.assert_close(output[1], inputs["x"][1] + norm)
    published = SILENT.call("reference")(**inputs)
    torch.testing.assert_close(output[[0, 2]], published[[0, 2]])


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("batch", "rows"), [(0, 5), (2, 0)])
def test_empty_batch_or_map_gives_an_empty_answer(impl, batch, rows):
    case = Case(batch, rows, 4, 64, 2, real=(4,) * batch)
    results = run_with_gradients(case.call(impl), case.inputs())
    assert results["output 0"].shape == (batch, rows, 64)


def test_words_behind_the_longest_sentence_change_nothing():
    long, short = Case(2, 13, 9, 64, 2, real=(5, 2)), Case(2, 13, 5, 64, 2, real=(5, 2))
    inputs = long.inputs()
    cut = inputs | {"text": inputs["text"][:, :5], "text_positions": inputs["text_positions"][:5]}
    assert torch.equal(long.call("torch")(**inputs), short.call("torch")(**cut))
    gradients = run_with_gradients(long.call("torch"), inputs)
    assert not gradients["gradient of text"][:, 5:].any()


@pytest.mark.parametrize(("dropout", "attention_dropout"), [(0.0, 0.3), (0.4, 0.0), (0.4, 0.3)])
def test_dropout_equals_the_formula_under_its_own_masks(dropout, attention_dropout):
    case = Case(2, 13, 5, 64, 2, real=(5, 3))
    inputs = {name: tensor.double() for name, tensor in case.inputs().items()}
    ours = case.call("torch", dropout=dropout, attention_dropout=attention_dropout, training=True)
    torch.manual_seed(3)
    results = run_with_gradients(ours, inputs)
    torch.manual_seed(3)
    kept_weights = torch.ones(2, 13, 2, 5, dtype=torch.bool)
    kept_branch = torch.ones(2, 13, 64, dtype=torch.bool)
    if attention_dropout:
        dropped = torch.empty(2, 2, 5, 13, dtype=torch.bool).bernoulli_(attention_dropout)  # the order in memory
        kept_weights = ~dropped.permute(0, 3, 1, 2)
    if dropout:
        kept_branch = torch.empty_like(kept_branch).bernoulli_(1 - dropout)
    formula = masked_formula(case, kept_weights, kept_branch, attention_dropout, dropout)
    for name, want in run_with_gradients(formula, inputs).items():
        torch.testing.assert_close(results[name], want, rtol=0, atol=1e-11, msg=name)


def test_dropout_repeats_under_a_seed_and_acts_only_in_training():
    case = CASE
    inputs = case.inputs()
    dropping = case.call("torch", dropout=0.5, attention_dropout=0.5, training=True)
    torch.manual_seed(1)
    first, second = dropping(**inputs), dropping(**inputs)
    torch.manual_seed(1)
    assert torch.equal(first, dropping(**inputs))
    assert not torch.equal(first, second)
    evaluating = case.call("torch", dropout=0.5, attention_dropout=0.5)
    assert torch.equal(evaluating(**inputs), case.call("torch")(**inputs))


def test_dropping_everything_leaves_the_residual():
    case = CASE
    inputs = case.inputs()
    output = case.call("torch", dropout=1.0, attention_dropout=1.0, training=True)(**inputs)
    assert torch.equal(output, inputs["x"])


def test_projected_fallback_drops_the_branch_as_published():
    inputs = PROJECTED.inputs()
    ours = PROJECTED.call("torch", dropout=1.0, attention_dropout=0.5, training=True)
    assert torch.equal(ours(**inputs), inputs["x"])


def kept_bytes(function, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd holds for the backward pass, without the inputs themselves."""
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(**{name: tensor.requires_grad_() for name, tensor in inputs.items()})
    assert output.requires_grad
    return sum(size for address, size in storages.items() if address not in given)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_backward_keeps_less_than_half_of_the_published_bytes(dropout):
    case = Case(2, 169, 17, 256, 8)
    options = {"dropout": dropout, "attention_dropout": dropout, "training": True}
    published = kept_bytes(case.call("reference", **options), case.inputs())
    assert kept_bytes(case.call("torch", **options), case.inputs()) < 0.5 * published


def test_differentiating_twice_is_refused_and_not_silently_wrong():
    inputs = {name: tensor.requires_grad_() for name, tensor in CASE.inputs().items()}
    output = CASE.call("torch")(**inputs)
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_nan_in_one_pixel_stays_in_that_pixel(impl):
    case = LARGER
    inputs = case.inputs()
    inputs["x"][1, 3, 7] = float("nan")
    wrong = torch.isnan(case.call(impl)(**inputs)).any(-1)
    assert wrong[1, 3]
    assert wrong.sum() == 1


def wrong_inputs():
    case = LARGER
    good = case.inputs()
    mask = case.padding_mask
    yield "x", {"x": good["x"][0]}, ValueError, r"x must be \(B, N, D\)"
    yield "no words", {"text": good["text"][:, :0]}, ValueError, "text has no words"
    yield "width of text", {"text": good["text"][..., :64]}, ValueError, r"text must be \(3, L, 128\)"
    yield "positions", {"positions": good["positions"][:5]}, ValueError, r"positions must be \(36, 128\)"
    yield "text_positions", {"text_positions": good["text_positions"][:5]}, ValueError, "text_positions must be"
    yield (
        "weights",
        {"in_proj_weight": good["in_proj_weight"][:128]},
        ValueError,
        r"in_proj_weight must be \(384, 128\)",
    )
    yield "norm", {"post_norm_bias": good["post_norm_bias"][:5]}, ValueError, r"post_norm_bias must be \(128\)"
    yield "dtype", {"text": good["text"].double()}, TypeError, "text is torch.float64 but x is torch.float32"
    yield "integers", {"x": good["x"].long()}, TypeError, "x must be floating point"
    yield "heads", {"num_heads": 5}, ValueError, "num_heads must divide the width 128"
    yield "no heads", {"num_heads": 0}, ValueError, "num_heads must divide"
    yield "dropout", {"dropout": 1.5}, ValueError, "dropout must be a probability"
    yield "attention_dropout", {"attention_dropout": -0.1}, ValueError, "attention_dropout must be a probability"
    yield "mask shape", {"padding_mask": mask[:, :3]}, ValueError, r"padding_mask must be \(3, 9\)"
    yield "mask dtype", {"padding_mask": mask.float()}, TypeError, "padding_mask must be bool"
    yield "device", {"text": good["text"].to("meta")}, ValueError, "text is on meta but x is on cpu"
    yield "mask device", {"padding_mask": mask.to("meta")}, ValueError, "padding_mask is on meta"


@pytest.mark.parametrize(
    ("changed", "error", "message"), [pytest.param(*rest, id=name) for name, *rest in wrong_inputs()]
)
def test_wrong_input_is_one_error_that_names_the_argument(changed, error, message):
    case = LARGER
    arguments = case.inputs() | {"padding_mask": case.padding_mask, "num_heads": case.heads} | changed
    arguments["weights"] = AttentionWeights(**{name: arguments.pop(name) for name in AttentionWeights._fields})
    with pytest.raises(error, match=message):
        cross_attention(**arguments)
