"""Recomputation changes what is kept for the backward pass, and no number: not a gradient, a mask, or a statistic."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from test_paths import make_batch, make_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fastris import CRIS, CRISConfig, use_impl
from fastris.nn import recompute

RECOMPUTING = recompute.RECOMPUTE_SETTINGS[1:]
PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")


def prepared(setting: str, dtype: torch.dtype = torch.float32) -> CRIS:
    return make_model(dropout=0.2).to(dtype).train().set_recompute(setting)


def batch_of(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    images, tokens, masks = make_batch()
    return images.to(dtype), tokens, masks.to(dtype)


def results(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and BatchNorm's statistics and counters after the backward pass."""
    torch.manual_seed(9)  # another state than the forward pass's
    loss.backward()
    gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients | dict(model.named_buffers())


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(actual[name], value)]


def one_step(model: CRIS, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return results(model, model(*batch)[2])


@pytest.mark.parametrize("setting", RECOMPUTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_has_the_bits_of_one_that_keeps_everything(setting, dtype):
    batch = batch_of(dtype)
    expected = one_step(prepared("none", dtype), batch)
    assert_same_bits(one_step(prepared(setting, dtype), batch), expected)
    counters = [value for name, value in expected.items() if name.endswith("num_batches_tracked")]
    assert counters and all(counter == 1 for counter in counters)


@pytest.mark.parametrize("setting", RECOMPUTING)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_step_under_autocast_has_the_same_bits_on_every_path(setting, impl):
    batch = batch_of(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), use_impl(impl):
        expected = one_step(prepared("none"), batch)
        assert_same_bits(one_step(prepared(setting), batch), expected)


@pytest.mark.parametrize("setting", RECOMPUTING)
def test_two_forward_passes_before_one_backward_keep_apart(setting):
    images, tokens, masks = batch_of(torch.float64)

    def twice(setting: str) -> dict[str, Tensor]:
        model = prepared(setting, torch.float64)
        torch.manual_seed(5)
        first, second = model(images, tokens, masks)[2], model(images.flip(0), tokens, masks)[2]
        return results(model, first + 2 * second)

    assert_same_bits(twice(setting), twice("none"))


@pytest.mark.parametrize("setting", RECOMPUTING)
def test_second_pass_under_one_autocast_finds_its_casts(setting):
    batch, model = batch_of(torch.float32), prepared(setting)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch)[2] + model(*batch)[2]
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.backbone.visual.parameters() if p.grad is not None)


@pytest.mark.parametrize("setting", RECOMPUTING)
def test_several_expressions_about_one_image_have_the_same_bits(setting):
    images, tokens, masks = batch_of(torch.float32)
    index = torch.tensor([1, 0, 1, 1])

    def shared(setting: str) -> dict[str, Tensor]:
        model = prepared(setting)
        torch.manual_seed(5)
        loss, _ = model.loss(model.encode_image(images[:2]), tokens, masks, index)
        return results(model, loss)

    assert_same_bits(shared(setting), shared("none"))


@pytest.mark.parametrize("setting", RECOMPUTING)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["this thread", "another thread"])
def test_backward_outside_the_block_takes_the_path_of_the_forward(setting, elsewhere):
    batch = batch_of(torch.float32)

    def step(setting: str) -> dict[str, Tensor]:
        model, found = prepared(setting), {}
        torch.manual_seed(5)
        with use_impl("reference"):
            loss = model(*batch)[2]
        if not elsewhere:
            return results(model, loss)
        thread = threading.Thread(target=lambda: found.update(results(model, loss)))  # as CUDA's backward does
        thread.start()
        thread.join()
        return found

    assert_same_bits(step(setting), step("none"))


@pytest.mark.parametrize("setting", RECOMPUTING)
def test_backward_computes_again_in_the_mode_of_the_forward(setting):
    batch = batch_of(torch.float32)

    def step(setting: str) -> dict[str, Tensor]:
        model = prepared(setting)
        model.backbone.visual.layer2.eval()  # frozen statistics
        torch.manual_seed(5)
        loss = model(*batch)[2]
        model.train(setting == "none")
        return results(model, loss)

    assert_same_bits(step(setting), step("none"))


def test_modules_are_as_before_when_the_backward_fails(monkeypatch):
    model = prepared("stages")
    loss = model(*batch_of(torch.float32))[2]
    buffers = dict(model.named_buffers())
    monkeypatch.setattr(model.backbone.visual.layer1[0].bn2, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert all(module.training for module in model.modules())
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())


