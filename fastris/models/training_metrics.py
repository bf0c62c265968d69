"""What systems with Mask Grounding and an alignment loss tell of a training step besides its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastris.nn.mask_grounding import METRICS


class TrainingMetrics:
    """The metric hooks of :class:`fastris.models.base.ReferringModel`, for a model with these two parts, or None."""

    grounding: Any
    cal: Any

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Those of Mask Grounding and of the alignment loss, where they are on."""
        return (*(METRICS if self.grounding else ()), *(("alignment_loss",) if self.cal else ()))

    def take_metrics(self) -> dict[str, float]:
        """See :attr:`metric_names`."""
        found = {} if self.grounding is None else self.grounding.take_metrics()
        return found if self.cal is None else found | {"alignment_loss": self.cal.meter.take()}

    def metrics_state(self) -> dict[str, Tensor]:
        """How often each word was hidden so far."""
        return {} if self.grounding is None else self.grounding.tally.state()

    def restore_metrics(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`metrics_state` returned."""
        if self.grounding is not None:
            self.grounding.tally.restore(state)
