"""Moving averages of a run's weights, by timm: what is validated, and kept as the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastris.models.base import ReferringModel


class AveragedWeights:
    """A copy of a model in eval mode whose weights and statistics follow the model's, each step a little.

    Args:
        model: as it is trained, on its device.
        decay: of the average; the first steps count more (timm's warm-up: after n steps 1 - n^(-2/3), if that is less).

    Raises:
        RuntimeError: timm is not installed.
    """

    def __init__(self, model: ReferringModel, decay: float):
        try:
            from timm.utils import ModelEmaV3
        except ImportError:
            raise RuntimeError("ema needs timm, which is not installed; run pip install timm, or give ema=0") from None
        self._average: Any = ModelEmaV3(model, decay=decay, use_warmup=True)

    @property
    def model(self) -> ReferringModel:
        """The model with averaged weights."""
        found: ReferringModel = self._average.module
        return found

    def update(self, model: ReferringModel, step: int) -> None:
        """Follow the model after optimizer step `step`, from 1."""
        self._average.update(model, step=step)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, for a run that goes on."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.model.load_state_dict(state)
