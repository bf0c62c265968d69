"""A small CRIS, a small CLIP of the same sizes, and the files that hold such weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from model_helpers import small_config
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from fastris import CRIS

CONFIG = small_config(
    clip={"vision_layers": (1, 2, 1, 1), "vision_width": 8, "transformer_layers": 2, "context_length": 12},
    fpn_in=(64, 128, 48),
    num_layers=2,
    dropout=0.0,
    word_len=9,
)
TEXT_SIZES = {"context_length": 12, "vocab_size": 96, "width": 32, "heads": 1, "layers": 2}


def small_clip(**vision) -> CLIP:
    """open_clip's own CLIP, with a ResNet of the sizes in CONFIG, or with another image encoder."""
    vision = {"layers": [1, 2, 1, 1], "width": 8, "image_size": 64, "patch_size": None, **vision}
    return CLIP(48, CLIPVisionCfg(**vision), CLIPTextCfg(**TEXT_SIZES), quick_gelu=True).eval()


def save_archive(clip: CLIP, path: Path) -> Path:
    """A TorchScript archive like OpenAI's: traced, fp16, with the three settings among its buffers."""
    for name, value in (("input_resolution", 64), ("context_length", 12), ("vocab_size", 96)):
        vars(clip).pop(name, None)
        clip.register_buffer(name, torch.tensor(value))
    inputs = torch.zeros(1, 3, 64, 64), torch.zeros(1, 12, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(clip, inputs, check_trace=False, strict=False).half().save(path)
    return path


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """All parameters and BatchNorm statistics away from their initial values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            else:
                tensor.fill_(11)
    return model


def same_state(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def published_checkpoint(model: CRIS) -> dict:
    """As the published training script saves it: DDP's names, NumPy's scores, the optimizer."""
    return {
        "epoch": 41,
        "cur_iou": np.float64(0.6),
        "best_iou": np.float64(0.6952),
        "prec": {"Pr@50": np.float32(0.8)},
        "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": torch.optim.Adam(model.parameters()).state_dict(),
    }
