"""A registry holds what the package and its plugins bring, and says what there is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae_bias.core.errors import RequestError
from sae_bias.core.registry import Registry


def test_entries_come_back_in_order_and_by_name():
    shapes: Registry[type] = Registry("shape")

    @shapes.register("round")
    class Round: ...

    @shapes.register("square")
    class Square: ...

    assert (shapes.names(), list(shapes)) == (("round", "square"), [Round, Square])
    assert shapes.get("square") is Square
    assert "round" in shapes and "oval" not in shapes


def test_an_unknown_name_is_answered_with_the_names_there_are():
    shapes: Registry[type] = Registry("shape")
    shapes.register("square")(int)
    with pytest.raises(RequestError, match=r"no shape 'sqare'; there are: square\. Did you mean 'square'\?"):
        shapes.get("sqare")


def test_one_name_has_one_meaning():
    shapes: Registry[type] = Registry("shape")
    shapes.register("square")(int)
    shapes.register("square")(int)
    with pytest.raises(RequestError, match="two shape entries are called 'square'"):
        shapes.register("square")(float)


def installed(folder: Path, name: str, code: str) -> dict[str, str]:
    """The environment in which a distribution with one plugin is installed."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sae_bias.plugins]\n{name} = {name}\n")
    here = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), here])}


def test_a_plugin_registers_at_the_first_look_up(tmp_path):
    env = installed(
        tmp_path,
        "brings_oval",
        "import shapes_of_somebody\nshapes_of_somebody.SHAPES.register('oval')(int)\n",
    )
    (tmp_path / "shapes_of_somebody.py").write_text(
        "from sae_bias.core.registry import Registry\nSHAPES = Registry('shape')\n"
    )
    code = "import sys, sae_bias, shapes_of_somebody as s\nassert 'brings_oval' not in sys.modules\nprint(s.SHAPES.names())"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "('oval',)"


def test_a_broken_plugin_is_named_and_stops_nothing(tmp_path):
    env = installed(tmp_path, "broken_plugin", "raise RuntimeError('no such thing')\n")
    code = "from sae_bias.core.registry import Registry\nprint(Registry('shape').names())"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "()"
    assert "broken_plugin" in done.stderr and "RuntimeError: no such thing" in done.stderr
