"""A verdict's JSON is enough to compute its p-value again, by hand and with nothing of the engine's."""

import json
import math
import re
from pathlib import Path

import mpmath
import numpy as np
import pytest
from wmengine.key import Key
from wmengine.schemes import black_box_parameters, scheme, white_box_parameters
from wmengine.triggers import to_input
from wmengine.verify import verify
from wmengine.watermark import Watermark

from wmengine.cli import main
from wmengine.suspects.adapters import Adapter

DESIGN = (Path(__file__).resolve().parent.parent / "docs" / "design.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", DESIGN, re.DOTALL)
KEY = Key("ACME Vision", bytes(range(32)))
SHAPE, RANGE = (1, 6, 6), [[-1.0, 1.0]]


def recomputed(document):
    """log10 p of a verdict's JSON text, as docs/design.md says, in 60 digits."""
    evidence = json.loads(document)["evidence"]
    matched, asked = evidence["matched"], evidence["asked"]
    with mpmath.workdps(60):
        p0 = mpmath.mpf(evidence["chance"])
        if evidence["test"] == "fixed":
            p = mpmath.fsum(
                mpmath.binomial(asked, k) * p0**k * (1 - p0) ** (asked - k) for k in range(matched, asked + 1)
            )
        else:
            gains = mpmath.betainc(matched + 1, asked - matched + 1, p0, 1)
            p = (1 - p0) * p0**matched * (1 - p0) ** (asked - matched) / gains
        return float(min(0, mpmath.log10(p) - evidence["log10_share"]))


def mark(classes=10, count=60):
    parameters = black_box_parameters(scheme("adi", count=count), SHAPE, classes, RANGE, "detector")
    return Watermark.create(KEY, "adi", parameters)


class Suspect:
    """Answers a share of the triggers rightly, by the one way of several in which it can be asked."""

    name, sha256, notes = "suspect", None, []

    def __init__(self, marked, kept=1.0, scaling="as recorded", ways=1, order=None, heads=1):
        self.marked, self.scaling, self.heads = marked, scaling, heads
        generator, classes = np.random.default_rng(4), marked.parameters["num_classes"]
        labels = marked.arrays["labels"]
        said = np.where(generator.random(len(labels)) < kept, labels, generator.integers(0, classes, len(labels)))
        self.said = said if order is None else order[said]
        self.others = generator.integers(0, classes, (len(labels), heads - 1))
        scalings = ["as recorded", "0 to 1", "0 to 255"][:ways]
        self.ways = [Adapter(scaling=each, share=1 / ways) for each in scalings]
        way = next(each for each in self.ways if each.scaling == scaling)
        self.known = {row.tobytes(): i for i, row in enumerate(way.inputs(marked.arrays["triggers"], RANGE))}

    def adapters(self, trigger_shape, value_range, every=True):
        return self.ways

    def query(self, inputs, num_classes=None):
        places = [self.known.get(row.tobytes()) for row in inputs]
        if None in places:
            return np.zeros((len(inputs), self.heads), np.int64)
        return np.concatenate([self.others[places], self.said[places, None]], axis=1)

    def tensors(self, input_shape=None):
        return []

    def close(self):
        pass


ORDER = np.array([3, 7, 0, 9, 1, 8, 2, 4, 6, 5])


@pytest.mark.parametrize("queries", ["all", "sequential"])
@pytest.mark.parametrize("kept", [1.0, 0.7, 0.3, 0.0])
@pytest.mark.parametrize(
    "options", [{}, {"ways": 3, "scaling": "0 to 255"}, {"heads": 4}, {"ways": 2, "heads": 2}], ids=str
)
def test_black_box(queries, kept, options):
    verdict = verify(Suspect(mark(), kept, **options), mark(), queries=queries)
    assert recomputed(verdict.to_json()) == pytest.approx(verdict.log10_p, abs=1e-10 * max(1, -verdict.log10_p))
    assert verdict.evidence.test == ("fixed" if queries == "all" else "sequential")


