"""What holds for every operator on a GPU: the same bits, any layout, captures, streams, no waiting; its launches."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
from tests import gpu_tensors  # noqa: E402

if not gpu_tensors.THERE:
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from tests.gpu_tensors import DEVICE, KEYS, embed, integers, layers, random, step_inputs, training_step  # noqa: E402
from wmengine import ops  # noqa: E402
from wmengine.kernels import launches  # noqa: E402
from wmengine.ops import cuda, reference  # noqa: E402


def differentiated(loss_of, *tensors):
    """(loss, gradients…) of what `loss_of` gives for the floating tensors among its arguments."""
    tensors = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    loss = loss_of(*tensors)
    return loss, *torch.autograd.grad(loss, [tensor for tensor in tensors if tensor.requires_grad])


def embedded(carrier, projection):
    def loss_of(bits, *weights):
        settings = {"carrier": carrier, "projection": projection, "link": "bce"}
        return ops.embedding_loss(weights, KEYS[: len(weights)], bits, **settings)[0]

    return lambda *tensors: differentiated(loss_of, *tensors)


def marks(total):
    return [integers(total, low=0, high=2, dtype=torch.uint8)]


PACKED = [integers(rows, 32, low=0, high=256, dtype=torch.uint8, seed=rows) for rows in (9, 5000)]
WEIGHTS = [random(33, 41), random(70, 3, 3, 3), random(64, 64, dtype=torch.bfloat16)]
ROWS = [random(65, 1000), integers(65, low=0, high=1000)]

# The inputs of an operator, and a call that returns a tensor or a tuple of them, gradients included.
OPERATORS = {
    "sketch": ([random(70_003)], lambda w: ops.sketch(w, 9, 256)),
    "sketch_adjoint": ([random(8192)], lambda g: ops.sketch_adjoint(g, 9, 70_003)),
    "rademacher": ([random(9001)], lambda w: ops.project(w, 9, 100, "rademacher")),
    "gaussian_adjoint": ([random(100)], lambda g: ops.project_adjoint(g, 9, 9001, "gaussian")),
    "match_counts": (
        [random(450, 100), integers(450)], lambda x, y: tuple(cuda.match_counts(x, y, None, 1, True))
    ),
    "match_counts of halves": (
        [random(45, 9000, dtype=torch.float16), integers(45)], lambda x, y: tuple(cuda.match_counts(x, y, y, 4, True))
    ),
    "label_matches": ([integers(65, 5000), integers(40, 5000, seed=1)], cuda.label_matches),
    "label_matches of few": ([integers(3, 500).int(), integers(2, 500, seed=1)], cuda.label_matches),
    "bit_matches": (PACKED, lambda messages, registry: cuda.bit_matches(messages, registry, 250)),
    "best_bit_matches": (PACKED, lambda messages, registry: cuda.best_bit_matches(messages, registry, 250, 20)),
    "embedding_loss": ([*marks(256), *WEIGHTS], embedded("unit_filters", "sketch")),
    "embedding_loss of means": ([*marks(40), *WEIGHTS], embedded("unit_filter_mean", "rademacher")),
    "embedding_loss of all": ([*marks(40), *WEIGHTS], embedded("flat", "gaussian")),
    "marked_cross_entropy": (
        ROWS, lambda *tensors: differentiated(lambda x, y: ops.marked_cross_entropy(x, y).loss, *tensors)
    ),
    "soft_nearest_neighbor": (
        [random(65, 32), integers(65, low=0, high=4)],
        lambda *tensors: differentiated(lambda x, y: ops.soft_nearest_neighbor(x, y, 32.0), *tensors),
    ),
}  # fmt: skip


@pytest.fixture(params=list(OPERATORS))
def operator(request):
    """(inputs of its own, call → list of tensors), called once: what is compiled and uploaded once is then there."""
    inputs, call = OPERATORS[request.param]
    inputs = [tensor.clone() for tensor in inputs]

    def results(*tensors):
        result = call(*tensors)
        return [result] if isinstance(result, torch.Tensor) else list(result)

    results(*inputs)
    torch.cuda.synchronize()
    return inputs, results


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_every_operator_gives_the_same_bits_twice(operator):
    inputs, call = operator
    expected = call(*inputs)
    for _ in range(5):
        assert_same(call(*inputs), expected)


def test_every_operator_reads_any_memory_layout(operator):
    inputs, call = operator
    strided = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in inputs]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_same(call(*strided), call(*inputs))


def test_every_captured_operator_follows_its_inputs(operator):
    inputs, call = operator
    before = call(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*inputs)
    for _ in range(2):
        for tensor in inputs:
            tensor.copy_(tensor.roll(1, 0) if tensor.ndim == 1 else tensor.flip(0).flip(1))
        graph.replay()
        expected = call(*inputs)
        assert_same(captured, expected)
        assert not all(torch.equal(one, other) for one, other in zip(before, expected, strict=True))


def test_no_operator_waits_for_the_gpu(operator):
    inputs, call = operator
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_operator_runs_on_the_current_stream(operator):
    inputs, call = operator
    changed = [tensor.roll(1, 0) for tensor in inputs]
    expected = call(*changed)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # on another stream the operator would read the inputs before they are changed
        for tensor, new in zip(inputs, changed, strict=True):
            tensor.copy_(new)
        actual = call(*inputs)
    stream.synchronize()
    assert_same(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_operator_runs_where_its_inputs_are(operator):
    inputs, call = operator
    actual = call(*(tensor.to("cuda:1") for tensor in inputs))
    assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda:1") for tensor in actual)
    assert_same([tensor.to(DEVICE) for tensor in actual], call(*inputs))


# Launches


@pytest.mark.parametrize("projection", reference.PROJECTIONS)
def test_launches_that_tuning_may_choose_give_the_same_bits(projection, monkeypatch):
    kernel = "sketch_adjoint" if projection == "sketch" else "dense_adjoint"
    inputs, call = [*marks(40), *WEIGHTS], embedded("flat", projection)
    expected = call(*inputs)
    row = launches.size_class(kernel, 1)
    assert row.others
    for launch in row.others:
        monkeypatch.setitem(launches.TABLE, kernel, (launches.SizeClass(float("inf"), launch),))
        assert_same(call(*inputs), expected)


def test_tuning_measures_keeps_and_uses_what_it_found(monkeypatch, tmp_path):
    inputs, call = [*marks(40), *WEIGHTS], embedded("flat", "sketch")
    expected = call(*inputs)
    monkeypatch.setattr(launches, "_TUNED", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("WMENGINE_AUTOTUNE", "1")
    assert_same(call(*inputs), expected)
    kept = launches.cache_file().read_text()
    assert kept.count("sketch_adjoint") == 2  # float32 and bfloat16
    assert torch.cuda.get_device_name() in kept
    assert_same(call(*inputs), expected)
    assert launches.cache_file().read_text() == kept


# Torch's own checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_pass_opcheck(dtype):
    weights = [weight.detach() for weight in layers(dtype)]
    keys = [3, -5, -1, 77]
    bits = torch.ones(40, dtype=torch.uint8, device=DEVICE)
    check, operators = torch.library.opcheck, torch.ops.wmengine
    check(operators.project.default, (random(300), -7, 40, "sketch", False))
    check(operators.project.default, (random(40), -7, 300, "gaussian", True))
    settings = ("unit_filters", "sketch")
    check(operators.embedding_loss.default, (weights, bits, keys, *settings, 0.1, "bce", 1.0, None))
    _, _, residual, norms = operators.embedding_loss(weights, bits, keys, *settings, 0.1, "bce", 1.0, None)
    one = torch.ones((), device=DEVICE)
    check(operators.embedding_loss_backward.default, (one, weights, residual, norms, keys, *settings, 0.1))
    logits, labels = random(8, 10, dtype=dtype), torch.arange(8, device=DEVICE)
    check(operators.marked_cross_entropy.default, (logits, labels, None, None, 1, 0.0, -100, True, True))


def test_a_compiled_training_step_gives_what_the_plain_one_gives():
    inputs = step_inputs()
    weights, logits, labels, bits = inputs

    def loss_of(weights, logits):
        marked = ops.marked_cross_entropy(logits, labels)
        return marked.loss + embed(weights, bits, carrier="unit_filters", projection="sketch", link="bce")[0]

    loss = torch.compile(loss_of, fullgraph=True)(weights, logits)
    gradients = torch.autograd.grad(loss, [*weights, logits])
    expected_loss, expected = training_step(*inputs)
    torch.testing.assert_close(loss, expected_loss)
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_step_compiled_into_cuda_graphs_gives_what_the_plain_one_gives():
    weights, logits, labels, bits = step_inputs()

    def loss_of(weights, logits):
        marked = ops.marked_cross_entropy(logits, labels)
        return marked.loss + embed(weights, bits, carrier="unit_filters", projection="sketch", link="bce")[0]

    captured = torch.compile(loss_of, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # it warms up, captures, and replays
        torch.compiler.cudagraph_mark_step_begin()
        gradients = [each.clone() for each in torch.autograd.grad(captured(weights, logits), [*weights, logits])]
    _, expected = training_step(weights, logits, labels, bits)
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
