from __future__ import annotations

import sys

import pytest
import torch
from training_helpers import Boxes, model_config, parts_of, rows, train_config, train_set, val_set

from fastris import CRIS
from fastris.commands import assemble
from fastris.commands.assemble import model_config as configured_model
from fastris.commands.train import TrainConfig, train
from fastris.data.tokens import tokenize
from fastris.options.declare import load_options
from fastris.training import loop as training
from fastris.training.feed import count_cut
from fastris.weights.load import load_model, load_torch


def run_to_the_end(folder, **changes):
    return train(train_config(folder, **changes), train_set(), val_set())


def test_checkpoints_are_there_from_the_start_and_load_as_models(uninterrupted, tmp_path, monkeypatch):
    best = load_torch(uninterrupted / "best.pth")
    validations = [float(row["mIoU"]) for row in rows(uninterrupted / "val.csv")]
    assert best["scores"]["mIoU"] == best["best_iou"] == max(validations)
    assert best["scores"]["sentences"] == "first"
    for name in ("best.pth", "last.pth"):
        assert load_model(uninterrupted / name).config == model_config()
    monkeypatch.setattr(training, "train_epoch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_to_the_end(tmp_path)
    assert load_torch(tmp_path / "last.pth")["step"] == 0


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    step = training.train_step

    def broken(plan, run, batch, *signals):
        result = step(plan, run, batch, *signals)
        with torch.no_grad():
            run.model.proj.txt.bias[0] = float("inf")
        return result

    monkeypatch.setattr(training, "train_step", broken)
    with pytest.raises(RuntimeError, match=r"after step 1 1 weights are not finite, proj.txt.bias among them"):
        run_to_the_end(tmp_path, save_every_steps=1)
    assert load_torch(tmp_path / "last.pth")["step"] == 0


def test_written_options_describe_the_same_run(uninterrupted):
    config = load_options(TrainConfig, [str(uninterrupted / "config.yaml"), "--resume"])
    assert config == train_config(uninterrupted, resume=True, extra=config.extra)
    assert configured_model(config) == model_config()


def test_data_too_small_for_any_batch_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="batch_size=13 is larger than the 1 training references"):
        run_to_the_end(tmp_path / "run", batch_size=13, limit_train=1)
    assert not (tmp_path / "run").exists()


def test_accumulated_parts_give_the_gradient_of_their_mean(tmp_path):
    no_dropout = train_config(tmp_path).extra | {"dropout": 0.0}
    gradients = []
    for accumulate, repeats in ((1, 1), (2, 2)):
        config = train_config(tmp_path, batch_size=6, accumulate=accumulate, extra=no_dropout)
        parts = parts_of(config)
        run, samples = parts.run, parts.batches.samples
        items = [samples[i] for i in range(3)] * repeats
        batch = {name: torch.stack([item[name] for item in items]) for name in ("image", "tokens", "mask")}
        run.model.train()
        loss, iou, *_ = training.train_step(parts.plan, run, batch)
        gradients.append((loss, iou, run.model.proj.txt.weight.grad.clone()))
    (loss, iou, gradient), (loss_parts, iou_parts, gradient_parts) = gradients
    assert (loss_parts, iou_parts) == pytest.approx((loss, iou))
    torch.testing.assert_close(gradient_parts, gradient)


def test_gradients_are_clipped_to_max_norm(tmp_path):
    parts = parts_of(train_config(tmp_path, max_norm=1e-3))
    run, batches = parts.run, parts.batches
    batch = next(iter(torch.utils.data.DataLoader(batches.samples, batch_sampler=batches.sampler)))
    run.model.train()
    training.train_step(parts.plan, run, batch)
    norms = [p.grad.norm() for p in run.model.parameters() if p.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_cut_expressions_are_counted_and_reported(tmp_path, capsys):
    data = Boxes()
    train(train_config(tmp_path, batch_size=6, epochs=1, evaluate=False, print_freq=0), data)
    cut = load_torch(tmp_path / "last.pth")
    assert cut["step"] == 1
    samples = parts_of(train_config(tmp_path), data).batches.samples
    long = torch.stack([tokenize(data.reference(0).sentences[2], 12).tokens[0]] * 3)
    short = torch.stack([tokenize(data.reference(0).sentences[1], 12).tokens[0]] * 3)
    index = torch.tensor([0, 2, 4])
    assert count_cut(samples, {"index": index, "tokens": long}) == 3
    assert count_cut(samples, {"index": index, "tokens": short}) == 0
    assert "1 references left out: image is missing" in capsys.readouterr().err


def test_large_model_without_clip_weights_warns(tmp_path, monkeypatch):
    class Unbuilt(CRIS):
        def __init__(self, config):
            torch.nn.Module.__init__(self)
            self.config = config

    monkeypatch.setattr("fastris.models.cris.model.CRIS", Unbuilt)
    with pytest.warns(UserWarning, match="random weights.*clip_pretrain=RN50:openai"):
        assemble.build_model(TrainConfig(model="cris_r50", output_folder=tmp_path))


def test_bf16_trains_on_the_cpu(tmp_path):
    result = run_to_the_end(tmp_path, amp="bf16", max_steps=1, evaluate=False)
    assert result.step == 1
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


def test_tensorboard_without_its_package_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match=r"pip install 'fastris\[tensorboard\]'"):
        run_to_the_end(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_run_on_a_gpu_trains_and_goes_on(tmp_path, amp):
    run_to_the_end(tmp_path, amp=amp, device="cuda", max_steps=3)
    assert bool(load_torch(tmp_path / "last.pth")["scaler"]) == (amp == "fp16")
    result = run_to_the_end(tmp_path, amp=amp, device="cuda", resume=True)
    log = rows(tmp_path / "log.csv")
    assert (result.step, [row["step"] for row in log]) == (8, [str(step) for step in range(1, 9)])
