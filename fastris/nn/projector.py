"""The projector (CRIS section 3.4): the sentence becomes a convolution kernel, its response the mask's logits."""

from __future__ import annotations

from torch import Tensor, nn

from fastris import reference
from fastris.nn.blocks import conv_layer


class Projector(nn.Module):
    """CRIS's projector under its published name, arguments, defaults and state-dict keys.

    ``forward(x, word)`` takes ``x`` (B, 2*in_dim, h, w) and the sentence ``word`` (B, word_dim) and returns logits
    (B, 1, 4h, 4w). ``txt`` projects the sentence to in_dim*k*k + 1 numbers: its own k x k kernel, laid out
    (in_dim, k, k), and last its bias.
    """

    def __init__(self, word_dim: int = 1024, in_dim: int = 256, kernel_size: int = 3):
        super().__init__()
        self.in_dim = in_dim
        self.kernel_size = kernel_size
        self.vis = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv_layer(in_dim * 2, in_dim * 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv_layer(in_dim * 2, in_dim, 3, padding=1),
            nn.Conv2d(in_dim, in_dim, 1),
        )
        self.txt = nn.Linear(word_dim, in_dim * kernel_size * kernel_size + 1)

    def text_kernel(self, word: Tensor) -> tuple[Tensor, Tensor]:
        """The sentence's kernel (B, in_dim, k, k) and bias (B,)."""
        parameters = self.txt(word)
        kernel = parameters[:, :-1].reshape(-1, self.in_dim, self.kernel_size, self.kernel_size)
        return kernel, parameters[:, -1]

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        kernel, bias = self.text_kernel(word)
        return reference.text_to_pixel_similarity(self.vis(x), kernel, bias)