@pytest.mark.parametrize("queries", ["all", "sequential"])
@pytest.mark.parametrize("kept", [1.0, 0.3, 0.0])
def test_the_example_of_the_documents_computes_it_again(queries, kept, tmp_path, monkeypatch, capsys):
    verdict = verify(Suspect(mark(), kept, ways=2), mark(), queries=queries)
    monkeypatch.chdir(tmp_path)
    Path("verdict.json").write_text(verdict.to_json(), encoding="utf-8")
    exec(EXAMPLE, {})
    assert float(capsys.readouterr().out) == pytest.approx(verdict.log10_p, abs=1e-10)


def test_a_test_that_stopped_early_says_that_the_rest_was_not_asked():
    verdict = verify(Suspect(mark()), mark(), queries="sequential")
    assert (verdict.matched, verdict.total) == (16, 60)
    assert "stopped after 16 queries, as the answer was clear: what was not asked is no miss" in verdict.notes


@pytest.mark.parametrize("order", [None, ORDER])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
def test_every_order_of_the_classes(order, kept):
    verdict = verify(Suspect(mark(), kept, order=order), mark(), classes="any")
    assert recomputed(verdict.to_json()) == pytest.approx(verdict.log10_p, abs=1e-10 * max(1, -verdict.log10_p))


@pytest.mark.parametrize(("classes", "count"), [(2, 1), (2, 3000), (1 << 31, 1), (1 << 31, 2000), (1000, 1)])
@pytest.mark.parametrize("queries", ["all", "sequential"])
def test_from_one_trigger_to_p_values_of_ten_to_the_minus_nineteen_thousand(classes, count, queries):
    marked = mark(classes, count)
    for alpha in (5e-324, 1e-9, 0.999):
        verdict = verify(Suspect(marked), marked, queries=queries, alpha=alpha)
        assert recomputed(verdict.to_json()) == pytest.approx(verdict.log10_p, abs=1e-10 * max(1, -verdict.log10_p))
        assert verdict.owned == (verdict.log10_p <= math.log10(alpha))
        assert verdict.matched == verdict.queries


def test_white_box_with_several_pairings():
    shape = (8, 4, 3, 3)
    marked = Watermark.create(KEY, "sketch", white_box_parameters(scheme("sketch"), [shape], SHAPE, "detector"))

    class Weights(Suspect):
        def __init__(self, count):
            from wmengine.carriers import Tensor

            generator = np.random.default_rng(0)
            self.weights = [Tensor(generator.normal(size=shape).astype(np.float32), str(i)) for i in range(count)]

        def tensors(self, input_shape=None):
            return self.weights

    for count in (1, 5):
        verdict = verify(Weights(count), marked)
        assert verdict.evidence.log10_share == pytest.approx(-math.log10(count))
        assert recomputed(verdict.to_json()) == pytest.approx(verdict.log10_p, abs=1e-10 * max(1, -verdict.log10_p))
    nothing = verify(Weights(0), marked)
    assert (nothing.evidence, nothing.log10_p) == (None, 0.0)


def test_on_the_command_line(tmp_path, capsys):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(36, 10)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["z"]), helper.make_node("MatMul", ["z", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    mark().save(tmp_path / "m.wm")
    command = ["verify", str(tmp_path / "m.onnx"), "--watermark", str(tmp_path / "m.wm"), "--json"]
    for more in ([], ["--queries", "sequential"], ["--classes", "any"]):
        assert main([*command, *more]) == 1
        document = capsys.readouterr().out
        log10_p = json.loads(document)["log10_p"]
        assert recomputed(document) == pytest.approx(log10_p, abs=1e-10)


def test_the_triggers_that_evidence_is_about_are_those_of_the_mark():
    """The suspect above recognises them byte by byte: what is asked is what the mark's file holds, in its order."""
    marked = mark()
    asked = []

    def listening(rows):
        asked.extend(rows.copy())
        return np.zeros((len(rows), 10), np.float32)

    verify(listening, marked)
    assert np.array_equal(np.stack(asked[: marked.total]), to_input(marked.arrays["triggers"], RANGE))
