from __future__ import annotations

import pytest
import torch
from training_helpers import model_config as tiny_config
from training_helpers import train_config

from fastris import CRIS, CRISConfig
from fastris.commands.assemble import make_optimizer, model_config, passed_over
from fastris.commands.train import TrainConfig
from fastris.options.declare import load_options
from fastris.runtime.device import Precision, choose_device
from fastris.training.optim import build_optimizer, build_scheduler

PUBLISHED_YAML = """
DATA:
  dataset: refcoco
  train_lmdb: datasets/lmdb/refcoco/train.lmdb
  train_split: train
  val_split: val
TRAIN:
  clip_pretrain: pretrain/RN50.pt
  input_size: 416
  word_len: 17
  word_dim: 1024
  vis_dim: 512
  fpn_in: [512, 1024, 1024]
  fpn_out: [256, 512, 1024]
  sync_bn: True
  num_layers: 3
  num_head: 8
  dim_ffn: 2048
  dropout: 0.1
  intermediate: False
  workers: 32
  epochs: 50
  milestones: [35]
  batch_size: 64
  base_lr: 0.0001
  lr_decay: 0.1
  lr_multi: 0.1
  weight_decay: 0.
  max_norm: 0.
  manual_seed: 0
  print_freq: 100
  exp_name: CRIS_R50
  output_folder: exp/refcoco
  weight:
  resume:
  evaluate: True
Distributed:
  dist_backend: 'nccl'
TEST:
  test_split: val-test
"""


def test_parameter_groups_are_the_published_ones():
    model = CRIS(tiny_config())
    optimizer = make_optimizer(TrainConfig(base_lr=1e-4, lr_multi=0.1), model, torch.device("cpu"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    backbone, head = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert sorted(backbone + head) == sorted(names.values())
    assert all(name.startswith("backbone.") and "positional_embedding" not in name for name in backbone)
    in_head = {name for name in head if name.startswith("backbone")}
    assert in_head == {"backbone.positional_embedding", "backbone.visual.attnpool.positional_embedding"}
    assert "backbone.token_embedding.weight" in backbone
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-4])
    assert {(group["betas"], group["weight_decay"]) for group in optimizer.param_groups} == {((0.9, 0.999), 0.0)}


@pytest.mark.parametrize(
    ("quirk", "first"),
    [(1.0, (1e-5, 1e-4)), (10.0, (1e-4, 1e-4))],  # published: the first epoch runs the backbone at the full rate
)
def test_learning_rates_follow_the_published_schedule(quirk, first):
    groups = {"backbone": [torch.nn.Parameter(torch.ones(1))], "head": [torch.nn.Parameter(torch.ones(1))]}
    optimizer = build_optimizer(groups, {"backbone": 1e-5, "head": 1e-4})
    scheduler = build_scheduler(optimizer, (35,), 0.1, first_epoch={"backbone": quirk})
    rates = []
    for _ in range(50):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(first)
    assert rates[1] == rates[34] == pytest.approx((1e-5, 1e-4))
    assert rates[35] == rates[49] == pytest.approx((1e-6, 1e-5))


def test_group_without_a_learning_rate_is_refused_by_name():
    groups = {"head": [torch.nn.Parameter(torch.ones(1))], "neck": [torch.nn.Parameter(torch.ones(1))]}
    with pytest.raises(ValueError, match="parameter groups neck have no learning rate; there are rates for head"):
        build_optimizer(groups, {"head": 1e-4})


def test_defaults_are_the_published_recipe():
    config = TrainConfig()
    recipe = (config.epochs, config.batch_size, config.base_lr, config.lr_multi, config.milestones, config.lr_decay)
    assert recipe == (50, 64, 1e-4, 0.1, (35,), 0.1)
    assert (config.weight_decay, config.max_norm, config.val_sentences) == (0.0, 0.0, "first")
    assert not config.published_first_epoch_quirk
    assert model_config(config) == CRISConfig.preset("cris_r50")


def test_published_yaml_file_is_read(tmp_path):
    (tmp_path / "cris_r50.yaml").write_text(PUBLISHED_YAML)
    config = load_options(TrainConfig, [str(tmp_path / "cris_r50.yaml"), "num_layers=2", "data_root=here"])
    assert model_config(config) == CRISConfig.from_dict(CRISConfig.preset("cris_r50").to_dict() | {"num_layers": 2})
    assert (config.epochs, config.workers, config.resume, config.weight) == (50, 32, None, None)
    assert str(config.folder) == "exp/refcoco/CRIS_R50"
    assert passed_over(config) == ["dist_backend", "sync_bn", "test_split", "train_lmdb"]


def test_missing_model_keys_are_named(tmp_path):
    (tmp_path / "half.yaml").write_text("dataset: refcoco\nnum_layers: 3\nword_dim: 1024\n")
    with pytest.raises(ValueError, match=r"names no preset \(model=cris_r50\), lacks the model keys clip, .*fpn_in"):
        model_config(load_options(TrainConfig, [str(tmp_path / "half.yaml")]))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"batch_size": 1}, "BatchNorm needs two"),
        ({"batch_size": 6, "accumulate": 4}, "equal parts"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"base_lr": -1.0}, "base_lr=-1.0 must be at least 0"),
        ({"lr_multi": 0.0, "published_first_epoch_quirk": True}, "lr_multi above 0"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        train_config(tmp_path, **changes)


def test_mixed_precision_falls_back_to_what_the_device_has():
    cpu = torch.device("cpu")
    assert Precision.choose("auto", cpu).name == "off"
    assert Precision.choose("bf16", cpu).name == "bf16"
    assert not Precision.choose("off", cpu).scaler().is_enabled()
    with pytest.raises(ValueError, match="amp=fp16 needs a CUDA device"):
        Precision.choose("fp16", cpu)
    with pytest.raises(ValueError, match="amp='half' is unknown"):
        Precision.choose("half", cpu)


def test_unknown_devices_are_refused():
    with pytest.raises(ValueError, match="device='gpu' is unknown"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="PyTorch sees"):
        choose_device("cuda:99")


@pytest.mark.parametrize("name", ["base_lr", "lr_multi", "weight_decay", "max_norm", "lr_decay"])
def test_rates_beyond_all_bounds_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"{name}=inf must be a finite number"):
        TrainConfig(**{name: float("inf")})
