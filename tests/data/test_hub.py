"""Tables of the Hugging Face hub. Most tests have a stand-in for its library; the last ones need the library itself."""

from __future__ import annotations

import gc
import io
import json
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from fastris.commands import cli
from fastris.data import DataError, load_dataset
from fastris.data.formats import published
from fastris.data.formats.annotated import MENDS
from fastris.data.formats.hub import source_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def stripe(column: int) -> np.ndarray:
    mask = np.zeros((10, 20), bool)
    mask[:, column : column + 4] = True
    return mask


def runs(mask: np.ndarray) -> dict[str, Any]:
    code = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


PICTURE = np.arange(600, dtype=np.uint8).reshape(10, 20, 3)


def refcoco_m() -> list[dict[str, Any]]:
    """Two pictures as `moondream/refcoco-m` has them, of one and of two objects."""
    samples = [
        {
            "id": 10 * picture + number,
            "category": "cat",
            "sentences": ["it", "the cat"],
            "mask": runs(stripe(5 * number)),
        }
        for picture in (1, 2)
        for number in range(picture)
    ]
    rows = [samples[:1], samples[1:]]
    return [
        {
            "image": {"bytes": png(PICTURE + number), "path": "a.jpg"},
            "image_id": 7 + number,
            "file_name": f"COCO_{number}.png",
            "samples": row,
        }
        for number, row in enumerate(rows)
    ]


