"""The pictures: what is drawn is what was computed, in both formats, readable, and mistakes are a sentence."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import tiny_data
import torch
from test_cli import training
from test_training import data, net

pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib, which is not installed")

import matplotlib
from matplotlib import pyplot
from matplotlib.collections import QuadMesh
from matplotlib.contour import ContourSet
from matplotlib.image import imread
from matplotlib.text import Text

from climax_elevation import InputError
from climax_elevation.cli import main
from climax_elevation.diagnostics import Run, open_run, read_record
from climax_elevation.diagnostics.view import (
    Field,
    error_field,
    ground_field,
    latitude_words,
    longitude_words,
    transect,
    view_from,
)
from climax_elevation.draw import pictures, plots
from climax_elevation.host.module import GlobalForecastModule
from climax_elevation.host.shards import GlobalForecastDataModule
from climax_elevation.train import _train_stand_in
from climax_elevation.training import read_datamodule
from climax_elevation.upstream.config import modernize

PLACE = (5.0, 8.0)  # row 0, column 1 of patches of 4 x 4 pixels, 2 degrees each


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    """Folders of two finished runs, with physics in both blocks and without."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--model.net.init_args.depth=2", "--model.net.init_args.patch_size=4"]
    bias = ["--model.net.init_args.bias_args={blocks: all}", "--trainer.callbacks.every_n_steps=1"]
    monitor = "--trainer.callbacks+=climax_elevation.diagnostics.BiasMonitor"
    _, _, _, *arguments = training(root, *flags)
    for name, own in {
        "physics": [monitor, *bias[::-1]],
        "none": ["--model.net.init_args.use_physics_mask=false"],
    }.items():
        given = [*arguments, *own, f"--trainer.default_root_dir={folder / name}"]
        _train_stand_in(modernize(given, folder, stand_in=True))
    return folder


@pytest.fixture(scope="module")
def run(runs):
    with open_run(runs / "physics") as opened:
        yield opened


def made(root, variables=tiny_data.VARIABLES, **flags):
    """A run in memory, untrained."""
    if variables == tiny_data.VARIABLES:
        model, source = net(**flags), data(root)
    else:
        from climax_elevation.host import StandInClimaX

        model = StandInClimaX(variables, img_size=[8, 16], patch_size=4, embed_dim=16, depth=2, num_heads=2, **flags)
        source = GlobalForecastDataModule(str(root), variables, 5, tiny_data.TARGETS, predict_range=1, batch_size=4)
    module = GlobalForecastModule(model, warmup_epochs=1, max_epochs=9)
    read_datamodule(module, source)
    return Run(module.eval(), source, Path("none.ckpt"))


def dense(run, sample, block):
    """Bias and logits of all pairs of patches, `[heads, L, L]`, from whole tensors."""
    x, _, lead_times, names, _ = next(iter(run.datamodule.val_dataloader()))
    model, caught = run.module.net, {}
    attention = model.blocks[block].attn
    with torch.no_grad():
        hook = attention.register_forward_pre_hook(lambda _, given: caught.update(x=given[0]))
        model.eval().forward_encoder(x, lead_times, names)
        hook.remove()
        q, k, _ = attention.project(caught["x"])
        bias = attention.bias(*attention.bias.inputs(model.terrain(x, lead_times, names)))
    bias = bias.expand(len(x), q.shape[1], -1, -1)
    return bias[sample].numpy(), (attention.scale * q @ k.transpose(2, 3))[sample].numpy()


