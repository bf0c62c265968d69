"""Proofs that the Triton kernels compile, launch and answer right on the GPU at hand, before anything relies on them.

A kernel that has never run on a card is not trusted there: its first use in a process is a proof, a small forward and
backward pass against float64 (:mod:`fastris.ops.proofs`), and the verdict holds for the rest of the process. Nothing
is tried and caught later: a backward pass that fails would come too late.
"""

from fastris.preflight.reasons import Failure
from fastris.preflight.verdicts import (
    POSTPONED,
    adopt,
    index_of,
    known,
    prove,
    register,
    settled,
    tell,
    try_out,
    verdict,
)

__all__ = [
    "POSTPONED",
    "Failure",
    "adopt",
    "index_of",
    "known",
    "prove",
    "register",
    "settled",
    "tell",
    "try_out",
    "verdict",
]
