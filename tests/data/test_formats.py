from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_trees import (
    LIBRARIES,
    MAKERS,
    SPLITS,
    content,
    make_folder_tree,
    make_grefs_tree,
    make_parquet_tree,
    save_mask,
)
from PIL import Image
from refer_tree import blocks, make_refer_tree

from fastris.commands.train import TrainConfig
from fastris.data import DataError, load_dataset, load_split
from fastris.data.formats import annotation as annotations
from fastris.data.formats import extras
from fastris.data.formats.table import discover

FORMATS = [*MAKERS]


def made(layout: str, root: Path, **options: Any) -> Path:
    if layout in LIBRARIES:
        pytest.importorskip(LIBRARIES[layout])
    return MAKERS[layout][1](root, **options)


@pytest.mark.parametrize("layout", ["lmdb", "parquet", "folder"])
@pytest.mark.parametrize("split", ["train", "val", "testA"])
def test_every_format_gives_the_sentences_images_and_masks_of_the_refer_files(
    tmp_path: Path, layout: str, split: str
) -> None:
    root = made(layout, tmp_path)
    data = load_dataset(MAKERS[layout][0], split, root)
    original = load_dataset("refcoco", split, tmp_path / "source")
    assert content(data) == content(original)
    assert data.by_image() == original.by_image()
    assert (data.split, data.skipped) == (split, {})
    assert not any(data.reference(index).no_target for index in range(len(data)))


@pytest.mark.parametrize("layout", FORMATS)
def test_a_wrong_split_lists_the_right_ones_in_every_format(tmp_path: Path, layout: str) -> None:
    root = made(layout, tmp_path)
    with pytest.raises(DataError, match="'dev' is unknown") as error:
        load_dataset(MAKERS[layout][0], "dev", root)
    assert all(split in str(error.value) for split in SPLITS)


@pytest.mark.parametrize("layout", FORMATS)
def test_a_folder_is_told_apart_by_what_lies_in_it(tmp_path: Path, layout: str) -> None:
    name, format = MAKERS[layout][0], {"grefs": "refer", "folder": "jsonl"}.get(layout, layout)
    found = {(entry.name, entry.format) for entry in discover(made(layout, tmp_path))}
    assert found == {("folder" if layout == "parquet" else name, format)}


@pytest.mark.parametrize("layout", FORMATS)
def test_data_sets_pass_into_worker_processes(tmp_path: Path, layout: str) -> None:
    data = load_dataset(MAKERS[layout][0], "train", made(layout, tmp_path))
    before = content(data)
    assert content(pickle.loads(pickle.dumps(data))) == before


def test_an_empty_folder_and_an_unknown_format_list_what_is_known(tmp_path: Path) -> None:
    for name in ("folder", "refcoco", "grefcoco"):
        with pytest.raises(DataError) as error:
            load_dataset(name, "train", tmp_path)
        for part in ("jsonl:", "refer:", "lmdb:", "parquet:", "grefs(unc).json"):
            assert part in str(error.value)
    with pytest.raises(DataError, match="format='csv' is unknown; choose auto or one of jsonl, refer, lmdb, parquet"):
        load_dataset("refcoco", "train", tmp_path, format="csv")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no_such is needed to read X, and is not .*: pip install 'fastris\[lmdb\]'"):
        extras.need("no_such.part", "lmdb", "to read X")


# gRefCOCO


def test_grefcoco_merges_several_targets_and_marks_none(tmp_path: Path) -> None:
    data = load_dataset("grefcoco", "val", make_grefs_tree(tmp_path))
    assert len(data) == 6
    for index in range(len(data)):
        mask, reference = data.mask(index), data.reference(index)
        block = blocks(*mask.shape)
        expected = (block["red"] | block["green"], np.zeros_like(mask), block["blue"])[index % 3]
        assert (mask == expected).all()
        assert reference.no_target is (index % 3 == 1)


