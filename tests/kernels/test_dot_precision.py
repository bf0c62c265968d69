"""float32 products follow PyTorch's switch for TF32, in its old and in its new form, and reading it never raises."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

OLD, NEW, ALL = (
    "torch.backends.cuda.matmul.allow_tf32",
    "torch.backends.cuda.matmul.fp32_precision",
    "torch.backends.fp32_precision",
)
# What a program wrote -> the precision of its float32 products. Each runs in a process of its own: there is no way back
# from the newer names to the older ones.
SETTINGS = {
    "": "ieee",
    f"{OLD} = True": "tf32",
    f"{OLD} = True; {OLD} = False": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.set_float32_matmul_precision('medium')": "tf32",
    "torch.set_float32_matmul_precision('high'); torch.set_float32_matmul_precision('highest')": "ieee",
    f"{ALL} = 'tf32'": "tf32",
    f"{ALL} = 'ieee'": "ieee",
    f"{NEW} = 'tf32'": "tf32",
    f"{ALL} = 'tf32'; {NEW} = 'ieee'": "ieee",
    f"{ALL} = 'ieee'; {NEW} = 'tf32'": "tf32",
    f"{ALL} = 'tf32'; {NEW} = 'ieee'; {NEW} = 'none'": "tf32",
    f"{OLD} = True; {NEW} = 'ieee'": "ieee",
    f"{ALL} = 'tf32'; {OLD} = False": "ieee",
    "torch.backends.cudnn.allow_tf32 = True": "ieee",
}
PROGRAM = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
from fastris.kernels.common import dot_precision

def answer(setting):
    exec(setting)
    os.write(1, " ".join(map(dot_precision, (torch.float32, torch.float16, torch.bfloat16))).encode() + b"\\n")
    os._exit(0)

for setting in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            answer(setting)
        except BaseException as error:
            os.write(1, f"{error!r}\\n".encode())
            os._exit(1)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM, *SETTINGS], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return dict(zip(SETTINGS, run.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
def test_float32_products_follow_the_setting_and_half_precision_ignores_it(answers, setting):
    assert answers[setting] == f"{SETTINGS[setting]} ieee ieee"
