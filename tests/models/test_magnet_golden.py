"""MagNet against numbers that the released code produced, and against its released state dict."""

from __future__ import annotations

import argparse
import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fastris.dispatch import use_impl
from fastris.models import registry
from fastris.models.magnet.config import STAGES, MagNetConfig
from fastris.models.magnet.model import MagNet
from fastris.weights.load import load_model

pytest.importorskip("transformers", reason="MagNet's text encoder is BERT: pip install 'fastris[magnet]'")

DATA = Path(__file__).parents[1] / "golden"
OUTPUTS, GRADIENTS = 5e-5, 1e-4
"""Largest errors of each tensor's largest value, and of gradients in float64. In float32 the released code is within
1e-5 of itself in float64."""
NOISE = (
    "image_lang_att.f_key.0.bias",
    "attention.self.key.bias",
)
"""Gradients that are 0 in exact arithmetic: a softmax drops a constant, an instance norm a bias."""
LANGUAGE_NOISE = ("f_value.0.bias", "W.0.bias")
MODES = {"compat": "released", "intended": "intended"}


class Golden:
    """The golden file: its configuration, models that hold its weights, and its numbers by name."""

    def __init__(self) -> None:
        with safe_open(DATA / "magnet_tiny.safetensors", "pt") as file:
            self.metadata = {name: _parsed(text) for name, text in file.metadata().items()}
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        given = self.metadata["config"]
        bert = {name: value for name, value in given["bert"].items() if "dropout" not in name and "eps" not in name}
        self.fields = {
            "bert": bert,
            "word_len": given["L"],
            "drop_path": 0.0,
            "conv_dim": given["d"],
            "decoder_heads": given["nheads"],
            "pixel_layers": given["enc_layers"],
            "pixel_ffn": given["pixel_ffn"],
            "query_layers": given["dec_layers"],
            "query_ffn": given["dec_ffn"],
            **{name: given[name] for name in ("embed_dim", "depths", "num_heads", "window")},
        }

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix + "/"): v for k, v in self.tensors.items() if k.startswith(prefix + "/")}

    def model(self, mode: str) -> MagNet:
        model = registry.create(MagNetConfig(**self.fields, language_mask=MODES[mode])).eval()
        own = model.state_dict()
        weights = {name: tensor for name, tensor in own.items() if name.endswith("relative_position_index")}
        weights |= {name: tensor.float() for name, tensor in self.group("param").items()}
        model.load_state_dict(weights)
        return model

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Image and tokens."""
        given = self.group("in")
        assert torch.equal(given["ids"] != 0, given["attention"] != 0)
        return given["image"].float(), given["ids"].long()

    @functools.cache  # noqa: B019 - one small file
    def stages(self, mode: str) -> dict[str, Tensor]:
        """What every stage answers, by the file's names and in its layouts."""
        image, tokens = self.inputs
        with torch.no_grad():
            return {name: tensor.detach() for name, tensor in trace(self.model(mode), image, tokens).items()}


def _parsed(text: str):
    return json.loads(text) if text[0] in '{["' else text


def trace(model: MagNet, image: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Every boundary of a forward pass, under the golden file's names."""
    found: dict[str, Tensor] = {}
    valid, vision, language = tokens != 0, model.image_model, model.language_model
    x = vision.patch_embed(image)
    words, mask = language.embed(tokens, valid)
    found |= {"img/stem": x.flatten(1, 2), "txt/stem": words}
    maps = []
    for number, stage in enumerate(vision.layers):
        n = number + 1
        x = stage.blocks(x)
        words = language.part(number, STAGES, words, mask)
        found |= {f"img/stage{n}": x.flatten(1, 2), f"txt/stage{n}": words}
        seen = stage.see(x, words, valid)
        pooled = stage.pooled(x, words, valid)
        found |= {f"img/pyramid{n}_{k}": each for k, each in enumerate(pooled)}
        heard = language.pwams[number](words, x.flatten(1, 2), valid)
        found |= {f"txt/pwam{n}": heard, f"txt/residual{n}": language.norms[number](heard)}
        words = language.listen(number, words, x.flatten(1, 2), valid)
        x = stage.pass_on(x, seen.residual)
        found |= {f"img/pwam{n}": seen.residual, f"s{n}": seen.mixed}
        found |= {f"img/next{n}": x.flatten(1, 2), f"txt/next{n}": words}
        maps.append(seen.mixed)
    decoder = model.classifier.pixel_decoder
    levels, pixels = decoder(maps)
    found |= {f"pixel{number}": level for number, level in enumerate(levels)}
    found["mask_features"] = decoder.mask_features(pixels)  # the model folds it
    scored = model.classifier(tuple(maps), all_outputs=True)
    found["pred_masks"] = scored.logits.transpose(0, 1)[:, :, None]
    found["pred_logits"] = model.classifier.predictor.class_embed(scored.queries).transpose(0, 1)[:, :, None]
    found["score"] = torch.nn.functional.interpolate(
        scored.logits[:, -1:], image.shape[-2:], mode="bilinear", align_corners=True
    ).sigmoid()
    return found


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest error, of the largest expected value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12))


@pytest.mark.parametrize("mode", MODES)
def test_every_stage_matches_the_released_code(golden, mode):
    expected = golden.group(mode)
    found = golden.stages(mode)
    assert set(expected) - set(found) == {"J", "grads"}
    errors = {name: error(found[name], expected[name]) for name in expected.keys() - {"J", "grads"}}
    assert max(errors.values()) < OUTPUTS, {name: e for name, e in errors.items() if e >= OUTPUTS}


