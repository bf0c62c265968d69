"""Attention to words of another width where the contract cannot see: padding, what is kept, what is refused."""

from __future__ import annotations

import pytest
import torch
from operator_cases import word_problem
from torch import nn

from fastris.bench.counter import saved_storages
from fastris.ops import word_attention
from fastris.reference import SeparateAttentionWeights
from fastris.testing import run_with_gradients

ABSORBED, PROJECTED = word_problem(2, 5, 32, 4, (12, 7), real=(6, 2)), word_problem(2, 5, 16, 4, (12, 7), real=(6, 2))
BOTH = pytest.mark.parametrize("problem", [ABSORBED, PROJECTED], ids=["absorbed", "projected"])


def weights_of(attention: nn.MultiheadAttention) -> SeparateAttentionWeights:
    a = attention
    matrices = a.q_proj_weight, a.k_proj_weight, a.v_proj_weight
    return SeparateAttentionWeights(*matrices, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias)


def test_it_is_pytorchs_attention():
    attention = nn.MultiheadAttention(32, 4, kdim=12, vdim=7, batch_first=True).double()
    nn.init.normal_(attention.in_proj_bias)
    inputs = {name: value.double() for name, value in ABSORBED.make().items() if name in ("query", "key", "value")}
    mask = ABSORBED.make()["padding_mask"]
    expected = attention(*inputs.values(), key_padding_mask=mask)[0]
    found = word_attention(*inputs.values(), weights_of(attention), 4, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@BOTH
def test_nothing_but_padding_gives_the_outputs_bias_and_its_words_no_gradient(problem):
    inputs = problem.make()
    before = run_with_gradients(problem.call("torch"), inputs)
    inputs["padding_mask"][1] = True
    found = run_with_gradients(problem.call("torch"), inputs)
    assert torch.equal(found["output 0"][1], inputs["out_bias"].expand_as(found["output 0"][1]))
    torch.testing.assert_close(found["output 0"][0], before["output 0"][0])
    assert all(each.isfinite().all() for each in found.values())
    for name in ("query", "key", "value"):
        assert not found[f"gradient of {name}"][1].any() and found[f"gradient of {name}"][0].any(), name


@BOTH
def test_words_that_are_padding_change_nothing_and_get_no_gradient(problem):
    inputs = problem.make() | {"padding_mask": torch.arange(6) >= torch.tensor([[4], [2]])}
    padding = inputs["padding_mask"][..., None]
    found = run_with_gradients(problem.call("torch"), inputs)
    spoilt = {name: inputs[name].masked_fill(padding, 1e6) for name in ("key", "value")}
    assert torch.equal(problem.call("torch")(**inputs | spoilt), found["output 0"])
    for name in ("key", "value"):
        assert not found[f"gradient of {name}"].masked_select(padding).any()


def test_less_is_kept_than_by_the_published_form():
    weights = weights_of(nn.MultiheadAttention(256, 8, kdim=24, vdim=24))
    query, words = torch.zeros(1, 600, 256, requires_grad=True), torch.zeros(1, 20, 24)
    kept = {}
    for impl in ("reference", "torch"):
        with saved_storages(weights) as saved:
            word_attention(query, words, words, weights, 8, impl=impl)
        kept[impl] = sum(saved.values())
    assert kept["torch"] < 0.8 * kept["reference"]


def bad_arguments():
    words, mask = torch.zeros(2, 6, 12), torch.zeros(2, 6, dtype=torch.bool)
    good = {"query": torch.zeros(2, 5, 32), "key": words, "value": words, "num_heads": 4, "padding_mask": mask}
    yield ValueError, r"query must be \(B, N, D\)", good | {"query": words[0]}
    yield ValueError, r"key has no words", good | {"key": words[:, :0]}
    yield ValueError, r"value must be \(2, 6, V\), got \(2, 5, 12\)", good | {"value": words[:, :5]}
    yield ValueError, r"key_weight must be \(32, 11\), got \(32, 12\)", good | {"key": words[..., :11]}
    yield ValueError, r"num_heads must divide the width 32 of query, got 5", good | {"num_heads": 5}
    yield ValueError, r"padding_mask must be \(2, 6\)", good | {"padding_mask": mask[:, :5]}
    yield TypeError, r"padding_mask must be bool, True where a word is padding", good | {"padding_mask": mask.long()}
    yield TypeError, r"value is torch\.float64 but query is torch\.float32", good | {"value": words.double()}
    yield TypeError, r"key must be a tensor, got list", good | {"key": [1.0]}


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("kind", "message", "arguments"), list(bad_arguments()))
def test_what_does_not_fit_is_named(kind, message, arguments, impl):
    weights = weights_of(nn.MultiheadAttention(32, 4, kdim=12, vdim=12))
    with pytest.raises(kind, match=f"word_attention: {message}"):
        word_attention(**arguments, weights=weights, impl=impl)
