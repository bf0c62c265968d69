"""A replaced forward was proved on small inputs: what it does at the first call with sizes that were not looked at."""

from __future__ import annotations

import copy
import gc
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
from strangers import (
    BatchHead,
    CroppingFusion,
    CrossModalDecoder,
    Fusion,
    Layer,
    LongSentenceDropoutLayer,
    MaskHead,
    NarrowHead,
    QueryHead,
    ShortSightedDecoder,
    Stranger,
    TrainingHead,
    WindowedLayer,
)
from torch import nn

from fastris.dropin import sizes as dropin_sizes
from fastris.dropin.patch import patch, unpatch


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def head_inputs(width: int = 4, batch: int = 2) -> tuple:
    return normal(batch, 32, 3, width), normal(batch, 48)


def decoder_inputs(words: int, batch: int = 2) -> tuple:
    return normal(batch, 32, 2, 3), normal(batch, words, 32), torch.zeros(batch, words, dtype=torch.bool)


def layer_inputs(pixels: int = 6, words: int = 5) -> tuple:
    mask = torch.zeros(2, words, dtype=torch.bool)
    return normal(pixels, 2, 32), normal(words, 2, 32), normal(pixels, 1, 32), normal(words, 1, 32), mask


def neck_inputs(width: int) -> tuple:
    sizes = zip((32, 64, 48), (4, 2, 1), strict=True)
    return [normal(2, channels, 2 * scale, width * scale) for channels, scale in sizes], normal(2, 48)


def decoder(kind: type = CrossModalDecoder) -> nn.Module:
    return kind(2, 32, 4, 64, dropout=0.0)


# name -> (module, training, small inputs at which it computes CRIS's formula, large ones at which it does not)
DEPENDENT = {
    "reads eight words": (decoder(ShortSightedDecoder), False, decoder_inputs(7), decoder_inputs(17)),
    "resizes wide maps": (NarrowHead(48, 16), False, head_inputs(8), head_inputs(40)),
    "crops wide maps": (CroppingFusion(), False, neck_inputs(4), neck_inputs(9)),
    "more than 600 pixels": (WindowedLayer(32, 4, 64), False, layer_inputs(600), layer_inputs(601)),
    "more than four samples": (BatchHead(48, 16), False, head_inputs(batch=4), head_inputs(batch=5)),
    "in training only": (TrainingHead(48, 16), True, head_inputs(8), head_inputs(9)),
    "dropout of long sentences": (
        LongSentenceDropoutLayer(32, 4, 64, dropout=0.0), True, layer_inputs(), layer_inputs(words=9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEPENDENT)
def test_forward_that_depends_on_size_is_put_back_at_the_first_call_that_shows_it(name):
    module, training, small, large = DEPENDENT[name]
    module = copy.deepcopy(module).train(training)
    twin = copy.deepcopy(module)
    replaced = patch(module).replaced
    assert replaced[0][0] == "", "the proof's small inputs do not show it"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*small)
    assert "forward" in module.__dict__
    twin(*small)  # so that both have seen the same batches
    with pytest.warns(UserWarning, match=r"fastris\.patch: the model runs its own forward again") as seen:
        torch.manual_seed(5)
        answer = module(*large)
    torch.manual_seed(5)
    torch.testing.assert_close(answer, twin(*large), rtol=0, atol=0 if len(replaced) == 1 else 1e-5)
    assert "forward" not in module.__dict__ and unpatch(module) == len(replaced) - 1
    (message,) = [str(w.message) for w in seen]
    shape = str(tuple((large[0][0] if isinstance(large[0], list) else large[0]).shape))
    assert shape in message and ("in training" if training else "in eval mode") in message
    assert "differ" in message or "shape" in message or "returns" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*small)


def test_words_that_are_padding_in_this_batch_still_show_that_nobody_reads_them():
    module = decoder(ShortSightedDecoder).eval()
    patch(module)
    image, words, padding = decoder_inputs(17)
    padding[:, 5:] = True  # the answers agree on this batch; they would not on the next
    with pytest.warns(UserWarning, match="in eval mode its values differ"):
        module(image, words, padding)


