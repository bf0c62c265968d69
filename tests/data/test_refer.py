from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco
from refer_tree import COLOURS, IMAGE_FOLDER, REFS_FILES, blocks, make_refer_tree

from fastris.data import DATASETS, DataError, ReferringDataset, load_dataset
from fastris.data.formats import annotation as annotations

FIRST_IMAGE = "COCO_train2014_000000581000.jpg"  # ref_id 0, 1, 2 = ann_id 1, 2, 3, in split train


def _train(root: Path, **options: Any) -> ReferringDataset:
    return load_dataset("refcoco", "train", root, **options)


def _first_image(root: Path) -> Path:
    return root / IMAGE_FOLDER / FIRST_IMAGE


def _edit(**changes: Any) -> Callable[[list[dict[str, Any]]], None]:
    """Changes keys of the first reference; None removes the key."""

    def change(refs: list[dict[str, Any]]) -> None:
        for key, value in changes.items():
            if value is None:
                del refs[0][key]
            else:
                refs[0][key] = value

    return change


def _segment(segmentation: Any, number: int = 0) -> Callable[[dict[str, Any]], None]:
    return lambda instances: instances["annotations"][number].update(segmentation=segmentation)


@pytest.mark.parametrize("name", REFS_FILES)
def test_every_split_of_every_data_set_gives_images_masks_and_sentences(tmp_path: Path, name: str) -> None:
    make_refer_tree(tmp_path, name)
    for split in REFS_FILES[name][2]:
        data = load_dataset(name, split, tmp_path)
        assert (data.name, data.split, len(data), data.skipped) == (name, split, 6, {})
        assert data.by_image() == [[0, 1, 2], [3, 4, 5]]
        for index in range(len(data)):
            colour = list(COLOURS)[index % 3]
            image, mask, reference = data.image(index), data.mask(index), data.reference(index)
            assert image.dtype == np.uint8
            assert image.shape == (*mask.shape, 3)
            assert mask.dtype == bool
            assert (mask == blocks(*mask.shape)[colour]).all()
            np.testing.assert_allclose(np.median(image[mask], axis=0), COLOURS[colour], atol=6)
            assert reference.sentences[0] == f"{colour} block"
            assert reference.sentences[2] == reference.sentences[2].strip()
            assert reference.file_name == f"COCO_train2014_{reference.image_id:012d}.jpg"


@pytest.mark.parametrize("protocol", range(6))
def test_refs_of_every_pickle_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    data = _train(make_refer_tree(tmp_path, protocol=protocol))
    assert data.reference(0).sentences == ("red block", "the red block on the left", "left one")


@pytest.mark.parametrize("folder", [IMAGE_FOLDER, "images/train2014", "train2014"])
def test_images_are_found_in_each_usual_folder(tmp_path: Path, folder: str) -> None:
    assert _train(make_refer_tree(tmp_path, image_folder=folder)).image(0).shape == (72, 96, 3)


def test_images_can_lie_anywhere(tmp_path: Path) -> None:
    make_refer_tree(tmp_path, image_folder="elsewhere/coco")
    with pytest.raises(DataError, match=r"COCO's train2014 images .* images= says \(MISSING\)"):
        _train(tmp_path)
    assert _train(tmp_path, images=tmp_path / "elsewhere" / "coco").image(0).shape == (72, 96, 3)


def test_the_published_name_of_the_validation_split_is_understood(tmp_path: Path) -> None:
    data = load_dataset("refcoco", "val-test", make_refer_tree(tmp_path))
    assert data.split == "val"
    assert data.reference(0).ref_id == 6


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    image = _train(make_refer_tree(tmp_path, grey=True)).image(0)
    assert image.shape == (72, 96, 3)
    assert (image[..., 0] == image[..., 1]).all()


