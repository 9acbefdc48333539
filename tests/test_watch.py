"""What no batch may have is refused in any batch, not in the first alone, and no one waits for it."""

import copy
import math
import time

import pytest
import torch
from terrains import global_terrain, make
from test_order import model, predict
from test_terrain import VARIABLES, physical_batch, reader_with_statistics, standardised

from climax_elevation import InputError, watch
from climax_elevation.bias.ridge import _check_ground
from climax_elevation.terrain.elevation_file import ElevationField


def high(x):
    x[1, 0] = 1e6


def geopotential(x):
    x[:, 0] *= 9.80665


def unknown(x):
    x[1, 0, 2, 3] = torch.nan


def stormy(x):
    x[1, 2] = 1e5


def calm_but_unknown(x):
    x[0, 3, 0, 0] = torch.nan


def like_standardised(x):
    x[1, 0] = torch.randn(4, 6)
    x[0, 0] = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (high, "to 1000000 m, outside -500 to 9000 m"),
        (geopotential, "is it geopotential"),
        (unknown, "has values that are not finite"),
        (stormy, "wind speed reaches 1000.* m/s, above 150"),
        (calm_but_unknown, "wind speed reaches nan m/s"),
        (like_standardised, "looks standardised"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_every_batch_is_looked_at(spoil, message, compiled):
    read = reader_with_statistics()
    good = physical_batch()
    forward = torch.compile(read, fullgraph=True, backend="aot_eager") if compiled else read
    read(standardised(good), None, VARIABLES)  # says once what it reads
    for _ in range(3):
        forward(standardised(good), None, VARIABLES)
    bad = good.clone()
    spoil(bad)
    with pytest.raises(InputError, match=message):
        forward(standardised(bad), None, VARIABLES)
    forward(standardised(good), None, VARIABLES)


def test_ground_that_is_static_stays_so_in_every_batch():
    read, x = reader_with_statistics(static_terrain=True), physical_batch()
    for _ in range(2):
        read(standardised(x), None, VARIABLES)
    for changed in ([0, 1], [1]):  # another ground, and one of two samples
        other = x.clone()
        other[changed, 0] += 100
        with pytest.raises(InputError, match="static_terrain is true, and 'orography' differs .* by up to 100 m"):
            read(standardised(other), None, VARIABLES)
    rounded = x.clone()
    rounded[:, 0] += 0.4
    read(standardised(rounded), None, VARIABLES)


def test_a_file_is_of_the_ground_of_every_sample():
    x = physical_batch()
    read = reader_with_statistics(elevation_file=ElevationField(x[0, 0].numpy(), None, None, "a file"))
    read(standardised(x), None, VARIABLES)
    x[1, 0] = x[1, 0].flip(0, 1)
    with pytest.raises(InputError, match="correlate by .*flipped, rolled, or of another region"):
        read(standardised(x), None, VARIABLES)


@pytest.mark.parametrize("level", ["file", "channel"])
def test_a_level_field_beside_one_that_is_not_is_refused(level):
    """500 m everywhere correlates with nothing, and would leave a bias without effect."""
    x = physical_batch()
    field = torch.full((4, 6), 500.0) if level == "file" else x[0, 0].clone()
    if level == "channel":
        x[:, 0] = 500.0
    read = reader_with_statistics(elevation_file=ElevationField(field.numpy(), None, None, "a file"))
    with pytest.raises(InputError, match="is level, and from .* it is not"):
        read(standardised(x), None, VARIABLES)


def test_a_channel_beside_a_file_is_finite_or_said_not_to_be():
    x = physical_batch()
    read = reader_with_statistics(elevation_file=ElevationField(x[0, 0].numpy().copy(), None, None, "a file"))
    x[1, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match="channel 'orography', which a file is compared with, has values that are not"):
        read(standardised(x), None, VARIABLES)


def test_variables_and_shapes_are_those_of_every_call():
    read, x = reader_with_statistics(), standardised(physical_batch())
    read(x, None, VARIABLES)
    with pytest.raises(InputError, match="reads 'orography', and the input has only"):
        read(x, None, ("height", *VARIABLES[1:]))
    with pytest.raises(InputError, match=r"the input is \[batch, 4 variables, 4, 6\], not \[2, 4, 2, 6\]"):
        read(x[:, :, :2], None, VARIABLES)


@pytest.mark.parametrize("compiled", [False, True])
def test_biases_look_at_every_batch_too(compiled):
    terrain = global_terrain((4, 8), batch=1)
    ridge, advection = make("ridge", terrain), make("advection", terrain)
    far = copy.copy(terrain)
    object.__setattr__(far, "lead_hours", terrain.lead_hours * 1e4)
    moved = copy.copy(terrain)
    object.__setattr__(moved, "elevation_m", terrain.elevation_m + 30)
    for bias, bad, message in (
        (advection, far, "past half way around"),
        (ridge, moved, "of another ground, up to 30 m"),
    ):
        inputs = torch.compile(bias.inputs, fullgraph=True, backend="aot_eager") if compiled else bias.inputs
        bias.inputs(terrain)
        for one, other in zip(inputs(terrain), bias.inputs(terrain), strict=True):
            assert torch.equal(one, other)
        with pytest.raises(InputError, match=message):
            inputs(bad)


def test_on_a_device_numbers_are_judged_once_they_have_arrived(monkeypatch):
    """A step later, in order, without waiting; and all of them at the end."""
    arrived = []
    monkeypatch.setattr(watch, "_sent", lambda numbers: (numbers.clone(), lambda: numbers.item() in arrived))
    monkeypatch.setattr(watch, "_on_host", lambda numbers: False)
    look = lambda apart: watch.judged(torch.zeros(1), torch.tensor([apart]), _check_ground)  # noqa: E731
    look(0.0)
    look(5.0)
    look(0.0)  # nothing has arrived: nobody waits
    assert len(watch._arriving) == 3
    arrived.extend([0.0, 5.0])
    with pytest.raises(InputError, match="up to 5 m"):
        look(0.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    watch.settle()
    assert not watch._arriving
    look(7.0)
    with pytest.raises(InputError, match="up to 7 m"):
        watch.settle()


def as_on_a_device(monkeypatch):
    """Numbers arrive only where someone waits for them."""
    monkeypatch.setattr(watch, "_sent", lambda numbers: (numbers.clone(), lambda: False))
    monkeypatch.setattr(watch, "_on_host", lambda numbers: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_no_state_is_handed_out_before_its_batches_are_judged(monkeypatch):
    """Of a checkpoint in the middle of an epoch, or of torch.save in a loop of one's own."""
    as_on_a_device(monkeypatch)
    made = model("physics").eval()
    predict(made)
    made.state_dict()
    monkeypatch.setattr(made.terrain, "elevation_std", made.terrain.elevation_std * 1e4)
    predict(made)
    with pytest.raises(InputError, match="outside -500 to 9000 m"):
        made.state_dict()


def test_an_error_leaves_nothing_for_the_next_run(monkeypatch):
    as_on_a_device(monkeypatch)
    look = lambda apart: watch.judged(torch.zeros(1), torch.tensor([apart]), _check_ground)  # noqa: E731
    for apart in (0.0, 5.0, 6.0, 7.0):
        look(apart)
    with pytest.raises(InputError, match="up to 5 m"):
        watch.settle()
    look(0.0)
    watch.settle()


@pytest.mark.parametrize("options", [{}, {"static_terrain": True}, {"control": "permuted"}, {"patch_order": "wind"}])
def test_a_reader_in_a_compiled_model_breaks_no_graph(options):
    made = model("physics", **options).eval()
    expected = predict(made)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    made.terrain.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(predict(made), expected)
    assert counter.frame_count == 1


def test_it_costs_next_to_nothing():
    """Of a training step: measured with benchmarks/step.py; here, that it is well below a hundredth of a second."""
    read, x = reader_with_statistics(static_terrain=True), standardised(physical_batch())
    read(x, None, VARIABLES)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        read(x, None, VARIABLES)
        times.append(time.perf_counter() - started)
    assert sorted(times)[25] < 0.01
