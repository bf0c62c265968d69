"""Weights of Swin and BERT as others store them, under the names that systems with these encoders have.

Swin: Microsoft's files (``swin_base_patch4_window12_384_22k.pth``), timm's and transformers' on Hugging Face. BERT:
transformers', with or without its pooler and heads, old names of LayerNorm's parameters included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris.models.encoders import BERTConfig

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
_HEAD_WIDTH = 64  # of BERT's attentions, in every size that was published


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


def bert_sizes(state: Iterable[str], part: str, size: Callable[[str, int], int]) -> BERTConfig:
    """The sizes of the BERT whose names begin with ``part``, its heads taken as 64 wide.

    ``size`` gives a tensor's size along an axis by its name, and raises ValueError where there is none.
    """
    embeddings = f"{part}embeddings."
    width = size(f"{embeddings}word_embeddings.weight", 1)
    return BERTConfig(
        vocab_size=size(f"{embeddings}word_embeddings.weight", 0),
        hidden_size=width,
        num_hidden_layers=count_blocks(state, re.escape(part) + r"encoder\.layer\.(\d{1,9})\."),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        intermediate_size=size(f"{part}encoder.layer.0.intermediate.dense.weight", 0),
        max_position_embeddings=size(f"{embeddings}position_embeddings.weight", 0),
        type_vocab_size=size(f"{embeddings}token_type_embeddings.weight", 0),
    )


def swin_depths(state: Iterable[str], part: str) -> tuple[int, ...]:
    """The blocks in each stage of the Swin whose names begin with ``part``; 0 where there are none."""
    names = list(state)
    return tuple(count_blocks(names, rf"{re.escape(part)}layers\.{stage}\.blocks\.(\d{{1,9}})\.") for stage in range(4))


def swin_sizes(state: Iterable[str], part: str, size: Callable[[str, int], int]) -> dict[str, object]:
    """The fields ``embed_dim``, ``depths``, ``num_heads`` and ``window`` of that Swin; ``size`` as above."""
    table = part + "layers.{}.blocks.0.attn." + _TABLE
    return {
        "embed_dim": size(f"{part}patch_embed.proj.weight", 0),
        "depths": swin_depths(state, part),
        "num_heads": tuple(size(table.format(stage), 1) for stage in range(4)),
        "window": (round(size(table.format(0), 0) ** 0.5) + 1) // 2,
    }


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """The number of blocks: the largest number that ``pattern`` finds in the names plus one, 0 if it finds none."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)
