"""The reference engine: every step in plain operations."""

import torch
from torch import Tensor
from torch.nn.functional import dropout

from climax_elevation.attention.engine import Engine, whole
from climax_elevation.bias.base import ElevationBias, Tensors


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: ElevationBias,
    inputs: Tensors,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """softmax(scale * q k^T + b) v, with logits and softmax in the bias's type."""
    with torch.autocast(q.device.type, enabled=False):
        b = bias(*inputs)
        logits = scale * (q @ k.transpose(-2, -1)).to(torch.promote_types(b.dtype, q.dtype)) + b
        attention = dropout(logits.softmax(dim=-1), dropout_p)
        return attention.to(v.dtype) @ v


ENGINE = Engine(dense_attention, values=whole)
