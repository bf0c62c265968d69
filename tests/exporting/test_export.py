"""What `fastris export` writes computes what the model computes, for other numbers of pictures and phrases."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import small_config

from fastris import CRIS, Segmenter
from fastris.commands.cli import main
from fastris.exporting import folder, programs
from fastris.exporting.parts import draw
from fastris.models.registry import create
from fastris.weights.load import load_model
from fastris.weights.shipped import shipped_model

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.fixture
def untraced(monkeypatch):
    """Export in a moment: parts are not traced, and run as they are; ``untraced.wrong`` is added to what they give."""

    def write_part(model, part, where, form, tell):
        (where / f"{part.name}.{form}").write_text("a program")

        def run(inputs):
            rest = list(inputs)
            given = [
                tuple(rest.pop(0) for _ in part.features) if each == "features" else rest.pop(0) for each in part.inputs
            ]
            found = part.module(*given)
            return [each + write_part.wrong for each in (found if isinstance(found, tuple) else (found,))]

        return run

    write_part.wrong = 0.0
    monkeypatch.setattr(folder, "_write_part", write_part)
    return write_part


def small():
    return CRIS(small_config()).eval()


def test_the_folder_says_how_pictures_and_phrases_become_inputs(untraced, tmp_path):
    said = json.loads((folder.export_model(small(), tmp_path / "out", name="me/mine") / "export.json").read_text())
    assert (said["size"], said["word_len"], said["fit"], said["tokenizer"]) == (64, 17, "letterbox", "clip")
    assert said["model"] == "me/mine" and said["threshold"] == 0.35 and said["settings"]["vis_dim"] == 32
    head = said["parts"]["head"]
    assert head["file"] == "head.onnx" and list(head["inputs"]) == ["f3", "f4", "f5", "tokens", "index"]
    assert head["inputs"]["tokens"] == {"shape": ["phrases", 17], "dtype": "int64"}
    assert head["outputs"] == {"logits": {"shape": ["phrases", 1, 16, 16], "dtype": "float32"}}
    assert said["parts"]["encoder"]["inputs"]["images"]["shape"] == ["pictures", 3, 64, 64]


def test_an_export_with_other_numbers_leaves_nothing(untraced, tmp_path):
    untraced.wrong = 1e-3
    with pytest.raises(folder.CheckFailed, match="encoder is wrong for 1 pictures and 4 phrases: its f3 differs"):
        folder.export_model(small(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_export_is_overwritten_and_only_when_told(untraced, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("miaow")
    with pytest.raises(FileExistsError, match=r"photos exists and is no export"):
        folder.export_model(small(), tmp_path / "photos", overwrite=True)
    folder.export_model(small(), tmp_path / "out", "torch")
    with pytest.raises(FileExistsError, match="pass overwrite=true"):
        folder.export_model(small(), tmp_path / "out")
    folder.export_model(small(), tmp_path / "out", overwrite=True)
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["encoder.onnx", "export.json", "head.onnx"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "photos"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["export", "format=tflite"], "format must be onnx|torch, got 'tflite'"),
        (["export", "out=taken"], "out=taken is a file"),
        (["export", "model=nothing-here", "out=new", "format=torch"], "there is no file or folder nothing-here"),
        (["convert", "m", "m.onnx"], "ends in .onnx, which convert does not write; `fastris export format=onnx` does"),
        (["convert", "m", "m.pt2"], "`fastris export format=torch` does; here give a name that ends in .safetensors"),
        (
            ["convert", "m", "m.h5"],
            "`fastris export` writes .onnx and .pt2; here give",
        ),
    ],
)
def test_a_wrong_turn_is_one_line_and_writes_nothing(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("taken").write_text("")
    assert main(args) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]


def test_a_missing_library_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", f"out={tmp_path / 'out'}"]) == 2
    assert "onnxscript is needed for format=onnx, and is not installed: pip install 'fastris[onnx]'" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_the_page_of_exporting_runs_and_finds_what_the_model_finds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs, "INLINE_BYTES", 2**20)  # as large weights are written
    text = PAGE.read_text()
    (command,) = re.findall(r"```bash\nfastris (.*?)\n```", text)
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert main(command.split()) == 0 and "largest difference" in capsys.readouterr().out
    assert Path("product/head.onnx.data").is_file()
    page: dict = {}
    exec(compile(code, str(PAGE), "exec"), page)
    model = load_model(shipped_model())
    expected = Segmenter(model)(page["picture"], ["the red square", "the blue square"]).masks
    shared = (expected & page["masks"]).sum((1, 2)) / (expected | page["masks"]).sum((1, 2))
    assert expected.any((1, 2)).all() and shared.min() > 0.97
    asked = draw(model, 2, 5)
    features = page["encoder"].run(None, {"images": asked.images.numpy()})
    given = {"tokens": asked.tokens.numpy(), "index": asked.index.numpy()}
    (found,) = page["head"].run(None, dict(zip(page["names"], features, strict=True)) | given)
    with torch.no_grad():
        right = model.segment(model.encode_image(asked.images), asked.tokens, asked.index)
    np.testing.assert_allclose(found, right.numpy(), atol=1e-4 * float(right.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        pytest.param(small_config(vlba="trunk"), id="cris", marks=pytest.mark.long),
        *(pytest.param(preset, id=preset, marks=pytest.mark.long) for preset in ("alignformer_tiny", "magnet_tiny")),
    ],
)
def test_a_whole_model_takes_any_number_of_pictures_and_phrases(what, tmp_path):
    model = create(what).eval()
    out = folder.export_model(model, tmp_path / "out", "torch")
    program = torch.export.load(out / "model.pt2").module()
    asked = draw(model, 2, 5)
    with torch.no_grad():
        right = model.segment(model.encode_image(asked.images), asked.tokens, asked.index)
        torch.testing.assert_close(program(*asked), right, atol=1e-4, rtol=1e-4)