def test_exif_orientation_is_not_applied_since_coco_annotates_raw_pixels(tmp_path: Path) -> None:
    make_refer_tree(tmp_path)
    file = _first_image(tmp_path)
    before = _train(tmp_path).image(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    segment, jpeg = exif.tobytes(), file.read_bytes()
    file.write_bytes(jpeg[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + jpeg[2:])
    with Image.open(file) as image:
        assert ImageOps.exif_transpose(image).size == (72, 96)
    assert (_train(tmp_path).image(0) == before).all()
    assert _train(tmp_path).mask(0).shape == before.shape[:2]


def test_opening_a_data_set_decodes_no_image(tmp_path: Path) -> None:
    make_refer_tree(tmp_path)
    for file in (tmp_path / IMAGE_FOLDER).iterdir():
        file.write_bytes(b"")
    assert len(_train(tmp_path)) == 6


def test_unknown_names_and_splits_list_the_known_ones(tmp_path: Path) -> None:
    make_refer_tree(tmp_path)
    with pytest.raises(DataError, match="'refcoc' is unknown") as error:
        load_dataset("refcoc", "val", tmp_path)
    assert all(name in str(error.value) for name in DATASETS)
    with pytest.raises(DataError, match=r"split='test' is unknown; .* has train, val, testA, testB"):
        load_dataset("refcoco", "test", tmp_path)
    with pytest.raises(DataError, match="on_error='ignore' is unknown"):
        _train(tmp_path, on_error="ignore")
    with pytest.raises(DataError, match="needs root="):
        load_dataset("refcoco", "val")


def test_a_wrong_root_is_one_error_that_lists_what_is_expected_and_missing(tmp_path: Path) -> None:
    make_refer_tree(tmp_path)
    (tmp_path / "refcoco" / "instances.json").unlink()
    with pytest.raises(DataError) as error:
        _train(tmp_path)
    assert "refcoco/refs(unc).p (found)" in str(error.value)
    assert "refcoco/instances.json (MISSING)" in str(error.value)
    with pytest.raises(DataError, match="There is no such folder"):
        _train(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"Did you mean root=.*one level up"):
        _train(tmp_path / "refcoco")


def test_a_missing_image_is_an_error_at_once_that_names_the_reference_and_the_mend(tmp_path: Path) -> None:
    make_refer_tree(tmp_path)
    _first_image(tmp_path).unlink()
    with pytest.raises(DataError) as error:
        _train(tmp_path)
    for part in ("missing image", "ref_id 0", "ann_id 1", FIRST_IMAGE, "images=", "on_error='skip'", "3 missing image"):
        assert part in str(error.value)


def test_an_image_of_another_size_is_an_error_that_names_both_sizes(tmp_path: Path) -> None:
    make_refer_tree(tmp_path)
    Image.new("RGB", (96, 70)).save(_first_image(tmp_path))
    data = _train(tmp_path)
    for read in (data.image, data.mask):
        with pytest.raises(DataError, match=r"size mismatch at ref_id 1 .*96 x 70 pixels .*for 96 x 72.*original COCO"):
            read(1)
    assert data.mask(3).any()


def test_run_lengths_of_another_size_are_an_error_at_once(tmp_path: Path) -> None:
    make_refer_tree(tmp_path, change_instances=_segment({"size": [96, 72], "counts": [0, 96 * 72]}))
    with pytest.raises(DataError, match=r"size mismatch at ref_id 0 .*\[96, 72\], but the image is \[72, 96\]"):
        _train(tmp_path)


@pytest.mark.parametrize(
    "segmentation",
    [[], [[]], [[3, 4, 5, 6]], {"size": [72, 96], "counts": [72 * 96]}, [[1.1, 1.1, 1.2, 1.1, 1.2, 1.2]]],
    ids=["no polygon", "no point", "a line", "empty crowd", "within a pixel"],
)
def test_an_empty_mask_is_an_error_never_an_empty_array(tmp_path: Path, segmentation: Any) -> None:
    make_refer_tree(tmp_path, change_instances=_segment(segmentation))
    with pytest.raises(DataError, match=r"empty mask at ref_id 0 \(ann_id 1"):
        _train(tmp_path).mask(0)


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 2, 3, 4, 5]],
        [["1", 2, 3, 4, 5, 6]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [[1, 2, 3, 4, 1e9, 6]],
        [{"size": [72, 96], "counts": [0, 72 * 96]}],
        {"size": [72, 96], "counts": [1, 2]},
        {"size": [72, 96], "counts": [-1, 72 * 96 + 1]},
        {"size": [72, 96], "counts": [0.5]},
        {"size": [72, 96], "counts": "zzzz"},
        {"size": [72, 96], "counts": "\x80"},
        {"size": [72, 96], "counts": ""},
        {"size": [72, 96]},
    ],
    ids=str,
)
def test_a_malformed_segmentation_is_an_error_at_once(tmp_path: Path, segmentation: Any) -> None:
    make_refer_tree(tmp_path, change_instances=_segment(segmentation))
    with pytest.raises(DataError, match=r"bad annotation at ref_id 0 .*correct its segmentation"):
        _train(tmp_path)


