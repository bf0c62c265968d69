"""The model against numbers that the published code produced, and against its published state dicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastris import CRIS, CRISConfig, use_impl

DATA = Path(__file__).parent / "data"
GOLDEN = ["cris_tiny_square", "cris_tiny_wide"]


def assert_within_scale(
    actual: torch.Tensor, expected: torch.Tensor, name: str, relative: float = 1e-5, like: torch.Tensor | None = None
) -> None:
    """The largest error is at most ``relative`` times the largest magnitude of ``like``, by default of ``expected``."""
    scale = (expected if like is None else like).abs().max().clamp_min(1e-12)
    error = (actual.double() - expected.double()).abs().max() / scale
    assert actual.shape == expected.shape and error <= relative, f"{name}: relative error {error:.2e}"


class Golden:
    """One golden file: its configuration, a model that holds its weights, and its numbers by name."""

    def __init__(self, name: str):
        with safe_open(DATA / f"{name}.safetensors", "pt") as file:
            fields = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        image_hw = fields.pop("image_hw")
        fields.pop("batch")
        clip = {k: v for k, v in fields.pop("clip").items() if k not in ("vision_patch_size", "txt_length")}
        self.config = CRISConfig(clip=clip, input_size=image_hw[0], **fields)
        self.model = CRIS(self.config)
        self.model.load_state_dict(self.group("param"))

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix + "/"): v for k, v in self.tensors.items() if k.startswith(prefix + "/")}


@pytest.fixture(autouse=True)
def _published_arithmetic():
    """The published operations in the published order: one rounding more or less in a BatchNorm over three samples
    moves some gradients by 4e-4 of their scale, so the sums must be split over as many threads as they were then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with use_impl("reference"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=GOLDEN)
def golden(request) -> Golden:
    return Golden(request.param)


def test_every_stage_in_eval_mode_matches_the_published_code(golden):
    model, inputs, expected = golden.model.eval(), golden.group("in"), golden.group("eval")
    with torch.no_grad():
        c3, c4, c5 = model.backbone.encode_image(inputs["image"])
        word, state = model.backbone.encode_text(inputs["tokens"])
        neck = model.neck((c3, c4, c5), state)
        decoder = model.decoder(neck, word, inputs["tokens"] == 0).reshape(neck.shape)
        stages = {"c3": c3, "c4": c4, "c5": c5, "word": word, "state": state, "neck": neck, "decoder": decoder}
        stages["logits"] = model(inputs["image"], inputs["tokens"])
    assert stages.keys() == expected.keys()
    for name, value in stages.items():
        assert_within_scale(value, expected[name], name)


def test_training_step_matches_the_published_code_in_loss_gradients_and_statistics(golden):
    model, inputs, expected = golden.model.train(), golden.group("in"), golden.group("train")
    logits, target, loss = model(inputs["image"], inputs["tokens"], inputs["mask"])
    loss.backward()
    assert not logits.requires_grad
    assert_within_scale(logits, expected["logits"], "logits")
    assert_within_scale(target, expected["target"], "target")
    assert_within_scale(loss.detach(), expected["loss"], "loss")

    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == golden.group("train/grad").keys()
    published = golden.group("train/grad")
    for name, gradient in published.items():
        # A key's bias shifts all scores of a query alike, so its gradient is zero and both sides hold rounding noise:
        # the noise is measured against the query bias's gradient.
        like = published.get(name.replace("k_proj.bias", "q_proj.bias"))
        assert_within_scale(gradients[name], gradient, f"gradient of {name}", like=like)
    buffers = dict(model.named_buffers())
    for name, buffer in golden.group("train/buffer").items():
        assert_within_scale(buffers[name].float(), buffer.float(), f"buffer {name}")


@pytest.mark.parametrize("name", ["cris_r50", "cris_r101"])
def test_state_dict_has_exactly_the_published_keys_and_shapes(name):
    with torch.device("meta"):
        model = CRIS(CRISConfig.preset(name))
    shapes = json.loads((DATA / "state_dict_shapes.json").read_text())[name]["state_dict"]
    published = {key: tuple(shape) for key, shape in shapes.items()}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == published


@pytest.mark.parametrize("name", ["cris_r50", "cris_r101"])
def test_presets_are_the_published_configurations(name):
    published = json.loads((DATA / "state_dict_shapes.json").read_text())[name]
    config = CRISConfig.preset(name).to_dict()
    for key, value in published["config"].items():
        assert config[key] == (tuple(value) if isinstance(value, list) else value), key
    for key in config["clip"]:
        value = published["clip"][key]
        assert config["clip"][key] == (tuple(value) if isinstance(value, list) else value), key
