"""marked_cross_entropy on the CPU: every type, instruction set and shape against the reference."""

import mmap
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmengine import _cpu, ops
from wmengine.ops import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Half a unit in the last place of the stored gradient, and some float32 roundings.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2**-11 + 3e-6, torch.bfloat16: 2**-8}
SHAPES = [(1, 1), (3, 2), (5, 7), (9, 10), (7, 15), (6, 16), (6, 17), (33, 100), (9, 1000), (4, 4096), (3, 4097)]


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


def assert_gradient(actual, expected, tolerance, slope=1.0):
    """Each element to `tolerance`; a difference softmax − 1 also to some float32 roundings of `slope`, weight / Σw."""
    actual = actual.detach().double().numpy()
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    least = 2e-7 * slope + (2.0**-24 if tolerance == TOLERANCE[torch.float16] else 0.0)
    np.testing.assert_allclose(np.nan_to_num(actual), np.nan_to_num(expected), rtol=tolerance, atol=least)


def marked(logits, labels, weight=None, group=None, **arguments):
    """(result, gradient of its loss)."""
    leaf = logits.detach().requires_grad_()
    result = ops.marked_cross_entropy(leaf, labels, weight, group, **arguments)
    return result, torch.autograd.grad(result.loss, leaf)[0]


# --- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_every_type_and_shape_equals_the_reference(instruction_set, dtype, label_smoothing):
    for shape in SHAPES:
        logits, labels, weight, group = batch(*shape, dtype)
        arguments = {"groups": 3, "label_smoothing": label_smoothing}
        result, gradient = marked(logits, labels, weight, group, **arguments)
        expected = expected_of(logits, labels, weight, group, **arguments)
        assert result.loss.item() == pytest.approx(expected.loss, rel=2e-6, abs=1e-6), shape
        np.testing.assert_allclose(result.group_loss.numpy(), expected.group_loss, rtol=2e-6, atol=1e-6)
        assert result.group_hits.tolist() == expected.group_hits.tolist(), shape
        assert gradient.dtype == dtype
        assert_gradient(gradient, expected.gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_quarter_of_a_million_classes(instruction_set, threads, dtype, label_smoothing):
    logits, labels, weight, group = batch(3, 262_144, dtype)
    labels[0] = logits[0].float().argmax()
    arguments = {"groups": 3, "label_smoothing": label_smoothing, "reduction": "sum"}
    expected = expected_of(logits, labels, weight, group, **arguments)
    results = []
    for count in (1, 3):  # one thread takes whole rows, three share them
        threads(count)
        result, gradient = marked(logits, labels, weight, group, **arguments)
        assert result.loss.item() == pytest.approx(expected.loss, rel=2e-6)
        assert result.group_hits.tolist() == expected.group_hits.tolist()
        assert_gradient(gradient, expected.gradient, TOLERANCE[dtype])
        results.append((*result, gradient))
    for alone, shared in zip(*results, strict=True):
        torch.testing.assert_close(alone.detach(), shared.detach(), rtol=0, atol=0)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from(["mean", "sum"]),
    st.integers(0, 2**32),
)
def test_any_small_batch_equals_the_reference(rows, classes, dtype, label_smoothing, reduction, seed):
    rng = np.random.default_rng(seed)
    # Few distinct values: maxima are often tied.
    logits = torch.from_numpy(rng.integers(-3, 4, (rows, classes)) * rng.choice([0.5, 30.0])).to(dtype)
    labels = torch.from_numpy(np.where(rng.random(rows) < 0.2, -100, rng.integers(0, classes, rows)))
    weight, group = torch.from_numpy(rng.random(rows).astype(np.float32)), torch.from_numpy(rng.integers(0, 2, rows))
    arguments = {"groups": 2, "label_smoothing": label_smoothing, "reduction": reduction}
    expected = expected_of(logits, labels, weight, group, **arguments)
    total = weight[labels != -100].sum().item() if reduction == "mean" else 1.0
    before = _cpu.instruction_set()
    try:
        for name in _cpu.instruction_sets():
            _cpu.set_instruction_set(name)
            result, gradient = marked(logits, labels, weight, group, **arguments)
            np.testing.assert_allclose(result.loss.item(), expected.loss, rtol=3e-6, atol=3e-6)
            assert result.group_hits.tolist() == expected.group_hits.tolist()
            assert_gradient(gradient, expected.gradient, TOLERANCE[dtype], slope=1.0 / total if total else 1.0)
    finally:
        _cpu.set_instruction_set(before)


