"""A white-box and a black-box mark of fixed keys, for tests of marks and of their files."""

from dataclasses import fields
from typing import Any

from wmengine.identity.key import Key
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.suspects.base import InputSpec

KEY = Key("ACME Vision", bytes(range(32)))
IMAGES = {"input": InputSpec((1, 8, 8), "float32")}
SHAPES = [[16, 1, 3, 3], [32, 16, 3, 3], [10, 128]]
TASK = Task(IMAGES, 10, [[0.0, 1.0]], weights=lambda: (SHAPES, [0, 1, 2]))
SKETCH, ADI = scheme("sketch", bits=64), scheme("adi", count=20)
SKETCH_PARAMETERS, ADI_PARAMETERS = (preset.describe(TASK, "detector-v3") for preset in (SKETCH, ADI))
BASELINE = {"matched": 31, "total": 64, "log10_p": "-0.2218"}


def marks() -> list[Watermark]:
    return [
        Watermark.create(KEY, SKETCH, SKETCH_PARAMETERS, message="to Zoë", baseline=BASELINE),
        Watermark.create(KEY, ADI, ADI_PARAMETERS),
    ]


def content(mark: Watermark) -> dict[str, Any]:
    """Every field of a mark, in a form that can be compared."""
    arrays = {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in mark.arrays.items()}
    held = {field.name: getattr(mark, field.name) for field in fields(mark)}
    return {**held, "arrays": arrays, "commitment": mark.commitment}
