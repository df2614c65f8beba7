"""A mark of `response` read on other inputs than those that are bound in it, to find out what pools are good for.

It is no proof: the bits were there before these inputs were chosen, and whoever chooses inputs by what they say pays
for nothing. So it is no option of `verify`; it needs the networks that the mark was made with, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from wmengine.judging.looks import looks_of_bits
from wmengine.marks.watermark import Watermark
from wmengine.parts.responses.gathering import Whitening, answers_of, base_of, raw_features, tensors
from wmengine.parts.responses.reading import projected, told, told_by_labels, unexplained
from wmengine.parts.responses.source import ResponsePool
from wmengine.suspects import open_suspect
from wmengine.suspects.base import Inputs, part_of


def log10_p_on(suspect: Any, mark: Watermark, probes: Inputs, controls: Sequence[Any]) -> tuple[float, float]:
    """By scores and by labels alone. probes: inputs [n, ...] by the mark's names for them, as its model takes them;
    controls: the networks of the mark, its base first. Raises ValueError for another base."""
    base, source = base_of(controls[0], tensors(part_of(probes, 0, 1))), cast(ResponsePool, mark.preset.source)
    if not source.fits(mark, raw_features(base, source.examples(mark, 64))):
        raise ValueError("the first of controls is not the base of this mark")
    classes = int(mark.parameters["num_classes"])
    features = Whitening(mark.arrays["centre"], mark.arrays["whitening"])(raw_features(base, probes))
    known, scores = answers_of(controls, probes, classes), open_suspect(suspect).answer(probes, classes).values
    found = []
    for said in (told(scores), told_by_labels(scores.argmax(axis=1), classes)):
        y = projected(unexplained(said, known), features, mark.arrays)
        test = mark.preset.test(mark, mark.total, sequential=False)
        test.add(*looks_of_bits(y, [mark.symbols]))
        found.append(test.log10_p)
    return found[0], found[1]
