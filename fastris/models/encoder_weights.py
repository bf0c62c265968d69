"""Weights of Swin and BERT as others store them, under the names that systems with these encoders have.

Swin: Microsoft's files (``swin_base_patch4_window12_384_22k.pth``), timm's and transformers' on Hugging Face. BERT:
transformers', with or without its pooler and heads, old names of LayerNorm's parameters included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_TABLE = "relative_position_bias_table"
_MICROSOFT = "layers.0.blocks.0.attn." + _TABLE
_TRANSFORMERS = "encoder.layers.0.blocks.0.attention.self." + _TABLE
_SWIN_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_THIRDS = ("query", "key", "value")
_WORDS = "embeddings.word_embeddings.weight"


def swin_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """A Swin's patch embedding and stages under Microsoft's names; None where these are no Swin's weights.

    Its last norm and its classifier are left out, and so is what is computed from the sizes (indices and masks).
    """
    if _MICROSOFT in state:
        # timm merges at a stage's beginning, Microsoft's code and ours at its end.
        shift = 1 if "layers.0.downsample.reduction.weight" not in state else 0
        named = {_merged_before(name, shift): tensor for name, tensor in state.items()}
    elif any(name.removeprefix("swin.") == _TRANSFORMERS for name in state):
        named = _from_transformers({name.removeprefix("swin."): tensor for name, tensor in state.items()})
    else:
        return None
    computed = ("relative_position_index", "attn_mask")
    return {
        name: tensor
        for name, tensor in named.items()
        if name.startswith(("patch_embed.", "layers.")) and not name.endswith(computed)
    }


def _merged_before(name: str, shift: int) -> str:
    found = re.match(r"layers\.(\d{1,4})\.downsample\.(.*)", name)
    return f"layers.{int(found[1]) - shift}.downsample.{found[2]}" if found else name


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        name = name.removeprefix("encoder.")
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("embeddings.norm", "patch_embed.norm")
        found = re.match(r"(layers\.\d{1,4}\.blocks\.\d{1,4}\.)(.*)", name)
        if found is None:
            named[name] = tensor
            continue
        block, inner = found[1], found[2]
        third = re.match(r"attention\.self\.(query|key|value)\.(weight|bias)", inner)
        if third is not None:
            thirds.setdefault(f"{block}attn.qkv.{third[2]}", {})[third[1]] = tensor
            continue
        inner = inner.replace("attention.self.", "attn.")
        for theirs, ours in _SWIN_BLOCK.items():
            if inner.startswith(theirs + "."):
                inner = ours + inner[len(theirs) :]
        named[block + inner] = tensor
    for name, parts in thirds.items():
        if len(parts) == len(_THIRDS):
            named[name] = torch.cat([parts[each] for each in _THIRDS])
    return named


def bert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """A BERT's ``embeddings`` and ``encoder``; None where these are no BERT's weights."""
    prefix = next((each for each in ("", "bert.") if each + _WORDS in state), None)
    if prefix is None:
        return None
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    named = {}
    for name, tensor in state.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix) or not inner.startswith(("embeddings.", "encoder.")):
            continue
        if inner == "embeddings.position_ids":
            continue
        for theirs, ours in old.items():
            inner = inner.replace(theirs, ours)
        named[inner] = tensor
    return named


def fitted_table(name: str, tensor: Tensor, size: torch.Size) -> Tensor:
    """A table of relative positions ((2w-1)^2, heads) for windows of another side, resized bicubically as Swin's own
    loader does; anything else as it is.
    """
    if not name.endswith(_TABLE) or tensor.ndim != 2 or len(size) != 2 or tensor.shape[1] != size[1]:
        return tensor
    theirs, ours = (round(rows**0.5) for rows in (tensor.shape[0], size[0]))
    if theirs**2 != tensor.shape[0] or ours**2 != size[0]:
        return tensor
    grid = tensor.float().T.reshape(1, -1, theirs, theirs)
    resized = F.interpolate(grid, (ours, ours), mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T.to(tensor.dtype)