def test_grefcoco_leaves_crowds_out_as_its_authors_do(tmp_path: Path) -> None:
    def change(refs: list[Any], instances: dict[str, Any]) -> None:
        instances["annotations"][1]["iscrowd"] = 1

    data = load_dataset("grefcoco", "train", make_grefs_tree(tmp_path, change))
    mask = data.mask(0)
    assert (mask == blocks(*mask.shape)["red"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ann_id": [-1]}, "has no_target False, but ann_id"),
        ({"no_target": True}, "has no_target True, but ann_id"),
        ({"ann_id": [1, [2]]}, "has 'ann_id' .* must be int or str, or a list"),
        ({"ann_id": [1, 12]}, "is about image 581000, but .*annotation 12, about image 581001"),
        ({"ann_id": [1, 999]}, "has 'ann_id' 999, but .*instances.json does not"),
    ],
)
def test_a_wrong_grefcoco_reference_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_grefs_tree(tmp_path, lambda refs, instances: refs[0].update(changes))
    with pytest.raises(DataError, match=message):
        load_dataset("grefcoco", "train", tmp_path)


# Parquet


def test_parquet_is_read_by_the_split_that_its_rows_state(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    make_parquet_tree(tmp_path)
    assert load_dataset("refcoco", "testA", tmp_path).reference(0).ref_id == 12
    assert load_dataset("refcoco", "validation", tmp_path).split == "val"


def test_older_parquet_with_sentences_as_json_is_read(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")

    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["sentences"] = json.dumps(row["sentences"])

    make_parquet_tree(tmp_path, change)
    assert load_dataset("refcoco", "train", tmp_path).reference(0).sentences[0] == "red block"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"raw_anns": "{"}, "raw_anns is not valid JSON"),
        ({"raw_anns": "{}"}, "raw_anns, lacks the key 'segmentation'"),
        ({"raw_anns": "[]"}, "empty mask"),
        ({"raw_image_info": '{"height": 72, "width": 96, "file_name": "../x"}'}, "leaves the folder of images"),
        ({"raw_image_info": '{"height": 0, "width": 96, "file_name": "x"}'}, "must be at least 1 pixel"),
        ({"sentences": []}, "has no sentences"),
        ({"ref_id": None}, "'ref_id' of type NoneType"),
    ],
)
def test_a_wrong_parquet_row_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    pytest.importorskip("pyarrow")
    make_parquet_tree(tmp_path, lambda rows: rows[0].update(changes))
    with pytest.raises(DataError, match=message):
        load_dataset("refcoco", "train", tmp_path)


