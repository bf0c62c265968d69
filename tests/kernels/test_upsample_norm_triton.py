"""The BatchNorm behind an upsampling convolution takes its statistics from the kernel: published numbers, a pass less.

Under the interpreter on a CPU (TRITON_INTERPRET=1), or on a GPU.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastris.dispatch import use_impl
from fastris.models.cris.projector import Projector
from fastris.nn.upsample_norm import upsampled_and_normed, upsampled_to_be_scored
from fastris.ops import text_to_pixel_similarity
from fastris.ops.upsample_conv import upsample2x_conv3x3
from fastris.runtime.sync_batchnorm import CPUSyncBatchNorm

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton kernels run on a CUDA device, or with TRITON_INTERPRET=1 in Triton's interpreter",
)

NORMS = {
    "momentum": lambda width: nn.BatchNorm2d(width, momentum=0.3),
    "cumulative": lambda width: nn.BatchNorm2d(width, momentum=None),
    "no momentum": lambda width: nn.BatchNorm2d(width, momentum=0.0),
    "not tracked": lambda width: nn.BatchNorm2d(width, track_running_stats=False),
    "not tracked, eval": lambda width: nn.BatchNorm2d(width, track_running_stats=False).eval(),
    "not affine": lambda width: nn.BatchNorm2d(width, affine=False),
    "eval": lambda width: nn.BatchNorm2d(width).eval(),
    "frozen": lambda width: nn.BatchNorm2d(width).requires_grad_(False),
    "synchronised": lambda width: CPUSyncBatchNorm(width),
}
IN_TRAINING = ("momentum", "cumulative", "no momentum", "not tracked", "not tracked, eval", "not affine", "frozen")


class Block(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        width = getattr(norm, "num_features", 5)
        self.convolution, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), norm
        for parameter in self.norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)

    def published(self, x: Tensor) -> Tensor:
        up = F.interpolate(x, scale_factor=2, mode="bilinear")
        return F.relu(self.norm(self.convolution(up)))

    def forward(self, x: Tensor) -> Tensor:
        with use_impl("triton"):
            return F.relu(upsampled_and_normed(x, self.convolution, self.norm), inplace=True)


def run(block: Block, function, inputs: list[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """Outputs, all gradients and the norm's buffers after a step on each of ``inputs``."""
    results = {}
    for number, value in enumerate(inputs):
        leaf = value.clone().requires_grad_()
        output = function(leaf)
        output.backward(upstream.to(output.dtype))
        results |= {f"output {number}": output.detach(), f"dx {number}": leaf.grad}
    results |= {f"d {name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    return results | {name: buffer.clone() for name, buffer in block.named_buffers()}


class Operators(TorchDispatchMode):
    """Names of what is called, and of BatchNorms that take the statistics themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name
        if name == "aten::native_batch_norm":
            name += " of its own" if arguments[5] else " by given ones"
        self.names.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", NORMS)
def test_numbers_are_the_published_ones_and_no_pass_reads_the_map_for_statistics(name):
    torch.manual_seed(0)
    block = Block(NORMS[name](5)).to(DEVICE)
    truth = copy.deepcopy(block).double()
    inputs = [
        torch.randn(2, 3, 2, 3, device=DEVICE) * scale + scale for scale in ((1, 3) if name == "cumulative" else (2,))
    ]
    upstream = torch.randn(2, 5, 4, 6, device=DEVICE)
    with Operators() as seen:
        results = run(block, block, inputs, upstream)
    expected = run(truth, truth.published, [value.double() for value in inputs], upstream)
    assert results.keys() == expected.keys()
    for key, value in results.items():
        error = (value.double() - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1e-3)
        assert error <= 1e-5, f"{key}: {error}"
    of_its_own = [each for each in seen.names if "of its own" in each or "var" in each or "cudnn_batch" in each]
    assert ("fastris::upsample2x_conv3x3_stats" in seen.names) == (name in IN_TRAINING)
    assert not of_its_own or name not in IN_TRAINING


def test_the_projector_trains_that_way_and_evaluates_as_before():
    projector = Projector(8, 4).to(DEVICE)
    x, word = torch.randn(2, 8, 2, 2, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    for training, times in ((True, 2), (False, 0)):
        with Operators() as seen, use_impl("triton"):
            projector.train(training)(x, word)
        assert seen.names.count("fastris::upsample2x_conv3x3_stats") == times


def kept_bytes(function) -> tuple[int, Tensor]:
    """Bytes that autograd keeps of one call, each storage once, and the answer."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function()
    return sum(kept.values()), output


def test_autocast_answers_in_its_dtype_and_nothing_more_is_kept():
    block = Block(nn.BatchNorm2d(5)).to(DEVICE)
    x = torch.randn(2, 3, 2, 3, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16), use_impl("triton"):
        ours, output = kept_bytes(lambda: upsampled_and_normed(x, block.convolution, block.norm))
        plain, expected = kept_bytes(lambda: block.norm(upsample2x_conv3x3(x, block.convolution.weight)))
    assert output.dtype is torch.float16 and ours <= plain
    torch.testing.assert_close(output, expected, rtol=2e-3, atol=2e-3)
    output.sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in block.parameters())


