"""A limit on the memory of parsed annotations: small files can grow to a thousand times their size.

The memory is estimated from above, as Python objects: the characters of texts, `NUMBER` bytes for a value, `LIST` and
`TABLE` for containers. COCO's instances_train2014.json (0.33 GB) comes to 2.3 GB, RefCOCO's largest split to 0.5 GB.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastris.data.base import DataError

LARGEST = 4 << 30  # bytes; COCO's annotations of train2017, 0.45 GB of JSON, come to 3.2 GB
FREE = 256 << 20  # bytes that a file of any size may take
RATIO = 24  # further bytes for each byte of the files; published ones need 3 to 10

ERROR = 1000  # bytes of the error that is kept for a bad record
TABLE, LIST, NUMBER, QUOTE = 184, 88, 40, 32  # bytes of a dict, a list, a value, and half of a text's overhead


class TooMuch(DataError):
    """The parsed files of a split would take more memory than its `Budget`: an error of the whole split."""


class Budget:
    """The memory, in bytes, that the parsed files of one split may still take.

    Args:
        source: the file or folder, for the error's message.
        size: total size of the files, in bytes.
    """

    def __init__(self, source: object, size: int):
        self._source, self._size = source, size
        self.limit = self.left = min(LARGEST, FREE + RATIO * size)

    def spend(self, count: int) -> None:
        """Take `count` bytes.

        Raises:
            TooMuch: that is more than is left; the message names the file and the limit.
        """
        self.left -= count
        if self.left < 0:
            raise TooMuch(
                f"{self._source} has {self._size} bytes, which unfold to more than {self.limit} bytes of memory, the "
                "limit for it; check where it comes from, or divide a data set that is this large into several splits"
            )


def of_texts(texts: Sequence[str]) -> int:
    """Bytes of texts and of their stripped copies."""
    return sum(map(len, texts)) * 2 + (2 * QUOTE + NUMBER) * len(texts)


def of_json(data: bytes | str) -> int:
    """Bytes that a JSON text takes at most once it is parsed, estimated from its punctuation before it is.

    Only these signs begin containers and values in JSON. Signs inside of texts are counted too: an overestimate.
    """
    width = 2 if data.isascii() else 5
    if isinstance(data, str):
        tables, lists, values, quotes = (data.count(sign) for sign in '{[,"')
    elif len(data) < 1 << 16:
        tables, lists, values, quotes = (data.count(sign) for sign in (b"{", b"[", b",", b'"'))
    else:
        tables, lists, values, quotes = _count(data, b'{[,"')
    return width * len(data) + TABLE * tables + LIST * lists + NUMBER * (values + 1) + QUOTE * quotes


def _count(data: bytes, signs: bytes) -> list[int]:
    """How often each of the signs occurs. The data is read in pieces that fit the cache."""
    import numpy as np

    values, piece, counts = np.frombuffer(data, np.uint8), 1 << 18, [0] * len(signs)
    for start in range(0, len(values), piece):
        part = values[start : start + piece]
        for number, sign in enumerate(signs):
            counts[number] += int(np.count_nonzero(part == sign))
    return counts