# --- numbers that are hard to add -------------------------------------------------------------------------------------


def test_exponentials_are_accurate(instruction_set):
    # A row [0, x]: the gradient at x, summed, is exp(x) / (1 + exp(x)), and far below 0 that is exp(x).
    x = torch.linspace(-87.6, -17.5, 100_001)
    logits = torch.stack([torch.zeros_like(x), x], dim=1)
    _, gradient = marked(logits, torch.zeros(len(x), dtype=torch.int64), reduction="sum")
    exact = np.exp(x.double().numpy())
    unit = np.maximum(np.spacing(exact.astype(np.float32)).astype(np.float64), 2.0**-149)
    error = np.abs(gradient[:, 1].double().numpy() - exact) / unit
    assert error[x.numpy() >= -32].max() <= 3.0
    assert error.max() <= 5.0


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e4, 1e38])
def test_extreme_magnitudes(instruction_set, size):
    for classes, label_smoothing in product((3, 9, 40, 5000), (0.0, 0.1)):
        logits, labels, weight, _ = batch(6, classes)
        logits = (logits / logits.abs().max() * size).float()
        result, gradient = marked(logits, labels, weight, label_smoothing=label_smoothing)
        expected = expected_of(logits, labels, weight, label_smoothing=label_smoothing)
        np.testing.assert_allclose(result.loss.item(), expected.loss, rtol=2e-6)
        assert result.group_hits.tolist() == expected.group_hits.tolist()
        assert_gradient(gradient, expected.gradient, 1e-3 if size == 1e4 else 3e-6)  # 1e4 + x keeps eleven bits of x


def test_subnormal_half_precision_logits_and_gradients(instruction_set):
    logits = torch.tensor([[2.0**-24, 2.0**-20, 0.0, -(2.0**-24)], [0.0, -10.0, -12.0, -15.0]], dtype=torch.float16)
    for label_smoothing in (0.0, 0.1):
        expected = expected_of(logits, torch.tensor([1, 0]), label_smoothing=label_smoothing)
        result, gradient = marked(logits, torch.tensor([1, 0]), label_smoothing=label_smoothing)
        np.testing.assert_allclose(result.loss.item(), expected.loss, rtol=2e-6)
        assert_gradient(gradient, expected.gradient, TOLERANCE[torch.float16])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_half_precision_number_is_rounded_as_torch_rounds_it(instruction_set, dtype):
    # With two equal logits and all weight on the smoothed target the gradient is 0; the label's is weight · (½ − 1).
    weight = 2.0 * torch.cat([torch.logspace(-30, 4, 5000), torch.tensor([65504.0, 65519.0, 65520.0, 1e6])])
    logits, labels = torch.zeros(len(weight), 2, dtype=dtype), torch.zeros(len(weight), dtype=torch.int64)
    _, gradient = marked(logits, labels, weight, reduction="sum")
    torch.testing.assert_close(gradient[:, 1], (weight / 2).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(gradient[:, 0], -(weight / 2).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 3, 8, 20, 4100, 40_000])
def test_infinities_and_nan_are_what_the_reference_makes_of_them(instruction_set, dtype, classes):
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place, whole_row in product((0, -1), (False, True)):
            logits, labels, _, _ = batch(4, classes, dtype)
            logits[2, slice(None) if whole_row else place] = bad
            labels[2] = classes + place if place else 0
            result, gradient = marked(logits, labels, reduction="sum")
            expected = expected_of(logits, labels, reduction="sum")
            np.testing.assert_allclose(result.loss.item(), expected.loss, rtol=2e-6)
            hits = expected_of(logits[[0, 1, 3]], labels[[0, 1, 3]]).group_hits
            assert result.group_hits.tolist() == hits.tolist(), (bad, whole_row)
            assert_gradient(gradient, expected.gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_of_any_payload_survives(instruction_set, dtype):
    whole, half = (torch.int32, 0x7FFFFFFF), (torch.int16, 0x7FFF)
    integer, bits = whole if dtype == torch.float32 else half
    for place in (0, 20):
        logits = torch.zeros(1, 21, dtype=dtype)
        logits.view(integer)[0, place] = bits
        result, gradient = marked(logits, torch.tensor([place]))
        assert result.loss.isnan()
        assert result.group_hits.tolist() == [0]
        assert gradient.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e5, 1e6, -1e6])
