"""Biases by name."""

import subprocess
import sys

import pytest

from climax_elevation import InputError, PhysicsBias, available_biases, build_bias, register_bias
from climax_elevation.bias.build import bias_arguments


def test_the_own_biases_are_there():
    assert "physics" in available_biases()
    assert isinstance(build_bias("physics", num_heads=4, alpha_init=2.0), PhysicsBias)
    assert build_bias("physics", num_heads=4, alpha_init=2.0).elevation_alpha.item() == 2.0


def test_unknown_names_list_the_known_ones():
    with pytest.raises(InputError, match=r"unknown bias 'phisics'; available: .*'physics'"):
        build_bias("phisics", num_heads=4)
    with pytest.raises(InputError, match="unknown argument 'alpha' for bias 'physics'; valid: alpha_init, beta_init"):
        build_bias("physics", num_heads=4, alpha=1)


def test_a_repeated_name_is_refused():
    with pytest.raises(InputError, match="'physics' is registered already"):
        register_bias("physics")(PhysicsBias)
    with pytest.raises(InputError, match="letters, digits and underscores"):
        register_bias("a+b")(PhysicsBias)


@pytest.mark.parametrize("other", [object, 3, PhysicsBias.forward])
def test_what_is_no_bias_is_refused(other):
    with pytest.raises(InputError, match="a bias is a class that is made from climax_elevation.ElevationBias, not"):
        register_bias("another")(other)
    assert "another" not in available_biases()


def test_heads_are_passed_to_those_who_name_them(monkeypatch):
    monkeypatch.setattr("climax_elevation.bias.registry._biases", {})

    @register_bias("a_head_each")
    class PerHead(PhysicsBias):
        def __init__(self, num_heads: int, strength: float = 1.0) -> None:
            super().__init__(alpha_init=strength)
            self.num_heads = num_heads

    assert build_bias("a_head_each", num_heads=6).num_heads == 6
    assert bias_arguments("a_head_each") == ("strength",)


HILLS = """
from climax_elevation import PhysicsBias

class Hills(PhysicsBias):
    pass
"""


@pytest.fixture
def install(tmp_path):
    """Installs a distribution, which is a module, and its metadata on the path."""

    def install(name, module, declared=None):
        (tmp_path / f"{name}.py").write_text(module)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[climax_elevation.biases]\n{declared or f'{name} = {name}:Hills'}\n")

    return install


@pytest.fixture
def fresh(tmp_path):
    """Runs a program in a process of its own, as a user's would be, where those are installed."""

    def fresh(program):
        start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import climax_elevation as c\n"
        return subprocess.run([sys.executable, "-c", start + program], capture_output=True, text=True)

    return fresh