def test_damaged_parquet_and_other_columns_are_one_error(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = make_parquet_tree(tmp_path) / "data" / "train-00000-of-00001.parquet"
    whole = file.read_bytes()
    for data in (b"", whole[:1000], b"PAR1" + b"\0" * 100 + b"PAR1"):
        file.write_bytes(data)
        with pytest.raises(DataError, match="is not a whole Parquet file"):
            load_dataset("refcoco", "train", tmp_path)
    parquet.write_table(pyarrow.table({"split": ["train"]}), file)
    with pytest.raises(DataError, match=r"lacks the column ref_id, image_id, .* jxu124/refcoco"):
        load_dataset("refcoco", "train", tmp_path)


def test_parquet_that_would_take_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file holds a text once, and 100,000 rows repeat it: 100 kB that become 10 GB."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from fastris.data.formats import parquet as reader

    file = make_parquet_tree(tmp_path) / "data" / "train-00000-of-00001.parquet"
    table, many = parquet.read_table(file), 100_000
    indices, text = pyarrow.array(np.zeros(many, np.int32)), pyarrow.array(["x" * 100_000])
    columns = {key: pyarrow.array([table[key][0].as_py()] * many) for key in ("ref_id", "image_id", "ann_id", "split")}
    columns["sentences"] = pyarrow.array([None] * many, table.schema.field("sentences").type)
    columns["raw_anns"] = pyarrow.DictionaryArray.from_arrays(indices, text)
    columns["raw_image_info"] = columns["raw_anns"]
    parquet.write_table(pyarrow.table(columns), file, use_dictionary=True, row_group_size=many)
    assert file.stat().st_size < 1_000_000
    monkeypatch.setattr(reader, "MAX_TEXT", 50_000)
    with pytest.raises(DataError, match="holds a text of 100000 bytes; the limit is 50000"):
        load_dataset("refcoco", "train", tmp_path)
    monkeypatch.setattr(reader, "MAX_ROWS", 1000)
    with pytest.raises(DataError, match=r"has 100000 rows, .* the limits are 1000 and"):
        load_dataset("refcoco", "train", tmp_path)


def test_a_parquet_row_of_too_many_sentences_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    make_parquet_tree(tmp_path, lambda rows: rows[0].update(sentences=rows[0]["sentences"] * 1000))
    with pytest.raises(DataError, match="holds a list of 3000 values; the limit is 1000"):
        load_dataset("refcoco", "train", tmp_path)


# People's own folders


def test_masks_may_be_files_run_lengths_or_polygons(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "images" / "a.png")
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    save_mask(mask, tmp_path / "masks" / "a.png")
    palette = Image.fromarray(mask.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 0, 0, 0])  # both colours are black: the index counts
    palette.save(tmp_path / "masks" / "palette.png")
    Image.fromarray(mask).save(tmp_path / "masks" / "bits.png")
    Image.fromarray(np.stack([mask] * 3, 2).astype(np.uint8)).save(tmp_path / "masks" / "rgb.png")
    polygon = [[2, 1, 5, 1, 5, 3, 2, 3]]
    runs = {"size": [4, 6], "counts": [9, 2, 2, 2, 2, 2, 5]}
    forms: list[Any] = ["a.png", "masks/a.png", "palette.png", "bits.png", "rgb.png", polygon, runs]
    lines = [{"image": "a.png", "mask": form, "sentences": ["it"]} for form in forms]
    lines += [{"image": "images/a.png", "mask": polygon, "sentences": ["it"], "size": [4, 6]}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    data = load_dataset("folder", "train", tmp_path)
    for index in range(len(data)):
        assert (data.mask(index) == mask).all(), lines[index]
    assert data.by_image() == [[*range(len(lines))]]


def test_splits_may_be_a_field_of_the_lines(tmp_path: Path) -> None:
    make_folder_tree(tmp_path)
    lines = [json.loads(line) for split in SPLITS for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    for number, line in enumerate(lines):
        line["split"] = "dev" if number % 2 else "train"
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert len(load_dataset("folder", "dev", tmp_path)) == 12
    with pytest.raises(DataError, match=r"'val' is unknown or empty; .* have dev, train"):
        load_dataset("folder", "val", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "gone.jpg"}, "missing image"),
        ({"image": "/etc/passwd"}, "has image '/etc/passwd', which leaves the folder of images"),
        ({"mask": "../0.png"}, "has mask '../0.png', which leaves the folder of masks"),
        ({"mask": "gone.png"}, "has mask 'gone.png', which is no file in"),
        ({"mask": None}, "has 'mask' of type NoneType"),
        ({"sentences": []}, "must be a list of one or more texts"),
        ({"sentences": "one"}, "'sentences' of type str, but it must be list"),
        ({"sentences": [" "]}, "empty sentence"),
        ({"size": [0, 4]}, "which must be .height, width. in pixels"),
        ({"ref_id": 1.5}, "'ref_id' of type float"),
        ({"ref_id": 1}, "duplicate id at ref_id 1"),
        ({"no_target": 1}, "'no_target' of type int"),
        ({"mask": [[1, 2, 3]]}, "is not a list x1, y1"),
        ({"no_target": True}, "marked no_target, but its mask is not empty"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_folder_tree(tmp_path, lambda row: row.update(changes))
    with pytest.raises(DataError, match=message):
        load_dataset("folder", "train", tmp_path).mask(0)


@pytest.mark.parametrize(("text", "message"), [("{", "line 1 is not valid JSON"), ("[1]", "line 1 is list")])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, text: str, message: str) -> None:
    make_folder_tree(tmp_path)
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        load_dataset("folder", "train", tmp_path)


def test_a_mask_of_another_size_or_kind_is_named(tmp_path: Path) -> None:
    make_folder_tree(tmp_path)
    data = load_dataset("folder", "train", tmp_path)
    save_mask(np.ones((5, 5), bool), tmp_path / "masks" / "0.png")
    with pytest.raises(DataError, match=r"size mismatch .*the mask is 5 x 5 pixels"):
        data.mask(0)
    Image.new("RGBA", (96, 72)).save(tmp_path / "masks" / "0.png")
    with pytest.raises(DataError, match="colour mode RGBA; save it as grey"):
        data.mask(0)
    Image.new("L", (96, 72)).save(tmp_path / "masks" / "0.png", format="JPEG")
    with pytest.raises(DataError, match="the mask cannot be decoded as PNG or BMP"):
        data.mask(0)


# Nothing leaves its folder, and nothing takes the memory


@pytest.mark.parametrize("layout", ["refer", "parquet", "grefs", "folder"])
def test_no_link_among_the_images_leads_out_of_their_folder(tmp_path: Path, layout: str) -> None:
    root = made(layout, tmp_path / "tree")
    folder = next(path.parent for path in root.rglob("*581000.jpg") if "source" not in path.parts or layout == "refer")
    secret = tmp_path / "secret.jpg"
    (folder / "COCO_train2014_000000581000.jpg").rename(secret)
    (folder / "COCO_train2014_000000581000.jpg").symlink_to(secret)
    with pytest.raises(DataError, match=r"path outside of its folder .*a symbolic link leads out of"):
        load_dataset(MAKERS[layout][0], "train", root)


def test_no_name_of_a_split_leads_out_of_the_folder(tmp_path: Path) -> None:
    root = make_folder_tree(tmp_path / "tree", lambda row: row.update(split="../secret"))
    (root / "val.jsonl").rename(tmp_path / "secret.jsonl")
    for split in ("testA", "testB"):
        (root / f"{split}.jsonl").unlink()
    (root / "train.jsonl").write_text('{"split": "train"}')
    (root / "train.jsonl").rename(root / "secret.jsonl")
    manifest = {"format": "fastris-data", "version": 1, "name": "folder", "splits": {"../secret": {"references": 6}}}
    (root / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"split='\.\./secret' is unknown or empty"):
        load_dataset("folder", "../secret", root)


def test_no_link_among_the_masks_leads_out_of_their_folder(tmp_path: Path) -> None:
    make_folder_tree(tmp_path / "tree")
    (tmp_path / "tree" / "masks" / "0.png").rename(tmp_path / "secret.png")
    (tmp_path / "tree" / "masks" / "0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"has mask '0\.png', which is no file in"):
        load_dataset("folder", "train", tmp_path / "tree")


def test_the_folder_of_images_itself_and_links_within_it_may_be_links(tmp_path: Path) -> None:
    make_folder_tree(tmp_path / "tree")
    images = tmp_path / "tree" / "images"
    images.rename(tmp_path / "elsewhere")
    images.symlink_to(tmp_path / "elsewhere")
    first = tmp_path / "elsewhere" / "COCO_train2014_000000581000.jpg"
    first.rename(first.with_name("real.jpg"))
    first.symlink_to("real.jpg")
    assert load_dataset("folder", "train", tmp_path / "tree").image(0).shape == (72, 96, 3)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: Any) -> None:
    data = load_dataset("refcoco", "train", make_refer_tree(tmp_path))
    monkeypatch.setattr(annotations, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match="96 x 72 pixels, over 1000: a decompression bomb"):
        data.image(0)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[0, 0, 9000, 9000] * 100], "outlines are longer than 1000000 pixels"),
        ([[0, 0, 9000, 9000] * 5] * 20, "outlines are longer"),
        ({"size": [9000, 9000], "counts": [0] * 10 + [81_000_001]}, "do not add up"),
        ({"size": [2, 2], "counts": [0] * 100 + [4]}, "do not add up"),
        ({"size": [2, 2], "counts": "0" * 1_000_000}, "damaged"),
    ],
    ids=["one outline", "many outlines", "sum", "runs", "compressed runs"],
)
def test_annotations_that_would_take_the_memory_are_refused(segmentation: Any, message: str) -> None:
    size = segmentation["size"] if isinstance(segmentation, dict) else [9000, 9000]
    with pytest.raises(annotations.BadAnnotation, match=message):
        annotations.checked(segmentation, *size)


def test_commands_find_images_that_lie_elsewhere_and_take_the_format_asked_for(tmp_path: Path) -> None:
    root = make_refer_tree(tmp_path / "tree")
    original = content(load_dataset("refcoco", "train", root))
    (root / "images").rename(tmp_path / "elsewhere")
    images = next(tmp_path.glob("elsewhere/**/train2014"))
    options = TrainConfig(dataset="refcoco", data_root=str(root), images=str(images), format="refer")
    assert content(load_split(options, "train")) == original
    with pytest.raises(DataError, match="dataset=synthetic reads no files, so images and format must be left out"):
        load_split(TrainConfig(dataset="synthetic", images=str(images), format="refer"), "train")
