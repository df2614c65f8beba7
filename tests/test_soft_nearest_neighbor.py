"""soft_nearest_neighbor against its float64 reference: torch on the CPU, and the Triton kernels.

The kernels of the GPU run on the GPU where there is one, else in Triton's interpreter on CPU tensors.
"""

import mmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmengine import ops
from wmengine.ops import reference

# The interpreter computes on NumPy arrays, masked lanes too.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SHAPES = [(1, 3), (2, 1), (3, 0), (5, 3), (96, 32), (97, 10), (200, 64), (129, 300)]


@pytest.fixture(params=["cpu", pytest.param("triton", marks=pytest.mark.slow)])
def differentiate(request):
    """(features, labels, temperature) → loss, gradient and temperature's gradient, by each implementation."""
    return on_cpu if request.param == "cpu" else by_triton


def on_cpu(features, labels, temperature, outer=1.0):
    x = features.detach().clone().requires_grad_()
    t = torch.tensor(float(temperature), requires_grad=True)
    loss = ops.soft_nearest_neighbor(x, labels, t)
    (outer * loss).backward()
    return loss.detach(), x.grad, t.grad


def by_triton(features, labels, temperature, outer=1.0):
    pytest.importorskip("triton", reason="Triton is not installed (it comes with torch on Linux)")
    from wmengine.kernels import soft_nearest_neighbor as kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = features.detach().float().to(device), labels.to(device)
    t = torch.tensor(float(temperature), device=device)
    loss, *gradients = kernels.loss_and_gradients(x, y, t, True)
    return loss.cpu(), *(outer * gradient.cpu() for gradient in gradients)


def batch(rows, size, classes=4, seed=0, shift=3.0):
    generator = torch.Generator().manual_seed(rows * 1000 + size + seed)
    return torch.randn(rows, size, generator=generator) + shift, torch.randint(0, classes, (rows,), generator=generator)


def assert_is_the_references(result, features, labels, temperature, tolerance=1e-5, outer=1.0):
    """The loss relative to itself, gradients relative to the largest; the temperature's as a derivative by log T."""
    expected = reference.soft_nearest_neighbor(features.detach().numpy(), labels.numpy(), float(temperature))
    loss, gradient, by_temperature = result
    assert loss.item() == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
    wanted = outer * expected.gradient
    assert gradient.shape == features.shape
    error = np.abs(gradient.double().numpy() - wanted).max(initial=0)
    assert error <= tolerance * np.abs(wanted).max(initial=1e-12)
    assert by_temperature.item() * temperature == pytest.approx(
        outer * expected.temperature_gradient * temperature, rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize(("rows", "size"), SHAPES)
@pytest.mark.parametrize("temperature", [100.0, 10.0, 0.5])
def test_loss_and_gradients_equal_the_reference(rows, size, temperature):
    features, labels = batch(rows, size)
    result = on_cpu(features, labels, temperature, outer=3.0)
    tolerance = 1e-5 + 1e-7 * size / temperature  # an exponent of float32 distances is off by some 1e-7 · d / T
    assert_is_the_references(result, features, labels, temperature, tolerance, outer=3.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "size", "temperature"),
    [(1, 3, 30.0), (3, 0, 0.5), (5, 3, 30.0), (33, 10, 30.0), (33, 10, 0.5), (70, 65, 30.0), (129, 7, 0.5)],
)
def test_triton_kernels_equal_the_reference(rows, size, temperature):
    features, labels = batch(rows, size)
    result = by_triton(features, labels, temperature, outer=3.0)
    assert_is_the_references(result, features, labels, temperature, outer=3.0)


@pytest.mark.slow
def test_triton_kernels_walk_several_slabs(monkeypatch):
    kernels = pytest.importorskip("wmengine.kernels.soft_nearest_neighbor", reason="Triton is not installed")
    monkeypatch.setattr(kernels, "SLAB", 1)
    features, labels = batch(130, 9)
    assert_is_the_references(by_triton(features, labels, 5.0), features, labels, 5.0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 130),
    size=st.integers(0, 70),
    classes=st.integers(1, 140),
    exponent=st.floats(-2, 3),
    seed=st.integers(0, 1000),
)
def test_any_batch_equals_the_reference(rows, size, classes, exponent, seed):
    features, labels = batch(rows, size, classes, seed)
    temperature = float(np.float32(10.0**exponent))
    expected = reference.soft_nearest_neighbor(features.numpy(), labels.numpy(), temperature)
    loss, gradient, _ = on_cpu(features, labels, temperature)
    assert loss.item() == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
    tolerance = 1e-5 + 1e-6 * size / temperature
    scale = np.abs(expected.gradient).max(initial=1e-12)
    assert np.abs(gradient.double().numpy() - expected.gradient).max(initial=0) <= tolerance * scale


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6])
def test_extreme_temperatures_neither_underflow_nor_overflow(temperature, differentiate):
    features, labels = batch(50, 20)
    expected = reference.soft_nearest_neighbor(features.numpy(), labels.numpy(), float(np.float32(temperature)))
    loss, gradient, by_temperature = differentiate(features, labels, temperature)
    assert loss.item() == pytest.approx(expected.loss, rel=1e-5)
    assert torch.isfinite(gradient).all()
    assert by_temperature.item() == pytest.approx(expected.temperature_gradient, rel=1e-4, abs=1e-12)
    # at the least, one pair stands in each sum, and the gradient is that of two distances
    assert np.abs(gradient.double().numpy() - expected.gradient).max() <= 1e-4 * np.abs(expected.gradient).max()


