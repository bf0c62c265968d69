"""How a Segmenter runs its model: dtype, device, compiled, or as CUDA graphs; and what points to it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from test_segmenter import RED, Corner, photo

import fastris
from fastris.inference.segmenter import Segmenter
from fastris.models.registry import create


@pytest.mark.parametrize("preset", ["tiny", "alignformer_tiny", "magnet_tiny"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_a_copy_with_nearly_the_same_probabilities(preset: str, dtype: str) -> None:
    torch.manual_seed(0)
    model = create(preset)
    expected = Segmenter(model)(photo(), RED).probabilities
    half = Segmenter(model, dtype=dtype)
    assert next(model.parameters()).dtype == torch.float32 and dtype in repr(half)
    np.testing.assert_allclose(half(photo(), RED).probabilities, expected, atol=0.05)


def test_compiled_halves_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled = Corner(), []

    def eager(function, **options):
        compiled.append(function.__name__)
        return torch._dynamo.optimize("eager")(function)

    expected = Segmenter(model)(photo(), [RED]).logits
    monkeypatch.setattr(torch, "compile", eager)
    segmenter = Segmenter(model, compile=True)
    assert compiled == ["encode_image", "segment"] and "compile" in repr(segmenter)
    np.testing.assert_allclose(segmenter(photo(), [RED]).logits, expected, atol=1e-5)


def test_a_picture_anew_for_each_phrase_compiles_for_a_few_numbers_of_phrases(monkeypatch: pytest.MonkeyPatch) -> None:
    how, counts = [], []

    def recorded(function, **options):
        how.append(options)
        return function

    class Anew(Corner):
        shares_image = False

        def segment(self, features, tokens, index=None):
            counts.append(len(tokens))
            return super().segment(features, tokens, index)

    monkeypatch.setattr(torch, "compile", recorded)
    model = Anew()
    phrases = [f"the {colour} one" for colour in ("red", "blue", "green", "white", "black")]
    plain, compiled = Segmenter(model)(photo(), phrases).logits, Segmenter(model, compile=True)(photo(), phrases).logits
    assert counts == [5, 8] and how == [{"dynamic": False}] * 2
    np.testing.assert_array_equal(plain, compiled)


@pytest.mark.slow
def test_several_phrases_about_one_picture_compile_into_one_graph(model: fastris.CRIS) -> None:
    tokens, index = torch.tensor([[49406, 518, 49407, 0]] * 3), torch.zeros(3, dtype=torch.int64)
    with torch.inference_mode():
        features = model.eval().encode_image(torch.zeros(1, 3, 96, 96))
        segment = torch.compile(model.segment, fullgraph=True, backend="eager")
        torch.testing.assert_close(segment(features, tokens, index), model.segment(features, tokens, index))


def test_options_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(ValueError, match="cuda_graph needs a CUDA device, and the model is on cpu; leave it out"):
        Segmenter(Corner(), cuda_graph=True)
    with pytest.raises(ValueError, match="cannot both be on"):
        Segmenter(Corner(), compile=True, cuda_graph=True)
    with pytest.raises(ValueError, match="dtype='int8' is unknown; choose from float32, float16"):
        Segmenter(Corner(), dtype="int8")
    with pytest.raises(TypeError, match=r"Segmenter.from_pretrained\('demo/model'\) loads one"):
        Segmenter("demo/model")
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="device=mps: PyTorch finds no Apple GPU here"):
            Segmenter(Corner(), device="mps")


def test_repr_names_model_device_dtype_and_threshold(model: fastris.CRIS) -> None:
    words = model.in_words()
    assert repr(Segmenter(model, threshold=0.4)) == f"Segmenter({words}, cpu, float32, threshold 0.4)"
    assert repr(Segmenter(Corner())).startswith("Segmenter(Corner, cpu")


def test_text_in_place_of_tokens_is_told_of_the_segmenter(model: fastris.CRIS) -> None:
    images = torch.zeros(1, 3, 96, 96)
    features = model.eval().encode_image(images)
    for call in (partial(model, images), partial(model.segment, features)):
        for text in ("a cat", ["a cat"]):
            with pytest.raises(
                TypeError, match=r"word must be token ids, not text; fastris.Segmenter\(model\).predict"
            ):
                call(text)
    with pytest.raises(TypeError, match=r"img must be a tensor of pixels, not a file's name; fastris.Segmenter"):
        model("cat.jpg", torch.zeros(1, 5, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_give_the_same_logits_for_any_number_of_phrases(model: fastris.CRIS) -> None:
    plain, graphed = (Segmenter(model, device="cuda", cuda_graph=graph) for graph in (False, True))
    for phrases in ([RED], [RED, "thing", "the blue square"], ["thing"] * 33, [RED]):
        np.testing.assert_allclose(graphed(photo(), phrases).logits, plain(photo(), phrases).logits, atol=1e-3)
