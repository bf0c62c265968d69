"""A letterbox's border is no background to the losses that look at one, and plain runs hear nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import MODEL, Boxes, parts_of, train_config

from fastris import AlignFormer, MagNet
from fastris.models.base import ReferringModel
from fastris.models.cris import model as cris
from fastris.models.cris import training_parts
from fastris.ops import pixel_contrast, region_contrast
from fastris.training import loop
from fastris.training.feed import Feed
from fastris.training.parts import Parts

EXTRA = {name: value for name, value in MODEL.items() if name not in ("input_size", "word_len")}
BOTH = {"instance_contrast": 0.1, "extra": EXTRA | {"alignment_loss": 0.5}}
SIDE = MODEL["input_size"]


def begun(folder, **changes: Any) -> tuple[Parts, dict[str, Tensor]]:
    """A run on images of awkward sizes, and its first batch."""
    parts = parts_of(train_config(folder, batch_size=4, accumulate=2, **changes), Boxes())
    parts.run.model.train()
    return parts, next(iter(Feed(parts.batches.samples, parts.batches.sampler, 0, torch.device("cpu"))))


def border(references: Tensor, cells: int) -> Tensor:
    """Which cells (E, cells, cells) of the square have any part outside the image of each reference."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * SIDE / cells
    found = []
    for index in references.tolist():
        sides = torch.tensor(Boxes.sizes[index // 2], dtype=torch.float64)
        half = sides * SIDE / sides.max() / 2
        rows, columns = ((edges[:-1] < SIDE / 2 - each - 1e-6) | (edges[1:] > SIDE / 2 + each + 1e-6) for each in half)
        found.append(rows[:, None] | columns[None])
    return torch.stack(found)


def spied(real: Callable[..., Tensor], seen: list[tuple[Tensor, Tensor, Any]]) -> Callable[..., Tensor]:
    """A loss that also tells of its features, of their gradient, and what it would be of others."""

    def spy(features: Tensor, *rest: Any, **more: Any) -> Tensor:
        loss = real(features, *rest, **more)
        (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
        seen.append((features.detach(), gradient, lambda changed: real(changed, *rest, **more)))
        return loss

    return spy


@pytest.mark.parametrize("several", [1, 2])
def test_features_on_the_border_get_no_gradient_and_change_nothing(tmp_path, monkeypatch, several):
    parts, batch = begun(tmp_path, expressions_per_image=several, **BOTH)
    seen: dict[str, list[tuple[Tensor, Tensor, Any]]] = {"region_contrast": [], "pixel_contrast": []}
    for module, name in ((cris, "region_contrast"), (training_parts, "pixel_contrast")):
        monkeypatch.setattr(module, name, spied(getattr(module, name), seen[name]))
    loop.train_step(parts.plan, parts.run, batch)
    for calls in seen.values():
        bordered = 0
        for references, (features, gradient, loss) in zip(batch["index"].flatten().chunk(2), calls, strict=True):
            outside = border(references, features.shape[-1])[:, None].expand_as(features)
            bordered += int(outside.sum())
            assert not gradient[outside].any() and gradient[~outside].any()
            assert torch.equal(loss(features), loss(torch.where(outside, torch.randn_like(features), features)))
        assert bordered


def test_a_plain_cris_has_the_batch_and_the_call_that_it_had(tmp_path, monkeypatch):
    parts, batch = begun(tmp_path)
    calls, forward = [], parts.run.model.forward

    def spy(*given, **named):
        calls.append((len(given), set(named)))
        return forward(*given, **named)

    monkeypatch.setattr(parts.run.model, "forward", spy)
    loop.train_step(parts.plan, parts.run, batch)
    assert set(batch) == {"image", "tokens", "mask", "index", "image_id"}
    assert calls == [(3, set())] * 2


def test_squashed_pictures_have_no_border_to_tell_of():
    for kind in (AlignFormer, MagNet):
        config = kind.config_class.preset(next(iter(kind.config_class.presets)))
        assert config.inputs.fit == "squash" and kind.asks_known is ReferringModel.asks_known


@pytest.mark.parametrize("loss", [region_contrast, pixel_contrast])
def test_nothing_changes_where_all_is_known(loss):
    generator = torch.Generator().manual_seed(0)
    features, centres = torch.randn(2, 8, 12, 12, generator=generator), torch.randn(2, 8, generator=generator)
    mask = torch.zeros(2, 1, 48, 48)
    mask[..., :24, 12:] = 1
    assert torch.equal(
        loss(features, centres, mask, known=torch.ones(2, 1, 48, 48).bool()), loss(features, centres, mask)
    )


def test_known_of_another_number_of_images_is_refused(tmp_path):
    parts, batch = begun(tmp_path, **BOTH)
    with pytest.raises(ValueError, match=r"known must be \(4, 1, H, W\) with pixels, one of each image, got \(2, 1"):
        parts.run.model(batch["image"], batch["tokens"], batch["mask"], known=batch["known"][:2])
