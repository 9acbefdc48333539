"""ClimaX's latitude-weighted losses and scores, with its names and call signatures.

Rows of a latitude-longitude grid shrink towards the poles; each is weighted by its share of area:

    weight[row] = cos(lat[row]) / mean over rows of cos(lat)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Scores = dict[str, Tensor]


def lat_weighted_mse(
    pred: Tensor, y: Tensor, vars: Sequence[str], lat: ArrayLike, mask: Tensor | None = None
) -> Scores:
    """Mean squared error, the loss of training.

    Args:
        pred: Prediction, `[B, V, H, W]`, standardised.
        y: Target, as pred.
        vars: Names of the V channels.
        lat: Latitudes of the rows, `[H]`, degrees.
        mask: Weights of pixels, `[B, H, W]`, 0 where nothing counts; None: all count alike.

    Returns:
        By variable, without gradient; and their mean, "loss", with.
    """
    error = (pred - y).square() * _weights(lat, y)
    if mask is None:
        per_variable = error.mean(dim=(0, 2, 3))
    else:
        per_variable = (error * mask[:, None]).sum(dim=(0, 2, 3)) / mask.sum()
    return {**dict(zip(vars, per_variable.detach(), strict=True)), "loss": per_variable.mean()}


def lat_weighted_mse_val(
    pred: Tensor,
    y: Tensor,
    transform: Callable[[Tensor], Tensor],
    vars: Sequence[str],
    lat: ArrayLike,
    clim: Tensor,
    log_postfix: str,
) -> Scores:
    """Mean squared error in standardised units, for validation.

    Args:
        pred: Prediction, `[B, V, H, W]`, standardised.
        y: Target, as pred.
        transform: From standardised to physical units; not used here.
        vars: Names of the V channels.
        lat: Latitudes of the rows, `[H]`, degrees.
        clim: Climatology, `[V, H, W]`, physical units; not used here.
        log_postfix: End of the keys.

    Returns:
        "w_mse_VARIABLE_POSTFIX" for each variable, and their mean, "w_mse".
    """
    error = (pred - y).square() * _weights(lat, y)
    return _named("w_mse", vars, log_postfix, error.mean(dim=(0, 2, 3)))


def lat_weighted_rmse(
    pred: Tensor,
    y: Tensor,
    transform: Callable[[Tensor], Tensor],
    vars: Sequence[str],
    lat: ArrayLike,
    clim: Tensor,
    log_postfix: str,
) -> Scores:
    """Root mean squared error in physical units: the root for each sample, then the mean over samples.

    The arguments are those of `lat_weighted_mse_val`.

    Returns:
        "w_rmse_VARIABLE_POSTFIX" for each variable, and their mean over unlike units, "w_rmse".
    """
    error = (_physical(pred, transform, y) - transform(y)).square() * _weights(lat, y)
    return _named("w_rmse", vars, log_postfix, error.mean(dim=(2, 3)).sqrt().mean(dim=0))


def lat_weighted_acc(
    pred: Tensor,
    y: Tensor,
    transform: Callable[[Tensor], Tensor],
    vars: Sequence[str],
    lat: ArrayLike,
    clim: Tensor,
    log_postfix: str,
) -> Scores:
    """Anomaly correlation with respect to the climatology, of a whole batch.

        acc = sum(w p t) / sqrt(sum(w p^2) * sum(w t^2))

    p and t are anomalies of prediction and target, less their unweighted mean over batch and pixels.
    NaN where either has no variance. The arguments are those of `lat_weighted_mse_val`.

    Returns:
        "acc_VARIABLE_POSTFIX" for each variable, and their mean, "acc".
    """
    weights = _weights(lat, y)
    clim = clim.to(y)
    anomalies = (_physical(pred, transform, y) - clim, transform(y) - clim)
    p, t = (anomaly - anomaly.mean(dim=(0, 2, 3), keepdim=True) for anomaly in anomalies)
    covariance, p_variance, t_variance = ((weights * a * b).sum(dim=(0, 2, 3)) for a, b in ((p, t), (p, p), (t, t)))
    return _named("acc", vars, log_postfix, covariance / (p_variance * t_variance).sqrt())


def _weights(lat: ArrayLike, like: Tensor) -> Tensor:
    return torch.as_tensor(latitude_weights(lat), dtype=like.dtype, device=like.device)[:, None]


def latitude_weights(lat: ArrayLike) -> NDArray[np.float64]:
    """cos(lat) / mean cos(lat) of the rows, `[H]`."""
    cosine = np.cos(np.deg2rad(np.asarray(lat, dtype=np.float64)))
    return cosine / cosine.mean()


def _physical(pred: Tensor, transform: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    # a prediction in half precision would lose up to 1 K at 290 K
    return transform(pred.to(y.dtype))


def _named(score: str, vars: Sequence[str], log_postfix: str, values: Tensor) -> Scores:
    values = values.detach()
    keys = [f"{score}_{name}_{log_postfix}" for name in vars]
    return {**dict(zip(keys, values, strict=True)), score: values.mean()}