@pytest.mark.parametrize("distance", ["squared_euclidean", "cosine"])
def test_inside_autocast_nothing_is_rounded(distance):
    features, labels = batch(20, 6)
    found = []
    for half in (False, True):
        rows = torch.as_tensor(features, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = ops.soft_nearest_neighbor(rows, torch.as_tensor(labels), 0.5, distance=distance)
        loss.backward()
        found.append((loss, rows.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_near_duplicates_with_large_norms_keep_their_distances(offset, noise, differentiate):
    """‖x‖² + ‖y‖² − 2 x·y has no correct digit here, nor has Σ W (x_i − x_j) as a difference of two sums."""
    base, _ = batch(20, 24, shift=0.0)
    features = (10.0 * base).repeat(4, 1) + offset + noise * batch(80, 24, shift=0.0)[0]
    labels = torch.arange(80) // 40  # of the three next to a row, one has its label
    temperature = max(24 * noise**2, 1e-6)
    expected = reference.soft_nearest_neighbor(features.numpy(), labels.numpy(), float(np.float32(temperature)))
    loss, gradient, _ = differentiate(features, labels, temperature)
    assert loss.item() == pytest.approx(expected.loss, rel=1e-5)
    error = np.abs(gradient.double().numpy() - expected.gradient).max()
    assert error <= 1e-4 * np.abs(expected.gradient).max()


def test_a_far_row_does_not_blur_the_others(differentiate):
    """One row moves the centre, so that all other pairs cancel."""
    features, labels = batch(24, 12)
    features[7], labels[7] = 3e4, 9  # it has no loss of its own: float32 does not hold differences of 1e10 to 1
    expected = reference.soft_nearest_neighbor(features.numpy(), labels.numpy(), 5.0)
    loss, gradient, _ = differentiate(features, labels, 5.0)
    assert loss.item() == pytest.approx(expected.loss, rel=1e-5)
    assert np.abs(gradient.double().numpy() - expected.gradient).max() <= 1e-5 * np.abs(expected.gradient).max()


def test_duplicates_only_have_no_gradient(differentiate):
    features, labels = torch.full((30, 8), 1234.5), torch.arange(30) % 2
    loss, gradient, by_temperature = differentiate(features, labels, 1e-3)
    assert loss.item() == pytest.approx(np.log(29 / 14))
    assert not gradient.any()
    assert by_temperature.item() == 0


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5], []])
def test_without_a_pair_of_one_label_loss_and_gradients_are_zero(labels, differentiate):
    features, _ = batch(len(labels), 6)
    loss, gradient, by_temperature = differentiate(features, torch.tensor(labels, dtype=torch.int64), 2.0)
    assert loss.item() == 0
    assert not gradient.any()
    assert by_temperature.item() == 0


def test_one_label_only_has_loss_zero_and_counts_as_rows(differentiate):
    features, _ = batch(9, 6)
    loss, gradient, _ = differentiate(features, torch.zeros(9, dtype=torch.int64), 2.0)
    assert loss.item() == 0
    assert not gradient.any()


def test_a_single_row_of_its_label_is_left_out_of_the_mean_but_stays_a_neighbour(differentiate):
    features, labels = batch(7, 5, classes=2)
    labels[3] = 9
    loss, gradient, _ = differentiate(features, labels, 4.0)
    assert_is_the_references((loss, gradient, differentiate(features, labels, 4.0)[2]), features, labels, 4.0)
    assert gradient[3].any()
    others = [0, 1, 2, 4, 5, 6]
    assert loss.item() > differentiate(features[others], labels[others], 4.0)[0].item()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e20])
def test_a_feature_that_is_not_finite_makes_everything_nan(bad, differentiate):
    features, labels = batch(12, 6)
    features[4, 2] = bad  # the square of 1e20 is beyond float32
    loss, gradient, by_temperature = differentiate(features, labels, 2.0)
    assert loss.isnan()
    assert gradient.isnan().all()
    assert by_temperature.isnan()