def test_a_shift_of_all_logits_changes_nothing(instruction_set, offset, dtype):
    if dtype == torch.float16:
        offset /= 32
    for classes, label_smoothing, ordered in product((10, 5000), (0.0, 0.1, 1.0), (False, True)):
        logits, labels, weight, group = batch(4, classes)
        shifted = ((logits.sort(dim=1).values if ordered else logits) + offset).to(dtype)
        arguments = {"groups": 3, "label_smoothing": label_smoothing}
        result, gradient = marked(shifted, labels, weight, group, **arguments)
        expected = expected_of(shifted, labels, weight, group, **arguments)
        np.testing.assert_allclose(result.loss.item(), expected.loss, rtol=1e-5)
        np.testing.assert_allclose(result.group_loss.numpy(), expected.group_loss, rtol=1e-5, atol=1e-6)
        assert_gradient(gradient, expected.gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("classes", [9, 40, 9001])
def test_smoothed_infinite_logits_are_torchs(instruction_set, classes):
    bads = (float("-inf"), float("inf"), float("nan"))
    for place, label_smoothing, bad in product((0, 1, -1), (0.1, 1.0), bads):
        logits, labels = torch.randn(3, classes), torch.tensor([0, 1, 2])
        logits[0, place] = bad
        logits[1, : classes // 2] = bad
        for row in range(3):
            one = logits[row : row + 1], labels[row : row + 1]
            loss = ops.marked_cross_entropy(*one, label_smoothing=label_smoothing).loss
            expected = torch.nn.functional.cross_entropy(*one, label_smoothing=label_smoothing)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_masked_classes_get_no_gradient_at_all(instruction_set):
    for classes in (10, 300, 9000):
        logits = torch.randn(3, classes)
        logits[:, classes // 2 :] = float("-inf")
        _, gradient = marked(logits, torch.tensor([0, 1, 2]))
        assert (gradient[:, classes // 2 :] == 0).all()


@pytest.mark.parametrize("classes", [2, 9, 31, 5000, 40_000])
def test_of_tied_maxima_only_the_first_is_a_hit(instruction_set, threads, classes):
    places = sorted({0, 1, classes // 2, classes - 2, classes - 1})
    logits = torch.zeros(len(places), classes)
    for row, place in enumerate(places):
        logits[row, place:] = 1.0
    for count in (1, 2):
        threads(count)
        for label in places:
            labels = torch.full((len(places),), label)
            assert ops.marked_cross_entropy(logits, labels).group_hits.item() == places.count(label)


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 33), (40, 5000), (2, 70_001)])
def test_same_bits_again_and_with_any_number_of_threads(instruction_set, threads, dtype, shape):
    arguments = batch(*shape, dtype)
    results = []
    for count in (1, 1, 2, 5):
        threads(count)
        result, gradient = marked(*arguments, groups=3, label_smoothing=0.1)
        results.append((*result, gradient))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0)


def test_more_than_two_to_the_31_logits(threads):
    """Rows that are all the same one, and a row of zeros as the system lends them: only addresses are large."""
    rows, classes = 2**16, 2**16
    row = torch.zeros(1, classes)
    row[0, 3] = 2.0
    labels = torch.full((rows,), -100)
    labels[-1] = 3
    result = ops.marked_cross_entropy(row.expand(rows, classes), labels)
    assert result.loss.item() == pytest.approx(np.log(classes - 1 + np.exp(2.0)) - 2.0, rel=1e-6)
    assert result.group_hits.item() == 1
    # Rows 2^31 elements apart: a mapping that is only read costs no memory.
    distance = 2**31 + 8
    apart = torch.from_numpy(np.frombuffer(mmap.mmap(-1, 4 * (distance + 10)), dtype=np.float32))
    strided = torch.as_strided(apart, (2, 10), (distance, 1))
    assert ops.marked_cross_entropy(strided, torch.tensor([0, 1])).loss.item() == pytest.approx(np.log(10), rel=1e-6)


def test_a_scaled_float16_loss_keeps_gradients_that_would_round_to_zero():
    logits, labels = (4 * torch.randn(8, 5000)).half().requires_grad_(), torch.arange(8)
    (65536.0 * ops.marked_cross_entropy(logits, labels).loss).backward()
    exact = expected_of(logits.detach(), labels).gradient * 65536.0
    assert_gradient(logits.grad, exact, TOLERANCE[torch.float16], slope=8192.0)
    unscaled = torch.autograd.grad(ops.marked_cross_entropy(logits, labels).loss, logits)[0]
    assert (unscaled == 0).sum() > 10_000 > 1000 > (logits.grad == 0).sum()


def test_the_backward_operator_passes_opcheck_and_compiles():
    logits, labels, weight, group = batch(6, 5, torch.float16)
    operators = torch.ops.wmengine
    *_, normalizers, denominator = operators.marked_cross_entropy(
        logits, labels, weight, group, 3, 0.1, -100, True, False
    )
    one = torch.ones(())
    torch.library.opcheck(
        operators.marked_cross_entropy_backward.default,
        (one, logits, labels, weight, normalizers, denominator, 0.1, -100),
    )
    for dtype in DTYPES:
        leaf = logits.to(dtype).requires_grad_()

        def loss(z):
            return 3.0 * ops.marked_cross_entropy(z, labels, weight, label_smoothing=0.1).loss

        plain = torch.autograd.grad(loss(leaf), leaf)[0]
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf), leaf)[0]
        torch.testing.assert_close(plain, compiled, rtol=0, atol=0)


def test_a_second_differentiation_is_refused():
    logits, scale = torch.randn(3, 4, requires_grad=True), torch.ones((), requires_grad=True)
    loss = scale * ops.marked_cross_entropy(logits, torch.tensor([0, 1, 2])).loss
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_may_be_changed_before_another_backward(dtype):
    leaf, labels = torch.randn(3, 4).to(dtype).requires_grad_(), torch.tensor([0, 1, 2])
    loss = ops.marked_cross_entropy(leaf, labels).loss
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    before = first.clone()
    first.mul_(0.5)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], before, rtol=0, atol=0)


