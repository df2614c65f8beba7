"""marked_linear_cross_entropy: every chunk, type and shape against the reference, and logits that are never held."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from wmengine import ops
from wmengine.ops import reference, torch_linear_cross_entropy
from wmengine.ops.torch_linear_cross_entropy import rows_of_a_chunk

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LOW = [torch.float16, torch.bfloat16]
SIZES = [(1, 1, 1), (5, 3, 2), (33, 16, 10), (20, 7, 1000), (6, 40, 4099)]


def batch(rows, features, classes, dtype=torch.float32, device="cpu", groups=3):
    """(hidden, head, bias) that want gradients and (labels, weight, group), with hits and an ignored row."""
    generator = torch.Generator().manual_seed(rows * features + classes)

    def normal(*shape, size=1.0):
        return (size * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()

    hidden, head, bias = normal(rows, features), normal(classes, features, size=0.7), normal(classes)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[::2] = (hidden @ head.t() + bias).detach().float().cpu().argmax(dim=1)[::2]
    if rows > 2:
        labels[1] = -100
    weight = torch.rand(rows, generator=generator) + 0.1
    group = torch.randint(0, groups, (rows,), generator=generator)
    return (hidden, head, bias), tuple(x.to(device) for x in (labels, weight, group))


def double(tensor):
    return None if tensor is None else tensor.detach().double().cpu().numpy()


def expected_of(hidden, head, labels, weight=None, group=None, bias=None, **arguments):
    integers = [None if x is None else x.cpu().numpy() for x in (labels, group)]
    with np.errstate(all="ignore"):
        return reference.marked_linear_cross_entropy(
            double(hidden), double(head), integers[0], double(weight), integers[1], bias=double(bias), **arguments
        )


def assert_close(actual, expected, tolerance=1e-5):
    actual = double(actual)
    assert actual.shape == np.shape(expected)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    least = tolerance * np.nanmax(np.abs(expected), initial=0.0) + 5e-7  # what is left of softmax − 1 near 0
    np.testing.assert_allclose(np.nan_to_num(actual), np.nan_to_num(expected), rtol=tolerance, atol=least)


def copies(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_equals_the_reference(device, size, label_smoothing, reduction, chunk):
    (hidden, head, bias), (labels, weight, group) = batch(*size, device=device)
    arguments = {"groups": 3, "label_smoothing": label_smoothing, "reduction": reduction}
    for b in (bias, None):
        hidden.grad = head.grad = bias.grad = None
        result = ops.marked_linear_cross_entropy(hidden, head, labels, weight, group, bias=b, chunk=chunk, **arguments)
        (2.0 * result.loss).backward()
        expected = expected_of(hidden, head, labels, weight, group, b, **arguments)
        assert result.loss.item() == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
        assert_close(result.group_loss, expected.group_loss)
        assert result.group_hits.tolist() == expected.group_hits.tolist()
        if size[2] > 1:  # one class has no gradient but rounding
            assert_close(hidden.grad, 2.0 * expected.by_hidden)
            assert_close(head.grad, 2.0 * expected.by_head)
        if size[2] > 1 and b is not None:
            assert_close(bias.grad, 2.0 * expected.by_bias)
        assert not result.group_loss.requires_grad


def test_every_instruction_set_equals_the_reference(instruction_set):
    (hidden, head, bias), (labels, weight, group) = batch(33, 16, 1003)
    result = ops.marked_linear_cross_entropy(hidden, head, labels, weight, group, bias=bias, groups=3, chunk=8)
    result.loss.backward()
    expected = expected_of(hidden, head, labels, weight, group, bias, groups=3)
    assert result.loss.item() == pytest.approx(expected.loss, rel=1e-5)
    for tensor, wanted in ((hidden, expected.by_hidden), (head, expected.by_head), (bias, expected.by_bias)):
        assert_close(tensor.grad, wanted)


def test_plain_call_equals_torchs_linear_and_cross_entropy():
    (hidden, head, bias), (labels, _, _) = batch(50, 30, 37)
    ours = torch.autograd.grad(
        ops.marked_linear_cross_entropy(hidden, head, labels, bias=bias, chunk=7).loss, (hidden, head, bias)
    )
    torchs = torch.autograd.grad(F.cross_entropy(F.linear(hidden, head, bias), labels), (hidden, head, bias))
    for actual, wanted in zip(ours, torchs, strict=True):
        torch.testing.assert_close(actual, wanted)


@given(
    rows=st.integers(0, 12),
    features=st.integers(0, 6),
    classes=st.integers(1, 40),
    chunk=st.integers(1, 14),
    ignored=st.floats(0, 1),
    reduction=st.sampled_from(["mean", "sum"]),
)
@settings(deadline=None, max_examples=60)
def test_any_size_and_chunk_equal_the_unfused_operator(rows, features, classes, chunk, ignored, reduction):
    (hidden, head, bias), (labels, weight, group) = batch(rows, features, classes)
    labels = torch.where(torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < ignored, -100, labels)
    arguments = {"groups": 3, "reduction": reduction}
    fused = ops.marked_linear_cross_entropy(hidden, head, labels, weight, group, bias=bias, chunk=chunk, **arguments)
    plain = ops.marked_cross_entropy(F.linear(hidden, head, bias), labels, weight, group, **arguments)
    for actual, wanted in zip(fused, plain, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    by_fused = torch.autograd.grad(fused.loss, (hidden, head, bias))
    by_plain = torch.autograd.grad(plain.loss, (hidden, head, bias))
    for actual, wanted in zip(by_fused, by_plain, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_quarter_of_a_million_classes(device):
    (hidden, head, bias), (labels, weight, group) = batch(5, 16, 262_144, device=device)
    result = ops.marked_linear_cross_entropy(hidden, head, labels, weight, group, bias=bias, groups=3, chunk=2)
    result.loss.backward()
    expected = expected_of(hidden, head, labels, weight, group, bias, groups=3)
    assert result.loss.item() == pytest.approx(expected.loss, rel=1e-5)
    assert result.group_hits.tolist() == expected.group_hits.tolist()
    assert_close(hidden.grad, expected.by_hidden, 1e-4)  # BLAS adds 2¹⁸ products, in float32
    assert_close(head.grad, expected.by_head)


# --- memory and work --------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements that any tensor made by torch has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def run_bare(hidden, head, bias, labels, chunk, wanted=(True, True, True), dtype=torch.float32, weight=None):
    arguments = (labels, weight, None, 1, 0.0, -100, True, chunk, dtype, *wanted)
    return torch_linear_cross_entropy._linear_cross_entropy(
        hidden.detach(), head.detach(), None if bias is None else bias.detach(), *arguments
    )


def test_no_array_is_larger_than_a_chunk_of_logits_or_the_head():
    (hidden, head, bias), (labels, _, _) = batch(64, 4, 500)
    with Largest() as largest:
        run_bare(hidden, head, bias, labels, 8)
    assert largest.elements == 8 * 500
    with Largest() as largest:
        run_bare(hidden, head, bias, labels, 2)
    assert largest.elements == 500 * 4


def test_only_what_is_wanted_is_computed():
    (hidden, head, bias), (labels, _, _) = batch(9, 4, 7)
    everything = run_bare(hidden, head, bias, labels, 4)[3:]
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        some = run_bare(hidden, head, bias, labels, 4, wanted)[3:]
        for want, gradient, whole in zip(wanted, some, everything, strict=True):
            assert torch.equal(gradient, whole) if want else gradient.numel() == 0
    with torch.no_grad():
        assert not ops.marked_linear_cross_entropy(hidden, head, labels).loss.requires_grad
    frozen = ops.marked_linear_cross_entropy(hidden, head.detach(), labels, bias=bias.detach())
    frozen.loss.backward()
    assert head.grad is None
    torch.testing.assert_close(hidden.grad, everything[0])


def test_loss_without_a_gradient_is_the_loss_with_one():
    (hidden, head, bias), (labels, weight, group) = batch(33, 8, 70)
    arguments = {"bias": bias, "groups": 3, "chunk": 10, "label_smoothing": 0.1}
    with_gradient = ops.marked_linear_cross_entropy(hidden, head, labels, weight, group, **arguments)
    with torch.no_grad():
        without = ops.marked_linear_cross_entropy(hidden, head, labels, weight, group, **arguments)
    for actual, wanted in zip(without, with_gradient, strict=True):
        torch.testing.assert_close(actual, wanted.detach())


@given(
    rows=st.integers(0, 1 << 24), features=st.integers(0, 1 << 14), classes=st.integers(1, 1 << 20),
    device=st.sampled_from(["cpu", "cuda"]),
)  # fmt: skip
def test_a_chunk_holds_no_more_than_it_says(rows, features, classes, device):
    step = rows_of_a_chunk(rows, features, classes, device)
    least = {"cpu": 1 << 22, "cuda": 1 << 26}[device]
    assert 1 <= step <= max(rows, 1)
    assert step * classes <= max(features * classes, 64 * classes, least)
    chunks = -(-rows // step)
    assert chunks * step - rows < max(chunks, 1)  # spread evenly: no chunk is short by more than one row each
    assert rows_of_a_chunk(rows, features, classes, device, 5) <= 5
    wide = rows_of_a_chunk(rows, features, classes, device, None, torch.bfloat16)
    assert wide * classes <= max(2 * features * classes, 64 * classes, least)


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW)
def test_sixteen_bits_are_summed_in_float32(monkeypatch, device, dtype):
    monkeypatch.setattr(torch_linear_cross_entropy, "_BFLOAT16_ON_CPU", False)
    tensors, (labels, weight, group) = batch(40, 24, 300, dtype=dtype, device=device)
    hidden, head, bias = tensors
    result = ops.marked_linear_cross_entropy(hidden, head, labels, weight, group, bias=bias, groups=3, chunk=8)
    result.loss.backward()
    expected = expected_of(hidden, head, labels, weight, group, bias, groups=3)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(expected.loss, rel=1e-5)  # 16-bit logits would be off by a thousandth
    half_a_step = torch.finfo(dtype).eps / 2
    for tensor, wanted in zip(tensors, (expected.by_hidden, expected.by_head, expected.by_bias), strict=True):
        assert tensor.grad.dtype == dtype
        # On a CPU each gradient is rounded once, when it is done; on a GPU so is the gradient by each logit.
        assert_close(tensor.grad, wanted, half_a_step + 1e-5 if device == "cpu" else 2 * half_a_step)


@pytest.mark.parametrize("rows", [40, 7])
def test_cpu_with_bfloat16_rounds_as_torch_but_sums_in_float32(monkeypatch, rows):
    monkeypatch.setattr(torch_linear_cross_entropy, "_BFLOAT16_ON_CPU", True)
    tensors, (labels, weight, group) = batch(rows, 24, 300, dtype=torch.bfloat16)
    hidden, head, bias = tensors
    result = ops.marked_linear_cross_entropy(hidden, head, labels, weight, group, bias=bias, groups=3, chunk=8)
    ours = torch.autograd.grad(result.loss, tensors)
    expected = expected_of(hidden, head, labels, weight, group, bias, groups=3)
    plain = ops.marked_cross_entropy(F.linear(hidden, head, bias), labels, weight, group, groups=3).loss
    torchs = torch.autograd.grad(plain, tensors)
    assert result.loss.item() == pytest.approx(expected.loss, rel=4e-3)
    for actual, unfused, wanted in zip(
        ours, torchs, (expected.by_hidden, expected.by_head, expected.by_bias), strict=True
    ):
        assert actual.dtype == torch.bfloat16
        ours_off, torchs_off = (np.abs(double(x) - wanted).max() / np.abs(wanted).max() for x in (actual, unfused))
        assert ours_off < 2 * max(torchs_off, 2**-8)  # rounded once more, after the division by Σ w


def test_head_and_hidden_of_two_types_get_gradients_of_their_own():
    (hidden, _, _), (labels, _, _) = batch(20, 6, 30, dtype=torch.bfloat16)
    (_, head, bias), _ = batch(20, 6, 30)
    ops.marked_linear_cross_entropy(hidden, head, labels, bias=bias).loss.backward()
    expected = expected_of(hidden, head, labels, bias=bias)
    assert (hidden.grad.dtype, head.grad.dtype) == (torch.bfloat16, torch.float32)
    assert_close(head.grad, expected.by_head)
    assert_close(hidden.grad, expected.by_hidden, 2**-8)


def test_a_loss_scaler_saves_small_float16_gradients():
    hidden = torch.full((4, 2), 2.0**-15, dtype=torch.float16).requires_grad_()
    head = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1)).mul(1e-3).half().requires_grad_()
    labels = torch.arange(4)
    loss = ops.marked_linear_cross_entropy(hidden, head, labels).loss
    (plain,) = torch.autograd.grad(loss, head, retain_graph=True)
    (scaled,) = torch.autograd.grad(65536.0 * loss, head)
    assert (plain == 0).any()
    assert_close(scaled, 65536.0 * expected_of(hidden, head, labels).by_head, 1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("instructions", [False, True])
def test_under_autocast_the_head_keeps_a_float32_gradient(monkeypatch, device, instructions):
    monkeypatch.setattr(torch_linear_cross_entropy, "_BFLOAT16_ON_CPU", instructions)
    (hidden, head, bias), (labels, _, _) = batch(30, 12, 50, device=device)
    narrow = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ops.marked_linear_cross_entropy(narrow, head, labels, bias=bias, chunk=8).loss
    loss.backward()
    assert (loss.dtype, narrow.grad.dtype, head.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    expected = expected_of(narrow, head, labels, bias=bias)
    if device == "cpu" and not instructions:  # computed in float32 whatever autocast says
        assert loss.item() == pytest.approx(expected.loss, rel=1e-6)
        assert_close(head.grad, expected.by_head)
    else:
        assert loss.item() == pytest.approx(expected.loss, rel=1e-2)
        assert_close(head.grad, expected.by_head, 2e-2)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("weighted", [True, False])
def test_path_of_a_gpu_with_sixteen_bits_in_the_interpreter(monkeypatch, dtype, weighted):
    """Products of 16 bits into float32 exist on GPUs only and are written out here; the kernels are the GPU's."""

    def product(a, b, out):
        assert a.dtype == b.dtype == dtype
        return out.copy_(a.float() @ b.float())

    monkeypatch.setattr(torch_linear_cross_entropy, "_stored", lambda dtype, device: torch.float32)
    monkeypatch.setattr(torch_linear_cross_entropy, "_product", product)
    monkeypatch.setattr(torch_linear_cross_entropy, "_add_product", lambda a, b, out: out.add_(a.float() @ b.float()))
    (hidden, head, bias), (labels, weight, _) = batch(12, 6, 40, dtype=dtype)
    weight = 1e-6 * weight if weighted else None  # a gradient that float16 alone would lose
    loss, group_loss, hits, *gradients = run_bare(hidden, head, bias, labels, 5, dtype=dtype, weight=weight)
    expected = expected_of(hidden, head, labels, weight, bias=bias)
    assert loss.item() == pytest.approx(expected.loss, rel=1e-5)
    assert_close(group_loss, expected.group_loss)
    assert hits.tolist() == expected.group_hits.tolist()
    tolerance = 2 * torch.finfo(dtype).eps  # the interpreter cuts bfloat16 off where a GPU rounds
    for actual, wanted in zip(gradients, (expected.by_hidden, expected.by_head, expected.by_bias), strict=True):
        assert actual.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert_close(actual, wanted, tolerance)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float64_passes_gradcheck(label_smoothing, reduction):
    tensors, (labels, weight, _) = batch(6, 3, 5, dtype=torch.float64)

    def loss(hidden, head, bias):
        return ops.marked_linear_cross_entropy(
            hidden, head, labels, weight, bias=bias, label_smoothing=label_smoothing, reduction=reduction
        ).loss

    assert torch.autograd.gradcheck(loss, tensors)