def test_entry_points_of_other_packages_load_on_first_use(install, fresh):
    install("hills", HILLS)
    done = fresh(
        "assert 'hills' not in sys.modules; print(type(c.build_bias('hills', num_heads=1)), c.available_biases())"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<class 'hills.Hills'> (")
    assert "'hills'" in done.stdout
    assert not done.stderr


BROKEN = {
    "absent": ("import a_package_that_is_not_there", "ModuleNotFoundError: No module named 'a_package_that_is_not_th"),
    "syntax": ("def", "SyntaxError: "),
    "raises": ("raise RuntimeError('no\\nGPU')", "RuntimeError: no GPU"),
    "exits": ("import sys; sys.exit('licence expired')", "SystemExit: licence expired"),
    "attribute": ("", "AttributeError: module 'attribute' has no attribute 'Hills'"),
    "other": ("class Hills: pass", "a bias is a class that is made from climax_elevation.ElevationBias, not <class 'o"),
    "no_class": ("Hills = 3", "a bias is a class that is made from climax_elevation.ElevationBias, not 3"),
    "registers": (
        "from climax_elevation import register_bias\n"
        + HILLS.replace("class", "@register_bias('half')\nclass")
        + "\nimport another_that_is_not_there",
        "ModuleNotFoundError: No module named 'another_that_is_not_there'",
    ),
}


def test_broken_packages_leave_the_other_biases_alone(install, fresh):
    """Each is loaded when it is asked for, or all are: then each is told of once."""
    for name, (module, _) in BROKEN.items():
        install(name, module)
    install("sound", HILLS)
    done = fresh(
        f"""
names = {list(BROKEN)}
c.build_bias('physics', num_heads=1), c.build_bias('sound', num_heads=1)
assert not set(sys.modules) & set(names)
for name in 2 * names:
  try: c.build_bias(name, num_heads=1)
  except c.InputError as error: print(error)
for _ in range(2):
  print(c.available_biases())
try: c.build_bias('phisics', num_heads=1)
except c.InputError as error: print(error)
"""
    )
    assert done.returncode == 0, done.stderr
    *said, listed, listed_again, unknown = done.stdout.splitlines()
    assert said == 2 * sorted(said[: len(BROKEN)], key=lambda line: list(BROKEN).index(line.split("'")[1]))
    for line, (name, (_, why)) in zip(said, BROKEN.items(), strict=False):
        assert line.startswith(f"the bias '{name}' of '{name}:Hills' cannot be loaded ({why}")
        assert line.endswith("): mend or remove the package that declares it")
    assert sorted(done.stderr.splitlines()) == sorted(set(said))
    assert listed == listed_again
    assert {"'physics'", "'sound'"} < set(listed.strip("()").split(", "))
    assert not {f"'{name}'" for name in (*BROKEN, "half")} & set(listed.strip("()").split(", "))
    assert unknown.startswith("unknown bias 'phisics'; available: ")


def test_doctor_names_a_broken_package_and_goes_on(install, fresh, no_climax):
    install("absent", "import a_package_that_is_not_there")
    install("sound", HILLS)
    done = fresh("from climax_elevation.cli import main; sys.exit(main(['doctor']))")
    assert done.returncode == 1
    of_biases = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.split()[1:2] == ["biases"]]
    assert [line[0] for line in of_biases] == ["ok", "wrong"]
    assert "sound" in of_biases[0][2]
    assert "the bias 'absent' of 'absent:Hills' cannot be loaded (ModuleNotFoundError" in of_biases[1][2]
    assert done.stdout.splitlines()[-1] == "1 wrong"
    assert "absent" not in done.stderr


@pytest.mark.parametrize("itself", [False, True])
def test_another_package_does_not_replace_a_bias_of_the_name(install, fresh, itself):
    registers = "from climax_elevation import register_bias\n" + HILLS.replace(
        "class", "@register_bias('physics')\nclass"
    )
    install("mountains", registers if itself else HILLS, "physics = mountains:Hills")
    done = fresh("print(type(c.build_bias('physics', num_heads=1)).__name__); c.available_biases()")
    assert done.stdout == "PhysicsBias\n"
    assert (
        "the bias 'physics' of 'mountains:Hills' cannot be loaded (a bias named 'physics' is registered" in done.stderr
    )


def test_two_packages_of_one_name_are_told_apart(install, fresh):
    """By their users: which comes first depends on how they were installed. The same class twice is no clash."""
    install("one", HILLS, "hills = one:Hills")
    install("again", HILLS, "hills = one:Hills")
    assert fresh("c.build_bias('hills', num_heads=1); c.available_biases()").stderr == ""
    install("two", HILLS, "hills = two:Hills")
    done = fresh(
        """
for _ in range(2):
  try: c.build_bias('hills', num_heads=1)
  except c.InputError as error: print(error)
  c.available_biases()
"""
    )
    assert done.stdout.splitlines() == 2 * [
        "the bias 'hills' of 'one:Hills' is declared as 'two:Hills' too: remove one of the packages"
    ] or done.stdout.splitlines() == 2 * [
        "the bias 'hills' of 'two:Hills' is declared as 'one:Hills' too: remove one of the packages"
    ]
    assert len(done.stderr.splitlines()) == 2


def test_a_module_may_register_more_than_it_declares(install, fresh):
    more = "@register_bias('more')\nclass More(PhysicsBias):\n  pass\n"
    install("hills", f"from climax_elevation import register_bias\n{HILLS}\n{more}")
    done = fresh("print(type(c.build_bias('more', num_heads=1)))")
    assert done.stdout == "<class 'hills.More'>\n", done.stderr
