"""LMDB files as the published tools of CRIS and ETRIS write them: one pickled record per reference, image included.

A file holds, under `__keys__` and `__len__`, the list of its keys and their number, and under each key a dict with
`img` and `mask` (an encoded JPEG and PNG), `sents`, `num_sents`, `seg_id` (REFER's ref_id), `img_name` and `cat`.
Source: `tools/folder2lmdb.py` and `utils/dataset.py` of CRIS.
"""

from __future__ import annotations

import errno
import os
import shlex
import threading
from pathlib import Path
from typing import Any

from fastris.data.base import DataError, Reference, shown
from fastris.data.formats.annotated import (
    BAD_ANNOTATION,
    SPLIT_ALIASES,
    Annotated,
    AnnotatedDataset,
    OnError,
    UnusableReference,
)
from fastris.data.formats.annotation import MaskPicture
from fastris.data.formats.budget import Budget, of_texts
from fastris.data.formats.extras import need
from fastris.data.formats.records import ID, field, stripped
from fastris.data.formats.unpickle import loads_plain
from fastris.data.formats.usable import Seen
from fastris.data.paths import GONE, Look, is_dir, place, regular, safe_name, unreadable

LAYOUT = "the LMDB layout of CRIS"
MAX_RECORD = 256 << 20  # bytes; an encoded image and its mask
_ARROW = b"\xff\xff\xff\xff"  # marks what pyarrow.serialize wrote, after 16 bytes of counts
_ONE_AT_A_TIME = threading.RLock()  # LMDB: a process may have a file open only once
os.register_at_fork(after_in_child=lambda: globals().update(_ONE_AT_A_TIME=threading.RLock()))
_RECIPE = """\
{path} was written with pyarrow.serialize, which pyarrow has dropped. Rewrite it once, with Python 3.7 to 3.11, \
and only if you trust its author: unlike fastris, pyarrow.deserialize can run code that a file holds.
  python -m venv old && old/bin/pip install "pyarrow==10.0.1" "numpy<2" lmdb
  old/bin/python -c "
import lmdb, os, pickle, pyarrow, sys
path = sys.argv[1]
old = lmdb.open(path, subdir=os.path.isdir(path), readonly=True, lock=False)
new = lmdb.open(path + '.new', subdir=False, map_size=1 << 40)
with old.begin() as source, new.begin(write=True) as target:
    for key, value in source.cursor():
        target.put(key, pickle.dumps(pyarrow.deserialize(value), 4))
" {quoted} && mv {quoted}.new {quoted}"""


def find_file(name: str, root: Path, split: str) -> Path | None:
    """Find `SPLIT.lmdb`, a file or a folder of LMDB: `root` itself, in it, or in the published layout's folders."""
    if root.name == f"{split}.lmdb" and root.exists():
        return root
    places = [root / name, root / "lmdb" / name, root]
    return next((place / f"{split}.lmdb" for place in places if (place / f"{split}.lmdb").exists()), None)


