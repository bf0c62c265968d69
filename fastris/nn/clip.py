"""CLIP's ResNet and text transformer as CRIS uses them: they return feature maps and every word, not single vectors.

Built from open_clip's modules, so that parameter names, initialisation and numerics are CLIP's own. CRIS changes what
is returned, and the attention pool: it does not pool, every pixel attends to every pixel.
Source: CRIS section 3.1; published file ``model/clip.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.transformer import LayerNorm, QuickGELU, Transformer
from torch import Tensor, nn

from fastris.nn.recompute import recomputed


class DenseAttentionPool(AttentionPool2d):
    """CLIP's attention pool without pooling, plus CRIS's residual ``connect``: (B, C, H, W) -> (B, E, H, W).

    The learned positions (without the class position) are resized bicubically from the training grid to H x W.
    ``connect`` (1x1 convolution and BatchNorm) is CRIS's own and absent from CLIP's weights.
    """

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads: int, output_dim: int):
        super().__init__(spacial_dim, embed_dim, num_heads, output_dim)
        self.spacial_dim = spacial_dim
        self.connect = nn.Sequential(nn.Conv2d(embed_dim, output_dim, 1, bias=False), nn.BatchNorm2d(output_dim))

    def positions(self, height: int, width: int) -> Tensor:
        """Positions for a grid of height x width: (1, C, height*width)."""
        grid = self.positional_embedding[1:].T.reshape(1, -1, self.spacial_dim, self.spacial_dim)
        return F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        tokens = x.flatten(2)
        tokens = (tokens + self.positions(height, width).to(x.dtype)).permute(2, 0, 1)
        attended, _ = F.multi_head_attention_forward(
            tokens,
            tokens,
            tokens,
            embed_dim_to_check=tokens.shape[-1],
            num_heads=self.num_heads,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            training=self.training,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )
        attended = attended.permute(1, 2, 0).reshape(batch, -1, height, width)
        return F.relu(attended + self.connect(x))


class DenseResNet(ModifiedResNet):
    """CLIP's ModifiedResNet, returning C3 (layer2), C4 (layer3) and C5 (attention pool) at strides 8, 16 and 32.

    For RN50 and 416x416: 512@52x52, 1024@26x26, 1024@13x13. ``recompute`` is set by :meth:`fastris.CRIS.set_recompute`.
    """

    recompute = "none"

    def __init__(self, layers: tuple[int, ...], output_dim: int, heads: int, image_size: int, width: int):
        super().__init__(list(layers), output_dim, heads, image_size, width)
        self.attnpool = DenseAttentionPool(image_size // 32, width * 32, heads, output_dim)
        self.init_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c2 = self.stage(1, self.stem_map(x))
        c3 = self.stage(2, c2)
        c4 = self.stage(3, c3)
        return c3, c4, self.stage(4, c4)

    def stem_map(self, x: Tensor) -> Tensor:
        """The stem's map (B, w, H/4, W/4) of images (B, 3, H, W), which stage 1 takes."""
        norms = [self.bn1, self.bn2, self.bn3]
        return recomputed(norms, self.recompute, self.stem, x, whole=self.recompute == "stages")

    def stage(self, number: int, x: Tensor, exchange: nn.Module | None = None, *text: Tensor) -> Any:
        """Stage ``number``, 1 to 4, of the map before it; the attention pool belongs to stage 4.

        With an ``exchange`` between pixels and words behind the stage's blocks, as part of it: the map and the words
        that ``exchange(map, *text)`` returns.
        """
        blocks: Any = self.get_submodule(f"layer{number}")
        pools = number == 4

        def run(x: Tensor, *text: Tensor) -> Any:
            x = blocks(x)
            if exchange is None:
                return self.attnpool(x) if pools else x
            x, words = exchange(x, *text)
            return (self.attnpool(x) if pools else x), words

        modules = [blocks, *([self.attnpool] if pools else []), *([] if exchange is None else [exchange])]
        return recomputed(modules, self.recompute, run, x, *text, whole=self.recompute == "stages" and number <= 2)


