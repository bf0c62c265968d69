"""Cards as their vendors describe them: what models of speed are made of. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A card as its vendor describes it.

    ``products`` is the number of bf16 operations that a multiprocessor does per clock in dense matrix products with
    float32 accumulation; at float32 it does 256. GeForce tensor cores accumulate in float32 at half of their fp16 rate.
    """

    name: str
    multiprocessors: int
    boost_ghz: float
    products: int
    bandwidth: float  # GB/s
    memory: int  # GB
    source: str

    @property
    def matrix_rate(self) -> float:
        """Dense bf16 products with float32 accumulation, operations per second."""
        return self.multiprocessors * self.products * self.boost_ghz * 1e9

    @property
    def wide_rate(self) -> float:
        """float32 products outside the tensor cores, operations per second."""
        return self.multiprocessors * 256 * self.boost_ghz * 1e9


CARDS = (
    Card("RTX 3060 12GB", 28, 1.777, 512, 360, 12, "NVIDIA GA102 whitepaper's table for GA10x, product page"),
    Card("RTX 4070", 46, 2.475, 512, 504, 12, "NVIDIA Ada whitepaper's table for AD10x, product page"),
    Card("RTX 4090", 128, 2.52, 512, 1008, 24, "NVIDIA Ada whitepaper, appendix A: 165.2 TFLOP/s"),
    Card("RTX 5090", 170, 2.407, 512, 1792, 32, "NVIDIA RTX Blackwell whitepaper, appendix A: 209.5 TFLOP/s"),
    Card("H200", 132, 1.83, 4096, 4800, 141, "NVIDIA H200 data sheet: 989 TFLOP/s dense, 4.8 TB/s"),
)