class LmdbDataset(AnnotatedDataset):
    """One split of an LMDB data set.

    Expected under `root`: `lmdb/NAME/SPLIT.lmdb`, `NAME/SPLIT.lmdb` or `SPLIT.lmdb`; or `root` is that file. As
    published, the mask is the one in the record for "train", and `masks/NAME/SEG_ID.png` for any other split; where
    there is no such folder it is the one in the record.

    Records are read on access, so an unusable one raises then, unless `on_error="skip"`, which reads the whole file
    when it is opened. The pickles are read by `formats/unpickle.py`, which executes nothing; LMDB's own pages are read
    by the library lmdb, which trusts them: a damaged or forged page can end the process. Open only files of people you
    trust, or run `fastris data convert` once where a crash does no harm: what it writes has no such pages.

    Args:
        name: the data set's name, as the folders spell it.
        split: "train", "val", ...; "val-test" means "val".
        root: the folder described above, or the file.
        masks: the folder of the masks, if it is another one.
        on_error: "raise" or "skip"; only "skip" detects two records with the same id.

    Raises:
        DataError: no such file, a damaged one, or one that was written with pyarrow.serialize (the message says how to
            convert it); or the library lmdb is not installed.
    """

    def __init__(
        self,
        name: str,
        split: str,
        root: str | Path,
        *,
        images: str | Path | None = None,
        masks: str | Path | None = None,
        on_error: OnError = "raise",
    ):
        root = Path(root).expanduser()
        split = SPLIT_ALIASES.get(split, split)
        path = find_file(name, root, split)
        if path is None:
            splits = ", ".join(self.splits(name, root)) or "none"
            raise DataError(f"split={split!r} is unknown; LMDB files under {root} for {name!r}: {splits}")
        if images is not None:
            raise DataError(f"images={str(images)!r} is not used: {path} holds its images; leave it out")
        self.path = path
        self._masks = None if split == "train" and masks is None else _mask_folder(name, path, masks)
        self._look = Look()
        self._last: tuple[int, Annotated] | None = None
        self._keys = self._read_keys()
        self._budget = Budget(path, regular(_data_of(path)))
        self._references: list[Reference | None] = [None] * len(self._keys)
        super().__init__(name, split, [], "defer")
        self._order = self._usable_order(on_error)

    @classmethod
    def finds(cls, name: str, root: Path) -> bool:
        """Whether LMDB files of this data set lie under `root`."""
        return bool(cls.splits(name, root))

    @classmethod
    def splits(cls, name: str, root: Path, images: str | Path | None = None) -> list[str]:
        """The splits that there are files for; the published ones first."""
        if root.suffix == ".lmdb":
            return [root.stem] if root.exists() else []
        found = {path.stem for place in (root / name, root / "lmdb" / name, root) for path in place.glob("*.lmdb")}
        return sorted(found, key=lambda split: (split != "train", split != "val", split))

    def __len__(self) -> int:
        return len(self._order)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}

    def reference(self, index: int) -> Reference:
        number = self._order[index]
        reference = self._references[number]
        if reference is None:
            reference = self._item(index).reference
            self._budget.spend(of_texts(reference.sentences))
            self._references[number] = reference
        return reference

    def _item(self, index: int) -> Annotated:
        number = self._order[index]
        if self._last is None or self._last[0] != number:
            self._last = number, self._read(number)
        return self._last[1]

    def _usable_order(self, on_error: OnError) -> list[int]:
        """Numbers of the records that are kept."""
        everything = list(range(len(self._keys)))
        if on_error != "skip":
            return everything
        self._order, order, unusable, seen = everything, [], [], Seen()
        for number in everything:
            try:
                error = self._first_problem(self._item(number), seen, on_error)
            except UnusableReference as found:
                error = found
            if error is None:
                order.append(number)
            else:
                unusable.append(error)
        self._account(unusable, len(everything), len(order), on_error)
        return order

    def _read(self, number: int) -> Annotated:
        """Read record `number` and check its form."""
        key = self._keys[number]
        where = f"{self.path}, record {key.decode(errors='replace')!r},"
        data = self._get(key)
        try:
            if data is None:
                raise DataError(f"{where} is missing; download the file again")
            item = self._build(_unpickle(data, self.path, where), where, len(data))
        except UnusableReference:
            raise
        except DataError as error:
            raise UnusableReference(str(error), ref_id=f"record {number}") from error
        self._rule.sentences(item)
        return item

    def _build(self, record: Any, where: str, size: int) -> Annotated:
        seg_id = field(record, "seg_id", ID, where, LAYOUT)
        sentences = field(record, "sents", (list, tuple), where, LAYOUT)
        if not sentences or not all(type(sentence) is str for sentence in sentences):
            raise DataError(f"{where} has sents {shown(sentences)}, which must be one or more texts")
        if record.get("num_sents", len(sentences)) != len(sentences):
            raise DataError(f"{where} has num_sents {shown(record['num_sents'])}, but {len(sentences)} sentences")
        name = safe_name(field(record, "img_name", (str,), where, LAYOUT), where, key="img_name")
        return Annotated(
            Reference(seg_id, name, stripped(sentences, Budget(where.rstrip(","), size)), name),
            f"{self.path.name}, ",
            Path(name),
            0,
            0,
            MaskPicture(self._mask_of(record, seg_id, where)),
            pixels=_encoded(record, "img", where),
        )

    def _mask_of(self, record: Any, seg_id: int | str, where: str) -> Path | bytes:
        if self._masks is None:
            return _encoded(record, "mask", where)
        stated = f"{seg_id}.png"
        name, found = place(self._masks, stated, where, self._look, key="seg_id", kind="the folder of masks")
        file = self._masks / name
        if found:
            why = "" if found == GONE else f" ({found})"
            message = f"{where} has its mask in {file}, which is no file there{why}; give masks=, its folder"
            raise UnusableReference(message, BAD_ANNOTATION, seg_id)
        return file

    def _read_keys(self) -> list[bytes]:
        where = f"{self.path}, "
        length, keys = (self._get(key) for key in (b"__len__", b"__keys__"))
        if length is None or keys is None:
            raise DataError(f"{self.path} lacks __len__ or __keys__; was it written by CRIS's folder2lmdb.py?")
        count, names = (_unpickle(data, self.path, where) for data in (length, keys))
        names = [name.encode() if type(name) is str else name for name in names] if type(names) is list else []
        if type(count) is not int or count != len(names) or not all(type(name) is bytes and name for name in names):
            raise DataError(f"{self.path} states __len__ {shown(count)}, but has {len(names)} keys; download it again")
        return names

    def _get(self, key: bytes) -> bytes | None:
        return _fetch(self.path, key)


