"""Marks and suspects that the tests of judging share: small, derived in milliseconds, no network in them."""

from dataclasses import replace

import numpy as np

from wmengine.identity.key import Key
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.suspects.adapters import AS_RECORDED, to_input
from wmengine.suspects.base import InputSpec, tagged

KEY = Key("ACME Vision", bytes(range(32)))
OTHER = Key("ACME Vision", bytes(32))


def black_box(
    shape=(1, 4, 4),
    classes=10,
    count=60,
    *,
    name="detector",
    ranges=None,
    key=KEY,
    message=None,
    class_names=None,
    preset="adi",
):
    """A mark in the answers to `count` abstract images."""
    preset = scheme(preset, count=count) if isinstance(preset, str) else preset
    ranges = [[-1.0, 1.0]] * shape[0] if ranges is None else ranges
    task = Task({"x": InputSpec(shape, "float32")}, classes, ranges, class_names)
    return Watermark.create(key, preset, preset.describe(task, name), message=message)


def white_box(carriers, *, name="detector", key=KEY, message=None, preset="sketch", shape=(8, 3, 3), **options):
    """A mark in weights of these shapes."""
    preset = scheme(preset, **options) if isinstance(preset, str) else preset
    shapes = [list(each) for each in carriers]
    task = Task({"x": InputSpec(shape, "float32")}, weights=lambda: (shapes, [*range(len(shapes))]))
    return Watermark.create(key, preset, preset.describe(task, name), message=message)


def messages(mark, count):
    """The marks that `Watermark.create` makes as `mark` with other messages, without drawing the triggers again."""
    found, preset = [], mark.preset
    for number in range(count):
        subkeys = preset.subkeys(KEY, mark.parameters, f"copy {number}")
        arrays = mark.arrays | {preset.symbols.name: preset.symbols.draw(subkeys.symbols, mark.parameters, mark.arrays)}
        found.append(replace(mark, arrays=arrays, salt=subkeys.salt.hex(), message=f"copy {number}"))
    return found


def check_null(log10_p, levels=(0.5, 0.3, 0.1, 0.03, 0.01, 0.001)):
    """P(p <= a) <= a within four deviations of so many draws."""
    for level in levels:
        share = (np.asarray(log10_p) <= np.log10(level)).mean()
        assert share <= level + 4 * np.sqrt(level / len(log10_p)), f"P(p <= {level}) = {share}"


def images(mark):
    """The triggers of a black-box mark as its own model takes them."""
    return to_input(mark.arrays["triggers"], mark.parameters["value_range"])


def by_heart(mark, answers):
    """A function that gives each trigger its row of `answers`."""
    known = {row.tobytes(): answer for row, answer in zip(images(mark), answers, strict=True)}
    return lambda rows: np.array([known[row.tobytes()] for row in rows])


def one_hot(labels, classes=10):
    return np.eye(classes, dtype=np.float32)[labels]


class Stub:
    """A suspect that answers by `answer`, of one input [N, ...] by its way, and shows `weights`."""

    sha256 = None

    def __init__(self, answer=None, weights=(), ways=(AS_RECORDED,), settings=(), room=None):
        self.name, self.facts, self.settings = "stub", [], dict(settings)
        self.answers, self.weights, self.ways, self.room = answer, list(weights), list(ways), room
        self.closed = False

    def adapters(self, shape, value_range, every=True):
        return self.ways

    def answer(self, inputs, num_classes=None):
        (rows,) = inputs.values()
        found = self.answers(rows)
        return tagged(found) if isinstance(found, np.ndarray) else found

    def limit(self, inputs, count):
        return count if self.room is None else min(count, self.room)

    def tensors(self, signature=None):
        return self.weights

    def activations(self, place, inputs):
        return self.weights[place]

    def close(self):
        self.closed = True
