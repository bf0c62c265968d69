"""Swin's and BERT's own weights, as Microsoft, timm and transformers store them, start an AlignFormer."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from fastris.commands.assemble import build_model
from fastris.commands.train import TrainConfig
from fastris.models.alignformer import AlignFormer, AlignFormerConfig
from fastris.models.encoder_weights import fitted_table, swin_weights
from fastris.weights.load import load_encoder, load_model

SIZES = {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8)}


def small(**changes: object) -> AlignFormer:
    fields = AlignFormerConfig.preset("alignformer_tiny").to_dict() | SIZES | {"window": 6} | changes
    return AlignFormer(AlignFormerConfig.from_dict(fields)).eval()


@pytest.fixture(scope="module")
def swin() -> torch.nn.Module:
    torch.manual_seed(1)
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=96, window_size=6, num_classes=3, always_partition=True, **SIZES
    )
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def as_microsoft(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merging stands at the end of a stage, and indices and masks are stored."""
    named = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        named[".".join(parts).replace("head.fc.", "head.")] = tensor
    named["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(36, 36, dtype=torch.int64)
    named["layers.1.blocks.1.attn_mask"] = torch.zeros(4, 36, 36)
    return named


def as_on_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of transformers' own Swin files."""
    renamed = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
               "attn.relative": "attention.self.relative", "mlp.fc1": "intermediate.dense",
               "mlp.fc2": "output.dense"}  # fmt: skip
    named = {}
    for name, tensor in as_microsoft(state).items():
        if name.startswith("patch_embed"):
            name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
            named["swin." + name.replace("patch_embed.norm", "embeddings.norm")] = tensor
        elif name.startswith("layers"):
            for ours, theirs in renamed.items():
                name = name.replace(f".{ours}", f".{theirs}")
            if ".attn.qkv." in name:
                for third, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    named["swin.encoder." + name.replace("attn.qkv", f"attention.self.{third}")] = part
            else:
                named["swin.encoder." + name] = tensor
    return named | {"classifier.weight": torch.zeros(3, 192), "swin.layernorm.weight": torch.ones(192)}


LAYOUTS = {"timm": dict, "microsoft": as_microsoft, "hugging face": as_on_hugging_face}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swins_weights_start_the_image_encoder_under_anybodys_names(swin, layout):
    model = small()
    report = load_encoder(model, LAYOUTS[layout](swin.state_dict()), "swin_pretrain")
    added = ("fusion", "res_gate", "sym_res_gate", "backbone.norm", "relative_position_index")
    assert report.fits and report.kept and all(any(part in name for part in added) for name in report.kept)
    assert report.loaded == sum(name.startswith(("layers.", "patch_embed.")) for name in swin.state_dict())
    image = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        x = model.backbone.patch_embed(image)
        for stage in list(model.backbone.layers)[:3]:
            x = stage.downsample(stage.blocks(x))
        theirs = swin.layers[3].downsample(swin.layers[2](swin.layers[1](swin.layers[0](swin.patch_embed(image)))))
    torch.testing.assert_close(x, theirs, rtol=0, atol=1e-5)


def test_another_window_gets_a_resized_table_and_another_width_one_error(swin):
    model = small(window=8)
    assert load_encoder(model, swin.state_dict(), "swin_pretrain").fits
    table = "layers.1.blocks.0.attn.relative_position_bias_table"
    ours, theirs = model.backbone.get_parameter(table).detach(), swin.state_dict()[table]
    grid = theirs.T.reshape(2, 11, 11)
    assert ours.shape == (225, 2) and grid.amin() - 1 < ours.amin() and ours.amax() < grid.amax() + 1
    constant = torch.full((121, 4), 0.7)
    torch.testing.assert_close(fitted_table(table, constant, torch.Size((225, 4))), torch.full((225, 4), 0.7))
    with pytest.raises(ValueError, match="their image encoder looks like a Swin of width 24"):
        load_encoder(small(embed_dim=32), swin.state_dict(), "swin_pretrain")


