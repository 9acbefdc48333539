"""Scores from kept sums: against plain loops, and against ClimaX's own metrics."""

from pathlib import Path

import numpy as np
import pytest
import tiny_data
import torch

from climax_elevation.compare.scores import METRICS, Samples, Scorer, load_samples, save_samples, score
from climax_elevation.compare.strata import StrataSettings
from climax_elevation.data.prepare import prepare
from climax_elevation.errors import InputError
from climax_elevation.files import save_npz
from climax_elevation.host.metrics import lat_weighted_acc, lat_weighted_rmse
from climax_elevation.testbed.fit import DataSettings, ModelSettings, build_network

MODEL = ModelSettings(patch_size=2, embed_dim=16, num_heads=2)


def _settings(root: Path) -> DataSettings:
    return DataSettings(str(root), tuple(tiny_data.VARIABLES), tuple(tiny_data.TARGETS), predict_range=2)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    root = tiny_data.write(tmp_path_factory.mktemp("shards"), val=(5, 4), test=(6, 4, 5))
    return Scorer.of(_settings(root), StrataSettings(slope_wind_m_s=0.02), patch_size=2, batch_size=3)


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return build_network(MODEL, tiny_data.VARIABLES, (8, 16), seed=1)


def _forecasts(scorer: Scorer, net: torch.nn.Module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, truth and input fields of every test sample, `[S, V, H, W]`, physical, by plain loops."""
    predicted, truth, start = [], [], []
    data = scorer.data
    mean, std = data.output_transforms.mean[:, None, None], data.output_transforms.std[:, None, None]
    for shard in data.shards["test"]:
        with np.load(shard.path) as fields:
            for i in range(shard.steps - 2):
                physical = torch.from_numpy(np.concatenate([fields[name][i] for name in tiny_data.VARIABLES]))
                x = data.transforms(physical)[None]
                with torch.no_grad():
                    _, y = net(x, None, torch.tensor([0.02]), tiny_data.VARIABLES, tiny_data.TARGETS, None, None)
                predicted.append(y[0].numpy() * std + mean)
                truth.append(np.concatenate([fields[name][i + 2] for name in tiny_data.TARGETS]))
                start.append(physical.numpy())
    return tuple(np.array(fields, dtype=np.float64) for fields in (predicted, truth, start))  # type: ignore[return-value]


def test_a_stretch_of_time_is_one_block_in_however_many_shards_it_lies(
    scorer: Scorer, net: torch.nn.Module, tmp_path: Path
) -> None:
    """Resampling draws blocks: shards that go on after one another are not independent."""
    cut = prepare(scorer.data.root, tmp_path / "cut", predict_range=2, shard_steps=4).out
    anew = Scorer.of(_settings(cut), StrataSettings(slope_wind_m_s=0.02), patch_size=2, batch_size=3)
    assert len(anew.data.shards["test"]) == 5  # of 2 pairs, or 1
    here, there = (each.network(net, "test") for each in (scorer, anew))
    assert there.shard.tolist() == here.shard.tolist() == [0] * 4 + [1] * 2 + [2] * 3
    np.testing.assert_array_equal(there.squares, here.squares)


def test_equals_plain_loops(scorer: Scorer, net: torch.nn.Module) -> None:
    samples = scorer.network(net, "test")
    predicted, truth, start = _forecasts(scorer, net)
    assert samples.shard.tolist() == [0] * 4 + [1] * 2 + [2] * 3
    weight = np.cos(np.deg2rad(tiny_data.LAT)) / np.cos(np.deg2rad(tiny_data.LAT)).mean()
    names = scorer.strata.names
    z, (dx, dy) = start[0, 0], scorer.strata.slope  # type: ignore[misc]
    for s in range(len(samples)):
        lift = start[s, 2] * dx + start[s, 3] * dy
        inside = {
            "all": np.full((8, 16), True),
            "1000 to 2000 m": (z >= 1000) & (z < 2000),
            "windward": lift > 0.02,
            "lee": lift < -0.02,
            "neutral": np.abs(lift) <= 0.02,
        }
        for name, mask in inside.items():
            area, squares = 0.0, np.zeros(2)
            for i in range(8):
                for j in range(16):
                    if mask[i, j]:
                        area += weight[i]
                        squares += weight[i] * (predicted[s, :, i, j] - truth[s, :, i, j]) ** 2
            assert samples.weight[s, names.index(name)] == pytest.approx(area)
            np.testing.assert_allclose(samples.squares[s, :, names.index(name)], squares, rtol=1e-5)
    assert len({tuple(samples.weight[s]) for s in range(len(samples))}) > 1  # the wind's strata change in time


def test_rmse_and_acc_are_climaxs(scorer: Scorer, net: torch.nn.Module) -> None:
    samples = scorer.network(net, "test")
    predicted, truth, _ = map(torch.from_numpy, _forecasts(scorer, net))
    clim = scorer.data.test_clim.double()
    given = (predicted, truth, lambda y: y, tiny_data.TARGETS, tiny_data.LAT, clim, "2_hours")
    std = np.array([2.0, 4.0])
    rmse, acc = lat_weighted_rmse(*given), lat_weighted_acc(*given)
    for v, name in enumerate(tiny_data.TARGETS):
        assert score("rmse", samples, {}, std)[0, v, 0] == pytest.approx(
            float(rmse[f"w_rmse_{name}_2_hours"]), rel=1e-5
        )
        assert score("acc", samples, {}, std)[0, v, 0] == pytest.approx(float(acc[f"acc_{name}_2_hours"]), rel=1e-5)
    assert score("rmse", samples, {}, std)[0, 2, 0] == pytest.approx(float(rmse["w_rmse"]), rel=1e-5)
    standardised = score("rmse_standardised", samples, {}, std)[0, :, 0]
    np.testing.assert_allclose(standardised[:2] * std, score("rmse", samples, {}, std)[0, :2, 0])
    assert standardised[2] == pytest.approx(standardised[:2].mean())


def test_skill_by_hand() -> None:
    """Two samples of one variable; stratum 1 is empty in the second.

    rmse: (sqrt(8 / 2) + sqrt(2 / 2)) / 2 = 1.5 in stratum 0, and sqrt(9 / 1) = 3 in stratum 1.
    skill: 1 - (8 + 2) / (20 + 20) = 0.75 and 1 - 9 / 36 = 0.75; with the first sample twice in stratum 0
    1 - 18 / 60 = 0.7.
    """

    def samples(squares: list) -> Samples:
        return Samples(np.array([0, 1]), np.array([[2.0, 1], [2, 0]]), np.array(squares), np.zeros((2, 1, 7)), 2)

    own, reference = samples([[[8.0, 9]], [[2, 0]]]), samples([[[20.0, 36]], [[20, 0]]])
    one = np.ones(1)
    np.testing.assert_allclose(score("rmse", own, {}, one)[0, 0], [1.5, 3])
    skill = score("skill_persistence", own, {"persistence": reference}, one)
    np.testing.assert_allclose(skill[0, 0], [0.75, 0.75])
    twice = score("skill_persistence", own, {"persistence": reference}, one, np.array([[2.0, 1], [0, 3]]))
    np.testing.assert_allclose(twice[:, 0, 0], [0.7, 0.9])
    assert np.isnan(twice[1, 0, 1])  # nothing of stratum 1 was drawn


def test_references(scorer: Scorer) -> None:
    references = {"persistence": scorer.persistence("test"), "climatology": scorer.climatology("test")}
    std = np.ones(2)
    for name, samples in references.items():
        own = score(f"skill_{name}", samples, references, std)[0]
        np.testing.assert_allclose(own[np.isfinite(own)], 0)
    with np.load(scorer.data.shards["test"][0].path) as fields:
        t = fields["2m_temperature"][:, 0].astype(np.float64)
    weight = (np.cos(np.deg2rad(tiny_data.LAT)) / np.cos(np.deg2rad(tiny_data.LAT)).mean())[:, None]
    assert references["persistence"].squares[1, 0, 0] == pytest.approx(((t[3] - t[1]) ** 2 * weight).sum(), rel=1e-6)
    mean = scorer.data.test_clim[0].double().numpy()
    assert references["climatology"].squares[1, 0, 0] == pytest.approx(((t[3] - mean) ** 2 * weight).sum(), rel=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_counts_are_as_if_samples_were_repeated(scorer: Scorer, net: torch.nn.Module, metric: str) -> None:
    parts = [scorer.network(net, "test"), scorer.persistence("test"), scorer.climatology("test")]
    drawn = np.array([0, 0, 3, 5, 5, 5, 8])
    counts = np.bincount(drawn, minlength=len(parts[0]))[None].astype(float)
    repeated = [Samples(p.shard[drawn], p.weight[drawn], p.squares[drawn], p.anomalies[drawn], p.pixels) for p in parts]
    std = np.array([2.0, 3.0])
    found, expected = (
        score(metric, own, {"persistence": persistence, "climatology": climatology}, std, given)
        for (own, persistence, climatology), given in ((parts, counts), (repeated, None))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.isfinite(found[:, :, 0]).all()


def test_samples_are_kept(scorer: Scorer, tmp_path: Path) -> None:
    parts = {"val": scorer.persistence("val"), "test/climatology": scorer.climatology("test")}
    save_samples(tmp_path / "samples.npz", parts, tiny_data.TARGETS, scorer.strata.names)
    loaded = load_samples(tmp_path / "samples.npz")
    assert list(loaded) == list(parts)
    for name, samples in parts.items():
        for field in ("shard", "weight", "squares", "anomalies", "pixels"):
            np.testing.assert_array_equal(getattr(loaded[name], field), getattr(samples, field))
    with np.load(tmp_path / "samples.npz") as archive:
        assert list(archive["variables"]) == tiny_data.TARGETS
        assert tuple(archive["strata"]) == scorer.strata.names


def test_data_without_orography(tmp_path: Path) -> None:
    root = tiny_data.write(tmp_path)
    for shard in root.glob("val/[0-9]*.npz"):
        with np.load(shard) as fields:
            rest = {name: values for name, values in fields.items() if name != "orography"}
        save_npz(shard, rest)
    settings = DataSettings(str(root), tuple(tiny_data.VARIABLES[1:]), tuple(tiny_data.TARGETS))
    with pytest.raises(InputError, match="has no orography.*it has 10m_u_component_of_wind"):
        Scorer.of(settings, StrataSettings(), 2, 3)


def test_patches_that_do_not_fit(scorer: Scorer) -> None:
    with pytest.raises(InputError, match="patches of 3 pixels do not tile fields of 8 x 16"):
        Scorer.of(_settings(scorer.data.root), StrataSettings(), 3, 3)
