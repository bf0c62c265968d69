"""A system of one's own offers its parts to strangers' models by its row in the registry, and by nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from strangers import Stranger
from torch import Tensor, nn

import fastris
from fastris.dropin.parts import DropIn, Part, normal
from fastris.models import registry
from fastris.models.config import ModelConfig
from fastris.models.registry import System


@dataclass
class ToyConfig(ModelConfig):
    system: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toy"
    input_size: int = 32
    word_len: int = 12


def gate_forward(gate: Any, x: Tensor) -> Tensor:
    return x + x * gate.opening(x).sigmoid()


def gates(gate: Any) -> list[Part]:
    obstacle = None if isinstance(gate.opening, nn.Linear) else "its opening is not torch.nn.Linear"
    return [Part("Gate", gate_forward, lambda g: (normal(3, g.opening.in_features),), lambda x: x.ndim == 2, obstacle)]


def almost(module: nn.Module) -> str | None:
    return "Gate-like, not supported: it lacks `opening`" if hasattr(module, "gate_closing") else None


PARTS = DropIn(by_name=((("opening",), gates),), near=almost)


class Gate(nn.Module):
    def __init__(self, width: int = 4, factor: float = 1.0):
        super().__init__()
        self.opening, self.factor = nn.Linear(width, width), factor

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.factor + self.opening(x).sigmoid())


class Closing(nn.Module):
    gate_closing = True


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(registry, "SYSTEMS", dict(registry.SYSTEMS))
    registry.register(System("toy", f"{__name__}:Toy", f"{__name__}:ToyConfig", ("toy",), f"{__name__}:PARTS"))


def test_parts_of_a_registered_system_are_replaced_beside_the_others():
    torch.manual_seed(0)
    model = nn.ModuleDict({"gate": Gate(), "head": Stranger().head})
    x = torch.randn(5, 4)
    expected = model["gate"](x)
    report = fastris.patch(model)
    assert report.replaced == [("gate", "Gate"), ("head", "Projector")] and not report.left_alone
    assert "no other CRIS-style or Toy-style part was found" in str(report)
    assert model["gate"].forward.__func__ is not Gate.forward
    torch.testing.assert_close(model["gate"](x), expected)
    assert fastris.unpatch(model) == 2


def test_report_names_the_system_whose_part_a_module_is_not():
    model = nn.ModuleDict({"open": Gate(factor=1.001), "odd": Gate(), "closing": Closing()})
    model["odd"].opening = nn.Sequential(nn.Linear(4, 4))
    assert fastris.patch(model).left_alone == [
        ("open", "Gate-like, but in eval mode its values or gradients differ from Toy's"),
        ("odd", "Gate-like, but its opening is not torch.nn.Linear"),
        ("closing", "Gate-like, not supported: it lacks `opening`"),
    ]


def test_gate_is_a_strangers_module_like_any_other_where_its_system_is_not_registered(monkeypatch):
    monkeypatch.delitem(registry.SYSTEMS, "toy")
    report = fastris.patch(nn.Sequential(Gate()))
    assert not report.replaced and not report.left_alone and "no other CRIS-style part was found" in str(report)