@pytest.mark.parametrize("old_names", [False, True])
def test_berts_weights_start_the_text_encoder_and_it_computes_the_same(old_names, tmp_path):
    import transformers

    model = small()
    sizes = vars(model.config.bert)
    torch.manual_seed(2)
    bert = transformers.BertModel(transformers.BertConfig(**sizes, attn_implementation="eager")).eval()
    bert.save_pretrained(tmp_path)
    source: object = tmp_path
    if old_names:  # of the file of bert-base-uncased itself
        gamma = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        source = {"cls.predictions.bias": torch.zeros(sizes["vocab_size"])}
        for name, tensor in bert.state_dict().items():
            for new, old in gamma.items():
                name = name.replace(new, old)
            source[f"bert.{name}"] = tensor
    assert load_encoder(model, source, "bert_pretrain").fits
    tokens = torch.tensor([[2, 17, 33, 3, 0], [2, 9, 3, 0, 0]])
    with torch.no_grad():
        ours = model.encode_text(tokens)
        theirs = bert(tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    torch.testing.assert_close(ours[tokens != 0], theirs[tokens != 0], rtol=0, atol=1e-5)


def test_other_weights_than_the_options_are_one_error_with_the_mend(swin, tmp_path):
    model = small()
    whole = model.state_dict()
    with pytest.raises(ValueError, match=r"bert_pretrain: .* holds Swin's weights; give it as swin_pretrain=PATH"):
        load_encoder(model, swin.state_dict(), "bert_pretrain")
    with pytest.raises(ValueError, match="holds a whole AlignFormer model; give Swin's weights alone"):
        load_encoder(model, whole, "swin_pretrain")
    with pytest.raises(ValueError, match="clip_pretrain: AlignFormer does not start from CLIP's weights; leave"):
        load_encoder(model, swin.state_dict(), "clip_pretrain")
    with pytest.raises(ValueError, match=r"holds neither AlignFormer's weights .* nor Swin's or BERT's"):
        load_encoder(model, {"visual.conv1.weight": torch.zeros(3, 3, 3, 3)}, "swin_pretrain")
    torch.save({"model": as_microsoft(swin.state_dict())}, tmp_path / "swin.pth")
    with pytest.raises(ValueError, match="holds Swin's weights alone; give a whole AlignFormer model"):
        load_model(tmp_path / "swin.pth", config=model.config)


def test_a_run_starts_from_both_and_says_so_where_one_is_missing(swin, tmp_path, recwarn):
    torch.save({"model": as_microsoft(swin.state_dict())}, tmp_path / "swin.pth")
    extra = {name: getattr(small().config, name) for name in ("depths", "num_heads")}
    options = TrainConfig(model="alignformer_tiny", swin_pretrain=str(tmp_path / "swin.pth"), extra=extra)
    model = build_model(options)
    weight = swin.state_dict()["layers.1.downsample.reduction.weight"]
    assert torch.equal(model.backbone.layers[0].downsample.reduction.weight, weight)
    assert not [each for each in recwarn if "random weights" in str(each.message)]  # a tiny one has no published start
    advice = AlignFormerConfig.preset("alignformer_swin_b").without_weights()
    assert "bert_pretrain=google-bert/bert-base-uncased and swin_pretrain=" in advice
    assert swin_weights({"visual.conv1.weight": weight}) is None


def test_the_same_weights_start_a_magnet(swin):
    import transformers

    from fastris.models.magnet import MagNet, MagNetConfig

    fields = MagNetConfig.preset("magnet_tiny").to_dict() | SIZES | {"window": 6}
    model = MagNet(MagNetConfig.from_dict(fields)).eval()
    assert load_encoder(model, as_microsoft(swin.state_dict()), "swin_pretrain").fits
    sizes = vars(model.config.bert)
    bert = transformers.BertModel(transformers.BertConfig(**sizes, attn_implementation="eager")).eval()
    assert load_encoder(model, bert.state_dict(), "bert_pretrain").fits
    image, tokens = torch.randn(1, 3, 96, 96), torch.tensor([[2, 17, 33, 3, 0]])
    with torch.no_grad():
        x = model.image_model.layers[0].blocks(model.image_model.patch_embed(image))
        torch.testing.assert_close(x, swin.layers[0](swin.patch_embed(image)), rtol=0, atol=1e-5)
        words, mask = model.language_model.embed(tokens, tokens != 0)
        for number in range(4):
            words = model.language_model.part(number, 4, words, mask)
        theirs = bert(tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    torch.testing.assert_close(words[tokens != 0], theirs[tokens != 0], rtol=0, atol=1e-5)
