"""False claims without the key: a projection that is stored can be set, ours cannot; what is left costs what p says."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
from judged import KEY, white_box
from onnx import TensorProto, helper, numpy_helper, save

from wmengine import Key, ops, verify
from wmengine.errors import WatermarkError
from wmengine.judging.looks import looks_of_bits
from wmengine.marks.watermark import Watermark
from wmengine.parts.statistics.tails import binomial_log10_tail
from wmengine.suspects import open_suspect

SHAPE, BITS = (16, 144), 64


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Somebody else's network, as a file, and its one weight."""
    weight = np.random.default_rng(5).normal(size=SHAPE).astype(np.float32)
    path = tmp_path_factory.mktemp("stranger") / "stranger.onnx"
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("Gemm", ["flat", "w"], ["y"], transB=1)]
    given = [value("x", TensorProto.FLOAT, ["N", 1, 12, 12])]
    answers = [value("y", TensorProto.FLOAT, ["N", 16])]
    graph = helper.make_graph(nodes, "stranger", given, answers, [numpy_helper.from_array(weight, "w")])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path, weight


def mark_of(preset="uchida", **options):
    return white_box([SHAPE], preset=preset, shape=(1, 12, 12), bits=BITS, **options)


def test_a_stored_projection_proves_any_message_in_any_network(stranger):
    """The published rule: X and b are what the claimant shows, and b is read as Xw > 0. Rows of X are turned until b is
    there; they are as Gaussian as before."""
    carrier = stranger[1].mean(axis=0)
    generator = np.random.default_rng(0)
    wanted = np.unpackbits(np.frombuffer(b"MINE, OF COURSE!"[: BITS // 8], np.uint8)).astype(bool)
    shown = generator.normal(size=(BITS, len(carrier)))
    shown[(shown @ carrier > 0) != wanted] *= -1.0
    assert ((shown @ carrier > 0) == wanted).all()
    assert abs(shown.mean()) < 0.05
    assert shown.std() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("preset", ["uchida", "deepmarks", "stdm", "neuralmark", "riga", "greedy_residuals"])
def test_ours_has_no_projection_to_turn(stranger, preset):
    """What is kept of it are keys of 8 bytes, or nothing; a mark whose arrays were set is not what its key derives."""
    widths = {"neuralmark": 64, "riga": 256, "greedy_residuals": 8}
    mark = mark_of(preset, **({"width": widths[preset]} if preset in widths else {}))
    for value in mark.parameters.values():
        numbers = np.array(value, dtype=object).reshape(-1)
        assert len(numbers) <= 3, "no parameter is as large as a row of X"
    geometry = {name: array for name, array in mark.arrays.items() if name != "bits"}
    assert sum(array.nbytes for array in geometry.values()) <= 16 + BITS
    assert verify(stranger[0], mark, key=KEY).decision == "not_proven"
    shown = mark.preset.source.observe(mark, open_suspect(stranger[0]), BITS).found[0].y > 0
    forged = replace(mark, arrays=mark.arrays | {"bits": shown.astype(np.uint8)})
    with pytest.raises(WatermarkError, match=r"the bits of the watermark .* are not those that its key derives"):
        verify(stranger[0], forged, key=KEY)
    for name, array in geometry.items():
        turned = replace(mark, arrays=mark.arrays | {name: array[::-1] + np.array(1, array.dtype)})
        with pytest.raises(WatermarkError, match=f"the {name} of the watermark"):
            turned.check_derivation(KEY)


@pytest.mark.slow
def test_searching_keys_costs_what_p_says(stranger):
    """Of 2^22 keys' symbols about N·p reach p, and the best p is about 1 / N: nothing is cheaper than trying.

    What a greedy residual shows is the same for every key, so a search draws symbols alone, as SHAKE-256 does here.
    """
    keys = 1 << 22
    mark = mark_of("greedy_residuals", width=8)
    y = mark.preset.source.observe(mark, open_suspect(stranger[0]), BITS).found[0].y
    tried = np.frombuffer(hashlib.shake_256(b"a search for keys").digest(keys * BITS // 8), np.uint8)
    packed = ops.PackedBits(tried.reshape(keys, BITS // 8), BITS)
    matched = ops.bit_matches((y > 0)[None], packed)[0]
    log2_p = [binomial_log10_tail(count, BITS, 0.5) / math.log10(2) for count in range(BITS + 1)]
    at_least = np.bincount(matched, minlength=BITS + 1)[::-1].cumsum()[::-1]
    levels = [count for count in range(BITS // 2, BITS + 1) if log2_p[count] > -20]
    assert log2_p[levels[-1]] < -18
    for count in levels:
        expected = keys * 2.0 ** log2_p[count]
        assert abs(at_least[count] - expected) < 4.5 * math.sqrt(expected), f"{count} bits, p = 2^{log2_p[count]}"
        first = int(np.argmax(matched >= count)) + 1  # keys until one is as good
        assert 0.005 < first * 2.0 ** log2_p[count] < 8.0
    assert -22 - 7 < log2_p[matched.max()] < -22 + 3


@pytest.mark.slow
def test_so_does_the_search_with_keys_that_are_derived(stranger):
    """Every key in full, with the statistic that marks have; their geometry is their own (uchida) or none's."""
    for preset, options in (("uchida", {}), ("greedy_residuals", {"width": 8})):
        mark, count = mark_of(preset, **options), 1500
        suspect, p = open_suspect(stranger[0]), []
        tests = mark.preset.statistic
        for number in range(count):
            key = Key("ACME Vision", hashlib.sha256(f"{preset} {number}".encode()).digest())
            other = Watermark.create(key, mark.preset, mark.parameters)
            (observation,) = other.preset.source.observe(other, suspect, BITS).found
            test = tests.begin(0.5, BITS, sequential=False)
            test.add(looks_of_bits(observation.y, [other.symbols])[0])
            p.append(test.log10_p)
        for level in (0.1, 0.03, 0.01, 0.003):
            assert (np.array(p) <= math.log10(level)).mean() <= level + 4 * math.sqrt(level / count)
