"""marked_cross_entropy on the CPU: every type, instruction set and shape against the reference, and in place."""

import numpy as np
import pytest
import torch

from wmengine import _cpu, ops
from wmengine.ops import reference
from wmengine.ops.torch_cross_entropy import cross_entropy_in_place

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Half a unit in the last place of the stored gradient, and some float32 roundings.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2**-11 + 3e-6, torch.bfloat16: 2**-8}
SHAPES = [(1, 1), (3, 2), (5, 7), (9, 10), (7, 15), (6, 16), (6, 17), (33, 100), (9, 1000), (4, 4096), (3, 4097)]


@pytest.fixture(params=_cpu.instruction_sets())
def instruction_set(request):
    before = _cpu.instruction_set()
    _cpu.set_instruction_set(request.param)
    yield request.param
    _cpu.set_instruction_set(before)


@pytest.fixture
def threads():
    before = ops.get_num_threads()
    yield ops.set_num_threads
    ops.set_num_threads(before)


def batch(rows, classes, dtype=torch.float32, groups=3):
    """(logits, labels, weight, group), with hits, an ignored row and a label drawn from all classes."""
    generator = torch.Generator().manual_seed(rows * classes)
    logits = (4 * torch.randn(rows, classes, generator=generator)).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[::2] = logits.float().argmax(dim=1)[::2]
    if rows > 2:
        labels[1] = -100
    weight = torch.rand(rows, generator=generator) + 0.1
    return logits, labels, weight, torch.randint(0, groups, (rows,), generator=generator)


def expected_of(logits, labels, weight=None, group=None, **arguments):
    arrays = [None if array is None else array.numpy() for array in (labels, weight, group)]
    with np.errstate(all="ignore"):
        return reference.marked_cross_entropy(logits.double().numpy(), *arrays, **arguments)


def assert_gradient(actual, expected, tolerance):
    actual = actual.double().numpy()
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    scale = np.nanmax(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(np.nan_to_num(actual), np.nan_to_num(expected), rtol=tolerance, atol=tolerance * scale)


# --- in place ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_in_place_gives_the_sum_and_its_gradient(instruction_set, dtype, label_smoothing):
    for shape in SHAPES:
        logits, labels, weight, group = batch(*shape, dtype)
        expected = expected_of(
            logits, labels, weight, group, groups=3, label_smoothing=label_smoothing, reduction="sum"
        )
        loss, group_loss, group_hits = cross_entropy_in_place(logits, labels, weight, group, 3, label_smoothing, -100)
        assert loss.item() == pytest.approx(expected.loss, rel=2e-6, abs=1e-6), shape
        np.testing.assert_allclose(group_loss.numpy(), expected.group_loss, rtol=2e-6, atol=1e-6)
        assert group_hits.tolist() == expected.group_hits.tolist(), shape
        assert_gradient(logits, expected.gradient, TOLERANCE[dtype])


def test_in_place_leaves_alone_what_lies_between_the_rows():
    wide, labels = torch.randn(6, 40), torch.arange(6)
    before, copied = wide.clone(), wide[:, 5:25].clone()
    cross_entropy_in_place(wide[:, 5:25], labels, None, None, 1, 0.0, -100)
    cross_entropy_in_place(copied, labels, None, None, 1, 0.0, -100)
    torch.testing.assert_close(wide[:, 5:25], copied, rtol=0, atol=0)
    torch.testing.assert_close(wide[:, :5], before[:, :5], rtol=0, atol=0)
    torch.testing.assert_close(wide[:, 25:], before[:, 25:], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_passes_opcheck_and_compiles(dtype):
    logits, labels, weight, group = batch(6, 5, dtype)
    for options in ((None, None), (weight, group)):
        torch.library.opcheck(
            torch.ops.wmengine.marked_cross_entropy_.default, (logits.clone(), labels, *options, 3, 0.1, -100)
        )

    def step(z):
        z = 2.0 * z
        loss, _, hits = cross_entropy_in_place(z, labels, weight, group, 3, 0.1, -100)
        return loss, hits, z

    plain, compiled = step(logits), torch.compile(step, fullgraph=True, backend="aot_eager")(logits)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"logits": torch.randn(3, 5, requires_grad=True)}, ValueError, "must not require a gradient"),
        ({"logits": torch.randn(5, 3).t()}, ValueError, "side by side"),
        ({"logits": torch.randn(3, 5, dtype=torch.float64)}, TypeError, "logits must be float32, float16 or bfloat16"),
        ({"labels": torch.tensor([0, 5, 1])}, ValueError, "row 1 has label 5"),
        ({"labels": torch.tensor([0, 1])}, ValueError, "labels must have shape"),
        ({"group": torch.tensor([0, 0, 1])}, ValueError, "row 2 has label 1 and group 1"),
    ],
)
def test_in_place_names_bad_arguments_and_overwrites_nothing(arguments, error, words):
    merged = {"logits": torch.randn(3, 5), "labels": torch.tensor([0, 1, 1]), "group": None, **arguments}
    before = merged["logits"].detach().clone()
    with pytest.raises(error, match=words):
        cross_entropy_in_place(merged["logits"], merged["labels"], None, merged["group"], 1, 0.0, -100)
    torch.testing.assert_close(merged["logits"].detach(), before, rtol=0, atol=0)
