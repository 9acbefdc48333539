"""Biases by name."""

import subprocess
import sys
import textwrap

import pytest

from climax_elevation import InputError, PhysicsBias, available_biases, build_bias, register_bias
from climax_elevation.bias.total import bias_arguments


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


def test_heads_are_passed_to_those_who_name_them(monkeypatch):
    monkeypatch.setattr("climax_elevation.registry._biases", {})

    @register_bias("a_head_each")
    class PerHead(PhysicsBias):
        def __init__(self, num_heads: int, strength: float = 1.0) -> None:
            super().__init__(alpha_init=strength)
            self.num_heads = num_heads

    assert build_bias("a_head_each", num_heads=6).num_heads == 6
    assert bias_arguments("a_head_each") == ("strength",)


def test_entry_points_of_other_packages_load_on_first_use(tmp_path):
    """A distribution is its metadata on the path; a new process finds it, as a user's would."""
    (tmp_path / "hills.py").write_text(
        textwrap.dedent(
            """
            from climax_elevation import PhysicsBias

            class Hills(PhysicsBias):
                pass
            """
        )
    )
    info = tmp_path / "hills-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hills\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[climax_elevation.biases]\nhills = hills:Hills\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import climax_elevation as c; "
        "assert 'hills' not in sys.modules; print(c.available_biases(), type(c.build_bias('hills', num_heads=1)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'hills'" in done.stdout
    assert "hills.Hills" in done.stdout

    (tmp_path / "hills.py").write_text("import a_package_that_is_not_there")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "the bias 'hills' of 'hills:Hills' cannot be loaded" in done.stderr
