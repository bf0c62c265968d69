"""The whole model by its fast path: the published numbers, in every way that people run it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from bounds import EXACT
from model_helpers import make_tokens, small_config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastris import CRIS, use_impl
from fastris.models.cris import decoder

OFF = 1 + 1e-6


HEADS = {"absorbed": 2, "projected": 4}
"""Which way the cross-attention goes for this batch's words -> heads of the decoder."""


def make_model(dropout: float = 0.0, way: str = "projected", layers: int = 2) -> CRIS:
    torch.manual_seed(0)
    model = CRIS(small_config(num_layers=layers, dropout=dropout, num_head=HEADS[way]))
    for parameter in model.parameters():  # CLIP starts some norms at zero, which would hide what is behind them
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 64, 96, generator=generator)
    masks = (torch.rand(4, 1, 64, 96, generator=generator) > 0.6).float()
    return images, make_tokens(5, 9, 3, 7), masks


def training_step(model: nn.Module, impl: str, batch, forward: Callable | None = None) -> dict[str, Tensor]:
    """Loss, logits, the gradient of every parameter and BatchNorm's statistics after one step."""
    model = copy.deepcopy(model).train()
    with use_impl(impl):
        logits, _, loss = (forward or type(model).forward)(model, *batch)
        loss.backward()
    results = {"loss": loss.detach(), "logits": logits}
    results |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return results | {n: b for n, b in model.named_buffers() if b.is_floating_point()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # A key's bias shifts all scores of a query alike: its gradient is zero, and rounding noise has no scale.
        scale = expected[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
        error = (actual[name].double() - value.double()).abs().max()
        assert error <= relative * scale, f"{name}: error {error:.2e} of scale {scale:.2e}"


@pytest.mark.parametrize("way", HEADS)
def test_training_step_in_float64_is_the_published_one_in_every_gradient_and_statistic(way):
    model, (images, tokens, masks) = make_model(way=way).double(), make_batch()
    batch = images.double(), tokens, masks.double()
    assert_close(training_step(model, "torch", batch), training_step(model, "reference", batch), EXACT)


@pytest.fixture(scope="module")
def exact_step() -> tuple[CRIS, tuple[Tensor, ...], dict[str, Tensor]]:
    """A model in float64, its batch, and the published training step."""
    model, (images, tokens, masks) = make_model(way="absorbed").double(), make_batch()
    batch = images.double(), tokens, masks.double()
    return model, batch, training_step(model, "reference", batch)


@pytest.mark.parametrize("number", ["absorbed keys", "absorbed values", "position tables"])
def test_training_step_in_float64_shows_a_millionth(exact_step, number, monkeypatch):
    model, batch, expected = exact_step
    operator = importlib.import_module("fastris.ops.cross_attention")  # the package has its function by this name
    absorb, table = operator.absorb, decoder._table_for

    def absorb_wrongly(*arguments):
        keys, bias, values = absorb(*arguments)
        return (keys * OFF, bias, values) if number == "absorbed keys" else (keys, bias, values * OFF)

    if number == "position tables":
        monkeypatch.setattr(decoder, "_table_for", lambda *arguments: table(*arguments) * OFF)
    else:
        monkeypatch.setattr(operator, "absorb", absorb_wrongly)
    with pytest.raises(AssertionError, match="of scale"):
        assert_close(training_step(model, "torch", batch), expected, EXACT)


def test_eval_logits_in_float32_are_within_a_hundred_thousandth_of_the_truth():
    model, (images, tokens, _) = make_model().eval(), make_batch()
    with use_impl("reference"):
        truth = copy.deepcopy(model).double()(images.double(), tokens)
    with use_impl("torch"):
        assert_close({"logits": model(images, tokens)}, {"logits": truth}, 1e-5)


@pytest.mark.parametrize("way", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_step_loses_no_more_than_the_published_formula_in_the_same_precision(dtype, way):
    model, (images, tokens, masks) = make_model(way=way), make_batch()
    truth = training_step(copy.deepcopy(model).double(), "reference", (images.double(), tokens, masks.double()))
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        ours = training_step(model, "torch", (images, tokens, masks))
        published = training_step(model, "reference", (images, tokens, masks))
    assert ours["logits"].dtype == published["logits"].dtype and ours["loss"].dtype == published["loss"].dtype
    kinds = {name.split()[0] if name.startswith("gradient") else name for name in truth}
    for kind in kinds - {name for name, _ in model.named_buffers()}:
        names = [name for name in truth if name.split()[0] == kind]
        loss = error_of(ours, truth, names), error_of(published, truth, names)
        assert loss[0] <= 1.25 * loss[1] + torch.finfo(dtype).eps, f"{kind}: {loss[0]:.2e} against {loss[1]:.2e}"


def error_of(results: dict[str, Tensor], truth: dict[str, Tensor], names: list[str]) -> float:
    """RMS over all tensors of the error relative to each tensor's norm."""
    errors = [((results[n].double() - truth[n]).norm() / truth[n].norm()) for n in names if "k_proj.bias" not in n]
    return torch.stack(errors).square().mean().sqrt().item()


def test_channels_last_model_gives_the_same_step():
    model, (images, tokens, masks) = make_model().double(), make_batch()
    images, masks = images.double(), masks.double()
    expected = training_step(model, "torch", (images, tokens, masks))
    layout = {"memory_format": torch.channels_last}
    assert_close(training_step(model.to(**layout), "torch", (images.to(**layout), tokens, masks)), expected, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.long), True])
def test_compiled_without_graph_breaks_equals_eager(training):
    model, (images, tokens, masks) = make_model(layers=1).double().train(training), make_batch()
    images, masks = images.double(), masks.double()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with use_impl("torch"):
        if not training:
            return assert_close({"logits": compiled(images, tokens)}, {"logits": model(images, tokens)}, EXACT)
        (logits, _, loss), (other, _, other_loss) = model(images, tokens, masks), compiled(images, tokens, masks)
        loss.backward()
        other_loss.backward()
    assert_close({"logits": other, "loss": other_loss.detach()}, {"logits": logits, "loss": loss.detach()}, EXACT)
    eager = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close({n: p.grad for n, p in compiled._orig_mod.named_parameters() if n in eager}, eager, EXACT)


def test_gradient_checkpointing_of_the_decoder_draws_the_same_dropout_again():
    model, batch = make_model(dropout=0.3), make_batch()

    def checkpointed(model, *inputs):
        for layer in model.decoder.layers:
            plain = layer.forward
            layer.forward = lambda *x, plain=plain: checkpoint(plain, *x, use_reentrant=False)
        return CRIS.forward(model, *inputs)

    torch.manual_seed(3)
    expected = training_step(model, "torch", batch)
    torch.manual_seed(3)
    assert_close(training_step(model, "torch", batch, checkpointed), expected, 1e-6)


def test_ddp_around_the_model_changes_no_gradient(tmp_path):
    model, batch = make_model(), make_batch()
    expected = training_step(model, "torch", batch)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(copy.deepcopy(model).train(), find_unused_parameters=True)
        with use_impl("torch"):
            logits, _, loss = wrapped(*batch)
            loss.backward()
    finally:
        dist.destroy_process_group()
    gradients = {f"gradient of {n}": p.grad for n, p in wrapped.module.named_parameters() if p.grad is not None}
    assert_close(gradients | {"logits": logits}, {k: expected[k] for k in [*gradients, "logits"]}, 1e-6)


def test_dropout_acts_in_training_only_and_repeats_under_a_seed():
    model, batch = make_model(dropout=0.3), make_batch()
    torch.manual_seed(5)
    first = training_step(model, "torch", batch)["logits"]
    second = training_step(model, "torch", batch)["logits"]
    torch.manual_seed(5)
    assert torch.equal(first, training_step(model, "torch", batch)["logits"])
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(*batch[:2]), model(*batch[:2]))


