"""Torch's fused attention, with the bias as its mask, or as extra columns where it has exact factors."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from climax_elevation.attention.columns import with_columns
from climax_elevation.attention.engine import Engine, Request, whole
from climax_elevation.bias.base import ElevationBias, Tensors
from climax_elevation.transforms import transforming

WIDE = (torch.float32, torch.float64)  # in these, factors are exact enough


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: ElevationBias,
    inputs: Tensors,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """softmax(scale * q k^T + b) v, fused.

    Torch wants the mask in q's type: in half precision the bias is rounded to it, by at most
    |b| * 2^-11 in float16 and |b| * 2^-8 in bfloat16. Factors are used in float32 and wider only.
    """
    with torch.autocast(q.device.type, enabled=False), _kernels():
        factors = bias.factors(*inputs) if q.dtype in WIDE else None
        if factors is None:
            return scaled_dot_product_attention(
                q, k, v, attn_mask=bias(*inputs).to(q.dtype), dropout_p=dropout_p, scale=scale
            )
        q, k = with_columns(q, k, factors, scale)
        # v is padded too, since the fused kernels want one head dimension for all three
        padded = scaled_dot_product_attention(q, k, pad(v, (0, factors[0].shape[-1])), dropout_p=dropout_p, scale=1.0)
        return padded[..., : v.shape[-1]]


def _kernels() -> AbstractContextManager[None]:
    """All that torch has; under torch.func the plain one, since the fused ones have no gradient of their mask there."""
    return sdpa_kernel(SDPBackend.MATH) if transforming() else nullcontext()


def _rank(request: Request) -> int:
    """First where there is dropout, which none of the others has, and where exact factors make a mask needless.

    But on the CPU the loops of "tiled" are faster with the same factors, which compiled programs do not give them.
    """
    columns = request.bias.has_factors and request.dtype in WIDE
    loops = request.device == "cpu" and not torch.compiler.is_compiling()
    return 3 if request.dropout_p > 0 or (columns and not loops) else 1


ENGINE = Engine(sdpa_attention, _rank, whole)
