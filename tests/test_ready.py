"""What `prepare` leaves can be trained on: the two lines that it prints run as they are, on either host."""

import csv
import shlex

import numpy as np
import prepare_data
import pytest
import torch
import yaml

from climax_elevation.cli import main
from climax_elevation.data.prepare import prepare


def alps(steps=40):
    """A newcomer's Alps: an odd number of rows and columns, hours of one week, no wind unless added."""
    lat, lon = np.arange(47.5, 44.0, -0.25), np.arange(6.0, 11.25, 0.25)
    dataset = prepare_data.era5(steps=steps, height=len(lat), width=len(lon))
    return dataset.assign_coords(latitude=lat, longitude=lon)


def lines(printed):
    """The two commands at the end of what was printed."""
    *_, said, off, on = printed.strip().splitlines()
    assert said == "to train a small model, without the terrain bias and with it:"
    return [shlex.split(line) for line in (off, on)]


def rows(folder):
    (file,) = folder.rglob("metrics.csv")
    with open(file) as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize("host", ["stand-in", "ClimaX"])
def test_the_two_lines_run(tmp_path, monkeypatch, capsys, request, host):
    if host == "ClimaX":
        pytest.importorskip("torchvision")
        monkeypatch.setenv("CLIMAX_SRC", str(request.getfixturevalue("climax")))
    else:
        request.getfixturevalue("no_climax")
    monkeypatch.chdir(tmp_path)
    prepare_data.write(alps(), tmp_path / "alps.nc")
    assert main(["prepare", "alps.nc", "data/my alps"]) == 0
    off, on = lines(capsys.readouterr().out)
    assert off[:4] == on[:4] == ["climax-elevation", "train", "global_forecast", "--"]
    assert off[4:6] == ["--config", "data/my alps/config.yaml"]
    monkeypatch.chdir(tmp_path)
    for line, name in ((off, "plain"), (on, "physics")):
        assert main(line[1:]) == 0
        folder = tmp_path / "runs" / "my alps" / name
        scores = [float(row["test/w_rmse"]) for row in rows(folder) if row.get("test/w_rmse")]
        assert len(scores) == 1
        assert 0 < scores[0] < 20  # K and m/s
        state = torch.load(next(folder.rglob("last.ckpt")), weights_only=True)["state_dict"]
        alpha = state.get("net.blocks.0.attn.bias.elevation_alpha")
        assert (alpha is not None) == (name == "physics")
        assert alpha is None or abs(alpha.item() - 1) > 1e-5
        forecast = ["forecast", str(folder), "alps.nc", f"{name}.nc"]
        assert main(forecast) == 0


def read(out):
    config = yaml.safe_load((out / "config.yaml").read_text())
    return config, config["model"]["net"]["init_args"], config["data"]


def test_it_says_what_the_shards_are(tmp_path):
    done = prepare(prepare_data.write(alps(), tmp_path / "s.nc"), tmp_path / "out", predict_range=3, patch_size=4)
    config, net, data = read(done.out)
    shard = dict(np.load(prepare_data.shard_files(done.out, "train")[0]))
    assert sorted(net["default_vars"]) == sorted(data["variables"]) == sorted(shard)
    assert data["out_variables"] == ["2m_temperature", "10m_u_component_of_wind", "10m_v_component_of_wind"]
    assert net["img_size"] == list(shard["orography"].shape[2:]) == [12, 20]
    assert (net["patch_size"], data["predict_range"], data["hrs_each_step"]) == (4, 3, 6)
    assert data["root_dir"] == str(done.out)
    assert net["bias_args"] == {"blocks": [0], "wind": True, "static_terrain": True}
    steps = sum(len(dict(np.load(p))["orography"]) - 3 for p in prepare_data.shard_files(done.out, "train"))
    assert data["buffer_size"] == steps
    assert config["model"]["max_epochs"] == config["trainer"]["max_epochs"] * -(-steps // data["batch_size"])


def test_a_bias_without_wind_and_flat_ground(tmp_path, no_climax, monkeypatch, capsys):
    """Without wind the bias does without; ground that looks standardised is said to be so flat."""
    source = alps(30).drop_vars(["u10", "v10"])
    rolling = np.random.default_rng(0).normal(0, 2, source.orography.shape).astype(np.float32)
    source["orography"] = source.orography.copy(data=np.clip(rolling, -9, 9))
    monkeypatch.chdir(tmp_path)
    prepare_data.write(source, tmp_path / "s.nc")
    assert main(["prepare", "s.nc", "out", "--patch-size", "1"]) == 0
    assert read(tmp_path / "out")[1]["bias_args"] == {
        **{"blocks": [0], "wind": False, "static_terrain": True},
        "terrain_is_flat": True,
    }
    _, on = lines(capsys.readouterr().out)
    assert main([*on[1:], "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]) == 0


def test_one_that_was_lost_is_written_again_and_one_that_was_edited_stays(tmp_path):
    source, out = prepare_data.write(alps(), tmp_path / "s.nc"), tmp_path / "out"
    prepare(source, out)
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text("mine")
    assert not prepare(source, out).changed
    assert (out / "config.yaml").read_text() == "mine"
    (out / "config.yaml").unlink()
    assert prepare(source, out).shards_written == 0
    assert (out / "config.yaml").read_text() == text


@pytest.mark.parametrize("columns", ["80", "40"])
def test_no_metric_is_cut(tmp_path, no_climax, monkeypatch, capsys, columns):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", columns)
    prepare_data.write(alps(30), tmp_path / "s.nc")
    assert main(["prepare", "s.nc", "out"]) == 0
    off, _ = lines(capsys.readouterr().out)
    assert main([*off[1:], "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]) == 0
    printed = capsys.readouterr().out
    (row,) = [row for row in rows(tmp_path / "runs" / "out" / "plain") if row.get("test/w_rmse")]
    for name, value in row.items():
        if name.startswith("test/"):
            (line,) = [line.split() for line in printed.splitlines() if line.split()[:1] == [name]]
            assert float(line[1]) == pytest.approx(float(value), rel=1e-4, nan_ok=True)