def _mask_folder(name: str, path: Path, masks: str | Path | None) -> Path | None:
    """The folder of the PNGs: the one given, or `masks/NAME` beside `lmdb/NAME` or `NAME`, or beside the file."""
    if masks is not None:
        folder = Path(masks).expanduser()
        if not is_dir(folder):
            raise DataError(f"masks={str(masks)!r} is no folder; give the one that holds SEG_ID.png")
        return folder
    bases = [path.parent.parent.parent, path.parent.parent, path.parent]
    folders = [base / "masks" / name for base in bases] + [path.parent / "masks"]
    return next((folder for folder in folders if is_dir(folder)), None)


def _encoded(record: Any, key: str, where: str) -> bytes:
    value = field(record, key, (bytes, str), where, LAYOUT)
    return value.encode("latin-1", "replace") if type(value) is str else value  # Python 2 wrote bytes as a string


def _unpickle(data: bytes, path: Path, where: str) -> Any:
    if data[:1] != b"\x80" and data[16:20] == _ARROW:
        raise DataError(_RECIPE.format(path=path, quoted=shlex.quote(str(path))), lines=True)
    return loads_plain(data, where.rstrip(", "), binary=True)


def _data_of(path: Path) -> Path:
    """The file with LMDB's pages: `path` itself, or `data.mdb` in it."""
    return path / "data.mdb" if path.is_dir() else path


def _fetch(path: Path, key: bytes) -> bytes | None:
    """The value of a key, or None. The LMDB environment is opened and closed for each call, which takes some 0.1 ms.

    An open one could neither be shared with another data set of this process nor survive a fork into worker processes.
    """
    lmdb = need("lmdb", "lmdb", "to read LMDB files")
    data = _data_of(path)
    if regular(data) < 8192:
        raise DataError(f"{path} is no LMDB file, or an empty one; download it again")
    try:
        options = {"subdir": path.is_dir(), "readonly": True, "lock": False, "readahead": False}
        with _ONE_AT_A_TIME, lmdb.open(str(path), **options) as env:
            pages, size = env.info()["last_pgno"] + 1, env.stat()["psize"]
            if pages * size > data.stat().st_size:  # LMDB would crash where the file ends
                have = data.stat().st_size
                raise DataError(f"{path} is cut off: {have} of {pages * size} bytes; download it again")
            with env.begin(buffers=True) as transaction:
                value = transaction.get(key)
                if value is not None and len(value) > MAX_RECORD:
                    raise DataError(f"{path}, record {key!r}, has {len(value)} bytes; the limit is {MAX_RECORD}")
                return None if value is None else bytes(value)
    except (lmdb.Error, OSError) as error:
        if not os.access(data, os.R_OK):
            raise unreadable(data, PermissionError(errno.EACCES, "Permission denied")) from error
        raise DataError(f"{path} cannot be read as LMDB ({error}); download it again") from error
