"""The model against numbers that the published code produced, and against its published state dicts."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from bounds import EXACT
from safetensors import safe_open

from fastris import CRIS, CRISConfig, use_impl

DATA = Path(__file__).parents[1] / "golden"
GOLDEN = ["cris_tiny_square", "cris_tiny_wide"]

LOST_IN_FLOAT32 = {"cris_tiny_square": 4.5e-4, "cris_tiny_wide": 5e-5}
"""Largest error of a gradient in the files, which are in float32, against float64: the same number on every machine."""

CPU_INFO = Path("/proc/cpuinfo")
ADDS_AS_PUBLISHED = CPU_INFO.exists() and "GenuineIntel" in CPU_INFO.read_text()
"""Whether float32 sums are split as they were when the files were made: the libraries choose by the processor."""


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
        self.name = name
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

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Image, tokens and mask."""
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.group("in").items()}

    def stages(self, impl: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """What every stage answers in eval mode."""
        model, inputs = copy.deepcopy(self.model).to(dtype).eval(), self.inputs(dtype)
        with torch.no_grad(), use_impl(impl):
            c3, c4, c5 = model.backbone.encode_image(inputs["image"])
            word, state = model.backbone.encode_text(inputs["tokens"])
            neck = model.neck((c3, c4, c5), state)
            decoder = model.decoder(neck, word, inputs["tokens"] == 0).reshape(neck.shape)
            stages = {"c3": c3, "c4": c4, "c5": c5, "word": word, "state": state, "neck": neck, "decoder": decoder}
            return stages | {"logits": model(inputs["image"], inputs["tokens"])}

    @functools.cache  # noqa: B019 - two small files, and the steps are compared in several ways
    def step(
        self, impl: str, dtype: torch.dtype = torch.float32, threads: int = 1
    ) -> dict[str, dict[str, torch.Tensor]]:
        """The values, gradients and statistics of a training step."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        model, inputs = copy.deepcopy(self.model).to(dtype).train(), self.inputs(dtype)
        with use_impl(impl):
            logits, target, loss = model(inputs["image"], inputs["tokens"], inputs["mask"])
            loss.backward()
        torch.set_num_threads(before)
        assert not logits.requires_grad
        return {
            "values": {"logits": logits, "target": target, "loss": loss.detach()},
            "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            "statistics": dict(model.named_buffers()),
        }


@pytest.fixture(params=GOLDEN, scope="module")
def golden(request) -> Golden:
    return Golden(request.param)


def assert_all_within_scale(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 1e-5
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # A key's bias shifts all scores of a query alike, so its gradient is zero and both sides hold rounding noise:
        # the noise is measured against the query bias's gradient.
        like = expected.get(name.replace("k_proj.bias", "q_proj.bias"))
        assert_within_scale(actual[name], value, name, relative, like=like)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_every_stage_in_eval_mode_matches_the_published_code(golden, impl):
    assert_all_within_scale(golden.stages(impl), golden.group("eval"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_training_step_matches_the_published_code_in_loss_and_statistics(golden, impl, dtype):
    step, train = golden.step(impl, dtype), golden.group("train")
    assert_all_within_scale(step["values"], {name: train[name] for name in ("logits", "target", "loss")})
    statistics = golden.group("train/buffer")
    assert_all_within_scale({name: step["statistics"][name] for name in statistics}, statistics)


@pytest.mark.skipif(not ADDS_AS_PUBLISHED, reason="float32 gradients to 1e-5 need the processor's kind of the files")
def test_training_step_matches_the_published_code_in_every_gradient(golden):
    # One rounding more or less in a BatchNorm over three samples moves some gradients by 4e-4 of their scale, so the
    # sums must be split over as many threads as they were then.
    assert_all_within_scale(golden.step("reference", threads=2)["gradients"], golden.group("train/grad"))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_published_gradients_differ_from_float64_by_what_float32_lost(golden, impl):
    gradients = golden.step(impl, torch.float64)["gradients"]
    assert_all_within_scale(gradients, golden.group("train/grad"), LOST_IN_FLOAT32[golden.name])


def test_default_path_in_float64_is_the_reference_in_every_stage_gradient_and_statistic(golden):
    assert_all_within_scale(golden.stages("torch", torch.float64), golden.stages("reference", torch.float64), EXACT)
    ours, published = (golden.step(impl, torch.float64) for impl in ("torch", "reference"))
    for kind, expected in published.items():
        assert_all_within_scale(ours[kind], expected, EXACT)


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