def test_large_features_whose_squares_fit_are_not_refused(differentiate):
    features, labels = batch(100, 6)
    large = 1e18 * features  # the squared norms fit, their sum does not
    assert_is_the_references(differentiate(large, labels, 2e36), large, labels, 2e36)
    far = torch.nn.functional.pad(features, (0, 1), value=3e37)  # the sum over rows does not fit
    assert differentiate(far, labels, 2.0)[0].item() == pytest.approx(
        differentiate(features, labels, 2.0)[0].item(), rel=1e-5
    )


def test_labels_may_be_any_integers():
    features, labels = batch(50, 8)
    names = torch.tensor([-(2**62), 2**40, 2**40 + 2**32, 7])
    plain, other = (ops.soft_nearest_neighbor(features, y, 3.0) for y in (labels, names[labels]))
    assert plain.item() == other.item()
    binary = labels > 1
    assert ops.soft_nearest_neighbor(features, binary, 3.0) == ops.soft_nearest_neighbor(features, binary.int(), 3.0)


def test_cosine_is_one_minus_the_cosine():
    features, labels = batch(40, 12, shift=0.2)
    x, t = features.double().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    d = 1 - torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    scores = (-d / t).masked_fill(torch.eye(40, dtype=torch.bool), -torch.inf)
    same = labels[:, None] == labels[None]
    expected = (torch.logsumexp(scores, 1) - torch.logsumexp(scores.masked_fill(~same, -torch.inf), 1)).mean()
    expected.backward()
    for dtype in (torch.float32, torch.float64):
        leaf = features.to(dtype, copy=True).requires_grad_()
        temperature = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        loss = ops.soft_nearest_neighbor(leaf, labels, temperature, distance="cosine")
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(leaf.grad.double(), x.grad, rtol=1e-4, atol=1e-7)
        assert temperature.grad.item() == pytest.approx(t.grad.item(), rel=1e-4)


@pytest.mark.parametrize("distance", ["squared_euclidean", "cosine"])
def test_float64_passes_gradcheck(distance):
    features, labels = batch(9, 4, classes=3)
    x, t = features.double().requires_grad_(), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    labels[2] = 8
    assert torch.autograd.gradcheck(lambda x, t: ops.soft_nearest_neighbor(x, labels, t, distance=distance), (x, t))
    if distance == "squared_euclidean":
        expected = reference.soft_nearest_neighbor(x.detach().numpy(), labels.numpy(), 1.7)
        loss = ops.soft_nearest_neighbor(x, labels, t)
        loss.backward()
        assert loss.item() == pytest.approx(expected.loss, rel=1e-12)
        np.testing.assert_allclose(x.grad.numpy(), expected.gradient, atol=1e-12)
        assert t.grad.item() == pytest.approx(expected.temperature_gradient, rel=1e-10)


def test_float64_without_a_pair_has_loss_zero():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    loss = ops.soft_nearest_neighbor(x, torch.arange(3), 1.0)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_keeps_its_dtype(dtype):
    features, labels = batch(70, 20)
    low = features.to(dtype).requires_grad_()
    wide = low.detach().float().requires_grad_()
    for x in (low, wide):
        ops.soft_nearest_neighbor(x, labels, 10.0).backward()
    assert low.grad.dtype == dtype
    torch.testing.assert_close(low.grad, wide.grad.to(dtype), rtol=0, atol=0)


def test_features_may_be_strided():
    base = torch.randn(80, 60)
    labels = torch.arange(40) % 3
    for view in (base[::2, :30], base.t()[:40, 5:50], base[:1, :9].expand(40, 9)):
        plain, strided = (on_cpu(x, labels, 5.0) for x in (view.contiguous(), view))
        leaf = view.detach().requires_grad_()
        ops.soft_nearest_neighbor(leaf, labels, 5.0).backward()
        assert plain[0] == strided[0]
        assert torch.equal(leaf.grad, plain[1])
    assert ops.soft_nearest_neighbor(base[:40], (torch.arange(80) % 3)[::2], 5.0).isfinite()


def test_rows_may_lie_further_apart_than_32_bits_count():
    memory = mmap.mmap(-1, 4 * (3 << 30) + 4096)  # pages that are not touched cost nothing
    far = torch.frombuffer(memory, dtype=torch.float32).as_strided((4, 6), (1 << 30, 1))
    features, labels = batch(4, 6, classes=2)
    far.copy_(features)
    plain = ops.soft_nearest_neighbor(features, torch.tensor([0, 1, 1, 0]), 5.0)
    assert ops.soft_nearest_neighbor(far, torch.tensor([0, 1, 1, 0]), 5.0) == plain
    leaf = far.requires_grad_()
    ops.soft_nearest_neighbor(leaf, labels, 5.0).backward()
    assert torch.equal(leaf.grad, on_cpu(features, labels, 5.0)[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [300, 3000])
def test_a_gpu_gives_what_the_cpu_gives(rows):
    features, labels = batch(rows, 130)
    x = features.to("cuda").requires_grad_()
    t = torch.tensor(100.0, device="cuda", requires_grad=True)
    loss = ops.soft_nearest_neighbor(x, labels.to("cuda"), t)
    loss.backward()
    assert_is_the_references((loss.cpu(), x.grad.cpu(), t.grad.cpu()), features, labels, 100.0)


def test_the_same_bits_again():
    features, labels = batch(700, 40)
    features[300] = features[3]
    first = on_cpu(features, labels, 20.0)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, on_cpu(features, labels, 20.0), strict=True))


