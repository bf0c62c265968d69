"""What a launch has to do, whoever does it: numbers that it writes, products, and bytes that move at least once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from fastris.kernels.configs import kernel_name
from fastris.kernels.launch import Launch


@dataclass(frozen=True)
class Work:
    """Of one launch.

    Attributes:
        outputs: numbers written.
        products: multiply-adds of the matrix products, where the algebra asks for them; none for stencils.
        bytes: of every tensor read or written, once.
        padded: multiply-adds of one block's tiles, with what they have too much.
        trips: how often a block goes round its loops, outermost first.
        samples: of the batch.
    """

    outputs: int
    products: int
    bytes: int
    padded: int
    trips: tuple[int, ...]
    samples: int


def work(launch: Launch) -> Work:
    """The work of a recorded launch. Raises KeyError for a kernel that is not in the table."""
    return _WORK[kernel_name(launch.kernel)](_Sizes(launch))


class _Sizes:
    """A launch's arguments as attributes; ``size("x_ptr")`` is the bytes of an element, 0 where there is none."""

    def __init__(self, launch: Launch):
        self._arguments: Mapping[str, Any] = dict(launch.arguments)
        self.blocks: int = prod(launch.grid)
        self.first: int = launch.grid[0]

    def __getattr__(self, name: str) -> Any:
        return self._arguments[name]

    def size(self, *pointers: str) -> int:
        given = (self._arguments.get(each) for each in pointers)
        return sum(pointer.dtype.itemsize for pointer in given if pointer is not None)


