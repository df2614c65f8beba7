"""torch operators on the CPU: references, autograd, gradcheck, opcheck, torch.compile, and what must never happen."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from wmengine import ops
from wmengine.ops import reference, torch_ops

KEYS = [3, 2**63 + 5, 2**64 - 1]


def layers(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


# Sketch and project


@pytest.mark.parametrize("projection", reference.PROJECTIONS)
def test_projection_of_a_tensor_equals_numpys_and_its_gradient_is_the_adjoint(projection):
    def forward(values):
        return ops.sketch(values, 9, 70) if projection == "sketch" else ops.project(values, 9, 70, projection)

    (w,) = layers((5000,))
    y = forward(w)
    np.testing.assert_array_equal(y.detach().numpy(), forward(w.detach().numpy()))
    g = torch.randn(70)
    y.backward(g)
    assert_close(
        w.grad, reference.projection_scale(70, 5000, projection) * reference.projection_adjoint(g, 9, 5000, projection)
    )


@pytest.mark.parametrize("projection", reference.PROJECTIONS)
def test_projection_passes_opcheck(projection):
    for dtype in (torch.float32, torch.float64):
        w, g = torch.randn(300, dtype=dtype), torch.randn(40, dtype=dtype)
        torch.library.opcheck(torch.ops.wmengine.project.default, (w, -7, 40, projection, False))
        torch.library.opcheck(torch.ops.wmengine.project.default, (g, -7, 300, projection, True))


def test_adjoint_of_a_tensor_is_differentiable_too():
    g = torch.randn(40, requires_grad=True)
    ops.sketch_adjoint(g, 5, 300).square().sum().backward()
    twice = 2 * reference.sketch_adjoint(g.detach().double().numpy(), 5, 300)
    assert_close(g.grad, reference.sketch(twice, 5, 40))


@pytest.mark.parametrize("projection", reference.PROJECTIONS)
def test_float64_projections_pass_gradcheck(projection):
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: torch_ops.project(w, 3, 33, projection), (values,))
    assert torch.autograd.gradcheck(lambda g: torch_ops.project_adjoint(g, 3, 40, projection), (values,))


# embedding_loss

SHAPES = [(6, 5, 3, 3), (33, 41), (7, 300)]


@pytest.mark.parametrize("carrier", reference.CARRIERS)
@pytest.mark.parametrize("projection", reference.PROJECTIONS)
@pytest.mark.parametrize("link", reference.LINKS)
def test_embedding_loss_and_every_gradient_equal_the_reference(carrier, projection, link):
    weights = layers(*SHAPES)
    bits = torch.arange(40) % 3 % 2
    loss, y = ops.embedding_loss(weights, KEYS, bits, carrier=carrier, projection=projection, link=link, margin=0.7)
    (3.0 * loss).backward()
    expected_loss, expected_y, gradients = reference.embedding_loss(
        [w.detach().numpy() for w in weights],
        KEYS,
        bits.numpy(),
        carrier=carrier,
        projection=projection,
        link=link,
        margin=0.7,
    )
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_close(y, expected_y)
    assert not y.requires_grad
    for weight, gradient in zip(weights, gradients, strict=True):
        assert_close(weight.grad, 3.0 * gradient, 1e-3 if link == "stdm" else 1e-5)


@pytest.mark.parametrize("carrier", reference.CARRIERS)
@pytest.mark.parametrize("link", reference.LINKS)
def test_embedding_loss_reference_passes_gradcheck(carrier, link):
    weights = layers((3, 2, 2), (4, 5), dtype=torch.float64)
    bits = torch.tensor([1, 0, 1, 1, 0, 0, 1] * 5)

    def loss(*arguments):
        return ops.embedding_loss(
            list(arguments), KEYS[:2], bits, carrier=carrier, projection="sketch", link=link, margin=0.3, scale=0.1
        )[0]

    assert torch.autograd.gradcheck(loss, tuple(weights))


def test_embedding_loss_follows_the_live_weights():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.ReLU(), torch.nn.Linear(30, 20))
    weights, bits = [model[0].weight, model[2].weight], torch.ones(32)

    def loss():
        return ops.embedding_loss(weights, KEYS[:2], bits, carrier="flat", projection="sketch", link="bce")[0].item()

    before = loss()
    with torch.no_grad():
        for weight in weights:
            weight.mul_(-5)
    after = loss()
    expected = reference.embedding_loss(
        [w.detach().numpy() for w in weights], KEYS[:2], bits.numpy(), carrier="flat", projection="sketch", link="bce"
    )[0]
    assert after != pytest.approx(before, rel=0.01)
    assert after == pytest.approx(expected, rel=1e-5)


def test_unit_filters_are_blind_to_each_filters_scale_and_feel_no_gradient_along_it():
    (weight,) = layers((12, 4, 3, 3))
    bits = torch.ones(32)
    arguments = {"carrier": "unit_filters", "projection": "sketch", "link": "bce"}
    loss, y = ops.embedding_loss([weight], [1], bits, **arguments)
    loss.backward()
    along = (weight.grad * weight.detach()).sum(dim=(1, 2, 3))
    assert along.abs().max() < 1e-6 * weight.grad.norm()
    scaled = weight.detach() * torch.rand(12, 1, 1, 1).add(0.1)
    torch.testing.assert_close(ops.embedding_loss([scaled], [1], bits, **arguments)[1], y)


@pytest.mark.parametrize("size", [0.0, 1e-41])
def test_filter_of_zeros_or_next_to_it_has_zero_gradient(size):
    weight = torch.randn(4, 50)
    weight[2] = size
    weight.requires_grad_()
    ops.embedding_loss([weight], [1], torch.ones(32), carrier="unit_filters", projection="sketch", link="bce")[
        0
    ].backward()
    assert torch.isfinite(weight.grad).all()
    assert not weight.grad[2].any()


def test_a_second_derivative_is_refused_rather_than_silently_zero():
    logits = torch.randn(4, 5, requires_grad=True)
    loss = ops.marked_cross_entropy(logits, torch.tensor([0, 1, 2, 3])).loss
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        gradient.square().sum().backward()


def test_embedding_loss_never_touches_grad_before_backward():
    weights = layers(*SHAPES)
    loss, _ = ops.embedding_loss(weights, KEYS, torch.ones(40), carrier="flat", projection="sketch", link="bce")
    assert all(w.grad is None for w in weights)
    optimizer = torch.optim.SGD(weights, lr=0.1)
    optimizer.zero_grad()
    loss.backward()
    assert all(w.grad.abs().sum() > 0 for w in weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_are_computed_in_float32(dtype):
    weights = [w.detach().to(dtype).requires_grad_() for w in layers(*SHAPES)]
    arguments = {"carrier": "unit_filters", "projection": "sketch", "link": "bce"}
    loss, _ = ops.embedding_loss(weights, KEYS, torch.ones(40), **arguments)
    loss.backward()
    widened = [w.detach().float().requires_grad_() for w in weights]
    exact, _ = ops.embedding_loss(widened, KEYS, torch.ones(40), **arguments)
    exact.backward()
    assert loss.item() == exact.item()
    for low, wide in zip(weights, widened, strict=True):
        assert low.grad.dtype == dtype
        torch.testing.assert_close(low.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (3, 17, 5, 5), (9, 64, 3, 3), (2, 700, 3, 3), (5, 8, 2, 1)], ids=str)
@pytest.mark.parametrize("carrier", reference.CARRIERS)
def test_weights_with_channels_last_have_the_same_loss_and_gradients_in_their_own_layout(shape, carrier):
    (weight,) = layers(shape)
    last = weight.detach().to(memory_format=torch.channels_last).requires_grad_()
    bits, what = torch.arange(40) % 2, {"carrier": carrier, "projection": "sketch", "link": "bce"}
    loss, y = ops.embedding_loss([last], [5], bits, **what)
    loss.backward()
    _, expected, (gradient,) = reference.embedding_loss([weight.detach().numpy()], [5], bits.numpy(), **what)
    assert_close(y, expected)
    assert_close(last.grad, gradient)
    assert last.grad.stride() == last.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("projection", reference.PROJECTIONS)
@pytest.mark.parametrize("carrier", ["unit_filters", "unit_filter_mean"])
def test_signs_turn_filters_around(carrier, projection, dtype):
    weights, bits = layers(*SHAPES, dtype=dtype), torch.arange(40) % 2
    signs = [torch.tensor([1.0, -1.0, 0.0] * len(w))[: len(w)] for w in weights]
    what = {"carrier": carrier, "projection": projection, "link": "mse"}
    loss, y = ops.embedding_loss(weights, KEYS, bits, **what, signs=torch.cat(signs))
    loss.backward()
    turned = [(w.detach().flatten(1) * s[:, None]).reshape(w.shape) for w, s in zip(weights, signs, strict=True)]
    _, expected, gradients = reference.embedding_loss([w.numpy() for w in turned], KEYS, bits.numpy(), **what)
    assert_close(y, expected)
    for weight, sign, gradient in zip(weights, signs, gradients, strict=True):
        assert_close(weight.grad, (torch.from_numpy(gradient).flatten(1) * sign[:, None]).reshape(weight.shape))


def test_embedding_loss_takes_transposed_weights():
    (base,) = layers((30, 20))
    view = base.t()
    ops.embedding_loss([view], [1], torch.ones(32), carrier="unit_filters", projection="sketch", link="bce")[
        0
    ].backward()
    copied = base.detach().t().contiguous().requires_grad_()
    ops.embedding_loss([copied], [1], torch.ones(32), carrier="unit_filters", projection="sketch", link="bce")[
        0
    ].backward()
    torch.testing.assert_close(base.grad.t(), copied.grad, rtol=0, atol=0)


@pytest.mark.parametrize("carrier", reference.CARRIERS)
def test_embedding_loss_passes_opcheck(carrier):
    weights = [w.detach() for w in layers((4, 3, 2), (5, 7))]
    bits = torch.ones(33, dtype=torch.uint8)
    torch.library.opcheck(
        torch.ops.wmengine.embedding_loss.default,
        (weights, bits, [1, -2], carrier, "sketch", 0.5, "bce", 1.0, torch.ones(9) if "unit" in carrier else None),
    )
    norms = torch.ones(9 if "unit" in carrier else 0)
    torch.library.opcheck(
        torch.ops.wmengine.embedding_loss_backward.default,
        (torch.tensor(1.0), weights, torch.randn(33), norms, [1, -2], carrier, "sketch", 0.5),
    )


def test_training_step_compiles_without_a_graph_break_and_gives_the_same_bits():
    weights = layers(*SHAPES)
    logits, labels = torch.randn(12, 9, requires_grad=True), torch.randint(0, 9, (12,))
    bits = torch.arange(40) % 2

    def step(logits, *weights):
        task = ops.marked_cross_entropy(logits, labels, group=labels % 2, groups=2)
        mark, _ = ops.embedding_loss(
            list(weights), KEYS, bits, carrier="unit_filters", projection="sketch", link="hinge"
        )
        return task.loss + 0.1 * mark, task.group_hits

    def run(function):
        leaves = [logits.detach().clone().requires_grad_(), *(w.detach().clone().requires_grad_() for w in weights)]
        loss, hits = function(*leaves)
        loss.backward()
        return [loss.detach(), hits, *(leaf.grad for leaf in leaves)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(run(step), run(compiled), strict=True):
        torch.testing.assert_close(traced, eager, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weights": []}, ValueError, "one key for each weight"),
        ({"keys": [1]}, ValueError, "one key for each weight"),
        ({"keys": [1, 2, 1 << 64]}, ValueError, "key must be"),
        ({"weights": [torch.ones(2, 2, dtype=torch.int32)], "keys": [1]}, TypeError, r"weights\[0\] must be float32"),
        ({"weights": [torch.tensor(1.0)], "keys": [1]}, ValueError, "first axis"),
        ({"bits": torch.ones(0)}, ValueError, "at least one bit"),
        ({"bits": torch.tensor([1.0, -1.0])}, ValueError, "bits must hold 0 and 1 only"),
        ({"bits": torch.tensor([0, 256, 1])}, ValueError, "bits must hold 0 and 1 only"),
        ({"bits": torch.tensor([0.0, 0.5, 1.0])}, ValueError, "bits must hold 0 and 1 only"),
        ({"bits": torch.tensor([0.0, float("nan")])}, ValueError, "bits must hold 0 and 1 only"),
        ({"carrier": "filters"}, ValueError, "carrier must be one of"),
        ({"projection": "dct"}, ValueError, "projection must be one of"),
        ({"link": "l1"}, ValueError, "link must be one of"),
    ],
)
def test_bad_embedding_arguments_are_named(change, error, words):
    arguments = {"carrier": "flat", "projection": "sketch", "link": "bce", **change}
    weights, keys, bits = (
        arguments.pop("weights", layers(*SHAPES)),
        arguments.pop("keys", KEYS),
        arguments.pop("bits", torch.ones(32)),
    )
    with pytest.raises(error, match=words):
        ops.embedding_loss(weights, keys, bits, **arguments)


# marked_cross_entropy

GRID = [(1, 1), (5, 3), (33, 10), (4, 8), (6, 9), (64, 1000), (3, 4099)]


@pytest.mark.parametrize(("rows", "classes"), GRID)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_marked_cross_entropy_equals_the_reference(rows, classes, label_smoothing, reduction):
    generator = torch.Generator().manual_seed(rows * classes)
    logits = (4 * torch.randn(rows, classes, generator=generator)).requires_grad_()
    labels = torch.randint(0, classes, (rows,), generator=generator)
    weight = torch.rand(rows, generator=generator)
    group = torch.randint(0, 3, (rows,), generator=generator)
    if rows > 3:
        labels[2] = -1
        labels[0] = logits[0].argmax()
    arguments = {"groups": 3, "label_smoothing": label_smoothing, "ignore_index": -1, "reduction": reduction}
    result = ops.marked_cross_entropy(logits, labels, weight, group, **arguments)
    (2.0 * result.loss).backward()
    expected = reference.marked_cross_entropy(
        logits.detach().numpy(), labels.numpy(), weight.numpy(), group.numpy(), **arguments
    )
    assert result.loss.item() == pytest.approx(expected.loss, rel=1e-5, abs=1e-7)
    assert_close(result.group_loss, expected.group_loss, at_least=1e-8)
    np.testing.assert_array_equal(result.group_hits.numpy(), expected.group_hits)
    if classes > 1:
        assert_close(logits.grad, 2.0 * expected.gradient)
    assert not result.group_loss.requires_grad


def test_plain_call_equals_torchs_cross_entropy():
    logits, labels = torch.randn(50, 37, requires_grad=True), torch.randint(0, 37, (50,))
    ours = torch.autograd.grad(ops.marked_cross_entropy(logits, labels).loss, logits)[0]
    torchs = torch.autograd.grad(F.cross_entropy(logits, labels), logits)[0]
    torch.testing.assert_close(ours, torchs)


def test_marked_cross_entropy_is_no_worse_than_torch_on_large_logits():
    logits, labels = 80 * torch.randn(40, 500), torch.randint(0, 500, (40,))
    exact = F.cross_entropy(logits.double(), labels).item()
    assert abs(ops.marked_cross_entropy(logits, labels).loss.item() - exact) <= 2e-6 * abs(exact)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_reference_passes_gradcheck(label_smoothing, reduction):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels, weight = torch.tensor([0, 4, -100, 2, 1, 1]), torch.rand(6, dtype=torch.float64)

    def loss(z):
        return ops.marked_cross_entropy(z, labels, weight, label_smoothing=label_smoothing, reduction=reduction).loss

    assert torch.autograd.gradcheck(loss, (logits,))


def test_float64_reference_in_torch_equals_the_one_in_numpy():
    logits, labels = torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 6, (20,))
    labels[3] = -100
    weight, group = torch.rand(20), torch.randint(0, 2, (20,))
    ours = ops.marked_cross_entropy(logits, labels, weight, group, groups=2, label_smoothing=0.1)
    wanted = reference.marked_cross_entropy(logits, labels, weight, group, groups=2, label_smoothing=0.1)
    assert ours.loss.item() == pytest.approx(wanted.loss, rel=1e-12)
    assert_close(ours.group_loss, wanted.group_loss)
    assert ours.group_hits.tolist() == wanted.group_hits.tolist()


@pytest.mark.parametrize("classes", [5, 8, 20])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_that_is_not_finite_poisons_the_loss_and_is_never_a_hit(classes, bad):
    logits = torch.zeros(3, classes)
    logits[:, 1] = 5.0
    logits[1, classes - 1] = bad
    labels = torch.tensor([1, classes - 1, 1])
    result = ops.marked_cross_entropy(logits, labels, group=torch.tensor([0, 1, 0]), groups=2)
    assert result.loss.isnan()
    assert result.group_hits.tolist() == [2, 0]
    assert result.group_loss[0].isfinite()


def test_nan_with_an_unusual_payload_stays_a_nan():
    logits = torch.zeros(1, 16)
    logits.view(torch.int32)[0, 3] = 0x7FFFFFFF
    assert ops.marked_cross_entropy(logits, torch.tensor([3])).loss.isnan()


def test_masked_logits_of_minus_infinity_are_allowed():
    logits = torch.randn(4, 20)
    logits[:, 10:] = float("-inf")
    logits.requires_grad_()
    labels = torch.tensor([0, 1, 2, 3])
    ours = torch.autograd.grad(ops.marked_cross_entropy(logits, labels).loss, logits)[0]
    torchs = torch.autograd.grad(F.cross_entropy(logits, labels), logits)[0]
    torch.testing.assert_close(ours, torchs)


def test_ties_count_as_a_hit_for_the_first_class_only():
    logits = torch.ones(2, 12)
    assert ops.marked_cross_entropy(logits, torch.tensor([0, 5])).group_hits.tolist() == [1]


def test_logits_are_never_overwritten_and_second_backward_gives_the_same():
    logits, labels = torch.randn(30, 20, requires_grad=True), torch.randint(0, 20, (30,))
    before = logits.detach().clone()
    loss = ops.marked_cross_entropy(logits, labels).loss
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)


def test_no_gradient_is_computed_where_none_is_asked_for():
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        assert not ops.marked_cross_entropy(logits, labels).loss.requires_grad
    outputs = torch.ops.wmengine.marked_cross_entropy(logits.detach(), labels, None, None, 1, 0.0, -100, True, False)
    assert outputs[3].shape == (4, 2)  # the normalizers of each row


def test_strided_logits_give_what_their_copies_give():
    base = torch.randn(40, 30)
    labels = torch.randint(0, 15, (20,))
    for view in (base[::2, :15], base.t()[:20, 5:20]):
        leaf = view.detach().requires_grad_()
        copied = view.detach().contiguous().requires_grad_()
        for z in (leaf, copied):
            ops.marked_cross_entropy(z, labels).loss.backward()
        torch.testing.assert_close(leaf.grad, copied.grad, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_computed_in_float32(dtype):
    logits, labels = torch.randn(30, 40).to(dtype).requires_grad_(), torch.randint(0, 40, (30,))
    loss = ops.marked_cross_entropy(logits, labels).loss
    loss.backward()
    exact = logits.detach().float().requires_grad_()
    ops.marked_cross_entropy(exact, labels).loss.backward()
    torch.testing.assert_close(logits.grad, exact.grad.to(dtype))


def test_empty_batch_behaves_as_torchs():
    logits = torch.empty(0, 5, requires_grad=True)
    labels = torch.empty(0, dtype=torch.long)
    assert ops.marked_cross_entropy(logits, labels).loss.isnan()
    assert ops.marked_cross_entropy(logits, labels, reduction="sum").loss == 0


@pytest.mark.parametrize("with_gradient", [True, False])
def test_marked_cross_entropy_passes_opcheck(with_gradient):
    logits, labels, weight = torch.randn(6, 5), torch.tensor([0, 4, 3, 2, 1, -100]), torch.rand(6)
    for group in (None, torch.tensor([0, 1, 0, 1, 0, 1])):
        torch.library.opcheck(
            torch.ops.wmengine.marked_cross_entropy.default,
            (logits, labels, weight, group, 2, 0.1, -100, True, with_gradient),
        )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"labels": torch.tensor([0, 5, 1])}, ValueError, "row 1 has label 5"),
        ({"labels": torch.tensor([0, -3, 1])}, ValueError, "row 1 has label -3"),
        ({"labels": torch.tensor([0, 1])}, ValueError, "labels must have shape"),
        ({"labels": torch.rand(3)}, TypeError, "soft labels"),
        ({"group": torch.tensor([0, 1, 2]), "groups": 2}, ValueError, "row 2 has label 2 and group 2"),
        ({"weight": torch.ones(2)}, ValueError, "weight must have shape"),
        ({"logits": torch.ones(3, 5, 2)}, ValueError, "logits must have 2"),
        ({"logits": torch.ones(3, 0)}, ValueError, "at least one class"),
        ({"logits": torch.ones(3, 5, dtype=torch.int32)}, TypeError, "logits must be float32"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be"),
        ({"reduction": "none"}, ValueError, "reduction must be one of"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
    ],
)
def test_bad_cross_entropy_arguments_are_named(arguments, error, words):
    merged = {"logits": torch.randn(3, 5), "labels": torch.tensor([0, 1, 2]), **arguments}
    with pytest.raises(error, match=words):
        ops.marked_cross_entropy(merged.pop("logits"), merged.pop("labels"), **merged)