def test_only_what_is_asked_for_is_computed():
    features, labels = batch(30, 7)
    t = torch.tensor(3.0, requires_grad=True)
    ops.soft_nearest_neighbor(features, labels, t).backward()
    assert t.grad.item() == on_cpu(features, labels, 3.0)[2].item()
    x = features.clone().requires_grad_()
    ops.soft_nearest_neighbor(x, labels, 3.0).backward()
    assert torch.equal(x.grad, on_cpu(features, labels, 3.0)[1])
    assert not ops.soft_nearest_neighbor(features, labels, 3.0).requires_grad


def test_a_learnt_temperature_may_have_one_axis_and_any_float_dtype():
    features, labels = batch(30, 7)
    wanted = on_cpu(features, labels, 3.0)[2]
    for dtype in (torch.float32, torch.float16, torch.float64):
        t = torch.full((1,), 3.0, dtype=dtype, requires_grad=True)
        ops.soft_nearest_neighbor(features, labels, t).backward()
        assert t.grad.dtype == dtype
        assert t.grad.item() == pytest.approx(wanted.item(), rel=1e-2)


def test_a_second_derivative_is_refused_rather_than_silently_zero():
    features, labels = batch(10, 3)
    x = features.requires_grad_()
    (gradient,) = torch.autograd.grad(ops.soft_nearest_neighbor(x, labels, 3.0), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        gradient.square().sum().backward()


def test_operators_pass_opcheck():
    features, labels = batch(20, 5)
    t = torch.tensor(3.0)
    for by_features in (True, False):
        torch.library.opcheck(torch.ops.wmengine.soft_nearest_neighbor.default, (features, labels, t, by_features))


@pytest.mark.parametrize("distance", ["squared_euclidean", "cosine"])
def test_compiles_without_a_graph_break_and_gives_the_same_bits(distance):
    features, labels = batch(40, 9)

    def step(x, t):
        loss = ops.soft_nearest_neighbor(x, labels, 100.0 / t, distance=distance)
        return loss + ops.soft_nearest_neighbor(x, labels, 5.0)

    def run(function):
        x, t = features.clone().requires_grad_(), torch.tensor(20.0, requires_grad=True)
        loss = function(x, t)
        loss.backward()
        return loss.detach(), x.grad, t.grad

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(run(step), run(compiled), strict=True):
        torch.testing.assert_close(traced, eager, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": np.ones((4, 2))}, TypeError, "features must be a torch tensor"),
        ({"features": torch.ones(4, 2, dtype=torch.int32)}, TypeError, "features must be float32"),
        ({"features": torch.ones(4, 2, 2)}, ValueError, r"features must have 2 dimension\(s\), not shape \(4, 2, 2\)"),
        ({"labels": [0, 1, 0, 1]}, TypeError, "labels must be a torch tensor"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must have shape \(4,\)"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be integers"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0, not 0"),
        ({"temperature": -1}, ValueError, "temperature must be finite and above 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite and above 0"),
        ({"temperature": torch.tensor(-2.0)}, ValueError, "temperature must be finite and above 0, not -2"),
        ({"temperature": torch.tensor(float("inf"))}, ValueError, "temperature must be finite and above 0"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must be one number on cpu, not shape \(2,\)"),
        ({"temperature": torch.tensor(3)}, TypeError, "temperature must be float32"),
        ({"temperature": "1"}, TypeError, "temperature must be a number or a tensor, not str"),
        ({"temperature": True}, TypeError, "temperature must be a number or a tensor, not bool"),
        ({"distance": "euclidean"}, ValueError, "distance must be one of squared_euclidean, cosine"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {
        "features": torch.ones(4, 2), "labels": torch.tensor([0, 1, 0, 1]), "temperature": 1.0, **change,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        ops.soft_nearest_neighbor(**arguments)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_temperature_on_a_gpu_makes_everything_nan(temperature):
    features, labels = batch(12, 6)
    loss, gradient, by_temperature = by_triton(features, labels, temperature)
    assert loss.isnan()
    assert gradient.isnan().all()
    assert by_temperature.isnan()