class CLIPBackbone(nn.Module):
    """CRIS's image and text encoder in one module, with CLIP's parameter names.

    The arguments are CLIP's: ``embed_dim`` is the width of ``state`` and of C5; ``image_resolution`` is the one at
    which the attention pool's positions were trained, in pixels (224 for RN50 and RN101), not the one to run at.
    ``recompute`` is set by :meth:`fastris.CRIS.set_recompute`.
    """

    recompute = "none"

    def __init__(
        self,
        embed_dim: int,
        image_resolution: int,
        vision_layers: tuple[int, ...],
        vision_width: int,
        context_length: int,
        vocab_size: int,
        transformer_width: int,
        transformer_heads: int,
        transformer_layers: int,
    ):
        super().__init__()
        vision_heads = vision_width * 32 // 64
        self.visual = DenseResNet(vision_layers, embed_dim, vision_heads, image_resolution, vision_width)
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads, act_layer=QuickGELU)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # in the checkpoints; CRIS does not use it
        self._init_text()

    def _init_text(self) -> None:
        """CLIP's initialisation of the text encoder, for training without its weights."""
        width, depth = self.transformer.width, self.transformer.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        residual_std = (2 * width * depth) ** -0.5
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> C3 (B, 8w, H/8, W/8), C4 (B, 16w, H/16, W/16), C5 (B, E, H/32, W/32); w = vision_width."""
        return self.visual(image)

    def encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) -> the words (B, L, D) and the sentence ``state`` (B, E), which is read at the end token.

        The end token has the largest id of the vocabulary, so argmax finds it.
        """
        words = self._states(self.embed_text(text))
        return words, self.sentence(words, text)

    def encode_text_and_hidden(self, text: Tensor, hidden: Tensor, mask_embedding: Tensor) -> tuple[Tensor, ...]:
        """:meth:`encode_text`, and the words (B, L, D) of the same sentences with ``hidden`` (B, L) tokens.

        Their rows of the embedding are ``mask_embedding`` (D,). One pass over 2B sentences; nothing of the one half
        reaches the other, and causality stays: a state knows its own and the earlier tokens.
        """
        embedded = self.token_embedding(text)
        masked = torch.where(hidden[..., None], mask_embedding.to(embedded.dtype), embedded)
        both = torch.cat([embedded, masked]) + self.positional_embedding[: text.shape[1]]
        words, of_masked = self._states(both).chunk(2)
        return words, self.sentence(words, text), of_masked

    def embed_text(self, text: Tensor) -> Tensor:
        """What the text encoder's first layer gets (B, L, D), of token ids (B, L)."""
        return self.token_embedding(text) + self.positional_embedding[: text.shape[1]]

    def text_part(self, part: int, parts: int, x: Tensor) -> Tensor:
        """The states (B, L, D) behind one of ``parts`` equal parts of the text encoder's layers, from 0 on."""
        length, layers = x.shape[1], self.transformer.layers
        causal = torch.full((length, length), -math.inf, device=x.device, dtype=x.dtype).triu(1)
        if parts == 1:
            return recomputed([self.transformer], self.recompute, self.transformer, x, causal, whole=True)
        blocks = self.transformer.resblocks[layers * part // parts : layers * (part + 1) // parts]

        def run(x: Tensor, causal: Tensor) -> Tensor:
            for block in blocks:
                x = block(x, attn_mask=causal)
            return x

        return recomputed([blocks], self.recompute, run, x, causal, whole=True)

    def _states(self, embedded: Tensor) -> Tensor:
        """The words (B, L, D) of embedded tokens (B, L, D) with their positions."""
        return self.ln_final(self.text_part(0, 1, embedded))

    def sentence(self, words: Tensor, text: Tensor) -> Tensor:
        """The ``state`` (B, E) of sentences with the words (B, L, D) and token ids (B, L)."""
        end = words[torch.arange(words.shape[0], device=words.device), text.argmax(dim=-1)]
        return end @ self.text_projection
