"""Attention of some queries and keys of several samples and heads, whose bias is given, and its gradient.

In compiled loops where there are some; else by torch's operations, some heads at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from climax_elevation import compiled
from climax_elevation.compiled.slices import slices

BUFFER_HELD = 1 << 18  # numbers of a buffer of probabilities, without compiled loops: 1 MB


def attend(q: Tensor, k: Tensor, v: Tensor, b: Tensor, gathered: Sequence[Tensor], scale: float) -> None:
    """Go on with softmax, to which keys come tile by tile: add what these keys give.

    Args:
        q: Some queries, `[B, H, rows, d]`.
        k, v: Some keys and their values, `[B, H, columns, ...]`.
        b: Their bias, `[H or 1, rows, columns]`.
        gathered: Of these queries, the largest logit m so far (-inf at first), the sum of weights e^(logit - m)
            (0), both `[B, H, rows]`, and that of weights times values (0), `[B, H, rows, ...]`: all written to.
        scale: Of products of queries and keys.
    """
    highest, sums, out = gathered
    if compiled.available(q, k, v, b, *gathered):
        sizes = (*q.shape[:3], k.shape[2], q.shape[3], v.shape[3])
        compiled.call("attend", q, k, v, _of_heads(b, q), highest, sums, out, scale, *sizes)
        return
    for at, own in _groups(q, k, b):
        s = torch.baddbmm(b[own], q[at], k[at].mT, alpha=scale)
        before = highest[at].clone()
        highest[at] = before.maximum(s.amax(dim=-1))
        s.sub_(highest[at][..., None]).exp_()
        share = (before - highest[at]).exp_()
        sums[at] = sums[at] * share + s.sum(dim=-1)
        out[at] = torch.baddbmm(out[at] * share[..., None], s, v[at])


def differentiate(given: Sequence[Tensor], b: Tensor, of_qkv: Sequence[Tensor], db: Tensor, scale: float) -> None:
    """Add gradients, by the equations of `tiled`, to those of q, k and v and to that of the bias, db.

    Args:
        given: q, k, v, the gradient of the output, l and delta, of some queries and keys.
        b: Their bias, `[H or 1, rows, columns]`.
        of_qkv: dq, dk, dv, of those queries and keys.
        db: Laid out as b.
        scale: Of products of queries and keys.
    """
    q, k, v, grad, logsumexp, delta = given
    dq, dk, dv = of_qkv
    if compiled.available(*given, b, *of_qkv, db):
        sizes = (*q.shape[:3], k.shape[2], q.shape[3], v.shape[3])
        compiled.call("differentiate", *given, _of_heads(b, q), *of_qkv, _of_heads(db, q), scale, *sizes)
        return
    for at, own in _groups(q, k, b):
        p = torch.baddbmm(b[own] - logsumexp[at][..., None], q[at], k[at].mT, alpha=scale).exp_()
        dv[at].baddbmm_(p.mT, grad[at])
        ds = torch.bmm(grad[at], v[at].mT).sub_(delta[at][..., None]).mul_(p)
        dq[at].baddbmm_(ds, k[at], alpha=scale)
        dk[at].baddbmm_(ds.mT, q[at], alpha=scale)
        db[own] += ds if len(db) > 1 else ds.sum(dim=0)


def _of_heads(b: Tensor, q: Tensor) -> Tensor:
    """b as `[1, H, rows, columns]`, whether heads share it or not."""
    return b.expand(q.shape[1], -1, -1)[None]


def _groups(q: Tensor, k: Tensor, b: Tensor) -> Iterator[tuple[tuple[int, slice], slice]]:
    """As many heads of a sample at once as a buffer holds, and which of the bias's they are."""
    at_once = max(1, BUFFER_HELD // (q.shape[2] * k.shape[2]))
    for sample in range(q.shape[0]):
        for heads in slices(0, q.shape[1], at_once):
            yield (sample, heads), heads if len(b) > 1 else slice(0, 1)
