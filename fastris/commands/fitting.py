"""What `fastris train` makes fit, and what it says where it cannot: batch and data, weights and model."""

from __future__ import annotations

from dataclasses import replace

from fastris.commands.train_options import TrainConfig
from fastris.data.base import DataError, ReferringDataset
from fastris.data.formats.extras import MissingLibrary
from fastris.data.held_out import hold_out
from fastris.data.options import has_split, load_split
from fastris.models.config import ModelConfig
from fastris.runtime import distributed
from fastris.weights.architecture import architecture_of, differences


def open_data(
    options: TrainConfig, train_set: ReferringDataset | None, val_set: ReferringDataset | None
) -> tuple[ReferringDataset, ReferringDataset | None]:
    """What the run trains and validates on: the data sets given, those of the options, or a share held out.

    Raises:
        DataError: there is no such data.
    """
    train_set = load_split(options, options.train_split) if train_set is None else train_set
    if not options.evaluate or val_set is not None:
        return train_set, val_set if options.evaluate else None
    try:
        if not options.split or has_split(options, options.val_split):
            return train_set, load_split(options, options.val_split)
    except MissingLibrary:
        raise
    except DataError as error:
        if options.split or options.data_root is None or has_split(options, options.val_split):
            raise
        raise DataError(f"{error}; to validate on a fifth of the training images instead give split=0.2") from error
    return hold_out(train_set, options.split)


def used_references(options: TrainConfig, train_set: ReferringDataset) -> int:
    """Number of references, from the first on, that the run trains on."""
    return min(len(train_set), options.limit_train or len(train_set))


def cut_batch(options: TrainConfig, train_set: ReferringDataset) -> tuple[TrainConfig, tuple[str, ...]]:
    """The options with a batch that is no larger than the data, and a notice of the change; both as before if it fits.

    A batch stays a multiple of what it is split into. One that cannot be cut that far is left to
    :func:`fastris.commands.assemble.make_batches`, which refuses it.
    """
    count, several = used_references(options, train_set), options.expressions_per_image
    if several > 1:
        count = several * sum(any(index < count for index in group) for group in train_set.by_image())
    unit = options.accumulate * several * distributed.world_size()
    most = count // unit * unit
    smallest = options.accumulate * options.smallest_batch
    if options.batch_size <= count or most < smallest:
        return options, ()
    notice = f"batch_size={options.batch_size} is cut to {most}: there are {count} training references"
    if several > 1:
        notice += f", counting {several} for each image"
    return replace(options, batch_size=most), (notice,)


def misfit(options: TrainConfig, wanted: ModelConfig) -> ValueError | None:
    """In one sentence why the weights that the run starts from do not fit its model; None if that cannot be told."""
    held = architecture_of(str(options.weight))
    found = differences(held, wanted) if held is not None else {}
    if held is None or not found:
        return None
    if "system" in found:
        said = f"holds a {held.title} model, and the options ask for {wanted.title}"
    else:
        shown = dict(list(found.items())[:4])
        theirs, ours = (", ".join(f"{name}={pair[which]}" for name, pair in shown.items()) for which in (0, 1))
        said = f"has {theirs}, and the options ask for {ours}"
    given = f"model={options.model}" if options.model else "the model keys"
    return ValueError(f"weight={options.weight} {said}; leave {given} out, and the model is the one of the weights")