def test_layers_that_share_a_proof_are_put_back_each_at_its_own_call():
    layers = nn.ModuleList([WindowedLayer(32, 4, 64) for _ in range(2)]).eval()
    twins = copy.deepcopy(layers)
    assert len(patch(layers).replaced) == 2
    for number, (layer, twin) in enumerate(zip(layers, twins, strict=True)):
        with pytest.warns(UserWarning, match=f"fastris.patch: {number} runs its own forward again"):
            assert torch.equal(layer(*layer_inputs(601)), twin(*layer_inputs(601)))
    assert unpatch(layers) == 0


HONEST = {
    "neck": (Fusion(), [neck_inputs(4), neck_inputs(9), neck_inputs(5)]),
    "decoder": (decoder(), [decoder_inputs(3), decoder_inputs(17), decoder_inputs(77), decoder_inputs(9, batch=1)]),
    "layer": (Layer(32, 4, 64), [layer_inputs(), layer_inputs(700, 17)]),
    "projector": (MaskHead(48, 16), [head_inputs(), head_inputs(40), head_inputs(5, batch=7)]),
    "projector with several maps": (MaskHead(48, 16, maps=5), [head_inputs(7), head_inputs(12)]),
    "projector with several text kernels": (QueryHead(48, 16), [head_inputs(7), head_inputs(12)]),
}  # fmt: skip


@pytest.mark.parametrize("precisions", [("float32", "bfloat16", "float16"), ("autocast",)], ids=", ".join)
@pytest.mark.parametrize("name", HONEST)
def test_honest_module_gives_no_warning_at_any_size_and_precision(name, precisions):
    module, calls = HONEST[name]
    module = copy.deepcopy(module)
    assert len(patch(module).replaced) == (3 if name == "decoder" else 1)
    for precision in precisions:
        dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
        module.to(dtype)
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            warnings.simplefilter("error")
            for training in (False, True):
                module.train(training)
                for inputs in calls:
                    module(*(in_dtype(value, dtype) for value in inputs))
    assert unpatch(module) == (3 if name == "decoder" else 1)


def in_dtype(value, dtype: torch.dtype):
    if isinstance(value, list):
        return [in_dtype(item, dtype) for item in value]
    return value.to(dtype) if value.is_floating_point() else value


def looks(monkeypatch: pytest.MonkeyPatch) -> list:
    """The sizes that were looked at from now on."""
    seen, look = [], dropin_sizes._difference
    monkeypatch.setattr(dropin_sizes, "_difference", lambda *args: (seen.append(args[-1]), look(*args))[1])
    return seen


def test_each_size_is_looked_at_once_and_the_mode_counts(monkeypatch):
    module, seen = MaskHead(48, 16).eval(), looks(monkeypatch)
    patch(module)
    for width in (4, 5, 4, 5):
        module(*head_inputs(width))
    assert len(seen) == 2
    module.train()
    module(*head_inputs(4))
    assert len(seen) == 3
    copy.deepcopy(module)(*head_inputs(4))
    assert len(seen) == 3, "a copy knows what the module knew"


def test_endless_sizes_cost_ever_fewer_looks_and_a_larger_one_is_always_looked_at(monkeypatch):
    monkeypatch.setattr(dropin_sizes, "LIMIT", 3)
    module, seen = NarrowHead(48, 16).eval(), looks(monkeypatch)
    module.widest = 30
    patch(module)
    for width in (2, 30, 20):
        module(*head_inputs(width))
    for _ in range(3):
        for width in range(3, 20):
            module(*head_inputs(width))
    assert 3 < len(seen) <= 3 + 6
    with pytest.warns(UserWarning, match="runs its own forward again"):
        module(*head_inputs(31))


