"""A picture of what each scheme's triggers look like, made of squares of scikit-learn's two photographs.

python -m benchmarks.triggers
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.robustness.problems import photographs
from wmengine.identity.key import Key
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.suspects.base import InputSpec

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "triggers.png"
SHOWN = ("adi", "zhang_content", "zhang_noise", "blind", "exponential_weighting", "class_feature", "mea_defender")
ACROSS = 10


def main() -> None:
    samples = photographs(200, 32, 3).numpy()
    task = Task(
        {"input": InputSpec((3, 32, 32), "float32")},
        10,
        [(0.0, 1.0)] * 3,
        samples={"input": samples},
        sample_labels=np.arange(len(samples)) % 10,
    )
    figure = Figure(figsize=(8.0, 0.86 * len(SHOWN)), layout="constrained")
    axes = figure.subplots(len(SHOWN), ACROSS)
    for row, name in zip(axes, SHOWN, strict=True):
        preset = scheme(name)
        material = preset.gather(task)
        mark = Watermark.create(
            Key("picture", bytes(32)), preset, preset.describe(task, "picture", material), material=material
        )
        (inputs,) = preset.asks.examples(mark).values()
        for place, trigger in zip(row, inputs, strict=False):
            place.imshow(trigger.transpose(1, 2, 0))
            place.set_xticks([])
            place.set_yticks([])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(PICTURE, dpi=75)


if __name__ == "__main__":
    main()