@pytest.mark.parametrize("sentence", ["", "  \t"])
def test_an_empty_sentence_is_an_error_at_once(tmp_path: Path, sentence: str) -> None:
    make_refer_tree(tmp_path, change_refs=_edit(sentences=[{"sent": "a block"}, {"sent": sentence}]))
    with pytest.raises(DataError, match="empty sentence at ref_id 0"):
        _train(tmp_path)


def test_skipping_leaves_out_exactly_the_unusable_and_counts_them(tmp_path: Path) -> None:
    def change(instances: dict[str, Any]) -> None:
        instances["annotations"][0]["segmentation"] = []
        instances["annotations"][1]["segmentation"] = [[1, 2, 3]]
        instances["annotations"][7]["segmentation"] = [[1.1, 1.1, 1.2, 1.1, 1.2, 1.2]]

    def change_refs(refs: list[dict[str, Any]]) -> None:
        refs[2]["sentences"][0]["sent"] = " "

    make_refer_tree(tmp_path, images_per_split=6, change_instances=change, change_refs=change_refs)
    images = sorted((tmp_path / IMAGE_FOLDER).iterdir())
    images[1].unlink()
    images[3].write_bytes(b"not a JPEG")
    Image.new("RGB", (5, 5)).save(images[4])
    data = _train(tmp_path, on_error="skip")
    assert data.skipped == {
        "empty mask": [0, 7],
        "bad annotation": [1],
        "empty sentence": [2],
        "missing image": [3, 4, 5],
        "unreadable image": [9, 10, 11],
        "size mismatch": [12, 13, 14],
    }
    assert [data.reference(i).ref_id for i in range(len(data))] == [6, 8, 15, 16, 17]
    for index in range(len(data)):
        assert data.mask(index).shape == data.image(index).shape[:2]


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    make_refer_tree(tmp_path)
    for file in (tmp_path / IMAGE_FOLDER).iterdir():
        file.unlink()
    with pytest.raises(DataError, match="every one of its 6 references is unusable: 6 missing image"):
        _train(tmp_path, on_error="skip")


