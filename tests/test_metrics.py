"""Latitude-weighted scores against plain loops, against hand numbers, and against upstream's functions."""

import importlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from climax_elevation.host import metrics
from climax_elevation.upstream import find_climax, overlay
from climax_elevation.upstream.overlay import importable

VARS = ["2m_temperature", "10m_u_component_of_wind"]
LAT = np.array([-75.0, -20.0, 10.0, 55.0])


@pytest.fixture(scope="module")
def upstream(climax: Path) -> Iterator[ModuleType]:
    with overlay(find_climax(climax), patched=False) as folder, importable(folder):
        yield importlib.import_module("climax.utils.metrics")


def _fields() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prediction, target [3, 2, 4, 5], climatology [2, 4, 5], mask [3, 4, 5], float64."""
    random = np.random.default_rng(3)
    shapes = ((3, 2, 4, 5), (3, 2, 4, 5), (2, 4, 5))
    pred, y, clim = (torch.from_numpy(random.normal(size=shape)) for shape in shapes)
    return pred, y, clim, torch.from_numpy(random.integers(0, 2, (3, 4, 5)).astype(np.float64))


def _to_physical(x: Tensor) -> Tensor:
    return 3 * x + 2


def _weights() -> list[float]:
    cosines = [math.cos(math.radians(lat)) for lat in LAT]
    return [cosine * len(LAT) / sum(cosines) for cosine in cosines]


def test_by_hand() -> None:
    # rows at 0 and 60 degrees: cosines 1 and 1/2, weights 4/3 and 2/3; errors 1 and 2: (4/3 + 4 * 2/3) / 2 = 2
    pred, y = torch.tensor([[[[1.0], [2.0]]]]), torch.zeros(1, 1, 2, 1)
    lat = np.array([0.0, 60.0])
    assert metrics.lat_weighted_mse(pred, y, ["a"], lat)["loss"].item() == pytest.approx(2.0)
    rmse = metrics.lat_weighted_rmse(pred, y, _to_physical, ["a"], lat, torch.zeros(1, 2, 1), "6_hours")
    assert rmse["w_rmse"].item() == pytest.approx(3 * math.sqrt(2))


def test_mse_against_loops() -> None:
    pred, y, _, mask = _fields()
    weights = _weights()
    for given in (None, mask):
        counted = torch.ones(3, 4, 5, dtype=torch.float64) if given is None else given
        expected = []
        for v in range(2):
            total = sum(
                float((pred[b, v, i, j] - y[b, v, i, j]) ** 2 * counted[b, i, j]) * weights[i]
                for b in range(3)
                for i in range(4)
                for j in range(5)
            )
            expected.append(total / float(counted.sum()))
        computed = metrics.lat_weighted_mse(pred, y, VARS, LAT, given)
        assert [computed[name].item() for name in VARS] == pytest.approx(expected, rel=1e-12)
        assert computed["loss"].item() == pytest.approx(sum(expected) / 2, rel=1e-12)


def test_rmse_against_loops() -> None:
    pred, y, clim, _ = _fields()
    weights = _weights()
    expected = []
    for v in range(2):
        roots = []
        for b in range(3):
            squares = [
                float(3 * pred[b, v, i, j] - 3 * y[b, v, i, j]) ** 2 * weights[i] for i in range(4) for j in range(5)
            ]
            roots.append(math.sqrt(sum(squares) / 20))
        expected.append(sum(roots) / 3)
    computed = metrics.lat_weighted_rmse(pred, y, _to_physical, VARS, LAT, clim, "6_hours")
    assert computed["w_rmse_2m_temperature_6_hours"].item() == pytest.approx(expected[0], rel=1e-12)
    assert computed["w_rmse"].item() == pytest.approx(sum(expected) / 2, rel=1e-12)


def test_acc_against_loops() -> None:
    pred, y, clim, _ = _fields()
    weights = _weights()
    places = [(b, i, j) for b in range(3) for i in range(4) for j in range(5)]
    expected = []
    for v in range(2):
        p = [3 * float(pred[b, v, i, j]) + 2 - float(clim[v, i, j]) for b, i, j in places]
        t = [3 * float(y[b, v, i, j]) + 2 - float(clim[v, i, j]) for b, i, j in places]
        p, t = [value - sum(p) / 60 for value in p], [value - sum(t) / 60 for value in t]
        w = [weights[i] for _, i, _ in places]
        products = [sum(w * a * b for w, a, b in zip(w, *pair, strict=True)) for pair in ((p, t), (p, p), (t, t))]
        expected.append(products[0] / math.sqrt(products[1] * products[2]))
    computed = metrics.lat_weighted_acc(pred, y, _to_physical, VARS, LAT, clim, "3_days")
    assert computed["acc_2m_temperature_3_days"].item() == pytest.approx(expected[0], rel=1e-10)
    assert computed["acc"].item() == pytest.approx(sum(expected) / 2, rel=1e-10)


def test_a_perfect_forecast() -> None:
    _, y, clim, _ = _fields()
    arguments = (y, y, _to_physical, VARS, LAT, clim, "6_hours")
    assert metrics.lat_weighted_rmse(*arguments)["w_rmse"].item() == 0
    assert metrics.lat_weighted_acc(*arguments)["acc"].item() == pytest.approx(1, rel=1e-12)


def test_only_the_loss_has_a_gradient() -> None:
    pred, y, _, _ = _fields()
    losses = metrics.lat_weighted_mse(pred.requires_grad_(), y, VARS, LAT)
    assert losses["loss"].requires_grad
    assert not any(losses[name].requires_grad for name in VARS)


def test_half_precision_predictions_are_scored_in_the_targets_precision() -> None:
    # 290.06 K in float16 is 290.0: the score would be off by the whole error
    pred, y = torch.full((1, 1, 4, 5), 0.5, dtype=torch.float16), torch.zeros(1, 1, 4, 5)
    scores = metrics.lat_weighted_rmse(pred, y, lambda x: 0.12 * x + 290, ["t"], LAT, torch.zeros(1, 4, 5), "6_hours")
    assert scores["w_rmse"].item() == pytest.approx(0.06, rel=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_loss_equals_upstreams(upstream: ModuleType, masked: bool) -> None:
    pred, y, _, mask = _fields()
    arguments = (pred, y, VARS, LAT, mask if masked else None)
    _assert_same(metrics.lat_weighted_mse(*arguments), upstream.lat_weighted_mse(*arguments))


@pytest.mark.parametrize("name", ["lat_weighted_mse_val", "lat_weighted_rmse", "lat_weighted_acc"])
def test_scores_equal_upstreams(upstream: ModuleType, name: str) -> None:
    pred, y, clim, _ = _fields()
    arguments = (pred, y, _to_physical, VARS, LAT, clim, "72_hours")
    ours: Callable[..., dict[str, Tensor]] = getattr(metrics, name)
    _assert_same(ours(*arguments), getattr(upstream, name)(*arguments))


def _assert_same(ours: dict[str, Tensor], upstreams: dict[str, Tensor]) -> None:
    assert set(ours) == set(upstreams)
    for name, value in ours.items():
        assert value.item() == pytest.approx(float(upstreams[name]), rel=1e-12), name