# ---- what is seen ----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [None, 1])
@pytest.mark.parametrize("bias_type", ["physics", "relative_3d", "ridge"])
def test_a_view_is_rows_and_columns_of_the_whole(root, bias_type, head):
    run = made(root, use_physics_mask=True, bias_type=bias_type, bias_args={"blocks": [1], "static_terrain": True})
    view = view_from(run, PLACE, sample=2, head=head)
    heads = slice(None) if head is None else slice(head, head + 1)
    bias, logits = dense(run, 2, 1)
    patch = 1
    weights = [
        np.exp(values[:, patch]) / np.exp(values[:, patch]).sum(axis=1, keepdims=True)
        for values in (logits, logits + bias)
    ]
    expected = (bias[heads, patch], bias[heads, :, patch], weights[0][heads], weights[1][heads])
    assert view.place == (0, 1)
    for seen, whole in zip((view.reads, view.is_read, view.without, view.with_bias), expected, strict=True):
        np.testing.assert_allclose(seen, whole.mean(axis=0).reshape(2, 4), rtol=1e-4, atol=1e-6)
    assert view.with_bias.sum() == pytest.approx(1)
    np.testing.assert_allclose(view.lat[:, 0], [tiny_data.LAT[:4].mean(), tiny_data.LAT[4:].mean()], rtol=1e-5)
    mountain = tiny_data.fields(0, 1)["orography"][0, 0].reshape(2, 4, 4, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(view.elevation_m, mountain, rtol=1e-4)


def test_wind_order_is_undone(root):
    views = [
        view_from(made(root, use_physics_mask=True, bias_args={"patch_order": order}), PLACE)
        for order in ("raster", "wind")
    ]
    for name in ("reads", "is_read", "without", "with_bias"):
        np.testing.assert_allclose(getattr(views[0], name), getattr(views[1], name), rtol=1e-4, atol=1e-6)


def test_without_a_place_it_is_where_the_ground_rises_most(root):
    view = view_from(made(root, use_physics_mask=True), None)
    height = np.pad(view.elevation_m, 1, constant_values=-1e9)
    rises = [[height[i : i + 3, j : j + 3].max() - height[i + 1, j + 1] for j in range(4)] for i in range(2)]
    assert view.place == np.unravel_index(np.argmax(rises), (2, 4))


def test_a_transect_goes_from_patch_to_neighbouring_patch(root):
    view = view_from(made(root, use_physics_mask=True), PLACE)
    line = transect(view, (6.0, 3.0), (-2.0, 27.0))
    assert (line.rows[0], line.columns[0], line.rows[-1], line.columns[-1]) == (0, 0, 1, 3)
    assert max(np.abs(np.diff(line.rows)).max(), np.abs(np.diff(line.columns)).max()) == 1
    # 24 degrees of longitude and 8 of latitude near the equator: 25.3 degrees of 111.2 km
    assert 0 < line.distance_km[0] < line.distance_km[-1] < 2813
    assert line.distance_km[-1] > 2000
    assert line.ends == ("6° N, 3° E", "2° S, 27° E")


def test_errors_at_each_pixel(run):
    error, variable = error_field(run, "test", None)
    squares = []
    for x, y, lead_times, names, targets in run.datamodule.test_dataloader():
        with torch.no_grad():
            _, predicted = run.module.net.forward(x, None, lead_times, names, targets, None, None)
        squares.append((predicted - y)[:, 0].numpy().astype(float) ** 2)
    std = run.datamodule.output_transforms.std[0]
    np.testing.assert_allclose(error.values, std * np.sqrt(np.concatenate(squares).mean(axis=0)), rtol=1e-4)
    assert variable == tiny_data.TARGETS[0]


def test_ground_comes_from_the_input_or_the_file(root, run, tmp_path):
    orography = tiny_data.fields(0, 1)["orography"][0, 0]
    np.testing.assert_allclose(ground_field(run, "val").values, orography, rtol=1e-4)
    file = tmp_path / "z.npz"
    np.savez(file, orography=orography, lat=tiny_data.LAT, lon=tiny_data.LON)
    others = tiny_data.VARIABLES[1:]
    filed = made(root, others, use_physics_mask=True, bias_args={"elevation_file": str(file)})
    np.testing.assert_allclose(
        ground_field(filed, "val").values, orography.reshape(2, 4, 4, 4).mean(axis=(1, 3)), rtol=1e-4
    )
    with pytest.raises(InputError, match="the run's input has no 'orography'"):
        ground_field(made(root, others), "val")


# ---- what is drawn ----------------------------------------------------------------------------------


def meshes(figure):
    """Values on the maps of a figure, colour bars excepted."""
    maps = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    found = [part for axes in maps for part in axes.collections if isinstance(part, QuadMesh)]
    return [mesh.get_array().reshape(mesh.get_coordinates().shape[0] - 1, -1) for mesh in found]


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


LEAST_GAP = 4.0  # pixels between numbers on an axis


def check_readable(figure):
    """Texts are large enough, words within the figure, numbers on an axis apart; an axis of numbers says its unit."""
    figure.draw_without_rendering()
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 11
    whole = [figure._suptitle, figure._supxlabel]
    words = [text for text in whole if text is not None]
    for axes in figure.axes:
        words += [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            ticks = [label.get_text() for label in axis.get_ticklabels() if label.get_visible() and label.get_text()]
            if ticks and all(tick.lstrip("−").replace(".", "").isdigit() for tick in ticks):
                label = axis.get_label_text() or figure.get_supxlabel()
                assert "(" in label or "gradient" in label or label == "training step", label
        extents = sorted((label.get_window_extent() for label in axes.get_xticklabels()), key=lambda extent: extent.x0)
        within = [extent for extent in extents if axes.bbox.x0 <= (extent.x0 + extent.x1) / 2 <= axes.bbox.x1]
        assert all(left.x1 + LEAST_GAP < right.x0 for left, right in itertools.pairwise(within)), axes.get_xticklabels()
    for text in words:
        if text.get_text():
            extent = text.get_window_extent()
            assert figure.bbox.x0 - 1 <= extent.x0 <= extent.x1 <= figure.bbox.x1 + 1, text
            assert figure.bbox.y0 - 1 <= extent.y0 <= extent.y1 <= figure.bbox.y1 + 1, text


def test_maps_of_bias_and_attention_hold_the_view(root):
    view = view_from(made(root, use_physics_mask=True), PLACE)
    figure = plots.bias_figure(view)
    for drawn, computed in zip(meshes(figure), (view.elevation_m, view.reads, view.is_read), strict=True):
        np.testing.assert_array_equal(drawn, computed)
    check_readable(figure)
    crosses = [line for axes in figure.axes for line in axes.get_lines() if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in crosses] == [(view.lon[0, 1], view.lat[0, 1])] * 3
    figure = plots.attention_figure(view)
    change = view.with_bias - view.without
    for drawn, computed in zip(meshes(figure), (view.without, view.with_bias, change), strict=True):
        np.testing.assert_allclose(drawn, 100 * computed, rtol=1e-5, atol=1e-7)
    check_readable(figure)


def test_a_transect_holds_the_view(root):
    view = view_from(made(root, use_physics_mask=True), (6.0, 3.0))
    line = transect(view, (6.0, 3.0), (-2.0, 27.0))
    figure = plots.transect_figure(view, line)
    terrain, bias, attention = figure.axes
    along = (line.rows, line.columns)
    np.testing.assert_array_equal(terrain.get_lines()[0].get_ydata(), view.elevation_m[along])
    drawn = lines(bias) | lines(attention)
    for label, values in {
        "start reads the place": view.reads,
        "place reads the start": view.is_read,
        "without the bias": 100 * view.without,
        "with the bias": 100 * view.with_bias,
    }.items():
        np.testing.assert_array_equal(drawn[label].get_ydata(), values[along])
        np.testing.assert_array_equal(drawn[label].get_xdata(), line.distance_km)
    check_readable(figure)


def test_error_maps_hold_errors_their_difference_and_contours(runs, run):
    error, variable = error_field(run, "val", None)
    with open_run(runs / "none") as other:
        figure = pictures.errors(run, other, part="val", variable=None, names=("physics", "none"))
        theirs, _ = error_field(other, "val", variable)
    first, second = meshes(figure)
    np.testing.assert_array_equal(first, error.values)
    np.testing.assert_array_equal(second, error.values - theirs.values)
    contours = [part for axes in figure.axes for part in axes.get_children() if isinstance(part, ContourSet)]
    assert list(contours[0].levels) == [1000, 2000, 3000]
    assert "RMSE (K)" in [text.get_text() for text in figure.findobj(Text)]
    check_readable(figure)


def test_trajectories_hold_the_record(runs):
    figure = pictures.parameters(runs / "physics")
    rows = read_record(runs / "physics" / "bias.csv")
    for axes, quantity in ((figure.axes[0], "value"), (figure.axes[2], "gradient")):
        for block in (0, 1):
            wanted = (block, "elevation_alpha", quantity)
            own = [row for row in rows if (row.block, row.parameter, row.quantity) == wanted]
            line = lines(axes)[f"block {block}"]
            assert list(line.get_xdata()) == [row.step for row in own]
            assert list(line.get_ydata()) == [row.value for row in own]
    assert figure.axes[0].get_ylabel() == "alpha (logits per height scale)"
    check_readable(figure)


COLUMNS = "variant,counterpart,part,metric,variable,stratum,seeds,difference,low,high,p,p_holm,time_low,time_high,"
COLUMNS += "percent,percent_low,percent_high,percent_time_low,percent_time_high,verdict"
LONG = "a very long name of a sum of biases+advection+ridge"
COMPARED = f"""{COLUMNS}
physics,none,test,rmse_standardised,mean,all,5,-.01,-.03,.01,.2,.2,,,-1.5,-3.5,0.5,,,no difference found
ridge,none,test,rmse_standardised,mean,all,5,-.04,-.05,-.03,.1,.1,-.05,-.02,-4.0,-5.0,-3.0,-4.5,-2.5,better
multiplicative,none,test,rmse_standardised,mean,all,5,.03,.01,.05,.03,.03,,,3.0,1.0,5.0,,,worse
{LONG},advection,test,rmse_standardised,mean,all,5,-.02,-.03,-.01,.02,.02,,,-2.0,-3.0,-1.0,,,better
ridge,none,test,skill_persistence,mean,all,5,0.04,0.03,0.05,.01,.01,0.02,0.06,,,,,,better
ridge,none,test,rmse,tracer,lee,5,-.06,-.07,-.05,.001,.001,,,-6.0,-7.0,-5.0,,,better
ridge,none,test,rmse,tracer,windward,1,-.06,,,,,,,-6.0,,,,,one seed: no interval
"""


@pytest.fixture
def compared(tmp_path):
    (tmp_path / "differences.csv").write_text(COMPARED)
    return tmp_path


def labelled(axes, label):
    return [line for line in axes.get_lines() if line.get_label() == label]


def test_a_forest_holds_the_differences(compared):
    figure = pictures.forest(compared)
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "multiplicative vs none"
    assert names[-1] == "ridge vs none"
    intervals = [tuple(line.get_xdata()) for line in labelled(axes, "over seeds")]
    assert intervals == [(1.0, 5.0), (-3.5, 0.5), (-3.0, -1.0), (-5.0, -3.0)]
    assert tuple(labelled(axes, "over time")[-1].get_xdata()) == (-4.5, -2.5)
    points = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [point.get_xdata()[0] for point in points] == [3.0, -1.5, -2.0, -4.0]
    assert [point.get_color() for point in points] == [plots.VERMILION, "0.45", plots.BLUE, plots.BLUE]
    assert [point.get_markerfacecolor() == "white" for point in points] == [False, True, False, False]
    assert figure.get_supxlabel() == "difference in rmse_standardised (% of the counterpart's; below 0: smaller error)"
    check_readable(figure)


def test_arms_are_panels_with_the_same_rows(tmp_path):
    header, *rows = COMPARED.strip().splitlines()
    lines = [f"arm,{header}"]
    for arm, percent in (("withheld", "-4"), ("given_60_days", "-0.5")):
        lines += [f"{arm},{row.replace(',-4.0,', f',{percent},')}" for row in rows]
    (tmp_path / "given").mkdir()
    for place in (tmp_path, tmp_path / "given"):  # the comparison's own, and an arm's
        (place / "differences.csv").write_text("\n".join(lines) + "\n")
    figure = pictures.forest(tmp_path)
    assert [axes.get_title() for axes in figure.axes] == ["withheld", "given 60 days"]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[-1] == "ridge vs none"
    of_ridge = [[line for line in axes.get_lines() if line.get_marker() == "o"][-1] for axes in figure.axes]
    assert [(point.get_xdata()[0], point.get_ydata()[0]) for point in of_ridge] == [(-4.0, 3), (-0.5, 3)]
    check_readable(figure)


def test_numbers_below_narrow_panels_stay_apart(tmp_path):
    header, *rows = COMPARED.strip().splitlines()
    wide = [
        row.replace(",-4.0,-5.0,-3.0,", ",-13.3,-17.3,-9.2,").replace(",3.0,1.0,5.0,", ",0.5,-1.8,2.8,") for row in rows
    ]
    lines = [f"arm,{header}", *(f"{arm},{row}" for arm in ("withheld", "given") for row in wide)]
    (tmp_path / "differences.csv").write_text("\n".join(lines) + "\n")
    check_readable(pictures.forest(tmp_path))


def test_a_skill_has_no_per_cent_and_one_seed_no_interval(compared):
    figure = pictures.forest(compared / "differences.csv", metric="skill_persistence")
    assert tuple(labelled(figure.axes[0], "over seeds")[0].get_xdata()) == (0.03, 0.05)
    assert "(dimensionless; above 0: better)" in figure.get_supxlabel()
    figure = pictures.forest(compared, metric="rmse", stratum="windward")
    (point,) = labelled(figure.axes[0], "one seed: no interval")
    assert point.get_markerfacecolor() == "white"
    assert np.isnan(labelled(figure.axes[0], "over seeds")[0].get_xdata()).all()
    check_readable(figure)


def drawn_at(lat, lon, values, point):
    """The value whose cell on the map holds a point."""
    figure = plots.new_figure(4, 4)
    axes = figure.subplots()
    plots.draw_map(axes, Field(lat, lon, values), "", "", "cividis")
    (mesh,) = [part for part in axes.collections if isinstance(part, QuadMesh)]
    x, y = mesh.get_coordinates()[..., 0], mesh.get_coordinates()[..., 1]
    inside = (
        (np.minimum(x[:-1, :-1], x[1:, 1:]) < point[1])
        & (point[1] < np.maximum(x[:-1, :-1], x[1:, 1:]))
        & (np.minimum(y[:-1, :-1], y[1:, 1:]) < point[0])
        & (point[0] < np.maximum(y[:-1, :-1], y[1:, 1:]))
    )
    assert inside.sum() == 1
    return values[inside].item()


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_maps_lie_right_whichever_way_the_rows_go_and_over_greenwich(descending, both):
    """Longitudes 350, 355, 0, 5: the third column is at 360 on the axis."""
    lat, lon = np.array([10.0, 20.0, 30.0]), np.array([350.0, 355.0, 0.0, 5.0])
    lat = lat[::-1] if descending else lat
    values = np.arange(12.0).reshape(3, 4)
    row = 0 if descending else 2
    if both:
        lat, lon = np.meshgrid(lat, lon, indexing="ij")
    assert drawn_at(lat, lon, values, (31.0, 361.0)) == values[row, 2]


@pytest.mark.parametrize(
    ("low", "high", "levels"),
    [
        (0, 90, []),
        (0, 350, [100, 200, 300]),
        (0, 3400, [1000, 2000, 3000]),
        (1200, 3400, [1500, 2000, 2500, 3000]),
        (0, 0, []),
    ],
)
def test_contours_are_few_and_round(low, high, levels):
    assert plots.contour_levels_m(np.array([low, high])) == levels


def test_colours_say_the_sign():
    white = np.array([0.97, 0.97, 0.97])
    for values, expected in (([-3, 0], (-3, 0)), ([0, 2], (0, 2)), ([-3, 2], (-3, 3)), ([0, 0], (-1, 1))):
        colours, limits = plots.bias_colours(np.array(values, dtype=float))
        assert limits == expected
        zero = colours((0 - limits[0]) / (limits[1] - limits[0]))[:3]
        np.testing.assert_allclose(zero, white, atol=0.03)
        if limits[0] < 0:
            assert colours(0.0)[0] > colours(0.0)[2]  # more red than blue: orange


def test_units_of_variables():
    units = ("2m_temperature", "temperature_850", "10m_u_component_of_wind", "geopotential_500", "tracer")
    assert [plots.variable_unit(name) for name in units] == ["K", "K", "m/s", "m²/s²", "tracer units"]


def test_drawing_leaves_the_users_settings_alone(root):
    before, open_figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    plots.bias_figure(view_from(made(root, use_physics_mask=True), PLACE))
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == open_figures


# ---- the command ------------------------------------------------------------------------------------

AT = ["--lat", "5", "--lon", "8"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["bias", "physics", *AT, "--block", "1", "--head", "0"],
        ["bias", "physics"],
        ["attention", "physics", *AT, "--part", "test", "--sample", "3"],
        ["transect", "physics", *AT, "--to-lat", "-2", "--to-lon", "28"],
        ["errors", "physics", "--variable", tiny_data.TARGETS[0]],
        ["errors", "none", "--against", "physics"],
        ["parameters", "physics"],
    ],
)
def test_every_kind_as_png_and_pdf(runs, tmp_path, capsys, arguments):
    kind, name, *options = arguments
    options = [str(runs / option) if option == "physics" else option for option in options]
    out = tmp_path / "pictures" / "one.two"
    assert main(["plot", kind, str(runs / name), *options, "--out", str(out)]) == 0
    files = [Path(line) for line in capsys.readouterr().out.split()]
    assert files == [tmp_path / "pictures" / f"one.two.{suffix}" for suffix in ("png", "pdf")]
    assert min(imread(files[0]).shape[:2]) > 600
    assert files[1].read_bytes().startswith(b"%PDF")


def test_a_forest_by_the_command(compared, capsys):
    out = compared / "forest"
    assert main(["plot", "forest", str(compared), "--metric", "rmse", "--stratum", "lee", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [f"{out}.png", f"{out}.pdf"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bias", "none"], "this StandInClimaX has no terrain bias"),
        (["bias", "nowhere"], "is not the folder of a run"),
        (["bias", "physics", "--lat", "50", "--lon", "8"], "50° N, 8° E is outside the grid, whose patches have"),
        (["bias", "physics", "--lat", "5", "--lon", "-170"], "is outside the grid"),
        (["bias", "physics", "--lat", "5"], "give both --lat and --lon"),
        (["bias", "physics", *AT, "--block", "7"], "block 7 has no terrain bias; those that have: 0, 1"),
        (["bias", "physics", *AT, "--head", "2"], "head is from 0 to 1, not 2"),
        (["bias", "physics", *AT, "--sample", "99"], "val has forecasts 0 to 3, and not 99"),
        (["attention", "physics", *AT, "--part", "train"], "unknown part 'train'"),
        (["transect", "physics", *AT, "--to-lat", "5.1", "--to-lon", "8"], "both places are in the same"),
        (["errors", "physics", "--variable", "snow"], "unknown variable 'snow'; choose one of '2m_temperature'"),
        (["parameters", "none"], "bias.csv is drawn, and"),
        (["forest", "none"], "differences.csv is drawn, and"),
        (["forest", "physics/bias.csv"], "is no result of compare: it lacks variant, counterpart"),
    ],
)
def test_mistakes_are_a_sentence(runs, tmp_path, capsys, arguments, sentence):
    kind, name, *options = arguments
    assert main(["plot", kind, str(runs / name), *options, "--out", str(tmp_path / "picture")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"metric": "rmse"}, "has several values of stratum: choose with --stratum one of lee, windward"),
        ({"metric": "rmsee"}, "has no metric 'rmsee'; it has rmse, rmse_standardised, skill_persistence"),
        ({"part": "val"}, "has no part 'val'; it has test"),
    ],
)
def test_what_a_forest_is_of_has_to_be_clear(compared, options, sentence):
    with pytest.raises(InputError, match=sentence):
        pictures.forest(compared, **options)