def test_a_cut_off_image_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    make_refer_tree(tmp_path)
    file = _first_image(tmp_path)
    file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(DataError, match=r"unreadable image at ref_id 0 .*download the file again"):
        _train(tmp_path).image(0)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _train(make_refer_tree(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"unreadable image at ref_id 0 .*decompression bomb"):
        data.image(0)


def test_an_annotated_image_size_out_of_bounds_allocates_nothing(tmp_path: Path) -> None:
    make_refer_tree(tmp_path, change_instances=lambda all: all["images"][0].update(height=10**6, width=10**6))
    with pytest.raises(DataError, match=r"bad annotation at ref_id 0 .*out of bounds"):
        _train(tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/secret.jpg", "a/../../b.jpg", "..\\b.jpg", "C:\\b.jpg", "", "a\0b"]
)
def test_no_file_name_leaves_the_folder_of_images(tmp_path: Path, name: str) -> None:
    make_refer_tree(tmp_path, change_instances=lambda all: all["images"][0].update(file_name=name))
    with pytest.raises(DataError, match=r"image 581000, has file_name .* leaves the folder of images"):
        _train(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_id": None}, "reference number 0, lacks the key 'ref_id'"),
        ({"ref_id": 1.5}, "reference number 0, has 'ref_id' of type float, but it must be int or str"),
        ({"ref_id": 1}, "holds ref_id 1 twice"),
        ({"split": None}, "ref_id 0, lacks the key 'split'"),
        ({"ann_id": None}, "ref_id 0, lacks the key 'ann_id'"),
        ({"image_id": [1]}, "ref_id 0, has 'image_id' of type list"),
        ({"sentences": None}, "ref_id 0, lacks the key 'sentences'"),
        ({"sentences": []}, "ref_id 0, has no sentences"),
        ({"sentences": "a block"}, "ref_id 0, has 'sentences' of type str"),
        ({"sentences": ["a block"]}, "ref_id 0, sentence number 0, is str, but must be a dict"),
        ({"sentences": [{"raw": "a block"}]}, "ref_id 0, sentence number 0, lacks the key 'sent'"),
        ({"sentences": [{"sent": 3}]}, "sentence number 0, has 'sent' of type int, but it must be str"),
        ({"ann_id": 999}, "has 'ann_id' 999, but .*instances.json does not"),
        ({"image_id": 999}, "has 'image_id' 999, but .*instances.json does not"),
        ({"image_id": 581001}, "ref_id 0, is about image 581001, but .*annotation 1, about image 581000"),
    ],
)
def test_a_wrong_reference_is_named_with_its_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_refer_tree(tmp_path, change_refs=_edit(**changes))
    with pytest.raises(DataError, match=message):
        _train(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all: all.pop("images"), "instances.json lacks the key 'images'"),
        (lambda all: all.update(annotations={}), "has 'annotations' of type dict, but it must be list"),
        (lambda all: all["annotations"][0].pop("segmentation"), "annotation 1, lacks the key 'segmentation'"),
        (lambda all: all["annotations"].insert(0, 3), "annotation number 0 is int, but must be a dict"),
        (lambda all: all["images"][0].pop("height"), "image 581000, lacks the key 'height'"),
        (lambda all: all["images"][0].update(width="96"), "image 581000, has 'width' of type str"),
    ],
)
def test_a_wrong_annotation_file_is_named_with_its_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    make_refer_tree(tmp_path, change_instances=change)
    with pytest.raises(DataError, match=message):
        _train(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"a"', "[" * 100_000, '{"images": [], "annotations": []'])
def test_a_damaged_annotation_file_is_one_error(tmp_path: Path, text: str) -> None:
    make_refer_tree(tmp_path)
    (tmp_path / "refcoco" / "instances.json").write_text(text)
    with pytest.raises(DataError, match=r"instances\.json"):
        _train(tmp_path)


@pytest.mark.parametrize("value", [{}, 3, [3], [], None])
def test_a_pickle_of_something_else_is_one_error(tmp_path: Path, value: Any) -> None:
    make_refer_tree(tmp_path)
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match=r"refs\(unc\)\.p"):
        _train(tmp_path)


def test_keys_that_are_not_used_may_be_absent(tmp_path: Path) -> None:
    def strip(refs: list[dict[str, Any]]) -> None:
        for ref in refs:
            for key in ("file_name", "category_id", "sent_ids"):
                del ref[key]
            ref["sentences"] = tuple({"sent": sentence["sent"]} for sentence in ref["sentences"])

    assert _train(make_refer_tree(tmp_path, change_refs=strip)).mask(0).any()


def test_overlapping_polygons_merge_and_do_not_cancel_or_add() -> None:
    square, same = [2.0, 2, 8, 2, 8, 8, 2, 8], [2.0, 2, 8, 2, 8, 8, 2, 8]
    once = annotations.decode(annotations.encode([square], 10, 12))
    twice = annotations.decode(annotations.encode([square, same], 10, 12))
    assert once.dtype == bool
    assert once.sum() == 36
    assert (once == twice).all()


def test_run_lengths_decode_as_pycocotools_decodes_them() -> None:
    rng = np.random.default_rng(0)
    for density in (0.02, 0.3, 0.5, 0.98, 1.0):
        for _ in range(20):
            height, width = (int(side) for side in rng.integers(1, 60, 2))
            mask = np.asfortranarray(rng.random((height, width)) < density, np.uint8)
            code = coco.encode(mask)
            compressed = {"size": [height, width], "counts": code["counts"].decode()}
            result = annotations.encode(compressed, height, width)
            assert result == (code if mask.any() else None)
            plain = json.loads(
                json.dumps({"size": [height, width], "counts": annotations.checked(compressed, height, width)})
            )
            assert annotations.encode(plain, height, width) == result
