from __future__ import annotations

import base64
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_trees import content, make_lmdb_tree, save_mask
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastris.data import DataError, ReferringDataset, load_dataset
from fastris.data.formats import annotation as annotations

pytest.importorskip("lmdb")


class Areas(Dataset):
    """Pixels of each mask."""

    def __init__(self, data: ReferringDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        return int(self.data.mask(index).sum())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_lmdb_records_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    make_lmdb_tree(tmp_path, protocol=protocol)
    data = load_dataset("refcoco", "train", tmp_path)
    assert content(data) == content(load_dataset("refcoco", "train", tmp_path / "source"))


def test_an_lmdb_record_that_names_a_function_is_refused_and_runs_nothing(tmp_path: Path) -> None:

    class Opens:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    make_lmdb_tree(tmp_path, change=lambda record: record.update(cat=Opens()))
    data = load_dataset("refcoco", "train", tmp_path)
    with pytest.raises(DataError, match="mkdir, which was refused"):
        data.image(0)
    assert not (tmp_path / "made").exists()


ARROW_LENGTH = zlib.decompress(  # of pyarrow 10: serialize(2)
    base64.b85decode(
        b"c-n<f!3_c-5FAcC$%Pmm7sJB>d>SjT5F0S@rw^Z&=fh&`;2f6ag2cp4V0Q*~U<de)iScF*f(Cf>Si-Sl7)uNy$KC2qTJwXwMC-_Ur(DN%=h`"
        b"d2oUb>CMpDj7Nuk_@>b<g7m;SNU-g0)(eutIz!yM($BXLjG3(7MXlX7e{@_+2irMaKXqhgPZPVPkw3o9CNc4}bl#f9X}Nj)=_m$s@4@0zpF_#c"
        b"{k@^qv7E6g9<Rdd$-2Ou9ChX"
    )
)


def test_pyarrow_serialised_lmdb_is_told_the_way_to_convert_it(tmp_path: Path) -> None:
    make_lmdb_tree(tmp_path, dumps=lambda value: ARROW_LENGTH)
    with pytest.raises(DataError) as error:
        load_dataset("refcoco", "train", tmp_path)
    path = str(tmp_path / "lmdb" / "refcoco" / "train.lmdb")
    for part in (path, "pyarrow.serialize", 'pip install "pyarrow==10.0.1"', "pickle.dumps(pyarrow.deserialize(value)"):
        assert part in str(error.value)


def test_lmdb_files_are_shared_with_forked_workers_and_other_data_sets(tmp_path: Path) -> None:
    make_lmdb_tree(tmp_path)
    data, again = (load_dataset("refcoco", "train", tmp_path) for _ in range(2))
    before = content(data)
    areas = [int(data.mask(index).sum()) for index in range(6)]
    loader = DataLoader(Areas(data), batch_size=2, num_workers=2, multiprocessing_context="fork")
    assert torch.cat(list(loader)).tolist() == areas
    del data, loader
    assert content(again) == before


def test_lmdb_masks_come_from_the_folder_in_every_split_but_train(tmp_path: Path) -> None:
    make_lmdb_tree(tmp_path)
    for file in (tmp_path / "masks" / "refcoco").iterdir():
        with Image.open(file) as image:
            mask = np.zeros((image.height, image.width), bool)
        mask[0, 0] = True
        save_mask(mask, file)
    assert load_dataset("refcoco", "train", tmp_path).mask(0).sum() > 1
    assert load_dataset("refcoco", "val", tmp_path).mask(0).sum() == 1
    (tmp_path / "masks" / "refcoco" / "6.png").unlink()
    with pytest.raises(DataError, match=r"masks/refcoco/6.png, which is no file there; give masks="):
        load_dataset("refcoco", "val", tmp_path).mask(0)


def test_lmdb_without_a_folder_of_masks_uses_those_of_its_records(tmp_path: Path) -> None:
    make_lmdb_tree(tmp_path, with_masks=False)
    data = load_dataset("refcoco", "val", tmp_path)
    assert content(data) == content(load_dataset("refcoco", "val", tmp_path / "source"))


def test_the_published_masks_of_overlapping_polygons_are_whole(tmp_path: Path) -> None:
    """The published tool adds polygons up before it multiplies by 255: 2 * 255 becomes 254 in a PNG."""
    grey = np.array([[0, 255, 254], [1, 0, 0]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "mask.png")
    code = annotations.encode(annotations.MaskPicture(tmp_path / "mask.png"), 2, 3)
    assert annotations.decode(code).tolist() == [[False, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sents": []}, "one or more texts"),
        ({"sents": [b"a"]}, "one or more texts"),
        ({"num_sents": 7}, "has num_sents 7, but 3 sentences"),
        ({"seg_id": None}, "'seg_id' of type NoneType"),
        ({"img": 5}, "'img' of type int"),
        ({"img": b"\xff\xd8 not a JPEG"}, "unreadable image"),
        ({"mask": b"no PNG"}, "the mask cannot be decoded as PNG"),
        ({"img_name": "../a.jpg"}, "has img_name '../a.jpg', which leaves the folder of images"),
        ({"sents": [" ", "a", "b"]}, "empty sentence"),
    ],
)
def test_a_wrong_lmdb_record_is_one_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_lmdb_tree(tmp_path, change=lambda record: record.update(changes))
    data = load_dataset("refcoco", "train", tmp_path)
    with pytest.raises(DataError, match=message):
        data.mask(0)
        data.image(0)
    with pytest.raises(DataError, match="every one of its 6 references is unusable"):
        load_dataset("refcoco", "train", tmp_path, on_error="skip")


def test_a_cut_off_lmdb_file_is_an_error_and_no_crash(tmp_path: Path) -> None:
    file = make_lmdb_tree(tmp_path) / "lmdb" / "refcoco" / "train.lmdb"
    whole = file.read_bytes()
    for size in (0, 100, 5000, 9000, len(whole) // 2, len(whole) - 4096):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"train\.lmdb"):
            load_dataset("refcoco", "train", tmp_path)
