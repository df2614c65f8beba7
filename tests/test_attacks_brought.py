"""Attacks of other packages are found, listed and carried out as those of the page are."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from attacked import ARRAYS, classifier, content, values

import wmengine as wm

BROUGHT = """
from dataclasses import replace
from wmengine.attacks import Attack
from wmengine.attacks.page import PAGE

def halve(weights, random, factor):
    for array in weights.values():
        array *= factor

def shift(model, random):
    from onnx import numpy_helper
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, tensor.name))

def half(source, target, data):
    target.write_bytes(b"half")
    raise OSError("the disk is full")

mine = [
    Attack("half", "test", half, "file"),
    Attack("halve", "test", halve, "weights", defaults={"factor": 0.5}),
    Attack("shift", "test", shift, "graph"),
]
twin = replace(PAGE[0], promise="another")
broken = 7
"""


@pytest.fixture
def model(tmp_path):
    onnx.save(classifier(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def bring(folder, name, code):
    """What a new interpreter prints and complains of, with a package whose entry point has this value."""
    (folder / "brought.py").write_text(BROUGHT)
    about = folder / "brought-1.0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[wmengine.attacks]\nthem = brought:{name}\n")
    path = os.pathsep.join([str(folder), str(Path(wm.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    return done.stdout, done.stderr


def test_an_attack_of_another_package_is_listed_and_carried_out(model, tmp_path):
    code = f"""
import wmengine as wm
print(list(wm.attacks.ATTACKS)[-2:])
print(wm.attacks.run("halve", {str(model)!r}, out={str(tmp_path / "h.onnx")!r}, factor=0.25).name)
print(wm.attacks.run("shift", {str(model)!r}, out={str(tmp_path / "s.onnx")!r}).name)
"""
    assert bring(tmp_path, "mine", code) == ("['halve', 'shift']\nh.onnx\ns.onnx\n", "")
    assert np.array_equal(values(tmp_path / "h.onnx")["a"], ARRAYS["a"] / 4)
    assert np.array_equal(values(tmp_path / "s.onnx")["bias"], ARRAYS["bias"] + 1)


def test_an_attack_that_fails_half_way_leaves_what_was_there(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p.onnx").write_bytes(b"before")
    code = f"""
import wmengine as wm
wm.attacks.run("half", {str(model)!r}, out={str(tmp_path / "out" / "p.onnx")!r}, overwrite=True)
"""
    assert "the disk is full" in bring(tmp_path, "mine", code)[1]
    assert content(tmp_path / "out") == {tmp_path / "out" / "p.onnx": b"before"}
    assert len(os.listdir(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("twin", "ValueError: two attacks are called ftll; uninstall one of the packages that bring them"),
        ("broken", "ImportError: the attacks of brought cannot be loaded ('int' object is not iterable); mend"),
    ],
)
def test_a_package_that_brings_no_good_attack_is_named(tmp_path, name, error):
    assert error in bring(tmp_path, name, "import wmengine as wm; list(wm.attacks.ATTACKS)")[1]


@pytest.mark.slow
def test_a_value_of_the_graph_that_the_module_does_not_hold_is_named(tmp_path):
    """The constant that a module adds is in its graph, and no parameter or buffer of it."""
    code = """
import torch, wmengine as wm
class Shifted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.constant = torch.nn.Linear(4, 3), torch.arange(3.0)
    def forward(self, x):
        return self.layer(x) + self.constant
wm.attacks.run("shift", Shifted().eval(), torch.rand(1, 4))
"""
    assert "which the module does not hold: attack its ONNX file" in bring(tmp_path, "mine", code)[1]