@pytest.mark.parametrize("kind", ["bias", "attention", "transect", "errors", "parameters", "forest"])
def test_every_kind_has_help(capsys, kind):
    with pytest.raises(SystemExit, match="0"):
        main(["plot", kind, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: climax-elevation plot {kind}")


def test_an_unknown_kind_lists_the_known(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plot", "globe", "run"])
    assert "invalid choice: 'globe' (choose from" in capsys.readouterr().err


def test_runs_of_other_grids_are_not_compared(root, run):
    other = made(root)
    other.datamodule.get_lat_lon = lambda: (tiny_data.LAT + 1, tiny_data.LON)
    with pytest.raises(InputError, match="a and b forecast other grids"):
        pictures.errors(run, other, part="val", variable=None, names=("a", "b"))


@pytest.mark.parametrize("lon", [np.linspace(290.0, 305.0, 16), np.linspace(-70.0, -55.0, 16)])
def test_longitudes_are_east_or_west_however_the_data_count(lon):
    field = Field(np.linspace(-20.0, 2.0, 8), lon, np.zeros((8, 16)))
    figure, (axes,) = plots.maps([field])
    plots.draw_map(axes, field, "", "", "cividis")
    figure.canvas.draw()
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert "60° W" in ticks
    assert set(tick[-1] for tick in ticks) == {"W"}
    assert {"20° S", "0°"} <= {tick.get_text() for tick in axes.get_yticklabels()}


def test_places_in_words():
    words = {0: "0°", 360: "0°", 180: "180°", -180: "180°", 290.5: "69.5° W", -190: "170° E", 10: "10° E"}
    assert {lon: longitude_words(lon) for lon in words} == words
    assert [latitude_words(lat) for lat in (-20, 0, 7.25)] == ["20° S", "0°", "7.25° N"]


def test_numbers_of_a_scale_are_whole():
    """Of a field that hardly varies: matplotlib would take out what they share, and write it over the label."""
    values = 293.6 + 0.01 * np.random.default_rng(0).random((6, 6))
    field = Field(np.arange(6.0), np.arange(6.0), values)
    figure = plots.forecast_figure(field, 1e-5 * (values - 293.605), None, "2m_temperature", "now", "K")
    figure.canvas.draw()
    for axes in figure.axes:
        assert not axes.xaxis.get_offset_text().get_text()
        assert not axes.yaxis.get_offset_text().get_text()
    pyplot.close(figure)