def test_a_hook_on_the_norm_is_still_called():
    block = Block(nn.BatchNorm2d(5)).to(DEVICE)
    calls = []
    block.norm.register_forward_hook(lambda *_: calls.append(1))
    block(torch.randn(1, 3, 2, 2, device=DEVICE))
    assert calls


def test_without_samples_the_norm_itself_answers():
    block = Block(nn.BatchNorm2d(5, track_running_stats=False).eval()).to(DEVICE)
    assert block(torch.randn(0, 3, 2, 2, device=DEVICE)).shape == (0, 5, 4, 4)


class Head(Block):
    """A block whose pixels are scored by one text kernel."""

    def __init__(self, norm: nn.Module, activation: nn.Module | None = None):
        super().__init__(norm)
        self.activation = activation or nn.ReLU(True)
        self.kernel = nn.Parameter(torch.randn(2, norm.num_features, 3, 3))

    def published(self, x: Tensor) -> Tensor:
        return text_to_pixel_similarity(super().published(x), self.kernel, impl="reference")

    def forward(self, x: Tensor) -> Tensor:
        operator = "text_to_pixel_similarity"
        with use_impl("triton"):
            features, norm = upsampled_to_be_scored(x, (self.convolution, self.norm, self.activation), operator, 9)
            return text_to_pixel_similarity(features, self.kernel, norm=norm)


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_the_scoring_kernels_apply_gives_the_published_numbers_in_no_pass_of_its_own(name):
    torch.manual_seed(1)
    head = Head(NORMS[name](16)).to(DEVICE)
    truth = copy.deepcopy(head).double()
    inputs = [torch.randn(2, 3, 2, 3, device=DEVICE) * scale + scale for scale in ((1, 3) if name == "eval" else (2,))]
    upstream = torch.randn(2, 1, 4, 6, device=DEVICE)
    with Operators() as seen:
        results = run(head, head, inputs, upstream)
    expected = run(truth, truth.published, [value.double() for value in inputs], upstream)
    assert results.keys() == expected.keys()
    for key, value in results.items():
        error = (value.double() - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1e-3)
        assert error <= 1e-5, f"{key}: {error}"
    of_the_map = [each for each in seen.names if "batch_norm" in each or "relu" in each or "threshold" in each]
    assert bool(of_the_map) == (name == "synchronised"), of_the_map


@pytest.mark.parametrize("channels", [16, 12])
def test_a_step_of_the_projector_keeps_its_last_map_once(channels):
    """With 12 channels, which the kernels do not norm themselves, twice: before the norm and behind the ReLU."""
    projector = Projector(8, channels).to(DEVICE)
    x, word = torch.randn(2, 2 * channels, 2, 2, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    mask = torch.zeros(2, 1, 32, 32, device=DEVICE)
    maps: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() == 2 * channels * 8 * 8:
            maps[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with use_impl("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = projector(x, word, mask)
    assert len(maps) == (1 if channels == 16 else 2)
    loss.backward()


@pytest.mark.parametrize("which", ["norm", "activation"])
def test_hooks_are_called_where_the_scoring_kernels_would_apply_the_norm(which):
    head, calls = Head(nn.BatchNorm2d(16)).to(DEVICE), []
    getattr(head, which).register_forward_hook(lambda *_: calls.append(1))
    head(torch.randn(2, 3, 2, 2, device=DEVICE))
    assert calls


def test_another_activation_stays_what_it_is():
    torch.manual_seed(2)
    x, head = torch.randn(2, 3, 2, 2, device=DEVICE), Head(nn.BatchNorm2d(16), nn.GELU()).to(DEVICE)
    features = nn.functional.gelu(head.norm(upsample2x_conv3x3(x, head.convolution.weight, impl="reference")))
    torch.testing.assert_close(head(x), text_to_pixel_similarity(features, head.kernel, impl="reference"))


def test_autocast_scores_normed_features_in_its_dtype():
    head = Head(nn.BatchNorm2d(16)).to(DEVICE)
    x = torch.randn(2, 3, 2, 3, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        output, expected = head(x), head.published(x)
    assert output.dtype is torch.float16
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=2e-2)
    output.sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in head.parameters())