def test_look_changes_nothing_that_the_run_computes():
    model = Stranger(dropout=0.3).train()
    twin = copy.deepcopy(model)
    patch(model)
    fired: list[str] = []
    model.fusion.txt_proj.register_forward_hook(lambda *_: fired.append("hook"))
    inputs = neck_inputs(4)
    expected = twin.fusion(*inputs)
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    gradients = torch.is_grad_enabled()
    answer = model.fusion(*inputs)
    assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all() and torch.is_grad_enabled() is gradients
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(model.fusion.buffers(), twin.fusion.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert fired == ["hook"] and all(p.grad is None for p in model.parameters())
    answer.sum().backward()
    assert all(p.grad is not None for p in model.fusion.parameters())


def test_look_keeps_autocast_and_its_gradients():
    head = MaskHead(48, 16).train()
    patch(head)
    with torch.autocast("cpu", torch.bfloat16):
        x, word = head_inputs(9)
        assert head(x, word).dtype is torch.bfloat16 and torch.is_autocast_enabled("cpu")
        head(x, word).float().sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_look_works_under_inference_mode_and_training_follows():
    head = NarrowHead(48, 16).eval()
    patch(head)
    with torch.inference_mode():
        head(*head_inputs(7))
        with pytest.warns(UserWarning, match="runs its own forward again"):
            head(*head_inputs(9))
    head.train()(*head_inputs(9)).sum().backward()


def count_tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_look_keeps_no_memory():
    head = MaskHead(48, 16).eval()
    patch(head)
    x, word = head_inputs(9)
    reference = weakref.ref(x)
    with torch.no_grad():
        head(x, word)
    gc.collect()
    before = count_tensors()
    with torch.no_grad():
        head(*head_inputs(11))
    gc.collect()
    assert count_tensors() <= before
    del x
    assert reference() is None


def test_wrong_call_raises_as_the_original_and_changes_nothing():
    head = MaskHead(48, 16).eval()
    patch(head)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="channels"):
        warnings.simplefilter("error")
        head(normal(2, 31, 3, 4), normal(2, 48))
    assert unpatch(head) == 1


def test_call_that_cannot_be_looked_at_runs_the_original():
    head = NarrowHead(48, 16).eval()
    twin = copy.deepcopy(head)
    patch(head)
    x, word = head_inputs(9)
    with torch.no_grad():
        got, expected = (torch.vmap(lambda one, f=module: f(one, word))(x[None]) for module in (head, twin))
    torch.testing.assert_close(got, expected)
    assert unpatch(head) == 1


def test_call_in_the_capture_of_a_cuda_graph_is_not_looked_at(monkeypatch):
    head, seen = NarrowHead(48, 16).eval(), looks(monkeypatch)
    patch(head)
    monkeypatch.setattr(dropin_sizes, "_device", lambda module: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.equal(head(*head_inputs(9)), NarrowHead.forward(head, *head_inputs(9)))
    assert not seen and unpatch(head) == 1


def test_module_that_cannot_be_copied_any_more_is_put_back():
    head = MaskHead(48, 16).eval()
    patch(head)
    head.door = (number for number in range(3))
    with pytest.warns(UserWarning, match="cannot be seen whether it is still CRIS's"):
        head(*head_inputs(4))
    assert unpatch(head) == 0


def test_sizes_that_there_is_no_memory_to_look_at_run_the_original(monkeypatch):
    head = NarrowHead(48, 16).eval()
    patch(head)

    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dropin_sizes, "_difference", full)
    with pytest.warns(UserWarning, match="there is not enough memory"):
        got = head(*head_inputs(9))
    assert torch.equal(got, NarrowHead.forward(head, *head_inputs(9))) and unpatch(head) == 1


@pytest.mark.slow
def test_compiled_call_looks_at_its_sizes_while_it_is_traced():
    head = NarrowHead(48, 16).eval()
    twin = copy.deepcopy(head)
    patch(head)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*head_inputs(7)), twin(*head_inputs(7)), rtol=0, atol=1e-5)
        with pytest.warns(UserWarning, match="runs its own forward again"):
            got = compiled(*head_inputs(9))
        torch.testing.assert_close(got, twin(*head_inputs(9)), rtol=0, atol=1e-5)
        torch.testing.assert_close(compiled(*head_inputs(10)), twin(*head_inputs(10)), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_graph_of_open_sizes_is_ours_between_sizes_that_were_looked_at_and_the_original_beyond():
    torch.compiler.reset()  # what other tests compiled decides what stays open
    head = NarrowHead(48, 16).eval()
    twin = copy.deepcopy(head)
    patch(head)
    with torch.no_grad():
        head(*head_inputs(8, batch=3))
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for width in (5, 6, 8):
            torch.testing.assert_close(compiled(*head_inputs(width)), twin(*head_inputs(width)), rtol=0, atol=1e-5)
        with pytest.warns(UserWarning, match="compiled for sizes that stay open"):
            got = compiled(*head_inputs(9))
        torch.testing.assert_close(got, twin(*head_inputs(9)), rtol=0, atol=1e-5)
