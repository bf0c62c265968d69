"""A process in which CPU tensors stand for a GPU's: the kernels come into question for them, and get a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

import fastris.ops  # noqa: F401 - makes the real proofs known, before they are replaced
from fastris import dispatch
from fastris.preflight import verdicts

CPU = torch.device("cpu")


class Proofs:
    """Proofs of all operators that do what they are told; ``made`` has the operator and dtype of each."""

    def __init__(self, failing: Callable[[str, torch.dtype], None] | None = None):
        self.made: list[tuple[str, torch.dtype]] = []
        self.failing = failing or (lambda operator, dtype: None)

    def of(self, operator: str) -> Callable[[torch.device, torch.dtype], None]:
        def proof(device: torch.device, dtype: torch.dtype) -> None:
            self.made.append((operator, dtype))
            self.failing(operator, dtype)

        return proof


@contextmanager
def pretended_gpu(failing: Callable[[str, torch.dtype], None] | None = None) -> Iterator[Proofs]:
    """Within this block, with no verdicts yet. ``failing`` raises what a proof is to raise."""
    proofs = Proofs(failing)
    operators = [name for name, operator in dispatch.OPERATORS.items() if operator.kernels]
    with (
        mock.patch.object(dispatch, "triton_obstacle", lambda device, dtype: None),
        mock.patch.object(dispatch, "_interpreting", False),
        mock.patch.object(dispatch, "_taken", set()),
        mock.patch.object(dispatch.tuned, "tuning_of", lambda index: None),
        mock.patch.object(dispatch.tuned, "preference", lambda *asked: dispatch.tuned.Preference(True, "pretended")),
        mock.patch.dict(verdicts.settled, clear=True),
        mock.patch.dict(verdicts._proofs, {name: proofs.of(name) for name in operators}),
        mock.patch.object(verdicts, "_told", set()),
    ):
        yield proofs
