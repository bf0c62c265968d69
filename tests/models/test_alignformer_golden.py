"""AlignFormer against numbers that the released code produced, and against its released state dict."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fastris.dispatch import use_impl
from fastris.models import registry
from fastris.models.alignformer.config import AlignFormerConfig
from fastris.models.alignformer.pixel_decoder import Words
from fastris.reference import region_contrast
from fastris.weights.load import load_model

pytest.importorskip("transformers", reason="AlignFormer's text encoder is BERT: pip install 'fastris[alignformer]'")

DATA = Path(__file__).parents[1] / "golden"
OUTPUTS, GRADIENTS = 3e-5, 1e-4
"""Largest errors, of each tensor's largest value. The released code itself is within 6e-6 and 2.6e-5 of float64."""


class Golden:
    """The golden file: its configuration, a model that holds its weights, and its numbers by name."""

    def __init__(self) -> None:
        with safe_open(DATA / "alignformer_tiny.safetensors", "pt") as file:
            self.metadata = {name: json.loads(text) for name, text in file.metadata().items()}
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        fields = self.metadata["config"]
        names = ("bert", "embed_dim", "depths", "num_heads", "window", "conv_dim", "word_ffn", "pixel_ffn",
                 "pixel_layers", "query_layers", "query_ffn")  # fmt: skip
        self.config = AlignFormerConfig(word_len=fields["length"], drop_path=0.0, **{n: fields[n] for n in names})
        self.model = registry.create(self.config).eval()
        own = self.model.state_dict()
        weights = {name: own[name] for name in self.metadata["buffers"]}
        weights |= {name: tensor.float() for name, tensor in self.group("param").items()}
        self.model.load_state_dict(weights)

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix + "/"): v for k, v in self.tensors.items() if k.startswith(prefix + "/")}

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image, tokens and mask."""
        given = self.group("in")
        return given["image"].float(), given["tokens"].long(), given["target"][:, None].float()

    @functools.cache  # noqa: B019 - one small file
    def stages(self) -> dict[str, Tensor]:
        """What every stage answers, by the file's names and in its layouts."""
        found: dict[str, Tensor] = {}
        image, tokens, _ = self.inputs
        valid = tokens != 0
        model = self.model
        with torch.no_grad():
            found["text"] = words = model.encode_text(tokens)
            x = model.backbone.patch_embed(image)
            found["patch_embed"] = x.permute(0, 3, 1, 2)
            for number, stage in enumerate(model.backbone.layers):
                x = stage.blocks(x)
                attended = stage.fusion.attend(x.flatten(1, 2), words, valid)
                residuals = stage.fuse(x, words, valid)
                following, heard = stage.pass_on(x, words, residuals, valid)
                parts = {
                    "blocks": x.flatten(1, 2),
                    "vlba_attended_pixels": attended.pixels,
                    "vlba_attended_words": attended.words.transpose(1, 2),
                    "pixel_residual": residuals.pixels,
                    "word_residual": residuals.words.transpose(1, 2),
                    "next_pixels": following.flatten(1, 2),
                    "next_words": heard.transpose(1, 2),
                }
                found |= {f"stage{number}/{name}": tensor for name, tensor in parts.items()}
                x, words = following, heard
            encoded = model.backbone(image, found["text"], valid)
            found |= self._decoders(encoded.maps, Words(encoded.words, valid))
        return found

    def _decoders(self, maps: tuple[Tensor, ...], words: Words) -> dict[str, Tensor]:
        classifier, found = self.model.classifier, {}
        encoder = classifier.pix_dec.transformer.encoder
        watched = {
            "pixel/layer0_words": encoder.cross_attn_layers[0].norm_ffn,
            "pixel/layer1_deform": encoder.layers[1],
        }
        hooks = [
            module.register_forward_hook(lambda _, __, output, name=name: found.__setitem__(name, output))
            for name, module in watched.items()
        ]
        levels, pixels = classifier.pix_dec(maps, words)
        found |= {f"pixel/level{number}": level for number, level in enumerate(levels)}
        found["pixel/mask_features_first"] = classifier.pix_dec.mask_features(pixels[:1])  # the model folds it
        found["query/start"] = classifier.sentence(words)
        centres = classifier.dynamic_conv_gen_body(found["query/start"], levels)
        found |= {f"query/{number}": centre for number, centre in enumerate(centres)}
        scored = classifier(maps, words, all_outputs=True)
        kernels = torch.cat([scored.kernels, scored.bias[..., None]], dim=-1)
        found["kernels"] = kernels.transpose(0, 1)[:, :, None]
        found |= {f"logits_low/{number}": scored.logits[:, number, None] for number in range(len(centres))}
        for hook in hooks:
            hook.remove()
        return found

    @functools.cache  # noqa: B019 - one small file
    def step(self) -> dict[str, Tensor]:
        """The loss, the last logits and every gradient."""
        model = copy.deepcopy(self.model)
        image, tokens, mask = self.inputs
        loss, logits = model.loss(model.encode_image(image), tokens, mask)
        loss.backward()
        gradients = {f"grad/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), "logits": logits.detach(), **gradients}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


def error(actual: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """The largest error, of the largest expected value or of ``scale``."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = float(expected.abs().max()) if scale is None else scale
    return float((actual.double() - expected.double()).abs().max()) / max(scale, 1e-12)


def test_every_stage_matches_the_released_code(golden):
    expected = golden.group("out")
    valid = golden.group("in")["attention"].bool()[:, None]
    found = golden.stages()
    assert set(expected) - set(found) == {"loss", "logits_full_last"}
    errors = {}
    for name in found.keys() & expected.keys():
        value = expected[name] * valid if name.endswith("attended_words") else expected[name]
        errors[name] = error(found[name], value)
    assert max(errors.values()) < OUTPUTS, {name: e for name, e in errors.items() if e >= OUTPUTS}


def test_loss_and_last_logits_match_the_released_code(golden):
    expected, step = golden.group("out"), golden.step()
    assert error(step["logits"], expected["logits_full_last"]) < OUTPUTS
    assert error(step["loss"].reshape(1), expected["loss"]) < OUTPUTS
    image, tokens, _ = golden.inputs
    assert error(golden.model(image, tokens), expected["logits_full_last"]) < OUTPUTS


def test_every_gradient_matches_the_released_code(golden):
    expected, step = golden.group("grad"), golden.step()
    norms, dead = golden.metadata["grad_norms"], golden.metadata["float64_check"]["dead"]
    silent = {name for name, _ in golden.metadata["no_gradient"]}
    mine = {name.removeprefix("grad/"): tensor for name, tensor in step.items() if name.startswith("grad/")}
    assert set(mine) | silent == {name for name, _ in golden.model.named_parameters()}
    assert not silent & set(mine)
    assert set(expected) == set(mine) - set(dead)
    errors = {}
    for name, value in expected.items():
        whole = mine[name]
        thinned = whole.flatten()[:: max(1, math.ceil(whole.numel() / golden.metadata["config"]["grad_keep"]))]
        errors[name] = error(thinned.reshape(value.shape), value, float(whole.abs().max()))
        errors[f"norm of {name}"] = abs(float(whole.double().norm()) / norms[name] - 1)
    assert max(errors.values()) < GRADIENTS, {name: e for name, e in errors.items() if e >= GRADIENTS}
    # These are 0 in exact arithmetic: what is left is noise, next to norms of up to hundreds.
    assert max(float(mine[name].abs().max()) for name in dead) < 1e-4


def test_fast_paths_equal_the_published_formulas_in_float64(golden):
    image, tokens, mask = (each.double() if each.is_floating_point() else each for each in golden.inputs)

    def step(impl: str) -> dict[str, Tensor]:
        model = copy.deepcopy(golden.model).double()
        model.instance_contrast = 0.1
        with use_impl(impl):
            loss, logits = model.loss(model.encode_image(image), tokens, mask)
            loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), "logits": logits.detach(), **gradients}

    fast, published = step("torch"), step("reference")
    dead = set(golden.metadata["float64_check"]["dead"])
    assert fast.keys() == published.keys()
    errors = {name: error(fast[name], published[name]) for name in fast.keys() - dead}
    assert max(errors.values()) < 1e-10, {name: e for name, e in errors.items() if e >= 1e-10}


def test_instance_contrast_matches_the_proposal(golden):
    proposal = golden.group("proposal")
    image, tokens, mask = golden.inputs
    with torch.no_grad():
        scored = golden.model.score(golden.model.encode_image(image), tokens)
        features = golden.model.classifier.pix_dec.mask_features(scored.features)
        loss = region_contrast(features, scored.kernels[:, -1], mask)
    assert error(loss, proposal["instance_loss"]) < OUTPUTS
    with torch.no_grad():
        plain, _ = golden.model.loss(golden.model.encode_image(image), tokens, mask)
        golden.model.instance_contrast = 0.1
        both, _ = golden.model.loss(golden.model.encode_image(image), tokens, mask)
        del golden.model.instance_contrast
    torch.testing.assert_close(both - plain, 0.1 * proposal["instance_loss"], rtol=1e-4, atol=1e-5)


def test_released_size_has_the_released_names_shapes_and_number_of_parameters():
    with torch.device("meta"):
        model = registry.create("alignformer_swin_b")
    shapes = json.loads((DATA / "alignformer_state_dict_shapes.json").read_text())["alignformer_swin_b_bert_base"]
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert len(shapes) == 962 and sum(p.numel() for p in model.parameters()) == 273_239_993
    counted = sum(model.config.parameter_counts().values())
    assert counted == pytest.approx(273_239_993, rel=0.01)
    inferred = type(model).infer_config(model.state_dict())
    assert inferred == AlignFormerConfig(behaviour="compat")


def test_released_checkpoint_is_read_strictly_and_computes_as_released(golden, tmp_path):
    state = {name: tensor for name, tensor in golden.model.state_dict().items()}
    released = {
        "model": state,
        "optimizer": {},
        "epoch": 3,
        "args": argparse.Namespace(window12=True),
        "lr_scheduler": {},
    }
    torch.save(released, tmp_path / "best.pth")
    compat = copy.copy(golden.config)
    compat.behaviour = "compat"
    loaded = load_model(tmp_path / "best.pth", compat)
    image, tokens, _ = golden.inputs
    assert loaded.config.behaviour == "compat"
    assert error(loaded(image, tokens), golden.group("out")["logits_full_last"]) < OUTPUTS
    del state["classifier.txt_proj.bias"]
    torch.save(released, tmp_path / "lacking.pth")
    with pytest.raises(ValueError, match=r"missing \(1\): classifier\.txt_proj\.bias"):
        load_model(tmp_path / "lacking.pth", compat)