class Table:
    """Of the library's table what is used."""

    info = types.SimpleNamespace(dataset_size=1000)
    features = None

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[number]

    def remove_columns(self, names: list[str]) -> Table:
        return Table([{key: value for key, value in row.items() if key not in names} for row in self.rows])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The repositories of a hub: name -> rows. `asked` has the arguments of the last call."""
    repos: dict[str, Any] = {"moondream/refcoco-m": refcoco_m()}

    def load(repo: str, config: Any, *, split: str, revision: Any, streaming: bool) -> Table:
        repos["asked"] = repo, config, split, revision, streaming
        return Table(repos[repo])

    def splits(repo: str, config: Any, revision: Any) -> list[str]:
        if repo not in repos:
            raise RuntimeError(f"Dataset '{repo}' doesn't exist\nsecond line")
        return ["validation"]

    library = types.ModuleType("datasets")
    library.__dict__.update(__version__="5.0.0", load_dataset=load, get_dataset_split_names=splits)
    monkeypatch.setitem(sys.modules, "datasets", library)
    return repos


@pytest.mark.parametrize("streaming", [False, True])
def test_refcoco_m_is_read_by_its_name(hub: dict[str, Any], streaming: bool) -> None:
    data = load_dataset("refcoco-m", "val", **({"streaming": True} if streaming else {}))
    assert hub["asked"] == ("moondream/refcoco-m", None, "validation", None, streaming)
    assert [data.reference(index).ref_id for index in range(len(data))] == [10, 20, 21]
    assert data.reference(2).sentences == ("it", "the cat")
    assert data.by_image() == [[0], [1, 2]]
    for index, (picture, column) in enumerate([(0, 0), (1, 0), (1, 5)]):
        assert (data.image(index) == PICTURE + picture).all()
        assert (data.mask(index) == stripe(column)).all()
    file = data.encoded_image(0)  # type: ignore[attr-defined]
    assert isinstance(file, Path) is streaming
    del data
    gc.collect()
    assert not (streaming and file.exists()), "the temporary folder outlives the data set"


def test_its_counts_are_compared_with_the_published_ones(
    hub: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert (published.REFERENCES["refcoco-m"], published.IMAGES_AND_SENTENCES["refcoco-m"]) == (
        {"val": 2080},
        {"val": (1190, 5598)},
    )
    assert cli.main(["data", "inspect", "hf://moondream/refcoco-m"]) == 0
    printed = capsys.readouterr().out
    assert "refcoco-m (hub) in hf:/moondream/refcoco-m" in printed
    assert "val    3 references, 6 sentences, 2 images; 2077 fewer than the published 2080" in printed
    monkeypatch.setitem(published.REFERENCES, "refcoco-m", {"val": 3})
    assert cli.main(["data", "check", "hf://moondream/refcoco-m", "streaming=true", "word_len=0"]) == 0
    assert "equals the published count, but of images 1190 are published" in capsys.readouterr().out
    for streaming in (False, True):
        out = tmp_path / str(streaming)
        assert cli.main(["data", "convert", "hf://moondream/refcoco-m", f"out={out}", f"streaming={streaming}"]) == 0
        data = load_dataset("refcoco-m", "val", out)
        assert (data.image(2) == PICTURE + 1).all() and (data.mask(2) == stripe(5)).all()
        assert not (out / "images").is_symlink()


def flat(**changes: Any) -> dict[str, Any]:
    """A row of one object, with its mask as a picture."""
    row = {"photo": {"bytes": png(PICTURE)}, "mask": {"bytes": png(stripe(3)), "path": None}, "text": "the stripe"}
    return row | changes


@pytest.mark.parametrize("streaming", [{}, {"streaming": True}])
@pytest.mark.parametrize(
    "mask",
    [
        {"bytes": png(stripe(3)), "path": None},
        runs(stripe(3)),
        json.dumps(runs(stripe(3))),
        [[3, 0, 7, 0, 7, 10, 3, 10]],
        [3, 0, 7, 0, 7, 10, 3, 10],
        {"size": [10, 20], "counts": [30, 40, 130]},
    ],
)
def test_a_row_of_one_object_has_its_mask_in_any_form(
    hub: dict[str, Any], mask: Any, streaming: dict[str, Any]
) -> None:
    hub["me/mine"] = [flat(mask=mask), flat(text=["a", "b"])]
    data = load_dataset("folder", "val", "hf://me/mine/small@v1.0", **streaming)
    assert hub["asked"][:4] == ("me/mine", "small", "validation", "v1.0")
    data = pickle.loads(pickle.dumps(data)) if not streaming else data
    assert [data.reference(index).sentences for index in (0, 1)] == [("the stripe",), ("a", "b")]
    assert (data.mask(0) == stripe(3)).all()
    assert (data.image(0) == PICTURE).all()


def test_columns_are_named_where_their_names_do_not_tell(hub: dict[str, Any]) -> None:
    row = flat(said="the one", shape=runs(stripe(8)))
    hub["me/mine"] = [row]
    data = load_dataset("folder", "val", "hf://me/mine", columns="text=said, mask=shape")
    assert data.reference(0).sentences == ("the one",)
    assert (data.mask(0) == stripe(8)).all()
    with pytest.raises(DataError, match=r"has no column 'x'; it has photo, mask, text, said, shape\. Say which"):
        load_dataset("folder", "val", "hf://me/mine", columns="text=x")
    with pytest.raises(DataError, match="columns='texts' must be such as image=photo,mask=mask,text=caption"):
        load_dataset("folder", "val", "hf://me/mine", columns="texts")
    del row["photo"]
    with pytest.raises(DataError, match="has no column whose name tells that it is the image; it has mask"):
        load_dataset("folder", "val", "hf://me/mine")


BAD = [
    (flat(mask={"size": [10, 20], "counts": [7]}), "do not add up to the image's 200 pixels"),
    (flat(mask={"size": [20, 10], "counts": [200]}), "size mismatch"),
    (flat(mask=7), "has mask 7, which is no mask: a picture, run lengths or polygons"),
    (flat(mask="{"), "mask is not valid JSON"),
    (flat(text=None), "has text None, which must be a text or a list of texts"),
    (flat(text=" "), "empty sentence"),
    (flat(photo={"bytes": None, "path": "/etc/passwd"}), "holds no picture but .*; pictures must be in the table"),
    (flat(photo="https://x/a.jpg"), "holds no picture but 'https://x/a.jpg'"),
    (flat(photo={"bytes": b"no picture"}), "unreadable image"),
    (flat(mask={"bytes": png(stripe(3)[:5])}), "size mismatch"),
    (flat(mask={"bytes": png(stripe(30))}), "empty mask"),
]


@pytest.mark.parametrize("streaming", [{}, {"streaming": True}])
@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_wrong_row_is_one_line_and_can_be_left_out(
    hub: dict[str, Any], row: dict[str, Any], message: str, streaming: dict[str, Any]
) -> None:
    hub["me/mine"] = [row, flat()]
    with pytest.raises(DataError, match=message) as error:
        data = load_dataset("folder", "val", "hf://me/mine", **streaming)
        data.image(0), data.mask(0)
    assert "\n" not in str(error.value)
    data = load_dataset("folder", "val", "hf://me/mine", on_error="skip", **streaming)
    assert len(data) == 1
    assert set(data.skipped) <= set(MENDS)


def test_what_the_library_raises_is_one_line(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"me/gone cannot be read .* \(RuntimeError: Dataset 'me/gone' doesn't exist\);"
    ):
        load_dataset("folder", "val", "hf://me/gone")
    with pytest.raises(DataError, match="split='test' is unknown; moondream/refcoco-m has val"):
        load_dataset("refcoco-m", "test")
    sys.modules["datasets"].__dict__["__version__"] = "3.6.0"
    with pytest.raises(DataError, match=r"datasets 3.6.0 may run .* code; pip install -U 'fastris\[datasets\]'"):
        load_dataset("refcoco-m", "val")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"datasets is needed to read .* pip install 'fastris\[datasets\]'"):
        load_dataset("refcoco-m", "val")


def test_a_root_is_a_repository_only_if_it_is_spelled_so(tmp_path: Path) -> None:
    assert source_of(Path("hf://me/mine"))[:3] == ("me/mine", None, None)
    for root in ("me/mine", "hf://me", "hf://me/../x", "hf://me/mine/a/b", "hf://me/mi ne", "x/hf://me/mine"):
        assert source_of(Path(root)).folder == Path(root)


# With the library itself


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


@pytest.mark.parametrize("streaming", [{}, {"streaming": True}])
@pytest.mark.parametrize("saved", [False, True])
def test_files_of_the_library_are_read_without_its_decoder(
    tmp_path: Path, library: Any, saved: bool, streaming: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = {
        "id": library.Value("int64"),
        "sentences": library.List(library.Value("string")),
        "mask": {"size": library.List(library.Value("int32")), "counts": library.Value("string")},
    }
    features = library.Features(
        {
            "image": library.Image(),
            "image_id": library.Value("int64"),
            "file_name": library.Value("string"),
            "samples": library.List(sample),
        }
    )
    root = tmp_path / "data_set"
    table = library.Dataset.from_list(refcoco_m(), features=features)
    if saved:
        library.DatasetDict({"validation": table}).save_to_disk(str(root))
    else:
        (root / "data").mkdir(parents=True)
        table.to_parquet(str(root / "data" / "validation-00000-of-00001.parquet"))
    monkeypatch.setattr(library.Image, "decode_example", None)
    data = load_dataset("refcoco-m", "val", root, **streaming)
    assert [data.reference(index).ref_id for index in range(len(data))] == [10, 20, 21]
    assert (data.image(2) == PICTURE + 1).all() and (data.mask(2) == stripe(5)).all()
    if not streaming:
        assert (pickle.loads(pickle.dumps(data)).mask(2) == stripe(5)).all()


def test_a_folder_of_pictures_is_read_and_no_path_leads_out_of_it(tmp_path: Path, library: Any) -> None:
    root = tmp_path / "pictures"
    (root / "train").mkdir(parents=True)
    (root / "train" / "a.png").write_bytes(png(PICTURE))
    line = {"file_name": "a.png", "text": "the stripe", "mask": json.dumps(runs(stripe(3)))}
    (root / "train" / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    data = load_dataset("folder", "train", root, format="hub")
    assert (data.image(0) == PICTURE).all() and (data.mask(0) == stripe(3)).all()
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "secret.png").write_bytes(png(PICTURE))
    features = library.Features({"image": library.Image(), "mask": library.Image(), "text": library.Value("string")})
    row = {
        "image": {"bytes": None, "path": str(tmp_path / "secret.png")},
        "mask": {"bytes": png(stripe(3))},
        "text": "it",
    }
    table = pyarrow.Table.from_pylist([row])  # as the library writes it, which puts the pictures in
    features = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    parquet.write_table(table.replace_schema_metadata(features), tmp_path / "saved.parquet")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved.parquet").rename(tmp_path / "saved" / "train.parquet")
    with pytest.raises(DataError, match=r"names the file '.*secret.png', which cannot be read from .*saved"):
        load_dataset("folder", "train", tmp_path / "saved").image(0)
