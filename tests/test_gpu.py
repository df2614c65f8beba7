"""Every operator on a real GPU against its float64 reference, and what only a GPU can show.

Triton kernels are tested without a GPU too (tests/test_triton.py). Here: the launches, CUDA C++, streams, graphs, the
absence of waiting, and sizes past 2³¹.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from tests import gpu_tensors  # noqa: E402

if not gpu_tensors.THERE:
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from tests.closeness import assert_close  # noqa: E402
from tests.gpu_tensors import DEVICE, KEYS, embed, integers, layers, needs_memory, random, step_inputs, training_step  # noqa: E402
from wmengine import ops  # noqa: E402
from wmengine.kernels import cross_entropy  # noqa: E402
from wmengine.ops import cuda, reference, torch_ops  # noqa: E402

COUNTS = [0, 1, 31, 33, 129, 4095, 4097, 131_073, 600_001]
GIB = 2**30


# Projections


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("total", [1, 32, 50, 128, 256, 512, 1024, 2048, 4096, 5000, 16_384])
def test_sketch_and_its_adjoint_equal_the_reference(count, total):
    w, g = random(count, seed=count), random(total, seed=total)
    assert_close(ops.sketch(w, KEYS[1], total), reference.sketch(w.double().cpu(), KEYS[1], total))
    expected = reference.sketch_adjoint(g.double().cpu(), KEYS[1], count)
    assert_close(ops.sketch_adjoint(g, KEYS[1], count), expected)


@pytest.mark.parametrize("count", [0, 1, 127, 129, 4097, 40_000])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("total", [1, 33, 256])
def test_dense_projection_and_its_adjoint_equal_the_reference(count, kind, total):
    w, g = random(count, seed=count), random(total, seed=total)
    assert_close(ops.project(w, KEYS[2], total, kind), reference.project(w.double().cpu(), KEYS[2], total, kind))
    expected = reference.project_adjoint(g.double().cpu(), KEYS[2], count, kind)
    assert_close(ops.project_adjoint(g, KEYS[2], count, kind), expected)


@pytest.mark.parametrize("projection", reference.PROJECTIONS)
def test_weights_at_any_address_give_the_same(projection):
    w = random(70_003)
    shifted = torch.empty(70_004, device=DEVICE)[1:].copy_(w)  # 4 bytes off every boundary
    assert torch.equal(torch_ops.project(w, 1, 256, projection), torch_ops.project(shifted, 1, 256, projection))


def test_the_sketchs_gradient_is_its_adjoint():
    w, g = random(5000).requires_grad_(), random(64)
    ops.sketch(w, 9, 64).backward(g)
    assert torch.equal(w.grad, ops.sketch_adjoint(g, 9, 5000))


@pytest.mark.parametrize("total", [256, 8192])
def test_sketches_of_more_than_two_to_the_31_weights(total):
    needs_memory(20)
    count = 2**31 + 12_345
    w = torch.zeros(count, device=DEVICE)
    first, last = 2**31 - 500, count
    w[first:] = random(last - first)
    y = ops.sketch(w, KEYS[0], total)
    size = last - first
    signed = reference.signs(KEYS[0], size, 0, reference.DOMAIN_SKETCH, first) * w[first:].double().cpu().numpy()
    buckets = reference.buckets(KEYS[0], size, total, first)
    scale = reference.projection_scale(total, count, "sketch")
    assert_close(y, scale * np.bincount(buckets, weights=signed, minlength=total))
    del w
    g = random(total)
    tail = ops.sketch_adjoint(g, KEYS[0], count)[first:]
    signs = reference.signs(KEYS[0], size, 0, reference.DOMAIN_SKETCH, first)
    assert_close(tail, scale * signs * g.double().cpu().numpy()[buckets])


# match_counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distribution", [False, True])
@pytest.mark.parametrize(
    "shape", [(9, 1), (1000, 10), (18, 33), (6, 1001), (7, 2801), (5, 6007), (4, 15_001), (3, 40_003), (5000, 3)]
)
def test_match_counts_equals_the_reference(dtype, distribution, shape):
    rows, classes = shape
    scores = random(rows, classes)
    outputs = (scores.softmax(dim=1) if distribution else scores.round(decimals=1)).to(dtype)  # ties
    outputs[0, classes - 1], outputs[1, 0], outputs[2] = float("nan"), float("inf"), -float("inf")
    answers = outputs.double().cpu().numpy()
    rng = np.random.default_rng(classes)
    expected = np.where(rng.random(rows) < 0.5, rng.integers(-1, classes + 1, rows), answers.argmax(axis=1))
    group = rng.integers(0, 3, rows)
    wanted = reference.match_counts(answers, expected, group, 4, levels=True)
    found = ops.match_counts(outputs, torch.from_numpy(expected), torch.from_numpy(group), 4, levels=True)
    assert {part.device.type for part in found} == {DEVICE.type}
    for name in ("predicted", "hits", "invalid"):
        np.testing.assert_array_equal(getattr(found, name).cpu().numpy(), getattr(wanted, name), err_msg=name)
    levels = found.levels.cpu().numpy().astype(int)
    off = np.abs(levels - wanted.levels)
    assert off.max() <= 1
    assert off.sum() <= 2 + 0.001 * off.size
    np.testing.assert_array_equal(
        found.histogram.cpu().numpy(), [np.bincount(row + 30, minlength=61) for row in levels]
    )
    known = (expected >= 0) & (expected < classes)
    named = levels[np.arange(rows), np.where(known, expected, 0)]
    np.testing.assert_array_equal(found.at.cpu().numpy(), np.where(known, named, 0))


def test_match_counts_of_nothing():
    found = ops.match_counts(random(0, 5), torch.zeros(0, dtype=torch.int64), groups=2, levels=True)
    assert (found.hits.tolist(), found.invalid.tolist(), found.levels.shape) == ([0, 0], [0, 0], (0, 5))


def test_match_counts_of_more_than_two_to_the_31_answers():
    needs_memory(8)
    rows, classes = 2250, 1_000_003
    outputs = torch.zeros(rows, classes, dtype=torch.bfloat16, device=DEVICE)
    outputs[1500:, 999_999] = 1
    expected, group = torch.full((rows,), 999_999), torch.arange(rows) // 750
    found = ops.match_counts(outputs, expected, group, 3)
    assert (found.hits.tolist(), found.invalid.tolist()) == ([0, 0, 750], [0, 0, 0])
    assert found.at[1500:].eq(30).all()


# label_matches and bit_matches


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 2), (2, 4100, 3), (8, 33, 9), (65, 40, 66), (1000, 100, 32), (9, 100_003, 70)]
)
def test_label_matches_equals_a_comparison(dtype, shape):
    suspects, rows, sets = shape
    predicted, expected = integers(suspects, rows).to(dtype), integers(sets, rows, seed=1)
    wanted = ((predicted[:, None] == expected[None]) & (predicted >= 0)[:, None]).sum(dim=-1)
    counts = cuda.label_matches(predicted, expected)
    assert counts.dtype == torch.int32
    assert torch.equal(counts, wanted.int())
    assert torch.equal(cuda.label_matches(predicted.t().contiguous().t(), expected.int()), counts)


@pytest.mark.parametrize("shape", [(0, 4, 2), (9, 0, 9), (2, 0, 3), (2, 4, 0)])
def test_label_matches_of_nothing(shape):
    suspects, rows, sets = shape
    counts = cuda.label_matches(integers(suspects, rows), integers(sets, rows))
    assert counts.shape == (suspects, sets)
    assert not counts.any()


@pytest.mark.parametrize("sets", [1, 8])
def test_label_matches_of_more_than_two_to_the_31_labels(sets):
    suspects, rows = 8, 2**28 + 77
    needs_memory(16 + 2 * sets + 2)
    predicted = torch.full((suspects, rows), -1, dtype=torch.int32, device=DEVICE)
    expected = torch.zeros(sets, rows, dtype=torch.int64, device=DEVICE)
    predicted[-1, -100:] = 7
    expected[-1, -99:] = 7
    counts = cuda.label_matches(predicted, expected)
    assert counts[-1].tolist() == [0] * (sets - 1) + [99]
    assert counts.sum() == 99


def bits_and_bytes(rows, total, seed=0):
    """Bits as ±1 in float32, and packed; the last byte's spare bits are noise."""
    bits = np.random.default_rng(seed + total).integers(0, 2, (rows, -(-total // 8) * 8), dtype=np.uint8)
    signs = torch.from_numpy(bits[:, :total]).to(DEVICE).float() * 2 - 1
    return signs, torch.from_numpy(np.packbits(bits, axis=1, bitorder="little")).to(DEVICE)


@pytest.mark.parametrize("total", [1, 31, 32, 100, 160, 256, 300, 4096])
@pytest.mark.parametrize(("suspects", "registered"), [(1, 1), (1, 9000), (70, 3000)])
def test_bit_matches_and_the_best_equal_a_product_of_signs(total, suspects, registered):
    messages, packed_messages = bits_and_bytes(suspects, total)
    registry, packed_registry = bits_and_bytes(registered, total, seed=1)
    wanted = ((messages.double() @ registry.double().t() + total) / 2).int()
    assert torch.equal(cuda.bit_matches(packed_messages, packed_registry, total), wanted)
    shifted = torch.empty(packed_registry.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view_as(packed_registry)
    assert torch.equal(cuda.bit_matches(packed_messages, shifted.copy_(packed_registry), total), wanted)
    for best in {1, min(10, registered), min(1024, registered)}:
        counts, indices = cuda.best_bit_matches(packed_messages, packed_registry, total, best)
        order = wanted.sort(dim=1, descending=True, stable=True)
        assert torch.equal(indices, order.indices[:, :best])
        assert torch.equal(counts, order.values[:, :best])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_bit_matches_of_nothing(shape):
    suspects, registered = shape
    messages, registry = bits_and_bytes(suspects, 20)[1], bits_and_bytes(registered, 20)[1]
    assert cuda.bit_matches(messages, registry, 20).shape == shape
    if registered:
        assert cuda.best_bit_matches(messages, registry, 20, 2)[1].shape == (suspects, 2)
    else:
        with pytest.raises(ValueError, match="best is 1"):
            cuda.best_bit_matches(messages, registry, 20, 1)


def test_bit_matches_of_no_bits_are_all_tied():
    messages, registry = (torch.empty(rows, 0, dtype=torch.uint8, device=DEVICE) for rows in (2, 5))
    assert cuda.bit_matches(messages, registry, 0).tolist() == [[0] * 5] * 2
    counts, indices = cuda.best_bit_matches(messages, registry, 0, 3)
    assert counts.tolist() == [[0] * 3] * 2
    assert indices.tolist() == [[0, 1, 2]] * 2


def test_bit_matches_of_a_registry_of_more_than_two_to_the_31_bytes():
    needs_memory(5)
    registered, total = 2**26 + 99, 256
    registry = torch.zeros(registered, total // 8, dtype=torch.uint8, device=DEVICE)
    message = torch.full((1, total // 8), 255, dtype=torch.uint8, device=DEVICE)
    registry[-1], registry[-3, 0], registry[5, 0] = 255, 7, 7
    counts, indices = cuda.best_bit_matches(message, registry, total, 4)
    assert counts.tolist() == [[256, 3, 3, 0]]
    assert indices.tolist() == [[registered - 1, 5, registered - 3, 0]]
    assert cuda.bit_matches(message, registry, total)[0, -3:].tolist() == [3, 0, 256]


# embedding_loss


@pytest.mark.parametrize("carrier", reference.CARRIERS)
@pytest.mark.parametrize("projection", reference.PROJECTIONS)
@pytest.mark.parametrize("link", reference.LINKS)
def test_embedding_loss_and_every_gradient_equal_the_reference(carrier, projection, link):
    weights, bits = layers(), torch.arange(40, device=DEVICE) % 3 % 2
    settings = {"carrier": carrier, "projection": projection, "link": link, "margin": 0.7}
    loss, y = embed(weights, bits, **settings)
    (3.0 * loss).backward()
    arrays = [w.detach().cpu().numpy() for w in weights]
    expected_loss, expected_y, gradients = reference.embedding_loss(arrays, [*KEYS, 77], bits.cpu().numpy(), **settings)
    assert_close(loss, expected_loss)
    assert_close(y, expected_y)
    for weight, gradient in zip(weights, gradients, strict=True):
        assert_close(weight.grad, 3.0 * gradient, 1e-3 if link == "stdm" else 2e-5)


@pytest.mark.parametrize("total", [1, 256, 4096, 8192])
def test_sketches_of_any_length_equal_the_reference(total):
    weights, bits = layers(), torch.arange(total, device=DEVICE) % 3 % 2
    settings = {"carrier": "unit_filters", "projection": "sketch", "link": "bce"}
    loss, _ = embed(weights, bits, **settings)
    loss.backward()
    arrays = [w.detach().cpu().numpy() for w in weights]
    expected, _, gradients = reference.embedding_loss(arrays, [*KEYS, 77], bits.cpu().numpy(), **settings)
    assert_close(loss, expected)
    for weight, gradient in zip(weights, gradients, strict=True):
        assert_close(weight.grad, gradient, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_get_gradients_of_their_own_dtype(dtype):
    weights, bits = layers(dtype), torch.ones(64, device=DEVICE)
    settings = {"carrier": "unit_filters", "projection": "sketch", "link": "bce"}
    embed(weights, bits, **settings)[0].backward()
    arrays = [w.detach().float().cpu().numpy() for w in weights]
    gradients = reference.embedding_loss(arrays, [*KEYS, 77], bits.cpu().numpy(), **settings)[2]
    for weight, gradient in zip(weights, gradients, strict=True):
        assert weight.grad.dtype == dtype
        assert_close(weight.grad, gradient, 0.01)


def test_the_same_input_gives_the_same_bits_twice():
    inputs = step_inputs()
    (first_loss, first), (second_loss, second) = (training_step(*inputs) for _ in range(2))
    assert torch.equal(first_loss, second_loss)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for projection in reference.PROJECTIONS:
        w = random(300_000)
        assert torch.equal(torch_ops.project(w, 1, 256, projection), torch_ops.project(w, 1, 256, projection))


def test_a_training_step_never_waits_for_the_gpu():
    inputs = step_inputs()
    training_step(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(*inputs)
        ops.sketch(inputs[0][2].detach().flatten(), 1, 256)
        ops.match_counts(inputs[1].detach(), inputs[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_runs_on_the_current_stream():
    inputs = step_inputs()
    expected = training_step(*inputs)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what ran on another stream would read the weights before they are changed
        changed = [weight.detach().mul(-5).requires_grad_() for weight in inputs[0]]
        actual = training_step(changed, *inputs[1:])[0]
        y = ops.sketch(changed[2].detach().flatten(), 1, 256)
    stream.synchronize()
    same = training_step([(-5 * weight.detach()).requires_grad_() for weight in inputs[0]], *inputs[1:])[0]
    assert torch.equal(actual, same)
    assert not torch.equal(actual, expected)
    assert torch.equal(y, ops.sketch(-5 * inputs[0][2].detach().flatten(), 1, 256))


def test_a_captured_training_step_follows_the_live_weights():
    weights, logits, labels, bits = step_inputs()
    for _ in range(2):
        training_step(weights, logits, labels, bits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradients = training_step(weights, logits, labels, bits)
    with torch.no_grad():
        for weight in weights:
            weight.mul_(torch.rand_like(weight))
    graph.replay()
    expected_loss, expected = training_step(weights, logits, labels, bits)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_new_weights_inside_a_capture_are_refused_with_the_mend():
    bits = torch.ones(32, dtype=torch.uint8, device=DEVICE)
    fresh = torch.randn(3, 1009, device=DEVICE)
    with (
        pytest.raises(RuntimeError, match="run the step once before capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        embed([fresh], bits, carrier="flat", projection="sketch", link="bce")


# marked_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (300, 10), (65, 1000), (9, 50_257), (33, 32_000)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_marked_cross_entropy_and_its_gradient_equal_the_reference(dtype, shape, smoothing):
    rows, classes = shape
    logits = (3 * random(rows, classes, dtype=dtype)).requires_grad_()
    rng = np.random.default_rng(rows)
    labels = np.where(rng.random(rows) < 0.3, logits.detach().float().cpu().argmax(1), rng.integers(0, classes, rows))
    labels[rows // 2] = -100 if rows > 1 else 0
    weight, group = rng.random(rows, dtype=np.float32), rng.integers(0, 3, rows)
    marked = ops.marked_cross_entropy(
        logits, *(torch.from_numpy(array).to(DEVICE) for array in (labels, weight, group)),
        groups=3, label_smoothing=smoothing,
    )  # fmt: skip
    (2.0 * marked.loss).backward()
    expected = reference.marked_cross_entropy(
        logits.detach().float().cpu().numpy(), labels, weight, group, groups=3, label_smoothing=smoothing
    )
    assert_close(marked.loss, expected.loss, at_least=0.1)
    assert_close(marked.group_loss, expected.group_loss, at_least=0.1)
    assert marked.group_hits.tolist() == expected.group_hits.tolist()
    assert logits.grad.dtype == dtype
    assert_close(logits.grad, 2.0 * expected.gradient, 2e-5 if dtype == torch.float32 else 0.01, at_least=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_graph_that_is_kept_gives_the_same_gradient_again(dtype):
    logits, labels = random(9, 5000, dtype=dtype).requires_grad_(), integers(9, low=0, high=5000)
    loss = 3.0 * ops.marked_cross_entropy(logits, labels).loss
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], first)
    exact = logits.detach().float().requires_grad_()
    (3.0 * torch.nn.functional.cross_entropy(exact, labels)).backward()
    assert_close(first.float(), exact.grad.cpu().numpy(), 2e-5 if dtype == torch.float32 else 0.01, at_least=1e-3)


def test_cross_entropy_of_more_than_two_to_the_31_logits():
    needs_memory(14)
    rows, classes = 70_000, 32_000
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device=DEVICE)
    logits[-3:] = random(3, classes, dtype=torch.bfloat16)
    labels = torch.full((rows,), -100, device=DEVICE)
    labels[-3:] = torch.tensor([5, 31_999, 7], device=DEVICE)
    loss, _, _, normalizers, denominator = cross_entropy.forward(logits, labels, None, None, 1, 0.0, -100, True, False)
    one = torch.ones((), device=DEVICE)
    tail = cross_entropy.backward(one, logits, labels, None, normalizers, denominator, 0.0, -100)[-3:]
    last = logits[-3:].float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(last, labels[-3:])
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(tail.float(), last.grad, rtol=0.01, atol=1e-6)
    kept = cross_entropy.forward(logits, labels, None, None, 1, 0.0, -100, True, True)[3]
    cross_entropy.scale(kept, 2.0 * one)
    assert not kept[:-3].any()
    torch.testing.assert_close(kept[-3:], 2.0 * tail)


# soft_nearest_neighbor


@pytest.mark.parametrize("shape", [(7, 3), (130, 64), (1000, 257)])
def test_soft_nearest_neighbor_and_its_gradient_equal_the_formula(shape):
    features = random(*shape).requires_grad_()
    labels = torch.arange(shape[0], device=DEVICE) % 3
    temperature = float(shape[1])
    loss = ops.soft_nearest_neighbor(features, labels, temperature)
    loss.backward()
    x = features.detach().double().requires_grad_()
    near = torch.exp(-((x[:, None] - x[None]) ** 2).sum(dim=-1) / temperature)
    near = near * (1 - torch.eye(shape[0], device=DEVICE, dtype=torch.float64))
    same = (near * (labels[:, None] == labels[None])).sum(dim=1)
    expected = -torch.log(same / near.sum(dim=1)).mean()
    expected.backward()
    assert_close(loss, expected.item(), 1e-4)
    assert_close(features.grad, x.grad.cpu().numpy(), 1e-3)
