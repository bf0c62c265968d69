"""What a visitor of the page gets: without Gradio, by the tiny model that comes with fastris."""

from __future__ import annotations

import ast
import json
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from fastris.app import drawing, examples
from fastris.app.downloads import write_files
from fastris.app.limits import LONGEST, MOST_PHRASES, Limits, phrases_of, read_upload
from fastris.app.visit import App, Model, Visit
from fastris.inference.segmenter import Segmenter
from fastris.pictures.overlay import colour_of
from fastris.weights.load import load_model
from fastris.weights.shipped import SHIPPED

APP = Path(examples.__file__).parent


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    path, text = examples.write_examples(tmp_path_factory.mktemp("scenes"))[0]
    return path, text.splitlines()


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(load_model(SHIPPED))


@pytest.fixture
def calls(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often either half of the model has run."""
    counted: Counter[str] = Counter()

    def counting(name: str, half: Any) -> Any:
        def call(*args: Any) -> Any:
            counted[name] += 1
            return half(*args)

        return call

    for name in ("_encode", "_segment"):
        monkeypatch.setattr(segmenter._run, name, counting(name, getattr(segmenter._run, name)))
    return counted


@pytest.fixture
def app(segmenter: Segmenter) -> App:
    return App([Model("shapes", segmenter)], Limits())


def ask(app: App, scene: tuple[str, list[str]], phrases: list[str], visit: Visit | None = None) -> Visit:
    return app.answer(visit, scene[0], "scene.png", "\n".join(phrases))


def test_no_file_but_the_page_knows_gradio() -> None:
    for path in APP.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
        imported += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert any(name.split(".")[0] == "gradio" for name in imported) == (path.name == "page.py"), path


def test_phrases_are_one_a_line_and_a_comma_belongs_to_its_phrase() -> None:
    assert phrases_of(" the cat \n\n the  dog\r\n") == (("the cat", "the dog"), ())
    phrases, notes = phrases_of("man in red, second from left\nthe cat\nthe cat")
    assert phrases == ("man in red, second from left", "the cat")
    assert [note.split(":")[0] for note in notes] == [
        "a phrase that is there twice is asked once",
        "a comma belongs to its phrase",
    ]
    with pytest.raises(ValueError, match="there are 33 phrases, and this page takes up to 32"):
        phrases_of("\n".join(f"phrase {i}" for i in range(MOST_PHRASES + 1)))
    with pytest.raises(ValueError, match="the phrases have 4001 characters together"):
        phrases_of("a" * (LONGEST + 1))


def test_a_picture_too_large_or_none_is_one_line_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo, text = tmp_path / "upload", tmp_path / "text"
    Image.new("1", (3000, 2000)).save(photo, "PNG")
    text.write_text("no picture")
    with pytest.raises(ValueError, match=r"^photo\.png has 0\.0 MB, and this page takes up to 0\.0001: shrink it"):
        read_upload(photo, "photo.png", Limits(megabytes=1e-4))
    monkeypatch.setattr("fastris.app.limits.read_encoded", lambda *args: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"^photo\.png is 3000 x 2000 pixels, and this page takes up to 5 million"):
        read_upload(photo, "photo.png", Limits(megapixels=5))
    with pytest.raises(ValueError, match=r"^image text\.jpg is in none of the formats"):
        read_upload(text, "text.jpg", Limits())


@pytest.mark.parametrize("limit", [{"megabytes": 0}, {"megapixels": float("nan")}, {"megabytes": float("inf")}])
def test_a_limit_that_nothing_meets_is_refused(limit: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be a finite number above 0"):
        Limits(**limit)


def test_a_picture_is_encoded_once_and_a_phrase_asked_once(
    app: App, scene: tuple[str, list[str]], calls: Counter[str]
) -> None:
    one, two, three = scene[1]
    visit = ask(app, scene, [one, two])
    assert calls == {"_encode": 1, "_segment": 2}
    visit = ask(app, scene, [three, one], visit)
    assert calls == {"_encode": 1, "_segment": 3} and visit.phrases == (three, one)
    for threshold, opacity in ((0.2, 0.5), (0.7, 0.9)):
        drawing.drawn(visit.seen[0], visit.phrases, threshold, opacity)
    assert calls == {"_encode": 1, "_segment": 3}, "sliders ask no model"
    app.answer(visit, str(Path(scene[0]).with_name("scene_2.png")), "other.png", one)
    assert calls == {"_encode": 2, "_segment": 4}, "another picture is another question"


def test_masks_are_those_of_predict_at_any_threshold(app: App, scene: tuple[str, list[str]]) -> None:
    visit = ask(app, scene, scene[1])
    expected = Segmenter(app.models[0].segmenter.model, threshold=0.6).predict(scene[0], scene[1])
    found = visit.seen[0].prediction(visit.phrases, 0.6)
    np.testing.assert_array_equal(found.masks, expected.masks)
    np.testing.assert_allclose(found.presence, expected.presence, atol=1e-6)
    assert found.masks.any((1, 2)).all()


def test_a_phrase_that_the_model_refuses_leaves_the_others_and_their_colours(
    app: App, scene: tuple[str, list[str]]
) -> None:
    visit = ask(app, scene, ["bicycle", scene[1][0]])
    picture, rows = drawing.drawn(visit.seen[0], visit.phrases, 0.35, 1.0)
    assert [(row.number, row.phrase) for row in rows] == [(1, scene[1][0])]
    assert (picture == colour_of(1)).all(-1).any() and not (picture == colour_of(0)).all(-1).any()
    assert any("bicycle" in note for note in visit.notes) and "bicycle" in drawing.message(visit.notes)


def test_the_picture_shows_the_mask_and_the_sliders_change_it(app: App, scene: tuple[str, list[str]]) -> None:
    visit = ask(app, scene, scene[1][:1])
    seen, phrases = visit.seen[0], visit.phrases
    plain, none = drawing.drawn(seen, (), 0.35, 0.5)
    half, rows = drawing.drawn(seen, phrases, 0.35, 0.5)
    np.testing.assert_array_equal(plain, seen.look.image)
    mask = seen.prediction(phrases, 0.35).masks[0]
    assert none == [] and rows[0].share == pytest.approx(mask.mean()) and rows[0].found
    assert (half != plain).any(-1)[mask].all()
    outlined, _ = drawing.drawn(seen, phrases, 0.35, 0.0)
    assert 0 < (outlined != plain).any(-1).mean() < (half != plain).any(-1).mean()
    assert drawing.drawn(seen, phrases, 0.6, 0.5)[1][0].share < rows[0].share
    with pytest.raises(ValueError, match=r"opacity must lie in 0\.\.1"):
        drawing.drawn(seen, phrases, 0.35, 2.0)


def test_what_a_visitor_types_is_text_and_no_page() -> None:
    row = drawing.Row(0, "<script>alert(1)</script>", False, 0.1, 0.2, 0.003, 0.004)
    told = drawing.table([row]) + drawing.message(["<b>\x1b[31m"], mistake=True)
    assert "<script" not in told and "<b>" not in told and "\x1b" not in told
    assert "&lt;script&gt;" in told and "not found" in told and "4 ms" in told and "0.3%" in told


def test_both_times_are_told_and_a_model_that_cannot_look_once_says_so() -> None:
    rows = [drawing.Row(0, "a", True, 1, 1, 0.1, seconds) for seconds in (0.004, 0.006)]
    seen: Any = SimpleNamespace(model=SimpleNamespace(shares=True, title="CRIS"), seconds=0.04)
    assert drawing.times(seen, rows) == "picture encoded once: <b>40 ms</b>; each phrase then took <b>5 ms</b>"
    assert drawing.times(seen, []) == "picture encoded once: <b>40 ms</b>"
    seen.model = SimpleNamespace(shares=False, title="MagNet")
    told = drawing.times(seen, rows)
    assert told == "MagNet reads the picture again for every phrase, 5 ms each; nothing can be kept"


def test_downloads_hold_the_masks_of_each_model(segmenter: Segmenter, scene: tuple[str, list[str]]) -> None:
    both = App([Model("first", segmenter), Model("second", segmenter)], Limits())
    visit = both.answer(None, scene[0], "scene.png", "\n".join(scene[1][:2]))
    mask = visit.seen[1].prediction(visit.phrases, 0.5).masks[0]
    write_files(visit, 1, 0.2)  # which the next call replaces
    packed, table = write_files(visit, 1, 0.5)
    assert (packed.name, table.name) == ("masks_model_b.zip", "predictions_model_b.coco.json")
    with zipfile.ZipFile(packed) as archive:
        names = archive.namelist()
        assert Counter(name.rsplit("_", 1)[-1] for name in names if name.endswith(".png")) == {
            "mask.png": 2, "overlay.png": 2, "probability.png": 2
        }  # fmt: skip
        with archive.open(next(name for name in names if "_1_" in name and name.endswith("mask.png"))) as file:
            np.testing.assert_array_equal(np.asarray(Image.open(file)) > 0, mask)
        assert table.name in names
    content = json.loads(table.read_text())
    assert [each["name"] for each in content["categories"]] == scene[1][:2]
    np.testing.assert_array_equal(coco.decode(content["annotations"][0]["segmentation"]).astype(bool), mask)
    assert content["info"]["model"] == "second" and content["info"]["threshold"] == 0.5
    with pytest.raises(ValueError, match="there are no masks yet"):
        write_files(both.answer(visit, scene[0], "scene.png", " "), 0, 0.5)
    folder = Path(visit.folder.name)
    del visit
    assert not folder.exists(), "files go with the visit"