@pytest.mark.parametrize("mode", MODES)
def test_the_model_itself_answers_as_released(golden, mode):
    image, tokens = golden.inputs
    model = golden.model(mode)
    assert error(model(image, tokens).sigmoid(), golden.tensors[f"{mode}/score"]) < OUTPUTS
    alone = model(image[1:], tokens[1:, :5])  # is padded to the released length again
    assert error(alone.sigmoid(), golden.tensors[f"{mode}/score"][1:]) < OUTPUTS


def row(parameter: Tensor) -> Tensor:
    """A gradient row of the golden file."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    flat, last = gradient.flatten(), parameter.numel() - 1
    places = [round(i * last / 7) for i in range(8)]
    return torch.stack([flat.norm(), (gradient * parameter.detach()).sum(), flat.sum(), *flat[places]])


@functools.cache
def gradient_rows(golden: Golden, mode: str, impl: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """J, the rows of all parameters that have a gradient, and the gradients, in float64."""
    model = golden.model(mode).double().requires_grad_(True)
    image, tokens = golden.inputs
    probe = {name: tensor.double() for name, tensor in golden.group("probe").items()}
    with use_impl(impl):
        found = trace(model, image.double(), tokens)
    objective = (found["pred_masks"] * probe["masks"]).mean() + (found["pred_logits"] * probe["classes"]).mean()
    objective = objective + (found["txt/next4"] * probe["text"]).mean()
    for number in range(STAGES):
        objective = objective + (found[f"txt/residual{number + 1}"] * probe["residuals"][number]).mean()
    objective.backward()
    parameters = dict(model.named_parameters())
    names = golden.metadata["grad_names"]
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return objective.detach(), torch.stack([row(parameters[name]) for name in names]), gradients


@pytest.mark.parametrize("mode", MODES)
def test_every_gradient_matches_the_released_code(golden, mode):
    objective, rows, gradients = gradient_rows(golden, mode, "torch")
    expected, names = golden.tensors[f"{mode}/grads"].double(), golden.metadata["grad_names"]
    assert abs(float(objective / golden.tensors[f"{mode}/J"].double()) - 1) < OUTPUTS
    assert set(names) | set(golden.metadata["no_grad"]) == set(golden.group("param"))
    assert set(gradients) <= set(names)
    parameters = golden.group("param")
    errors, largest = {}, float(expected[:, 0].max())
    for name, mine, theirs in zip(names, rows, expected, strict=True):
        if is_noise(name, mode):
            assert max(float(mine[0]), float(theirs[0])) < 2e-6 * largest, name
            continue
        value = parameters[name].double()
        norm = theirs[0]
        scale = torch.stack([norm, norm * value.norm(), norm * value.numel() ** 0.5, *[norm] * 8])
        errors[name] = float(((mine - theirs).abs() / scale).max())
    assert len(errors) > 650
    assert max(errors.values()) < GRADIENTS, {name: e for name, e in errors.items() if e >= GRADIENTS}


def is_noise(name: str, mode: str) -> bool:
    if name.endswith(NOISE):
        return True
    if not name.startswith("language_model.pwams."):
        return False
    silent = ("f_query.0.weight", "f_query.0.bias", "f_key.0.weight") if mode == "compat" else ()
    return name.endswith(LANGUAGE_NOISE + silent)


@pytest.mark.parametrize("mode", MODES)
def test_fast_paths_equal_the_published_formulas_in_float64(golden, mode):
    fast, published = (gradient_rows(golden, mode, impl) for impl in ("torch", "reference"))
    assert fast[2].keys() == published[2].keys()
    assert error(fast[0].reshape(1), published[0].reshape(1)) < 1e-10
    errors = {
        name: error(gradient, published[2][name]) for name, gradient in fast[2].items() if not is_noise(name, mode)
    }
    assert max(errors.values()) < 1e-10, {name: e for name, e in errors.items() if e >= 1e-10}


def test_released_rule_has_no_gradient_of_queries_and_keys(golden):
    _, _, gradients = gradient_rows(golden, "compat", "torch")
    assert not [n for n in gradients if n.startswith("language_model.pwams") and ("f_query" in n or "f_key" in n)]


def test_released_size_has_the_released_names_shapes_and_number_of_parameters():
    with torch.device("meta"):
        model = registry.create("magnet_swin_b")
    shapes = json.loads((DATA / "magnet_state_dict_shapes.json").read_text())["magnet_swin_b_bert_base"]
    found = {name: [list(tensor.shape), str(tensor.dtype)[6:]] for name, tensor in model.state_dict().items()}
    assert found == shapes
    assert len(shapes) == 1310 and sum(p.numel() for p in model.parameters()) == 296_984_954
    inferred = type(model).infer_config(model.state_dict())
    assert inferred == MagNetConfig(language_mask="released")


def test_released_checkpoint_is_read_strictly_and_computes_as_released(golden, tmp_path):
    model = golden.model("compat")
    state = dict(model.state_dict())
    torch.save({"model": state, "args": argparse.Namespace(window12=True)}, tmp_path / "magnet_refcoco.pth")
    loaded = load_model(tmp_path / "magnet_refcoco.pth", copy.copy(model.config))
    image, tokens = golden.inputs
    assert error(loaded(image, tokens).sigmoid(), golden.tensors["compat/score"]) < OUTPUTS
    plain = load_model(tmp_path / "magnet_refcoco.pth")
    assert (plain.config.language_mask, plain.config.class_score) == ("released", "off")
    del state["lang_proj.bias"]
    torch.save({"model": state}, tmp_path / "lacking.pth")
    with pytest.raises(ValueError, match=r"missing \(1\): lang_proj\.bias"):
        load_model(tmp_path / "lacking.pth", model.config)