def test_float64_in_torch_equals_the_reference_in_numpy():
    (hidden, head, bias), (labels, weight, group) = batch(20, 5, 9, dtype=torch.float64)
    result = ops.marked_linear_cross_entropy(hidden, head, labels, weight, group, bias=bias, groups=3)
    result.loss.backward()
    expected = expected_of(hidden, head, labels, weight, group, bias, groups=3)
    assert result.loss.item() == pytest.approx(expected.loss, rel=1e-7)
    assert result.group_hits.tolist() == expected.group_hits.tolist()
    assert_close(head.grad, expected.by_head, 1e-7)
    assert_close(hidden.grad, expected.by_hidden, 1e-7)


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(0, 4, 5), (3, 0, 5), (3, 4, 1), (0, 0, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sizes_of_nothing_and_one_behave_as_torchs(device, size, reduction):
    tensors, (labels, _, _) = batch(*size, device=device)
    labels = labels.clamp(min=0)
    ours = ops.marked_linear_cross_entropy(tensors[0], tensors[1], labels, bias=tensors[2], reduction=reduction).loss
    torchs = F.cross_entropy(F.linear(*tensors), labels, reduction=reduction)
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    wanted = torch.autograd.grad(torchs, tensors)
    for actual, expected in zip(torch.autograd.grad(ours, tensors), wanted, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batch_that_is_all_ignored_behaves_as_torchs(device, reduction):
    tensors, _ = batch(6, 4, 5, device=device)
    labels = torch.full((6,), 3, device=device)
    result = ops.marked_linear_cross_entropy(
        tensors[0], tensors[1], labels, bias=tensors[2], ignore_index=3, reduction=reduction
    )
    torchs = F.cross_entropy(F.linear(*tensors), labels, ignore_index=3, reduction=reduction)
    torch.testing.assert_close(result.loss, torchs, equal_nan=True)
    assert (result.group_loss.tolist(), result.group_hits.tolist()) == ([0.0], [0])
    for gradient in torch.autograd.grad(result.loss, tensors):
        assert not gradient.any()


def test_rows_that_are_ignored_are_not_even_looked_at():
    (hidden, head, _), (labels, _, _) = batch(30, 6, 20)
    labels[5:20] = -100
    kept = labels != -100
    short = ops.marked_linear_cross_entropy(hidden.detach()[kept], head, labels[kept], chunk=4).loss
    (wanted,) = torch.autograd.grad(short, head)
    poisoned = hidden.detach().clone()
    poisoned[7] = float("nan")
    poisoned.requires_grad_()
    loss = ops.marked_linear_cross_entropy(poisoned, head, labels, chunk=4).loss
    by_hidden, by_head = torch.autograd.grad(loss, (poisoned, head))
    assert torch.equal(loss, short)
    assert torch.equal(by_head, wanted)
    assert not by_hidden[~kept].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_that_is_not_finite_poisons_the_loss_and_only_its_own_group(device, bad):
    (hidden, head, bias), (labels, _, _) = batch(9, 4, 30, device=device)
    with torch.no_grad():
        hidden[4, 2] = bad
    group = torch.zeros(9, dtype=torch.long, device=device)
    group[4] = 1
    result = ops.marked_linear_cross_entropy(hidden, head, labels, group=group, bias=bias, groups=2, chunk=2)
    result.loss.backward()
    assert result.loss.isnan()
    assert result.group_loss.isnan().tolist() == [False, True]
    assert result.group_hits.tolist() == [4, 0]  # rows 0, 2, 6 and 8
    assert hidden.grad.isnan().any(dim=1).nonzero()[:, 0].tolist() == [4]
    assert head.grad.isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs_give_what_their_copies_give(device):
    base = torch.randn(60, 40, device=device)
    labels = (torch.arange(40, device=device) // 2)[::2]
    weight = torch.rand(40, device=device)[::2]
    for hidden, head in (
        (base[:40:2, :10], base[40:, 10:20]),
        (base.t()[:20, :10], base.t()[20:, :10]),
        (base[:20, ::4], base[::2, 1::4]),
        (base[:1, :10].expand(20, 10), base[20:40, :10]),
    ):
        results = []
        for h, w in ((hidden, head), (hidden.contiguous(), head.contiguous())):
            leaves = [h.detach().requires_grad_(), w.detach().requires_grad_()]
            loss = ops.marked_linear_cross_entropy(*leaves, labels, weight, chunk=7).loss
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        for actual, wanted in zip(*results, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU a bad label raises")
@pytest.mark.parametrize("label", [-3, 5])
def test_bad_label_makes_the_loss_nan_on_a_gpu(label):
    (hidden, head, _), (labels, _, _) = batch(3, 4, 5, device="cuda")
    labels[2] = label
    assert ops.marked_linear_cross_entropy(hidden, head, labels).loss.isnan()


# --- autograd ---------------------------------------------------------------------------------------------------------


def test_tied_weights_get_both_gradients():
    torch.manual_seed(3)
    embedding, tokens, labels = torch.randn(30, 8), torch.randint(0, 30, (25,)), torch.randint(0, 30, (25,))
    ours, torchs = copies([embedding]), copies([embedding])
    ops.marked_linear_cross_entropy(F.embedding(tokens, ours[0]).tanh(), ours[0], labels, chunk=6).loss.backward()
    F.cross_entropy(F.embedding(tokens, torchs[0]).tanh() @ torchs[0].t(), labels).backward()
    torch.testing.assert_close(ours[0].grad, torchs[0].grad)
    square = torch.randn(6, 6, requires_grad=True)
    labels = torch.arange(6)
    (ours_of_square,) = torch.autograd.grad(ops.marked_linear_cross_entropy(square, square, labels).loss, square)
    (torchs_of_square,) = torch.autograd.grad(F.cross_entropy(square @ square.t(), labels), square)
    torch.testing.assert_close(ours_of_square, torchs_of_square)


def test_gradients_accumulate_over_micro_batches_and_nothing_is_touched_before_backward():
    tensors, (labels, weight, _) = batch(24, 6, 20)
    hidden, head, bias = tensors
    whole = ops.marked_linear_cross_entropy(hidden, head, labels, weight, bias=bias, reduction="sum").loss
    assert hidden.grad is head.grad is bias.grad is None
    whole.backward()
    parts = copies(tensors)
    for first in range(0, 24, 8):
        here = slice(first, first + 8)
        loss = ops.marked_linear_cross_entropy(
            parts[0][here], parts[1], labels[here], weight[here], bias=parts[2], reduction="sum"
        ).loss
        (loss / 4).backward()
    for part, tensor in zip(parts, tensors, strict=True):
        torch.testing.assert_close(4 * part.grad, tensor.grad)


def test_inputs_are_never_overwritten_and_a_second_backward_gives_the_same():
    tensors, (labels, weight, _) = batch(20, 6, 30)
    before = copies(tensors)
    loss = ops.marked_linear_cross_entropy(tensors[0], tensors[1], labels, weight, bias=tensors[2], chunk=6).loss
    first = [x.clone() for x in torch.autograd.grad(loss, tensors, retain_graph=True)]
    scaled = torch.autograd.grad(3.0 * loss, tensors, retain_graph=True)
    second = torch.autograd.grad(loss, tensors)
    for one, three, two in zip(first, scaled, second, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(three, 3.0 * one)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def test_a_second_derivative_is_refused():
    (hidden, head, _), (labels, _, _) = batch(4, 3, 5)
    loss = ops.marked_linear_cross_entropy(hidden, head, labels).loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_same_input_gives_the_same_bits(device, threads):
    tensors, (labels, weight, group) = batch(100, 30, 500, device=device)
    runs = []
    for count in (1, 2, 5):
        threads(count)
        result = ops.marked_linear_cross_entropy(
            tensors[0], tensors[1], labels, weight, group, bias=tensors[2], groups=3, chunk=30
        )
        runs.append([*result, *torch.autograd.grad(result.loss, tensors)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# --- torch's own checks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (False, False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_passes_opcheck(device, wanted, dtype):
    (hidden, head, bias), (labels, weight, group) = batch(6, 3, 5, dtype=dtype, device=device)
    work = torch.float32 if device == "cpu" and dtype == torch.float16 else dtype
    for optional in ((bias, weight, group), (None, None, None)):
        b, w, g = (None if x is None else x.detach() for x in optional)
        torch.library.opcheck(
            torch.ops.wmengine.marked_linear_cross_entropy.default,
            (hidden.detach(), head.detach(), b, labels, w, g, 3, 0.1, -100, True, 2, work, *wanted),
        )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break_and_gives_the_same_bits(autocast, dynamic):
    torch.compiler.reset()

    def step(hidden, head, bias, labels, weight):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            result = ops.marked_linear_cross_entropy(hidden, head, labels, weight, bias=bias, chunk=5)
        return 0.5 * result.loss, result.group_hits

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (12, 17):
        tensors, (labels, weight, _) = batch(rows, 8, 40)
        results = []
        for function in (step, compiled):
            leaves = copies(tensors)
            loss, hits = function(*leaves, labels, weight)
            loss.backward()
            results.append([loss.detach(), hits, *(leaf.grad for leaf in leaves)])
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"labels": torch.tensor([0, 1, 5])}, ValueError, "row 2 has label 5 and group 0"),
        ({"labels": torch.tensor([0, -3, 1])}, ValueError, "row 1 has label -3"),
        ({"labels": torch.tensor([-100, 1, 9])}, ValueError, "row 2 has label 9"),
        ({"labels": torch.tensor([0, 1])}, ValueError, r"labels must have shape \(3,\)"),
        ({"labels": torch.rand(3)}, TypeError, "soft labels"),
        ({"group": torch.tensor([0, 1, 2]), "groups": 2}, ValueError, "row 2 has label 2 and group 2"),
        ({"weight": torch.ones(2)}, ValueError, r"weight must have shape \(3,\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(5,\)"),
        ({"bias": torch.ones(5, dtype=torch.int64)}, TypeError, "bias must be float32"),
        ({"hidden": torch.ones(3, 4, 2)}, ValueError, "hidden must have 2"),
        ({"hidden": torch.ones(3, 4, dtype=torch.int32)}, TypeError, "hidden must be float32"),
        ({"hidden": np.ones((3, 4))}, TypeError, "hidden must be a torch tensor"),
        ({"head": torch.ones(5, 3)}, ValueError, r"head must have shape \(classes, 4\)"),
        ({"head": torch.ones(0, 4)}, ValueError, "at least one class"),
        ({"head": torch.ones(5, 4, device="meta")}, ValueError, "on cpu"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be"),
        ({"reduction": "none"}, ValueError, "reduction must be one of"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"chunk": 2.5}, TypeError, "chunk must be an int"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    merged = {
        "hidden": torch.randn(3, 4), "head": torch.randn(5, 4), "labels": torch.arange(3), "chunk": 1, **arguments,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        ops.marked_linear_cross_entropy(**merged)
