"""COCO's instances: `{"images": [...], "annotations": [...], "categories": [...]}`, as most tools for labelling export.

An object's phrases are its own words where its annotation has any (`pictures.OWN_WORDS`), else its category's name.
Masks are polygons or run lengths; boxes are not taken for masks. `iscrowd` marks a region of several objects, so that
a phrase names it only where crowds are merged. Files are split by their names: `instances_train2017.json`, `val.json`,
`valid/_annotations.coco.json`; a single file whose name tells no split is "train".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastris.data.base import DataError, shown
from fastris.data.formats.annotated import BAD_ANNOTATION, AnnotatedDataset, OnError, Record, UnusableReference
from fastris.data.formats.budget import ERROR, Budget, TooMuch
from fastris.data.formats.pictures import (
    SPLITS,
    Labelled,
    Picture,
    References,
    Shared,
    own_words,
    picture_folder,
    rooted,
    split_name,
    starts_with,
)
from fastris.data.formats.records import ID, field, read_json, stripped
from fastris.data.paths import Look, is_dir, place, regular

LAYOUT = "COCO's layout of instances"
ROBOFLOW = "_annotations.coco"
_COCO = re.compile(rb'^\s*\{.*"(?:images|annotations|categories)"\s*:\s*\[', re.DOTALL)
_TRIED = 20  # pictures that are looked for, to find their folder


class CocoDataset(AnnotatedDataset):
    """One split of COCO instances.

    Expected under `root`: the files in `annotations`, in `root` itself or, as Roboflow writes them, in one folder for
    each split; `root` may also be one such file. The pictures' folder is the first of `images/SPLIT`, `SPLIT`,
    `images`, the file's own and `root` that holds one of them.

    Args:
        name: "folder".
        split: of the files there.
        root: the folder, or a JSON file.
        images: the folder of the pictures.
        several: "skip" or "merge": what to do about phrases that several objects of a picture share.
        on_error: "raise" or "skip", as `AnnotatedDataset` describes.

    Raises:
        DataError: unknown split, two files of one split, damaged files, no folder of pictures, unusable references.
    """

    def __init__(
        self,
        name: str,
        split: str,
        root: str | Path,
        *,
        images: str | Path | None = None,
        several: Shared = "skip",
        on_error: OnError = "raise",
    ):
        root = Path(root).expanduser()
        files, split = _by_split(root), split_name(split)
        if split not in files:
            raise DataError(f"split={split!r} is unknown; the COCO files in {root} have {', '.join(files) or 'none'}")
        look = Look()
        references = References(several, Budget(files[split], regular(files[split])))
        records = list(_read(files[split], split, root, images, references, look))
        super().__init__(name, split, records, on_error, look, references.left_out)

    @classmethod
    def finds(cls, name: str, root: Path) -> bool:
        """Whether there are COCO's instances; they do not name their data set, so it counts as "folder"."""
        return name == "folder" and bool(_files(root))

    @classmethod
    def splits(cls, name: str, root: Path, images: str | Path | None = None) -> list[str]:
        """The splits that the files' names tell."""
        return sorted(_by_split(root), key=lambda split: (split != "train", split != "val", split))


def _files(root: Path) -> list[Path]:
    """The files of instances: those called so, if any are (COCO's captions and keypoints lie beside them), else all."""
    if root.suffix == ".json" and not is_dir(root):
        return [root] if starts_with(root, _COCO) else []
    if any(True for pattern in ("refs(*).p", "grefs(*).json") for _ in root.glob(pattern)):
        return []
    places = ("*.json", "annotations/*.json", f"*/{ROBOFLOW}.json")
    found = [path for pattern in places for path in sorted(root.glob(pattern)) if starts_with(path, _COCO)]
    return [path for path in found if path.stem.startswith("instances_")] or found


def _by_split(root: Path) -> dict[str, Path]:
    """Split -> its file."""
    files, found = _files(root), dict[str, Path]()
    for path in files:
        split = split_name(path.parent.name if path.stem == ROBOFLOW else path.stem)
        if split not in SPLITS and len(files) == 1:
            split = "train"
        if split in found:
            raise DataError(f"{found[split]} and {path} both hold the split {split!r}; rename one of them, or move it")
        found[split] = path
    return found


