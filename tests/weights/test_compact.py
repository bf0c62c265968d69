"""The model that comes with fastris: small, loaded like any other, and honest about the words that it knows."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastris import CRIS, CRISConfig, Segmenter
from fastris.commands.cli import main
from fastris.commands.demo import DemoConfig, run
from fastris.data.scenes.dataset import SyntheticExpressions
from fastris.data.scenes.speaker import words_in_use
from fastris.data.tokens import find_tokenizer, token_ids, tokenize
from fastris.evaluation.evaluate import evaluate
from fastris.models.cris.kept_tokens import END, with_kept_tokens
from fastris.weights import shipped

KNOWS = "knows drawn shapes only; give model="


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    short = {"steps": 3, "images": 2, "scenes": 4, "held_out": 2, "threads": 1, "progress": False}
    assert run(DemoConfig(out=str(folder), compact=True, **short)) == 0
    return folder


@pytest.fixture
def ships(demo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shipped, "SHIPPED", demo / "model")
    return demo / "model"


def test_no_phrase_of_any_split_has_a_word_outside_of_words_in_use() -> None:
    words = set(words_in_use())
    for split in ("train", "val", "test"):
        data = SyntheticExpressions(split, seed=3, scenes=40)
        said = {word for i in range(len(data)) for sentence in data.reference(i).sentences for word in sentence.split()}
        assert said <= words and len(said) > 45


def test_a_model_of_few_tokens_computes_the_same_bits() -> None:
    torch.manual_seed(0)
    whole = CRIS(CRISConfig.preset("tiny")).eval()
    small = with_kept_tokens(whole, token_ids(words_in_use()))
    phrases = ["the small red circle left of the blue square", "topmost thing"]
    rows = small.backbone.token_embedding.weight.shape[0]
    assert rows == small.config.clip.vocab_size < 80
    assert CRISConfig.from_dict(small.config.to_dict()) == small.config
    tokens, truncated = find_tokenizer(small.config.inputs.tokenizer)(phrases, 17)
    assert int(tokens.max()) == rows - 1 and not any(truncated)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(small(images, tokens), whole(images, tokenize(phrases, 17).tokens))
    with pytest.raises(ValueError, match="give one that has all of CLIP's"):
        with_kept_tokens(small, [320])


def test_the_demos_compact_folder_loads_as_float32_and_scores_what_its_card_says(demo: Path) -> None:
    files = {path.name: path.stat().st_size for path in (demo / "model").iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "README.md"} and sum(files.values()) < 6_000_000
    model = CRIS.from_pretrained(demo / "model")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    assert all(torch.equal(matrix, matrix.half().float()) for matrix in matrices)
    norms = [buffer for name, buffer in model.named_buffers() if name.endswith("running_var")]
    assert not all(torch.equal(norm, norm.half().float()) for norm in norms)
    card = (demo / "model" / "README.md").read_text()
    assert "fastris demo model=tiny steps=3 scenes=4" in card and "compact=true" in card and "drawn shapes only" in card
    held_out = SyntheticExpressions("val", scenes=2, size=96)
    scores = evaluate(model, held_out, progress=False, batch_size=16, workers=0).scores
    assert f"| {100 * scores.mIoU:.2f} % | {100 * scores.oIoU:.2f} % |" in card


def test_words_that_the_model_does_not_know_are_named_and_passed_over(demo: Path) -> None:
    segmenter = Segmenter.from_pretrained(demo / "model", device="cpu")
    picture = np.full((40, 40, 3), 200, np.uint8)
    with pytest.warns(UserWarning, match="does not know 'a', 'mug', and passes over it; it knows few words: above, at"):
        odd = segmenter.predict(picture, ["a red mug circle"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = segmenter.predict(picture, ["red circle"])
    np.testing.assert_array_equal(odd.logits, plain.logits)
    with pytest.raises(ValueError, match="'zebras' has no word that this model knows; it knows few words"):
        segmenter.predict(picture, ["red circle", "zebras"])


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((0, 7, END), "ids of CLIP's vocabulary"),
        ((0, 49406, END, 5), "in order"),
        ((0, 5, 49406, END), "holds 4 ids, and clip.vocab_size is 49408"),
        ("0,1", "whole numbers"),
    ],
)
def test_kept_tokens_that_fit_no_embedding_are_refused(kept: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRISConfig(**{**CRISConfig.presets["tiny"], "kept_tokens": kept})


def test_predict_without_a_model_uses_the_shipped_one_and_says_what_it_knows(
    ships: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["predict", str(demo / "scene_0.png"), "the red circle", f"out={tmp_path}", "device=cpu"])
    printed, errors = capsys.readouterr()
    assert code == 0 and errors.count("\n") == 1 and KNOWS in errors
    assert "the red circle" in printed
    assert f'"model": "{shipped.NAME}"' in (tmp_path / "predictions.json").read_text()
    with pytest.warns(UserWarning, match=KNOWS):
        found = Segmenter(device="cpu").predict(demo / "scene_0.png", "the red circle")
    expected = Segmenter.from_pretrained(ships, device="cpu").predict(demo / "scene_0.png", "the red circle")
    np.testing.assert_array_equal(found.logits, expected.logits)


def test_an_installation_without_the_shipped_model_says_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "nothing")
    Image.new("RGB", (9, 9)).save(tmp_path / "page.png")
    assert main(["predict", str(tmp_path / "page.png"), "the red circle"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "give model=PATH: a model folder (`fastris demo` trains" in errors
