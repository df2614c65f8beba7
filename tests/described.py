"""Parameters of every preset, as small tasks give them, and what keys derive from them and their material."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine.identity.key import Key
from wmengine.marks.catalogue import scheme
from wmengine.marks.preset import Preset
from wmengine.parts.base import Integers, Parameters, Task
from wmengine.suspects.base import InputSpec
from wmengine.testing import small_network

KEY = Key("ACME Vision", bytes(range(32)))
IMAGES = {"input": InputSpec((1, 8, 8), "float32")}
SHAPES = [[16, 1, 3, 3], [32, 16, 3, 3], [10, 128]]
LEVELS = [np.random.default_rng(n).integers(-127, 128, sizes).astype(np.float32) for n, sizes in enumerate(SHAPES)]
INTEGERS = [
    Integers(place, levels / 128, np.full(levels.shape, 1 / 128, np.float32), np.abs(levels) < 127)
    for place, levels in enumerate(LEVELS)
]
TASK = Task(IMAGES, 10, [[0.0, 1.0]], weights=lambda: (SHAPES, [0, 1, 2]), integers=INTEGERS)
TEXT = {"tokens": InputSpec((16,), "int64"), "mask": InputSpec((16,), "int64")}
TOKENS = Task(TEXT, 10, [[0, 99]])
PASSPORTS = ("deepipr_v1", "deepipr_v2", "deepipr_v3", "passport_norm")
TWO = [[32, 1, 3, 3], [32, 32, 3, 3], [10, 128]]
NORMALISED = Task(IMAGES, weights=lambda: (TWO, [0, 1, 2]), normalised=lambda: [0, 1])
SAMPLES = np.random.default_rng(8).random((40, 1, 8, 8)).astype(np.float32)
POOL = replace(
    TASK,
    samples={"input": SAMPLES},
    sample_labels=np.arange(40) % 10,
    controls=[small_network(5), small_network(6)],
    model=small_network(4),
)
RANKED = ("frontier", "ewe", "ipguard", "conferrable", "known_mistakes", "posthoc", "blackmarks", "dataset_inference")
OF_FAMILIES = ("class_feature", "mea_defender")
POOLED = (
    *("zhang_content", "zhang_noise", "zhang_unrelated", "exponential_weighting", "multi_view", "blind", "ewe_keyed"),
    *OF_FAMILIES,
    *RANKED,
)
QUICK = {"frontier": {"push": 0.2}, "conferrable": {"distilling": 5}, "blind": {"encoding": 3}}
WAVES = Task({"input": InputSpec((1, 64), "float32")}, 10, [[0.0, 1.0]])
ROWS = {"input": np.random.default_rng(8).normal(size=(30, 7)).astype(np.float32)}
OWN = {
    "adi_tokens": TOKENS,
    "adi_audio": WAVES,
    "adi_table": Task({"input": InputSpec((7,), "float32")}, 10, samples=ROWS),
    "adi_values": Task(IMAGES, value_range=[[0.0, 1.0]], targets=np.arange(60.0)),
    **dict.fromkeys(PASSPORTS, NORMALISED),
    **dict.fromkeys(POOLED, POOL),
}
SMALL: dict[str, dict[str, Any]] = {
    "sketch": {"bits": 64},
    "uchida": {"bits": 64},
    "adi": {"count": 20},
    "deepsigns": {"bits": 64},
    "adi_tokens": {"count": 20},
    "adi_audio": {"count": 20},
    "adi_table": {"count": 20},
    "adi_multilabel": {"bits": 64},
    "adi_values": {"count": 20},
    "adi_anchors": {"count": 20, "choices": 10},
    "adi_boxes": {"count": 20},
    **{name: {} for name in PASSPORTS},
    "diction": {"bits": 64},
    "tattooed": {"bits": 64},
    "deepmarks": {"bits": 64},
    "stdm": {"bits": 64},
    "neuralmark": {"bits": 64, "width": 128},
    "greedy_residuals": {"bits": 64},
    "riga": {"bits": 64, "width": 128},
    "emmark": {"bits": 64},
    **{name: {"count": 20, **QUICK.get(name, {})} for name in POOLED},
    "margin": {"count": 20},
    "certified": {"count": 20},
    "blackmarks": {"bits": 20},
    "dataset_inference": {"bits": 12},
}
MATERIAL: dict[str, dict[str, NDArray[Any]]] = {}  # by its digests


def parameters_of(name: str, task: Task | None = None, **options: Any) -> Parameters:
    preset, own = scheme(name, **{**SMALL[name], **options}), task or OWN.get(name, TASK)
    if task is None and not options:
        return copy.deepcopy(described(preset))
    return _described(preset, own)


@cache
def described(preset: Preset) -> Parameters:
    return _described(preset, OWN.get(preset.name, TASK))


def _described(preset: Preset, task: Task) -> Parameters:
    material = preset.gather(task)
    parameters = preset.describe(task, "detector-v3", material)
    MATERIAL[str(parameters.get("material", {}))] = material
    return parameters


def derived(name: str, parameters: Parameters, key: Key = KEY, message: str | None = None) -> dict[str, NDArray[Any]]:
    return scheme(name).derive(key, parameters, message, MATERIAL[str(parameters.get("material", {}))])