@pytest.mark.parametrize("setting", RECOMPUTING)
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, affine=False),
        nn.SyncBatchNorm(4),
    ],
    ids=["cumulative", "untracked", "plain", "sync"],
)
def test_every_batch_norm_moves_once_and_dropout_repeats(norm, setting):
    def step(setting: str) -> dict[str, Tensor]:
        block = nn.Sequential(
            nn.Conv2d(3, 4, 3), copy.deepcopy(norm), nn.ReLU(True), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)
        )
        block.load_state_dict(state, strict=False)
        torch.manual_seed(5)
        loss = sum(
            recompute.recomputed([block], setting, block, x, whole=setting == "stages").square().sum() for x in inputs
        )
        return results(block, loss)

    inputs = torch.randn(2, 5, 3, 6, 6)
    state = {"0.weight": torch.randn(4, 3, 3, 3), "4.weight": torch.randn(2, 4, 1, 1)}
    state |= {"0.bias": torch.randn(4), "4.bias": torch.randn(2)}
    assert_same_bits(step(setting), step("none"))


class CountedProducts(TorchDispatchMode):
    """How often each product ran."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        if name in PRODUCTS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def products_of_step(setting: str) -> Counter[str]:
    model, batch = prepared(setting), batch_of(torch.float32)
    with CountedProducts() as counted, torch.autocast("cpu", torch.bfloat16):
        model(*batch)[2].backward()
    return counted.counts


def products_of_text_encoder() -> Counter[str]:
    backbone, (_, tokens, _) = prepared("none").backbone, batch_of(torch.float32)
    with CountedProducts() as counted, torch.autocast("cpu", torch.bfloat16):
        backbone.transformer(backbone.token_embedding(tokens), torch.zeros(tokens.shape[1], tokens.shape[1]))
    return counted.counts


def test_pointwise_computes_no_product_again_but_the_text_encoders():
    plain = products_of_step("none")
    assert plain["convolution"] > 20 and plain["_scaled_dot_product_flash_attention_for_cpu"] > 0
    extra = products_of_step("pointwise") - plain
    assert extra <= products_of_text_encoder() and "convolution" not in extra  # the last one's result is not needed


def test_stages_compute_the_convolutions_of_stem_layer1_and_layer2_again():
    extra = products_of_step("stages") - products_of_step("pointwise")
    assert extra == Counter(convolution=3 + 4 + 4)  # each layer: one block with its downsampling


def test_eval_mode_and_no_grad_take_no_detour(monkeypatch):
    monkeypatch.setattr(recompute, "checkpoint", None)
    model, (images, tokens, masks) = prepared("stages"), batch_of(torch.float32)
    with torch.no_grad():
        model(images, tokens, masks)
    logits = model.eval().segment(model.encode_image(images), tokens)
    assert logits.requires_grad


def test_unknown_setting_lists_the_valid_ones():
    with pytest.raises(ValueError, match="recompute must be one of none, pointwise, stages, got 'all'"):
        make_model().set_recompute("all")


def test_copies_keep_the_setting_and_weights_know_nothing_of_it():
    model = prepared("stages")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.recompute == twin.backbone.recompute == twin.backbone.visual.recompute == "stages"
    plain = prepared("none")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert plain.recompute == "none" and model.set_recompute("none").backbone.visual.recompute == "none"


@pytest.mark.parametrize("setting", RECOMPUTING)
def test_ddp_sees_the_same_gradients(setting, tmp_path):
    batch = batch_of(torch.float32)
    expected = one_step(prepared("none"), batch)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(prepared(setting), find_unused_parameters=True)
        torch.manual_seed(5)
        actual = results(wrapped.module, wrapped(*batch)[2])
    finally:
        dist.destroy_process_group()
    assert_same_bits(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [pytest.param(RECOMPUTING[0], marks=pytest.mark.long), *RECOMPUTING[1:]])
def test_compiled_without_graph_breaks_equals_eager(setting):
    images, tokens, masks = batch_of(torch.float64)

    def step(setting: str, compiled: bool) -> dict[str, Tensor]:
        model = make_model(layers=1).double().train().set_recompute(setting)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        return results(model, run(images, tokens, masks)[2])

    actual, expected = step(setting, compiled=True), step("none", compiled=False)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = expected[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
        assert (actual[name] - value).abs().max() <= 1e-10 * scale, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device with 12 GiB or more")
def test_published_batch_of_64_trains_on_a_card_of_12_gb():
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = 12 * 2**30 - 512 * 2**20  # without CUDA's context and kernels
    if total < allowed:
        pytest.skip(f"the device has {total / 2**30:.1f} GiB")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        model = CRIS(CRISConfig.preset("cris_r50")).cuda().train().set_recompute("stages")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
        tokens = torch.ones(64, 17, dtype=torch.int64, device="cuda")
        tokens[:, 16] = model.config.clip.vocab_size - 1
        for _ in range(2):  # the second with Adam's state
            with torch.autocast("cuda", torch.bfloat16):
                _, _, loss = model(torch.randn(64, 3, 416, 416).cuda(), tokens, torch.rand(64, 1, 416, 416).cuda())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.isfinite(loss)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