def test_the_decoders_norm_copies_nothing_and_gives_the_projector_a_map_that_lies_as_it_reads_it():
    layers = decoder.TransformerDecoder(1, 32, 4, 32, 0.1)
    given = []
    layers.norm.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    answer = layers(torch.randn(2, 32, 4, 5), torch.randn(2, 3, 32), None)
    assert given[0].is_contiguous(), "LayerNorm copies an input that lies in another order"
    assert answer.reshape(2, 32, 4, 5).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(answer, layers.norm(given[0].transpose(0, 1)).permute(1, 2, 0))


def test_inference_keeps_nothing_for_a_backward_pass():
    model, (images, tokens, _) = make_model().eval(), make_batch()
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x), use_impl("torch"):
        model(images, tokens)
    assert not kept


def test_tables_made_under_inference_mode_can_be_trained_with_later():
    model, batch = make_model(), make_batch()
    with torch.inference_mode():
        model.eval()(*batch[:2])
    training_step(model, "torch", batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_replays_the_training_step():
    model, batch = make_model().cuda().train(), [x.cuda() for x in make_batch()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(*batch)[2].backward()
    torch.cuda.current_stream().wait_stream(stream)
    expected = model(*batch)[2].detach()
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = model(*batch)[2]
        loss.backward()
    graph.replay()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=0)
