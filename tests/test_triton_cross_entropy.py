"""Triton's marked_cross_entropy against the reference: on a GPU where there is one, else in Triton's interpreter."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it comes with torch on Linux)")

from tests.closeness import assert_close
from wmengine.kernels import cross_entropy
from wmengine.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The interpreter computes on NumPy arrays, masked lanes too.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), pytest.mark.slow]


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def assert_entropy_is_the_references(
    logits, labels, weight=None, group=None, groups=3, smoothing=0.0, reduction="mean", tolerance=1e-5
):
    given = logits, labels, weight, group, groups, smoothing, -100, reduction == "mean"
    loss, group_loss, group_hits, normalizers, denominator = cross_entropy.forward(*given, False)
    outer = torch.tensor(2.0, device=DEVICE)
    gradient = cross_entropy.backward(outer, logits, labels, weight, normalizers, denominator, smoothing, -100)
    if logits.dtype != torch.float16:  # the gradient of the forward pass, and all else is the same
        again, *others, kept, divisor = cross_entropy.forward(*given, True)
        results = loss, group_loss, group_hits, denominator
        torch.testing.assert_close((again, *others, divisor), results, rtol=0, atol=0, equal_nan=True)
        plain = kept.clone()
        cross_entropy.scale(kept, torch.ones((), device=DEVICE))
        assert torch.equal(kept.nan_to_num(7.0), plain.nan_to_num(7.0))
        cross_entropy.scale(kept, outer)
        rounding = 0.02 if logits.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(kept, gradient, rtol=rounding, atol=1e-9, equal_nan=True)
    with np.errstate(all="ignore"):
        expected = reference.marked_cross_entropy(
            logits.cpu().float().numpy(),
            labels.cpu().numpy(),
            None if weight is None else weight.cpu().numpy(),
            None if group is None else group.cpu().numpy(),
            groups=groups,
            label_smoothing=smoothing,
            reduction=reduction,
        )
    assert_close(loss, expected.loss, 1e-5, at_least=0.1)  # a difference of numbers of order 1
    assert_close(group_loss, expected.group_loss, 1e-5, at_least=0.1)
    assert group_hits.tolist() == expected.group_hits.tolist()
    assert gradient.dtype == logits.dtype
    assert_close(gradient, 2.0 * expected.gradient, tolerance, at_least=0.1)


def batch(rows, classes, dtype=torch.float32):
    """(logits, labels, weight, group) with an ignored row and a row whose label is its argmax."""
    logits = 3 * random(rows, classes, seed=rows + classes, dtype=dtype)
    rng = np.random.default_rng(rows * classes)
    labels = torch.from_numpy(rng.integers(0, classes, size=rows)).to(DEVICE)
    if rows > 1:
        labels[0] = logits[0].argmax()
        labels[1] = -100
    weight = torch.from_numpy(rng.random(rows, dtype=np.float32)).to(DEVICE)
    return logits, labels, weight, torch.from_numpy(rng.integers(0, 3, size=rows)).to(DEVICE)


@pytest.mark.parametrize("classes", [1, 2, 10, 33, 1000, 5000, 9001, 30000, 70000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_any_number_of_classes_equals_the_reference(classes, smoothing):
    logits, labels, weight, group = batch(5, classes)
    assert_entropy_is_the_references(logits, labels, weight, group, smoothing=smoothing)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_weights_groups_and_reductions(reduction, weighted, grouped):
    logits, labels, weight, group = batch(70, 10)
    assert_entropy_is_the_references(
        logits, labels, weight if weighted else None, group if grouped else None, reduction=reduction
    )


def test_more_rows_than_the_finishing_kernel_adds_at_a_time():
    assert_entropy_is_the_references(*batch(4100, 3))


def test_more_rows_than_one_program_adds():
    assert_entropy_is_the_references(*batch(16384 + 40, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_read_as_they_are(dtype):
    logits, labels, weight, group = batch(6, 40, dtype)
    assert_entropy_is_the_references(logits, labels, weight, group, tolerance=0.01)


def test_logits_may_be_columns_or_rows_of_something_wider():
    logits, labels, weight, group = batch(6, 40)
    assert_entropy_is_the_references(torch.cat([logits, logits], dim=1)[:, :40], labels, weight, group)
    assert_entropy_is_the_references(logits.t().contiguous().t(), labels, weight, group)


def test_no_rows_and_only_ignored_rows():
    for rows in (0, 4):
        labels = torch.full((rows,), -100, device=DEVICE)
        assert_entropy_is_the_references(random(rows, 5), labels)
        assert_entropy_is_the_references(random(rows, 5), labels, reduction="sum")


def test_a_row_with_nan_makes_the_loss_nan_and_is_never_a_hit():
    logits, labels, _, _ = batch(4, 6)
    labels[:] = logits.argmax(dim=1)
    logits[2, 5] = float("nan")
    loss, _, hits, normalizers, _ = cross_entropy.forward(logits, labels, None, None, 1, 0.0, -100, True, False)
    assert torch.isnan(loss)
    assert hits.tolist() == [3]
    assert torch.isnan(normalizers).any(dim=1).tolist() == [False, False, True, False]


def test_infinite_logits_are_treated_as_the_reference_treats_them():
    logits, labels, weight, group = batch(5, 6)
    labels[:] = torch.tensor([1, 1, 0, 2, 3])
    logits[0, 4] = float("-inf")
    logits[2] = float("-inf")
    logits[3, 2] = float("inf")
    assert_entropy_is_the_references(logits, labels, weight, group)


@pytest.mark.parametrize("classes", [5, 1000, 8192, 8193, 30000, 70000])
def test_ties_go_to_the_first_class(classes):
    """Wherever the equal logits stand: beside each other, in another step of a long row, first and last."""
    places = sorted({0, 1, 4, classes // 2, classes - 8, classes - 2, classes - 1} & set(range(classes)))
    pairs = [(first, second) for first in places for second in places if first < second]
    logits = random(2 * len(pairs), classes).clamp(max=4.0)
    labels = torch.tensor([place for pair in pairs for place in pair], device=DEVICE)
    for row, pair in enumerate(pairs):
        for place in pair:
            logits[2 * row : 2 * row + 2, place] = 5.0
    group = torch.arange(len(labels), device=DEVICE) % 2
    assert cross_entropy.forward(logits, labels, None, group, 2, 0.0, -100, True, False)[2].tolist() == [len(pairs), 0]
    zeros = torch.zeros(3, classes, device=DEVICE)
    labels = torch.tensor([0, 1, classes - 1], device=DEVICE)
    assert cross_entropy.forward(zeros, labels, None, None, 1, 0.0, -100, True, False)[2].tolist() == [1]


@pytest.mark.parametrize("place", [0, 9000, 20000, 29999])
def test_a_long_row_with_nan_or_infinity_in_any_step_is_never_a_hit(place):
    for bad in (float("nan"), float("inf")):
        logits = random(3, 30000)
        labels = logits.argmax(dim=1)
        logits[1, place] = bad
        labels[2] = -100
        loss, _, hits, normalizers, _ = cross_entropy.forward(logits, labels, None, None, 1, 0.0, -100, True, False)
        assert torch.isnan(loss)
        assert hits.tolist() == [1]
        assert torch.isnan(normalizers).any(dim=1).tolist() == [False, True, True]


def test_a_long_row_of_minus_infinity_but_for_one_step_is_the_references():
    for place in (0, 9000, 29999):
        logits = torch.full((2, 30000), float("-inf"), device=DEVICE)
        logits[0, place] = 1.0
        labels = torch.tensor([place, -100], device=DEVICE)
        assert_entropy_is_the_references(logits, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1000, 1004, 1002, 1001, 20000, 20001])
def test_rows_that_begin_at_any_address(width, dtype):
    logits, labels, weight, group = batch(6, 1024 * 20, dtype)
    logits = logits.flatten()[: 5 * width + 1][1:].reshape(5, width)
    labels = labels[:5].clamp(max=width - 1)
    assert_entropy_is_the_references(logits, labels, weight[:5], group[:5], tolerance=0.01)


@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_a_label_that_is_no_class_makes_loss_and_gradient_nan(label):
    logits, labels, _, _ = batch(3, 5)
    labels[:] = torch.tensor([0, label, 1])
    loss, _, hits, normalizers, denominator = cross_entropy.forward(
        logits, labels, None, None, 1, 0.0, -100, False, False
    )
    gradient = cross_entropy.backward(
        torch.ones((), device=DEVICE), logits, labels, None, normalizers, denominator, 0.0, -100
    )
    kept = cross_entropy.forward(logits, labels, None, None, 1, 0.0, -100, False, True)[3]
    assert torch.isnan(loss)
    assert hits.item() <= 2
    for each in (gradient, kept):
        assert torch.isnan(each).all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("group", [-1, 3, 2**40])
def test_a_group_that_is_none_makes_loss_and_gradient_nan(group):
    logits, labels, _, groups = batch(4, 5)
    groups[:] = torch.tensor([0, group, group, 1])  # the second row is ignored
    labels[:] = torch.tensor([0, -100, 2, 1])
    loss, _, hits, normalizers, denominator = cross_entropy.forward(
        logits, labels, None, groups, 3, 0.0, -100, False, False
    )
    gradient = cross_entropy.backward(
        torch.ones((), device=DEVICE), logits, labels, None, normalizers, denominator, 0.0, -100
    )
    kept = cross_entropy.forward(logits, labels, None, groups, 3, 0.0, -100, False, True)[3]
    assert torch.isnan(loss)
    assert hits.sum().item() <= 2
    for each in (gradient, kept):
        assert torch.isnan(each).all(dim=1).tolist() == [False, False, True, False]


def test_more_groups_than_the_second_axis_of_a_grid_takes(monkeypatch):
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(cross_entropy, "finish_kernel", Recorded())
    logits, labels, _, group = batch(2, 3)
    cross_entropy.forward(logits, labels, None, group, 70_000, 0.0, -100, True, False)
    assert grids == [(70_001,)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e5, 1e6, -1e6])
@pytest.mark.parametrize("classes", [40, 9001])
def test_a_shift_of_all_logits_changes_nothing(classes, offset, smoothing):
    logits, labels, weight, group = batch(4, classes)
    for ordered in (logits, logits.sort(dim=1).values):  # the top rises with every block
        assert_entropy_is_the_references(ordered + offset, labels, weight, group, smoothing=smoothing)


@pytest.mark.parametrize("size", [1e30, 3e37, 1.6e38])
@pytest.mark.parametrize("classes", [100, 9001])
def test_smoothed_logits_do_not_overflow(classes, size):
    logits = torch.full((2, classes), size, device=DEVICE)
    assert_entropy_is_the_references(logits, torch.tensor([0, 5], device=DEVICE), smoothing=0.1)
    logits[:, ::2] = -size
    assert_entropy_is_the_references(logits, torch.tensor([0, 5], device=DEVICE), smoothing=0.1)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_smoothed_infinite_logits_are_torchs(place, smoothing):
    for bad in (float("-inf"), float("inf"), float("nan")):
        logits, labels = random(3, 9001), torch.tensor([0, 1, 2], device=DEVICE)
        logits[0, place] = bad
        logits[1, :5000] = bad
        for row in range(3):
            one = logits[row : row + 1], labels[row : row + 1]
            loss = cross_entropy.forward(*one, None, None, 1, smoothing, -100, False, False)[0]
            expected = torch.nn.functional.cross_entropy(*one, label_smoothing=smoothing)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
