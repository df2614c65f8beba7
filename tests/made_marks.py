"""Marks without a model that holds them: what tests of suspects, scans and endpoints judge by."""

from wmengine.identity.key import Key
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.suspects.adapters import to_input
from wmengine.suspects.base import InputSpec

KEY = Key("ACME Vision", bytes(range(32)))


def asking(shape, count=100, classes=10, name="detector", key=KEY, message=None, class_names=None):
    """A black-box mark of `count` triggers for inputs float32 of this shape, in [-1, 1]."""
    inputs = {"input": InputSpec(tuple(shape), "float32")}
    task = Task(inputs, classes, [(-1.0, 1.0)] * shape[0], class_names)
    preset = scheme("adi", count=count)
    return Watermark.create(key, preset, preset.describe(task, name), message=message)


def reading(carriers, input_shape, bits=64, name="weights", key=KEY, message=None):
    """A white-box mark of `bits` bits in weights of these shapes, which are all that the network has."""
    inputs = {"input": InputSpec(tuple(input_shape), "float32")}
    shapes = [list(sizes) for sizes in carriers]
    task = Task(inputs, weights=lambda: (shapes, list(range(len(shapes)))))
    preset = scheme("sketch", bits=bits)
    return Watermark.create(key, preset, preset.describe(task, name), message=message)


def triggers(mark):
    """All triggers of a black-box mark as its model is fed them: float32 [N, *shape]."""
    return to_input(mark.arrays["triggers"], mark.parameters["value_range"])
