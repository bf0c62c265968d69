"""``fastris predict`` on folders, patterns, lists, addresses and stdin, and the forms in which it writes masks."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from test_predict_command import run
from test_segmenter import BLUE, RED, photo

from fastris.inference import fetch
from fastris.inference.segmenter import Segmenter
from fastris.inference.sources import questions, split_pictures
from fastris.inference.write import _file_name

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "a.png", "deep/c.png"):
        Image.fromarray(photo()).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def lines_of(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    first, *lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return first["run"], lines


def asked(images: list[str], *phrases: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(Path(each.image).name, each.phrases) for each in questions(images, phrases)]


def test_a_folder_gives_files_of_their_own_to_each_picture_and_says_how_fast(
    folder: str, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    (photos / "broken.jpg").write_bytes(b"no jpeg")
    long = "the red circle " * 8
    code, printed, errors = run([str(photos), long, f"model={folder}", f"out={out}", "device=cpu"], capsys)
    assert code == 2 and "3 pictures, 3 phrases in " in printed and "pictures/s, written to" in printed
    told = errors.splitlines()
    assert "1 files are no pictures by their names" in told[0] and "was cut" in told[1]  # once for all pictures
    assert "broken.jpg is in none of the formats" in told[2]
    assert told[3].startswith("fastris predict: 1 of 4 pictures gave an error") and len(told) == 4
    settings, lines = lines_of(out)
    assert settings["model"] == folder and settings["format"] == "png" and settings["threshold"] == 0.35
    assert [Path(line["image"]).name for line in lines] == ["a.jpg", "a.png", "b.png", "broken.jpg"]
    assert "error" in lines[3]
    masks = [line["mask"] for line in lines[:3]]
    assert len(set(masks)) == 3 and masks[1].startswith("a-2_1_the-red-circle")
    expected = Segmenter.from_pretrained(folder, device="cpu")(photo(), long)
    np.testing.assert_array_equal(np.asarray(Image.open(out / masks[2])), expected.masks[0] * 255)
    assert lines[2]["box"] == list(expected[0].box) and lines[2]["area"] == expected[0].area
    assert lines[2]["found"] == expected.found[0]
    assert lines[2]["presence"] == pytest.approx(expected.presence[0], abs=1e-4)
    assert [record["phrase"] for record in json.loads((out / "predictions.json").read_text())] == [long] * 3


def test_patterns_several_files_and_lists_name_the_same_pictures(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked([f"{photos}/*.png"], RED) == [("a.png", (RED,)), ("b.png", (RED,))]
    assert [name for name, _ in asked([f"{photos}/**/*.png"], RED)] == ["a.png", "b.png", "c.png"]
    (tmp_path / "images").mkdir()
    Image.fromarray(photo()).save(tmp_path / "images" / "d.png")
    objects = [{"image": "photos/a.png", "phrases": [RED, BLUE]}, {"image": "d.png", "mask": "x", "sentences": [RED]}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, objects)) + "\n\n")
    found = questions([str(tmp_path / "list.jsonl")], ())
    assert [each.phrases for each in found] == [(RED, BLUE), (RED,)]
    assert all(Path(each.image).is_file() for each in found)
    (tmp_path / "list.csv").write_text(
        f'image,phrase\nphotos/a.png,"red, or so"\nphotos/b.png,{RED}\nphotos/a.png,{BLUE}'
    )
    assert asked([str(tmp_path / "list.csv")]) == [("a.png", ("red, or so", BLUE)), ("b.png", (RED,))]
    (tmp_path / "names.tsv").write_text("image\tother\nphotos/a.png\tx\n")
    assert asked([str(tmp_path / "names.tsv")], RED) == [("a.png", (RED,))]

    def stdin(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))

    stdin(f"{photos}/a.png\n{photos}/b.png\n".encode())
    assert asked(["-"], RED) == [("a.png", (RED,)), ("b.png", (RED,))]
    stdin(json.dumps({"image": f"{photos}/a.png", "phrase": BLUE}).encode())
    assert asked(["-"]) == [("a.png", (BLUE,))]
    stdin((photos / "a.png").read_bytes())
    (one,) = questions(["-"], (RED,))
    np.testing.assert_array_equal(one.read(), photo())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "{", "line 1 is no valid JSON; write"),
        ("x.jsonl", "a.png", "line 1 is no JSON object"),
        ("x.jsonl", '\n{"phrases": ["a"]}', "line 2 names no image"),
        ("x.jsonl", '{"image": "a.png", "phrases": "a"}', "phrases must be a list"),
        ("x.jsonl", '{"image": "a.png", "phrases": [" "]}', r"line 1: phrases\[0\] is ' ', which names nothing"),
        ("x.jsonl", '{"image": "a.png"}', "PHRASES is missing"),
        ("x.jsonl", "", "holds no picture"),
        ("x.csv", "file,phrase\na.png,b", "must name the columns image and phrase; it has file, phrase"),
        ("x.csv", "image,phrase\na.png,b,c", "line 2 has too many cells"),
        ("x.csv", "image,phrase\na.png,", r"line 2: phrases\[0\] is ''"),
    ],
)
def test_a_broken_list_names_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        questions([str(tmp_path / name)], ())


def test_what_names_no_picture_is_one_line(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": "a.png", "phrases": [RED]}))
    for image, error, message in (
        (f"{photos}/*.bmp", FileNotFoundError, "nothing matches; quote the pattern"),
        (f"{photos}/*.txt", FileNotFoundError, "the 1 matches are no pictures"),
        (str(tmp_path), FileNotFoundError, r"the folder has no picture \(1 other files\)"),
        (str(tmp_path / "list.jsonl"), ValueError, "has phrases of its own, and phrases are given"),
        ("http://127.0.0.1:9/a.png", ValueError, "nothing is fetched unasked; give urls=true"),
    ):
        with pytest.raises(error, match=message):
            questions([image], (RED,))


def test_pictures_behind_the_first_are_pictures_and_a_phrase_that_is_a_file_is_told(
    folder: str, photos: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "red").write_text("a file")
    monkeypatch.chdir(tmp_path)
    arguments = ["photos/a.png", "photos/b.png", RED, "red", f"model={folder}", "out=o"]
    (tmp_path / "circles").mkdir()
    with pytest.warns(UserWarning, match="phrase 'circles' is also the name of a folder"):
        assert split_pictures(["photos/deep/", "circles", "photos/a.png"])[0] == ["photos/deep/"]
    code, printed, errors = run([*arguments, "format=boxes", "device=cpu"], capsys)
    assert code == 0 and "2 pictures, 4 phrases" in printed
    assert errors.count("\n") == 1 and "is also the name of a file; pictures come before phrases" in errors
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["predictions.jsonl"]


def test_every_format_holds_the_same_mask(folder: str, photos: Path, tmp_path: Path, capsys: Capture) -> None:
    expected = Segmenter.from_pretrained(folder, device="cpu", threshold=0.5)(photo(), [RED, BLUE])
    for form in ("rle", "polygon", "coco"):
        out = tmp_path / form
        options = [f"model={folder}", f"out={out}", f"format={form}", "threshold=0.5", "device=cpu"]
        assert run([str(photos / "a.png"), RED, BLUE, *options], capsys)[0] == 0
        settings, lines = lines_of(out)
        assert settings["format"] == form and len(lines) == 2
        for line, mask in zip(lines, expected.masks, strict=True):
            if form == "polygon":
                outlines = [np.array(outline) for outline in line["polygons"]]
                held = cv2.fillPoly(np.zeros(mask.shape, np.uint8), outlines, 1)
            else:
                held = coco_mask.decode(line["rle"])
            np.testing.assert_array_equal(held, mask)
    content = json.loads((tmp_path / "coco" / "predictions.coco.json").read_text())
    assert [each["name"] for each in content["categories"]] == [RED, BLUE]
    assert content["images"] == [{"id": 1, "file_name": str(photos / "a.png"), "width": 40, "height": 30}]
    assert [each["category_id"] for each in content["annotations"]] == [
        1 + i for i in range(2) if expected.masks[i].any()
    ]
    for annotation in content["annotations"]:
        assert annotation["area"] == coco_mask.area(annotation["segmentation"])


def test_lines_are_added_to_earlier_ones_and_never_to_a_foreign_file(
    folder: str, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    command = [str(photos / "a.png"), RED, f"model={folder}", f"out={tmp_path}", "format=boxes", "device=cpu"]
    path = tmp_path / "predictions.jsonl"
    assert run(command, capsys)[0] == 0
    path.write_text(path.read_text() + '{"half')  # as a full disk leaves it
    assert run(command, capsys)[0] == 0
    first, second = (line for line in path.read_text().splitlines() if line.startswith('{"run"'))
    assert first == second and path.read_text().splitlines()[2] == '{"half'
    path.write_text('{"mine": 1}\n')
    code, _, errors = run(command, capsys)
    assert code == 2 and "predictions.jsonl was not written by `fastris predict`" in errors
    assert path.read_text() == '{"mine": 1}\n'


@pytest.fixture
def server(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/elsewhere.png":
                self.send_response(302)
                self.send_header("Location", "ftp://127.0.0.1/a.png")
                self.end_headers()
            else:
                super().do_GET()

        log_message = BaseHTTPRequestHandler.log_message

        def log_request(self, *_: Any) -> None: ...

        def log_error(self, *_: Any) -> None: ...

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(photos))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_addresses_are_fetched_when_asked_within_limits(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: str) -> np.ndarray:
        (one,) = questions([f"{server}/{path}"], (RED,), urls=True)
        return one.read()

    np.testing.assert_array_equal(read("b.png?size=1"), photo())
    with pytest.raises(ConnectionError, match=r"none.png could not be fetched \(.*not found"):
        read("none.png")
    with pytest.raises(ValueError, match=r"leads to ftp://127.0.0.1/a.png, which is not on the web"):
        read("elsewhere.png")
    with pytest.raises(ValueError, match=r"notes.txt is in none of the formats"):
        read("notes.txt")
    monkeypatch.setattr(fetch, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="is larger than"):
        read("b.png")


@pytest.mark.parametrize(
    ("phrase", "slug"),
    [
        ("das rote H\u00e4uschen", "das-rote-h\u00e4uschen"),
        ("\u7ea2\u8272\u7684\u5706", "\u7ea2\u8272\u7684\u5706"),
        ("\u0932\u093e\u0932 \u0935\u0943\u0924\u094d\u0924", "\u0932\u093e\u0932-\u0935\u0943\u0924\u094d\u0924"),
        ("a/b\\c:d*..\x1b[31m_e", "a-b-c-d-31m-e"),
        ("\U0001f34e", "phrase"),
        ("\U00020000" * 60, "\U00020000" * 20),
    ],
)
def test_file_names_keep_the_letters_of_any_script(phrase: str, slug: str) -> None:
    assert _file_name("photo", 0, phrase) == f"photo_1_{slug}"
