"""What fastris.patch finds of CRIS. The registry's row of CRIS names this table; find.py goes by it."""

from __future__ import annotations

from fastris.dropin.cris.decoders import LAYER, decoders, layers, renamed_layers
from fastris.dropin.cris.near import near_miss
from fastris.dropin.cris.necks import NECK, gates, necks
from fastris.dropin.cris.projectors import projectors, renamed_projectors
from fastris.dropin.parts import DropIn

PARTS = DropIn(
    # The neck stands before the projector: necks that hold a projector's attributes as well exist, the reverse does
    # not.
    by_name=(
        (LAYER, layers),
        (("layers", "norm"), decoders),
        (NECK, necks),
        (("vis", "txt"), projectors),
        (("vis", "txt_fc"), projectors),
    ),
    by_make=(gates, renamed_layers, renamed_projectors),
    near=near_miss,
)