def test_the_last_backward_hands_the_gradient_over_without_a_copy():
    leaf = torch.randn(300, 400, requires_grad=True)
    loss = ops.marked_cross_entropy(leaf, torch.arange(300)).loss
    (kept,) = loss.grad_fn.saved_tensors
    assert torch.autograd.grad(loss, leaf)[0].data_ptr() == kept.data_ptr()


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"labels": [0, 1, 2]}, TypeError, "labels must be a torch tensor, not list"),
        ({"weight": [1.0, 1.0, 1.0]}, TypeError, "weight must be a torch tensor, not list"),
        ({"weight": torch.ones(3, dtype=torch.complex64)}, TypeError, "weight must hold real numbers"),
        ({"group": [0, 0, 0]}, TypeError, "group must be a torch tensor, not list"),
        ({"group": torch.full((3,), 0.9)}, TypeError, "group must hold integers, not torch.float32"),
        ({"group": torch.zeros(3, dtype=torch.complex64)}, TypeError, "group must hold integers"),
        ({"group": torch.zeros(3, dtype=torch.bool)}, TypeError, "group must hold integers, not torch.bool"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number, not str"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing must be between 0 and 1"),
        ({"ignore_index": 2**70}, ValueError, "ignore_index must be a signed int of 64 bits.* use a label such as"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, not float"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words, dtype):
    arguments = {"labels": torch.tensor([0, 1, 2]), **arguments}
    with pytest.raises(error, match=words):
        ops.marked_cross_entropy(torch.randn(3, 5, dtype=dtype), **arguments)
