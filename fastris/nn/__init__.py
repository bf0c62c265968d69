"""CRIS's modules under their published names, constructor arguments, forward signatures and state-dict keys."""

from fastris.nn.blocks import CoordConv
from fastris.nn.clip import CLIPBackbone, DenseAttentionPool, DenseResNet
from fastris.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from fastris.nn.losses import TextToPixelContrastiveLoss
from fastris.nn.neck import FPN
from fastris.nn.projector import Projector

__all__ = [
    "FPN",
    "CLIPBackbone",
    "CoordConv",
    "DenseAttentionPool",
    "DenseResNet",
    "Projector",
    "TextToPixelContrastiveLoss",
    "TransformerDecoder",
    "TransformerDecoderLayer",
]