def _up(count: int, step: int) -> int:
    return -(-count // step)


def _taps(a: _Sizes) -> Work:
    samples = a.first // _up(a.pixels, a.BLOCK_P)
    steps = _up(a.channels, a.BLOCK_C)
    columns, outputs = a.columns, samples * a.columns * a.pixels
    moved = samples * (a.channels * a.pixels * a.size("x_ptr") + 4 * columns * a.channels) + 4 * outputs
    return Work(outputs, outputs * a.channels, moved, a.BLOCK_N * a.BLOCK_P * a.BLOCK_C * steps, (steps,), samples)


def _shift(a: _Sizes) -> Work:
    """The shift-add, with the loss or without."""
    pixels = a.height * a.width
    planes = a.first // _up(pixels, a.BLOCK)
    maps = ("loss_ptr", "slope_ptr", "positive_ptr", "negative_ptr") if "loss_ptr" in a._arguments else ()
    each = 4 * a.SIZE**2 + a.size("logits_ptr", *maps)
    return Work(planes * pixels, 0, planes * pixels * each, 0, (), planes)


def _features_gradient(a: _Sizes) -> Work:
    samples, steps = a.first // _up(a.pixels, a.BLOCK_P), _up(a.columns, a.BLOCK_N)
    outputs = samples * a.channels * a.pixels  # x is read where a norm needs it
    small = samples * 4 * (a.columns // a.SIZE**2 * a.pixels + a.columns * a.channels)
    padded = a.BLOCK_P * a.BLOCK_C * a.BLOCK_N * steps
    return Work(outputs, outputs * a.columns, outputs * a.size("dx_ptr", "x_ptr") + small, padded, (steps,), samples)


def _kernel_gradient(a: _Sizes) -> Work:
    sums = 1 if a.norm_ptr is None else 2
    outputs = sums * a.first * a.columns * a.channels  # partial sums of every chunk
    features = a.batch * a.channels * a.pixels
    moved = features * a.size("x_ptr") + 4 * (a.batch * a.columns // a.SIZE**2 * a.pixels + outputs)
    padded = sums * a.BLOCK_N * a.BLOCK_C * a.BLOCK_P * a.TILES
    return Work(outputs, sums * features * a.columns, moved, padded, (a.TILES,), a.batch)


def _gather(a: _Sizes) -> Work:
    maps, samples = a.pixels * a.channels, a.pixels // (a.height * a.width)
    return Work(4 * maps, 0, maps * (4 * a.size("out_ptr") + 9 * a.size("taps_ptr")), 0, (), samples)


def _adjoint(a: _Sizes) -> Work:
    maps, samples = a.pixels * a.channels, a.pixels // (a.height * a.width)
    return Work(9 * maps, 0, maps * (4 * a.size("dout_ptr") + 9 * a.size("dtaps_ptr")), 0, (), samples)


def _weights(written: str, pixels: tuple[str, ...], words: str, read: tuple[str, ...]) -> Callable[[_Sizes], Work]:
    """Kernels that multiply pixels by words: attention weights [rows, heads * words] are written."""

    def count(a: _Sizes) -> Work:
        samples, columns, steps = a.first // _up(a.rows, a.BLOCK_N), a.HEADS * a.WORDS, _up(a.DIM, a.BLOCK_D)
        outputs = samples * a.rows * columns
        wide = samples * a.rows * a.DIM * a.size(*pixels) + samples * columns * a.DIM * a.size(words)
        moved = wide + outputs * a.size(written, *read)
        padded = a.BLOCK_N * a.GROUP * a.WORDS * a.BLOCK_D * steps
        return Work(outputs, outputs * a.DIM, moved, padded, (steps,), samples)

    return count


def _rows(pixels: tuple[str, ...], weights: str, words: str) -> Callable[[_Sizes], Work]:
    """Kernels that multiply weights by words, twice: pixels [rows, DIM] are written."""

    def count(a: _Sizes) -> Work:
        samples = a.first // _up(a.rows, a.BLOCK_N)
        outputs = samples * a.rows * a.DIM
        moved = outputs * a.size(*pixels) + samples * a.COLUMNS * (a.rows * a.size(weights) + a.DIM * a.size(words))
        trips = _up(a.DIM, a.BLOCK_D), _up(a.COLUMNS, a.BLOCK_K)
        padded = 2 * a.BLOCK_N * a.BLOCK_D * a.BLOCK_K * prod(trips)
        return Work(outputs, 2 * outputs * a.COLUMNS, moved, padded, trips, samples)

    return count


def _of_queries(*rows: str) -> Callable[[_Sizes], Work]:
    """Deformable attention's kernels by query; ``rows`` are the tensors of the output's size."""

    def count(a: _Sizes) -> Work:
        groups, samples = a.first // _up(a.queries, a.BLOCK_Q), a.LEVELS * a.POINTS
        outputs = groups * a.queries * a.width
        of_samples = a.size(*(name for name in _OF_SAMPLES if name in a._arguments)) + 2 * a.size("offsets_ptr")
        moved = outputs * a.size(*rows) + groups * a.queries * samples * of_samples
        moved += groups * a.pixels * a.width * a.size("value_ptr")
        return Work(outputs, 0, moved, 0, (samples,), groups // a.heads)

    return count


def _of_pixels(a: _Sizes) -> Work:
    """The maps' gradient; a cell's samples are taken to be as many in all cells."""
    groups, samples = a.first // _up(a.pixels, a.BLOCK_P), a.queries * a.count
    outputs = groups * a.pixels * a.width
    read = groups * (a.queries * a.width * a.size("upstream_ptr") + samples * (8 + 3 * 4))
    return Work(outputs, 0, outputs * a.size("d_value_ptr") + read, 0, (_up(samples, a.cells),), groups // a.heads)


def _kept(a: _Sizes) -> Work:
    return Work(a.count, 0, a.count, 0, (), 1)


def _pool(a: _Sizes) -> Work:
    """Scores and weighted sums of the same pixels; every chunk leaves partial sums."""
    chunks, kept = a.first // a.batch, 4 * a.batch * a.rows * a.pixels
    products = 2 * a.batch * a.rows * a.pixels * a.channels
    outputs = a.first * a.rows * (a.channels + 2) + a.batch * a.rows * a.pixels
    moved = a.batch * a.channels * (a.pixels * a.size("y_ptr") + 4 * a.rows * (1 + chunks)) + 2 * kept
    padded = 2 * a.BLOCK_R * a.BLOCK_K * a.BLOCK_P * a.TILES
    return Work(outputs, products, moved, padded, (a.TILES,), a.batch)


def _pool_gradients(a: _Sizes) -> Work:
    chunks, kept = a.first // a.batch, 4 * a.batch * a.rows * a.pixels
    passes = 4 if a.WANTS_PIXELS else 2
    maps = a.batch * a.pixels * a.channels
    written = maps if a.WANTS_PIXELS else 0
    moved = maps * a.size("y_ptr") + written * a.size("dy_ptr") + 2 * kept
    moved += 4 * a.batch * a.channels * a.rows * (2 + chunks)
    padded = passes * a.BLOCK_R * a.BLOCK_K * a.BLOCK_P * a.TILES
    outputs = written + a.first * a.rows * a.channels + a.batch * a.rows * a.pixels
    return Work(outputs, passes * maps * a.rows, moved, padded, (a.TILES,), a.batch)


def _read(a: _Sizes) -> Work:
    """Bidirectional attention, or its columns alone: scores, and every tile's partial sums."""
    tile, samples = a.BLOCK_N, a.first // _up(a.pixels, a.BLOCK_N)
    sums = a.first * a.words * (3 + a.words * a.BOTH + a.value_width)
    outputs = samples * a.words * a.pixels + sums
    wide = samples * a.pixels * (a.width * a.size("source_ptr") + a.value_width * a.size("value_ptr"))
    few = 4 * samples * a.words * (a.width + 1)
    products = samples * a.pixels * a.words * (a.width + a.value_width)
    steps = _up(a.width, a.BLOCK_D)
    padded = _split(a, "source_ptr") * a.BLOCK_L * tile * a.BLOCK_D * (steps + _up(a.value_width, a.BLOCK_D))
    return Work(outputs, products, wide + few + 4 * outputs, padded, (steps,), samples)


def _centre_rows(a: _Sizes) -> Work:
    samples = a.first // _up(a.pixels, a.BLOCK_N)
    outputs = samples * a.words * a.pixels
    return Work(outputs, 0, outputs * a.size("rows_ptr", "scores_ptr"), 0, (), samples)


def _read_backward(a: _Sizes) -> Work:
    samples, steps = a.first // _up(a.pixels, a.BLOCK_N), _up(a.value_width, a.BLOCK_D)
    outputs = samples * a.words * a.pixels
    wide = samples * a.value_width * (a.pixels * a.size("value_ptr") + 4 * a.words)
    moved = wide + outputs * a.size("d_scores_ptr", "columns_ptr", "scores_ptr", "d_rows_ptr")
    padded = _split(a, "value_ptr") * a.BLOCK_L * a.BLOCK_N * a.BLOCK_D * steps
    return Work(2 * outputs, outputs * a.value_width, moved, padded, (steps,), samples)


def _split(a: _Sizes, pixels: str) -> int:
    """How many products stand for one, where few rows are two numbers each."""
    return 1 if a.size(pixels) == 4 else 2


def _region_sums(a: _Sizes) -> Work:
    """Of the map, both regions' weights, and the partial sums."""
    outputs = 2 * a.first * a.channels
    moved = a.batch * a.pixels * (a.channels * a.size("x_ptr") + 8) + 4 * outputs
    return Work(outputs, 0, moved, 0, (a.TILES,), a.batch)


def _region_spread(a: _Sizes) -> Work:
    outputs = a.batch * a.pixels * a.channels
    return Work(outputs, 0, outputs * a.size("d_x_ptr") + 8 * a.batch * (a.pixels + a.channels), 0, (), a.batch)


def _contrast_sums(a: _Sizes) -> Work:
    """Of the map, its cells' weights, and the partial sums; with the cells' norms where these are made."""
    rows = 3 if a.size("norms_ptr") == 0 else 2
    cells = a.batch * a.pixels
    outputs = rows * a.first * a.channels + (cells if rows == 2 else 0)
    moved = cells * (a.channels * a.size("x_ptr") + 4 * rows) + 4 * outputs
    trips = (a.TILES,) if rows == 3 else (_up(a.channels, a.BLOCK_C),)
    return Work(outputs, 0, moved, 0, trips, a.batch)


def _contrast_cells(a: _Sizes) -> Work:
    """The cosines of three vectors a sample, or the map's gradient."""
    backward = a.size("d_x_ptr") > 0
    cells, rows = a.batch * a.pixels, 5 if backward else 3
    outputs = cells * (a.channels if backward else rows)
    moved = cells * a.channels * a.size("x_ptr", "d_x_ptr") + 4 * rows * a.batch * a.channels
    moved += 4 * cells * (rows + (2 if backward else 1))
    return Work(outputs, 0, moved, 0, (_up(a.channels, a.BLOCK_C),), a.batch)


def _pixel_words(a: _Sizes) -> Work:
    """Pixel-word attention: both products with the words' rows and both with their factor, and the maps once."""
    samples = a.first // _up(a.pixels, a.BLOCK_N)
    wide, narrow = samples * a.pixels * a.channels, samples * a.pixels * a.words
    backward = a.size("upstream_ptr") > 0
    maps = ("out_ptr", "seen_ptr", "source_ptr", "d_seen_ptr", "d_heard_ptr", "upstream_ptr")
    of_words = ("raw_ptr", "weights_ptr", "d_scores_ptr")
    few = samples * a.words * a.channels * a.size("keys_ptr", "answers_ptr") + 4 * samples * a.words * (a.words + 4)
    moved = wide * a.size(*maps) + narrow * a.size(*of_words) + few + 4 * samples * a.pixels * (3 if backward else 1)
    outputs = (3 * wide + 2 * narrow) if backward else wide + narrow
    steps, factors = _up(a.channels, a.BLOCK_D), 2 if backward else 1
    padded = a.BLOCK_N * a.WORDS * (2 * a.BLOCK_D * steps + factors * a.WORDS)
    return Work(outputs, 2 * wide * a.words + factors * narrow * a.words, moved, padded, (steps,), samples)


def _cholesky(a: _Sizes) -> Work:
    outputs = a.first * a.words**2
    return Work(outputs, 0, outputs * a.size("factor_ptr", "gram_ptr"), 0, (a.words,), a.first)


def _few_words(a: _Sizes) -> Work:
    """Word attention: the answer, or the query's gradient with the weights and the scores' gradient."""
    samples = a.first // _up(a.rows, a.BLOCK_N)
    backward = "upstream_ptr" in a._arguments
    pixels, columns, passes = samples * a.rows, a.HEADS * a.words, 3 if backward else 2
    wide = pixels * a.DIM * (a.size("query_ptr") + a.size("upstream_ptr", "d_query_ptr" if backward else "answer_ptr"))
    narrow = pixels * columns * a.size("weights_ptr", "d_scores_ptr")
    few = samples * columns * (a.DIM * a.size("keys_ptr", "values_ptr") + 4)
    padded = a.HEADS * a.BLOCK_N * a.WORDS * ((passes - 1) * _up(a.DIM, a.BLOCK_D) * a.BLOCK_D + a.WIDTH)
    outputs = pixels * (a.DIM + (2 * columns if backward else 0))
    return Work(outputs, passes * pixels * a.DIM * columns, wide + narrow + few, padded, (a.HEADS,), samples)


def _upsampled_loss(a: _Sizes) -> Work:
    """Every pixel of the large maps is made once; the masks are read by each of their maps, and count once."""
    cells = (a.height + 1) * (a.width + 1)
    planes = a.first // _up(cells, a.BLOCK // a.PHASES)
    outputs = a.first + (0 if a.corners_ptr is None else 4 * planes * cells)
    samples = planes // a.maps
    read = planes * a.height * a.width * a.size("logits_ptr") + samples * a.rows * a.columns * a.size("target_ptr")
    return Work(outputs, 0, read + 4 * outputs, 0, (a.steps, a.tall), samples)


def _corners(a: _Sizes) -> Work:
    pixels = a.height * a.width
    planes = a.first // _up(pixels, a.BLOCK)
    read = 16 * planes * (a.height + 1) * (a.width + 1)
    return Work(planes * pixels, 0, read + 4 * planes * pixels, 0, (), planes)


_OF_SAMPLES = ("logits_ptr", "d_logits_ptr", "cell_ptr", "shares_ptr", "shares_ptr", "shares_ptr", "d_offsets_ptr",
               "d_offsets_ptr")  # fmt: skip
_BACKWARD = ("x_ptr", "upstream_ptr", "d_x_ptr", "query_ptr", "d_query_ptr")
_WORK: dict[str, Callable[[_Sizes], Work]] = {
    "similarity taps": _taps,
    "similarity shift": _shift,
    "similarity features gradient": _features_gradient,
    "similarity kernel gradient": _kernel_gradient,
    "contrastive loss": _shift,
    "upsample_conv gather": _gather,
    "upsample_conv adjoint": _adjoint,
    "cross_attention scores": _weights("weights_ptr", ("x_ptr",), "keys_ptr", ()),
    "cross_attention output": _rows(("x_ptr", "y_ptr"), "weights_ptr", "values_ptr"),
    "cross_attention branch backward": _rows(("upstream_ptr", "d_gathered_ptr"), "weights_ptr", "values_ptr"),
    "cross_attention weights backward": _weights("d_scores_ptr", ("d_gathered_ptr",), "values_ptr", ("weights_ptr",)),
    "cross_attention query backward": _rows(_BACKWARD, "d_scores_ptr", "keys_ptr"),
    "cross_attention kept": _kept,
    "few_query_attention pool": _pool,
    "few_query_attention gradients": _pool_gradients,
    "bidirectional_attention scores": _read,
    "bidirectional_attention rows": _centre_rows,
    "bidirectional_attention backward": _read_backward,
    "deformable_attention samples": _of_queries("out_ptr"),
    "deformable_attention query backward": _of_queries("upstream_ptr"),
    "deformable_attention pixel backward": _of_pixels,
    "region_contrast sums": _region_sums,
    "region_contrast spread": _region_spread,
    "pixel_word_attention factor": _cholesky,
    "pixel_word_attention listen": _pixel_words,
    "pixel_word_attention gradients": _pixel_words,
    "pixel_contrast norms": _contrast_sums,
    "pixel_contrast cosines": _contrast_cells,
    "pixel_contrast sums": _contrast_sums,
    "pixel_contrast gradient": _contrast_cells,
    "word_attention answer": _few_words,
    "word_attention gradients": _few_words,
    "upsampled_bce loss": _upsampled_loss,
    "upsampled_bce corners": _corners,
}
