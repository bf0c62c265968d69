"""Kernels are proved once, before anything relies on them; what fails is left by `auto`, with one notice."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
import torch
from pretended_gpu import CPU, pretended_gpu
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastris import dispatch, preflight
from fastris.dispatch import chosen_paths, resolve, use_impl
from fastris.ops import upsample2x_conv3x3
from fastris.ops.proofs import PROOFS
from fastris.preflight import verdicts
from fastris.testing import WrongNumber

OPERATOR = "upsample2x_conv3x3"


def no_compiler(operator, dtype):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


def wrong_attention(operator, dtype):
    if operator == "cross_attention" and dtype is torch.float16:
        raise WrongNumber("gradient of x: max error 1.0e+00 exceeds 1.0e-02")


def slow(operator, dtype):
    time.sleep(0.1)


def test_kernels_that_pass_are_taken_and_proved_once():
    with pretended_gpu() as proofs:
        assert [resolve(OPERATOR, CPU, torch.float32, impl) for impl in ("auto", "triton", "auto")] == ["triton"] * 3
        assert proofs.made == [(OPERATOR, torch.float32)]
        resolve(OPERATOR, CPU, torch.float16)
        assert proofs.made[1:] == [(OPERATOR, torch.float16)]


def test_nothing_is_proved_for_who_asks_for_another_path():
    with pretended_gpu() as proofs, use_impl("torch"):
        assert resolve(OPERATOR, CPU, torch.float32) == "torch"
        assert resolve(OPERATOR, CPU, torch.float32, "reference") == "reference"
        assert not proofs.made


def test_run_without_a_c_compiler_goes_on_with_one_notice_that_names_the_mend():
    x, weight = torch.randn(1, 2, 3, 4), torch.randn(2, 2, 3, 3)
    with pretended_gpu(no_compiler) as proofs:
        with pytest.warns(UserWarning) as told:
            output = upsample2x_conv3x3(x, weight)
            for operator in ("cross_attention", OPERATOR):
                for dtype in (torch.float32, torch.bfloat16):
                    assert resolve(operator, CPU, dtype) == "torch"
        assert torch.equal(output, upsample2x_conv3x3(x, weight, impl="torch"))
        (notice,) = [str(warning.message) for warning in told]
        assert notice.startswith("the Triton kernels are not used on cpu: Triton found no C compiler")
        assert "the torch path answers in their place" in notice and "apt install gcc" in notice
        assert len(proofs.made) == 1, "what is missing on the machine is missing for every operator"


def test_triton_that_failed_its_proof_is_an_error_with_reason_and_mend():
    with pretended_gpu(no_compiler), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r'impl="triton" cannot run: .* no C compiler.*apt install gcc'):
                upsample2x_conv3x3(torch.randn(1, 2, 3, 4), torch.randn(2, 2, 3, 3), impl="triton")


def test_wrong_number_concerns_its_operator_and_dtype_alone():
    with pretended_gpu(wrong_attention):
        with pytest.warns(
            UserWarning, match="of cross_attention in float16 .* their numbers are wrong .*gradient of x"
        ):
            assert resolve("cross_attention", CPU, torch.float16) == "torch"
        assert resolve("cross_attention", CPU, torch.float32) == resolve(OPERATOR, CPU, torch.float16) == "triton"
        reasons = {operator: (path, reason) for operator, path, reason in chosen_paths(CPU, torch.float16)}
    assert reasons["cross_attention"][0] == "torch" and "numbers are wrong" in reasons["cross_attention"][1]
    assert reasons[OPERATOR][0] == "triton"


def test_proof_that_fails_with_impl_triton_is_told_when_auto_meets_it():
    with pretended_gpu(no_compiler):
        with pytest.raises(RuntimeError, match="no C compiler"):
            resolve(OPERATOR, CPU, torch.float32, "triton")
        with pytest.warns(UserWarning, match="no C compiler"):
            assert resolve(OPERATOR, CPU, torch.float32) == "torch"


@pytest.mark.parametrize("failing", [None, no_compiler], ids=["right", "failing"])
def test_compiled_function_proves_while_it_is_traced_and_breaks_no_graph(failing):
    def double_or_negate(x):
        return 2 * x if resolve(OPERATOR, x.device, x.dtype) == "triton" else -x

    torch.compiler.reset()
    with pretended_gpu(failing) as proofs, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        compiled = torch.compile(double_or_negate, fullgraph=True, backend="eager")
        assert [compiled(torch.tensor(3.0)).item() for _ in range(2)] == [-3.0 if failing else 6.0] * 2
        assert len(proofs.made) == 1
        notices = [w for w in told if "Triton kernels" in str(w.message)]
        assert len(notices) == bool(failing)


def test_no_proof_starts_while_a_cuda_graph_is_captured(monkeypatch):
    with pretended_gpu() as proofs:
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_available", lambda: True)
            patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.warns(
                UserWarning, match="were not proved before.*capture of a CUDA graph.*once before"
            ) as told:
                assert [resolve(OPERATOR, CPU, torch.float32) for _ in range(2)] == ["torch"] * 2
            assert len(told) == 1
            assert resolve(OPERATOR, CPU, torch.float32, "triton") == "triton", "whoever asks for it gets it"
            assert not proofs.made
        assert resolve(OPERATOR, CPU, torch.float32) == "triton", "afterwards it is proved"
        assert len(proofs.made) == 1


def test_no_proof_starts_inside_functorch_or_fake_tensors():
    taken = []

    def look(x):
        taken.append(resolve(OPERATOR, CPU, torch.float32))
        return x

    with pretended_gpu() as proofs, pytest.warns(UserWarning, match="were not proved before"):
        torch.func.vmap(look)(torch.zeros(2))
        with FakeTensorMode():
            look(torch.zeros(2))
        assert taken == ["torch", "torch"] and not proofs.made


def test_no_proof_starts_inside_a_backward_pass_whose_thread_it_would_wait_for():
    taken = []

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            taken.append(resolve(OPERATOR, CPU, torch.float32))
            return gradient

    with pretended_gpu() as proofs:
        with pytest.warns(UserWarning, match="were not proved before.*backward pass"):
            Asking.apply(torch.ones(2, requires_grad=True)).sum().backward()
        assert taken == ["torch"] and not proofs.made
        assert resolve(OPERATOR, CPU, torch.float32) == "triton"
        Asking.apply(torch.ones(2, requires_grad=True)).sum().backward()
        assert taken == ["torch", "triton"] and len(proofs.made) == 1


def test_modes_that_only_watch_are_no_obstacle_to_a_proof():
    with pretended_gpu() as proofs, FlopCounterMode(display=False) as counter:
        assert resolve(OPERATOR, CPU, torch.float32) == "triton"
        assert len(proofs.made) == 1 and counter.get_total_flops() == 0


def test_notice_waits_for_no_proof():
    told = threading.Event()

    def proof_that_needs_a_notice(operator, dtype):
        threading.Thread(target=lambda: (verdicts.tell(OPERATOR, CPU, dtype, preflight.POSTPONED), told.set())).start()
        assert told.wait(20), "the notice waits for the proof, and the proof may wait for who tells"

    with pretended_gpu(proof_that_needs_a_notice), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert resolve(OPERATOR, CPU, torch.float32) == "triton"


def test_threads_that_ask_at_once_wait_for_one_proof():
    taken = []
    with pretended_gpu(slow) as proofs:
        work = [threading.Thread(target=lambda: taken.append(resolve(OPERATOR, CPU, torch.float32))) for _ in range(4)]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        assert taken == ["triton"] * 4 and len(proofs.made) == 1


def test_operators_that_a_proof_calls_need_no_proof():
    inside = []

    def asking(operator, dtype):
        inside.append(resolve("cross_attention", CPU, torch.float32, "triton"))

    with pretended_gpu(asking) as proofs:
        assert resolve(OPERATOR, CPU, torch.float32) == "triton"
        assert inside == ["triton"] and len(proofs.made) == 1


def test_other_processes_than_the_main_one_stay_silent(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pretended_gpu(no_compiler), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(OPERATOR, CPU, torch.float32) == "torch"


def test_every_operator_with_kernels_has_a_proof():
    with_kernels = {name for name, operator in dispatch.OPERATORS.items() if operator.kernels}
    assert set(PROOFS) == with_kernels


@pytest.mark.parametrize("impl", ["auto", "triton", "prove"])
def test_measured_tiles_are_in_use_before_anything_is_proved(monkeypatch, impl):
    order = []
    with pretended_gpu(lambda operator, dtype: order.append("proof")):
        monkeypatch.setattr(dispatch.tuned, "tuning_of", lambda index: order.append("tiles"))
        if impl == "prove":
            dispatch.prove(OPERATOR, CPU, torch.float32)
        else:
            resolve(OPERATOR, CPU, torch.float32, impl)
    assert order == ["tiles", "proof"]
