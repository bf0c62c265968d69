"""CRIS's modules under their published names, constructor arguments, forward signatures and state-dict keys."""

from fastris.models.cris.decoder import TransformerDecoder, TransformerDecoderLayer
from fastris.models.cris.neck import FPN
from fastris.models.cris.projector import Projector
from fastris.nn.blocks import CoordConv
from fastris.nn.clip import CLIPBackbone, DenseAttentionPool, DenseResNet
from fastris.nn.losses import TextToPixelContrastiveLoss

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