def _read(
    file: Path, split: str, root: Path, images: str | Path | None, references: References, look: Look
) -> Iterator[Record]:
    content = read_json(file)
    for key in ("images", "annotations"):
        field(content, key, (list,), str(file), LAYOUT)
    root = root if is_dir(root) else root.parent
    names = _categories(content, file, references.budget)
    by_id: dict[int | str, dict[str, Any]] = {}
    for number, image in enumerate(content["images"]):
        image_id = field(image, "id", ID, f"{file}, image number {number},", LAYOUT)
        if by_id.setdefault(image_id, image) is not image:
            raise DataError(f"{file} holds image {shown(image_id)} twice; give every image an id of its own")
    folder = _folder(file, split, root, images, by_id, look)
    images_in = rooted(root, folder)
    objects: dict[int | str, list[Labelled | UnusableReference]] = {}
    for number, annotation in enumerate(content["annotations"]):
        try:
            where = f"{file}, annotation number {number},"
            image_id = field(annotation, "image_id", ID, where, LAYOUT)
            if image_id not in by_id:
                raise DataError(f"{where} is of image {shown(image_id)}, which the file does not list")
            objects.setdefault(image_id, []).append(_labelled(annotation, number, file, names, references.budget))
        except TooMuch:
            raise
        except DataError as error:
            references.budget.spend(ERROR)
            yield (
                error
                if isinstance(error, UnusableReference)
                else UnusableReference(str(error), ref_id=f"annotation number {number}")
            )
    for image_id, labelled in objects.items():
        try:
            picture = _picture(by_id[image_id], image_id, file, folder, images_in, look)
        except DataError as error:
            references.budget.spend(ERROR)
            yield UnusableReference(str(error), ref_id=f"image {image_id}")
            continue
        yield from references.of(picture, labelled)


def _categories(content: dict[str, Any], file: Path, budget: Budget) -> dict[int | str, str]:
    names = {}
    rows = field(content, "categories", (list,), str(file), LAYOUT) if "categories" in content else []
    for number, category in enumerate(rows):
        where = f"{file}, category number {number},"
        names[field(category, "id", ID, where, LAYOUT)] = field(category, "name", (str,), where, LAYOUT)
    return dict(zip(names, stripped(list(names.values()), budget), strict=True))


def _labelled(annotation: Any, number: int, file: Path, names: dict[int | str, str], budget: Budget) -> Labelled:
    where = f"{file}, annotation number {number},"
    ref_id = field(annotation, "id", ID, where, LAYOUT)
    where = f"{file}, annotation {ref_id},"
    phrases = own_words(annotation, where, budget)
    if not phrases:
        category = field(annotation, "category_id", ID, where, LAYOUT)
        if category not in names:
            raise DataError(f"{where} has category_id {shown(category)}, which is none of the file's categories")
        phrases = (names[category].replace("_", " "),)
    segmentation = annotation.get("segmentation")
    if not segmentation:
        message = f"{where} has no segmentation, and a box is no mask; draw its outline, or take the annotation out"
        raise UnusableReference(message, BAD_ANNOTATION, ref_id)
    segmentation = field(annotation, "segmentation", (list, dict), where, LAYOUT)
    crowd = field(annotation, "iscrowd", (int, bool), where, LAYOUT) if "iscrowd" in annotation else 0
    return Labelled(ref_id, phrases, segmentation, f"annotation {ref_id}, ", bool(crowd))


def _picture(
    image: dict[str, Any], image_id: int | str, file: Path, folder: Path, images_in: tuple[Path, str], look: Look
) -> Picture:
    where = f"{file}, image {image_id},"
    stated = field(image, "file_name", (str,), where, LAYOUT).replace("\\", "/")
    name, _ = place(folder, stated, where, look, key="file_name", kind="the folder of images", prefix="images/")
    sides = []
    for key in ("height", "width"):
        side = field(image, key, (int,), where, LAYOUT) if image.get(key) is not None else 0
        if side < 0:
            raise DataError(f"{where} has {key} {side}, but it must be at least 1 pixel")
        sides.append(side)
    height, width = sides if all(sides) else (0, 0)
    return Picture(image_id, images_in[0], images_in[1] + name, height, width)


def _folder(
    file: Path, split: str, root: Path, images: str | Path | None, by_id: dict[int | str, dict[str, Any]], look: Look
) -> Path:
    """The folder of the pictures."""
    if images is not None:
        folder = Path(images).expanduser()
        if not is_dir(folder):
            raise DataError(f"images={str(images)!r} is no folder; give the one that holds the pictures")
        return folder
    told = (file.stem.removeprefix("instances_"), split)
    places = [root / "images" / name for name in told] + [root / name for name in told]
    places += [root / "images", file.parent, root]
    names = [image.get("file_name") for image in list(by_id.values())[:_TRIED]]
    spelled = [name.replace("\\", "/") for name in names if type(name) is str]
    folder_or_none = picture_folder(places, [*spelled, *(name.removeprefix("images/") for name in spelled)], look)
    assert folder_or_none is not None  # the file's own folder is there
    return folder_or_none
