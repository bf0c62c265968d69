"""Small files that unfold to a thousand times their size are refused before they do, and large real ones are read."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from format_trees import make_folder_tree, make_grefs_tree, make_lmdb_tree, make_parquet_tree
from refer_tree import make_refer_tree

from fastris.data import DataError, load_dataset
from fastris.data.formats.budget import FREE, LARGEST, Budget, of_json
from fastris.data.formats.records import IDS, MAX_ID

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")

MOST = 700  # MB that refusing may take; each of these files would take 1.2 GB or more
CHILD = """
import resource, sys
from fastris.data import DataError, load_dataset
name, root, library = sys.argv[1:]
if library:
    __import__(library)
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) // 1024
before = peak()
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
most = (4096 if library.startswith("pyarrow") else 1100) << 20  # Arrow's threads set addresses aside
resource.setrlimit(resource.RLIMIT_AS, (size + most, resource.RLIM_INFINITY))
said = "it was read"
try:
    data = load_dataset(name, "train", root)
    data.reference(0)
except DataError as error:
    said = str(error)
print(peak() - before)
print(said)
"""
TEXT = " " + "x" * 1_000_000 + " "


def sentences_of_one_text(root: Path) -> str:
    make_refer_tree(root)
    file = root / "refcoco" / "refs(unc).p"
    refs = pickle.loads(file.read_bytes())
    copies = [refs[0] | {"ref_id": 1000 + number, "sentences": [{"sent": TEXT}]} for number in range(8000)]
    file.write_bytes(pickle.dumps(refs + copies, 2))
    return "refcoco"


def empty_dicts_in_instances(root: Path) -> str:
    make_refer_tree(root)
    (root / "refcoco" / "instances.json").write_text('{"images": [], "annotations": [' + "{}," * 20_000_000 + "{}]}")
    return "refcoco"


def lists_in_references(root: Path) -> str:
    make_grefs_tree(root)
    (root / "grefcoco" / "grefs(unc).json").write_text("[" + "[[[[]]]]," * 6_000_000 + "0]")
    return "grefcoco"


def empty_dicts_in_a_line(root: Path) -> str:
    make_folder_tree(root)
    (root / "train.jsonl").write_text('{"image": [' + "{}," * 11_000_000 + "{}]}")
    return "folder"


def empty_dicts_in_many_lines(root: Path) -> str:
    make_folder_tree(root)
    (root / "train.jsonl").write_text(('{"image": [' + "{}," * 100_000 + "{}]}\n") * 200)
    return "folder"


def dicts_in_a_pickle(root: Path) -> str:
    make_refer_tree(root)
    (root / "refcoco" / "refs(unc).p").write_bytes(b"}" * 16_000_000 + b".")
    return "refcoco"


def _parquet(root: Path, count: int, **columns: Any) -> str:
    import pyarrow
    from pyarrow import parquet

    file = make_parquet_tree(root) / "data" / "train-00000-of-00001.parquet"
    table = parquet.read_table(file)
    same = {
        key: pyarrow.array([table[key][0].as_py()] * count, table.schema.field(key).type) for key in table.schema.names
    }
    parquet.write_table(pyarrow.table(same | columns), file, compression="zstd", row_group_size=count)
    assert file.stat().st_size < 100_000
    return "refcoco"


def sentences_of_one_parquet_text(root: Path) -> str:
    import numpy as np
    import pyarrow

    rows, each = 50, 900
    one = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(np.zeros(rows * each, np.int32)), pyarrow.array(["x" * 10**7])
    )
    offsets = pyarrow.array(np.arange(0, rows * each + 1, each, dtype=np.int32))
    values = pyarrow.StructArray.from_arrays([one], ["sent"])
    return _parquet(root, rows, sentences=pyarrow.ListArray.from_arrays(offsets, values))


def annotations_of_one_parquet_text(root: Path) -> str:
    import numpy as np
    import pyarrow

    text = json.dumps({"segmentation": [[1.5] * 200_000]})
    indices = pyarrow.array(np.zeros(2000, np.int32))
    anns = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))
    return _parquet(root, 2000, raw_anns=anns, ref_id=pyarrow.array(np.arange(2000)))


def sentences_of_one_lmdb_text(root: Path) -> str:
    import lmdb

    make_lmdb_tree(root)
    file = next(root.rglob("train.lmdb"))
    with lmdb.open(str(file), subdir=file.is_dir(), map_size=1 << 28) as env, env.begin(write=True) as transaction:
        key = pickle.loads(transaction.get(b"__keys__"))[0]
        record = pickle.loads(transaction.get(key))
        record |= {"sents": [TEXT] * 8000, "num_sents": 8000}
        transaction.put(key, pickle.dumps(record, 4))
    return "refcoco"


BOMBS: list[tuple[Callable[[Path], str], str]] = [
    (sentences_of_one_text, ""),
    (empty_dicts_in_instances, ""),
    (lists_in_references, ""),
    (empty_dicts_in_a_line, ""),
    (empty_dicts_in_many_lines, ""),
    (dicts_in_a_pickle, ""),
    (sentences_of_one_parquet_text, "pyarrow"),
    (annotations_of_one_parquet_text, "pyarrow"),
    (sentences_of_one_lmdb_text, "lmdb"),
]


@pytest.mark.parametrize(("make", "library"), BOMBS, ids=[make.__name__ for make, _ in BOMBS])
def test_annotations_that_unfold_are_refused_in_little_memory(
    tmp_path: Path, make: Callable[[Path], str], library: str
) -> None:
    if library:
        pytest.importorskip(library)
    name = make(tmp_path)
    command = [sys.executable, "-c", CHILD, name, str(tmp_path), "pyarrow.parquet" if library == "pyarrow" else library]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-500:]
    grown, said = ran.stdout.splitlines()
    assert str(tmp_path) in said and "unfold to more than" in said and "divide" in said
    assert int(grown) < MOST


@pytest.mark.parametrize("text", ["0\n", "{}\n", "[]\n"])
def test_many_bad_lines_are_one_error_and_not_one_kept_for_each(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastris.data.formats.budget.FREE", 1 << 20)
    make_folder_tree(tmp_path)
    (tmp_path / "train.jsonl").write_text(text * 20_000)
    with pytest.raises(DataError, match=r"^\S* has \d+ bytes, which unfold to more than"):
        load_dataset("folder", "train", tmp_path)


COCO = {
    "segmentation": [[round(7.31 * x % 640, 2) for x in range(54)]],  # 605,000 annotations with 53 numbers each
    "area": 702.1057499999998,
    "iscrowd": 0,
    "image_id": 289343,
    "bbox": [473.07, 395.93, 38.65, 28.67],
    "category_id": 18,
    "id": 1768,
}
GREF = {
    "image_id": 98304,
    "split": "train",
    "sentences": [
        {"tokens": ["the", "left", "bike"], "raw": "the left bike", "sent_id": 19, "sent": "the left bike"},
        {"tokens": ["red", "bike"], "raw": "red bike", "sent_id": 20, "sent": "red bike"},
    ],
    "file_name": "COCO_train2014_000000098304.jpg",
    "category_id": [3],
    "ann_id": [1350],
    "sent_ids": [19, 20],
    "ref_id": 12,
    "no_target": False,
}
LINE = {"image": "1.jpg", "mask": "1.png", "sentences": ["it"]}


@pytest.mark.parametrize(
    ("record", "count"),
    [
        pytest.param(COCO, 605_000, id="COCO train2014"),
        pytest.param(COCO, 870_000, id="COCO train2017"),
        pytest.param(GREF, 260_000, id="gRefCOCO"),
        pytest.param(LINE, 1_000_000, id="a million short lines"),
        pytest.param(LINE | {"mask": COCO["segmentation"], "size": [480, 640]}, 1_000_000, id="a million polygons"),
    ],
)
def test_real_annotations_stay_within_the_limit(record: Any, count: int) -> None:
    text = json.dumps(record, separators=(",", ":")).encode()
    Budget("x", len(text) * count).spend(of_json(text) * count)


def test_the_limit_is_stated_and_grows_with_the_file() -> None:
    budget = Budget("x.json", 10)
    assert FREE < budget.limit < FREE + 1000
    assert Budget("x", 1 << 40).limit == LARGEST
    budget.spend(budget.limit)
    with pytest.raises(DataError, match=rf"x\.json has 10 bytes, which unfold to more than {budget.limit} bytes"):
        budget.spend(1)


@pytest.mark.parametrize("text", ["{}", "[]", '"a"', "1", '{"a":1}', "[[[]]]", '{"a":{"b":[1,2.5,"xy"]}}', '"é画😀"'])
def test_the_estimate_is_no_less_than_what_json_takes(text: str) -> None:
    def size(value: Any) -> int:
        inner = [*value.values(), *value] if type(value) is dict else value if type(value) is list else ()
        return sys.getsizeof(value) + sum(map(size, inner))

    many = "[" + ",".join([text] * 1000) + "]"
    assert of_json(many) >= size(json.loads(many))
    assert of_json(many) == of_json(many.encode()) if many.isascii() else True
    assert of_json((many + " " * (1 << 16)).encode()) >= of_json(many)


@pytest.mark.parametrize("ref_id", [IDS.stop, IDS.start - 1, 7 * (2**61 - 1) << 10, "x" * (MAX_ID + 1)])
def test_ids_that_a_file_could_make_collide_are_refused(tmp_path: Path, ref_id: Any) -> None:
    make_folder_tree(tmp_path, lambda row: row.update(ref_id=ref_id))
    with pytest.raises(DataError, match="an id must be a number of 64 bits or a text of at most 1000 characters"):
        load_dataset("folder", "train", tmp_path)
