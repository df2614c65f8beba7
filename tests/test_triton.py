"""Triton kernels against the reference: on the GPU where there is one, else in Triton's interpreter on CPU tensors.

The interpreter runs a program at a time in about a millisecond, so shapes are small. What it cannot show, that each
kernel compiles for a GPU and keeps its registers, the last test shows with the real compiler, which needs no GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (it comes with torch on Linux)")

import triton.language as tl  # noqa: E402

from tests.closeness import assert_close  # noqa: E402
from wmengine.kernels import cross_entropy, embedding_loss, philox  # noqa: E402
from wmengine.kernels.layers import address_table  # noqa: E402
from wmengine.ops import reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEYS = [0xFEDCBA9876543210, 5, 2**63, 2**64 - 1, 11]

# The interpreter computes on NumPy arrays, masked lanes too.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), pytest.mark.slow]


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


# The generator


@triton.jit
def words_kernel(counters, words, key, domain: tl.constexpr):
    i = tl.arange(0, 64)
    w0, w1, w2, w3 = philox.philox4x32(tl.load(counters + i), tl.load(counters + 64 + i), domain, tl.load(key))
    tl.store(words + i, w0.to(tl.int32, bitcast=True))
    tl.store(words + 64 + i, w1.to(tl.int32, bitcast=True))
    tl.store(words + 128 + i, w2.to(tl.int32, bitcast=True))
    tl.store(words + 192 + i, w3.to(tl.int32, bitcast=True))


@triton.jit
def normals_kernel(counters, values, key):
    i = tl.arange(0, 64)
    z0, z1, z2, z3 = philox.normal_values(tl.load(counters + i), tl.load(counters + 64 + i), tl.load(key))
    tl.store(values + i, z0)
    tl.store(values + 64 + i, z1)
    tl.store(values + 128 + i, z2)
    tl.store(values + 192 + i, z3)


def generated(kernel, dtype, key, *settings):
    counters = np.random.default_rng(key % 997).integers(0, 2**32, size=(2, 64), dtype=np.uint32)
    out = torch.empty((4, 64), dtype=dtype, device=DEVICE)
    held = torch.from_numpy(np.array([key], np.uint64).view(np.int64)).to(DEVICE)
    kernel[(1,)](torch.from_numpy(counters.astype(np.int64)).to(DEVICE), out, held, *settings)
    return counters, out.cpu().numpy()


@pytest.mark.parametrize("key", KEYS)
def test_words_are_philox(key):
    counters, words = generated(words_kernel, torch.int32, key, 4)
    counter = np.stack([counters[0], counters[1], np.zeros(64, np.uint32), np.full(64, 4, np.uint32)], axis=-1)
    np.testing.assert_array_equal(words.view(np.uint32).T, reference.philox4x32(counter, key))


def test_normal_values_are_box_and_mullers():
    key = KEYS[0]
    counters, values = generated(normals_kernel, torch.float32, key)
    counter = np.stack([counters[0], counters[1], np.zeros(64, np.uint32), np.full(64, 5, np.uint32)], axis=-1)
    words = reference.philox4x32(counter, key).astype(np.float64)
    for pair in (0, 2):
        radius = np.sqrt(-2 * np.log((words[:, pair] // 256 + 1) * 2.0**-24))
        angle = 2 * np.pi * (words[:, pair + 1] // 256) * 2.0**-24
        np.testing.assert_allclose(values[pair], radius * np.cos(angle), atol=3e-6)
        np.testing.assert_allclose(values[pair + 1], radius * np.sin(angle), atol=3e-6)


# embedding_loss


def embed(weights, bits, carrier, projection, link="bce", margin=0.8, scale=0.05, outer=1.0):
    """(loss, y, gradients) of the kernels, gradients already times `outer`."""
    settings = (KEYS[: len(weights)], carrier, projection, scale)
    loss, y, residual, norms = embedding_loss.forward(weights, bits, *settings, link, margin)
    gradients = embedding_loss.backward(torch.tensor(outer, device=DEVICE), weights, residual, norms, *settings)
    return loss, y, gradients


def embed_reference(weights, bits, carrier, projection, link="bce", margin=0.8, scale=0.05):
    arrays = [weight.detach().cpu().float().numpy() for weight in weights]
    return reference.embedding_loss(
        arrays, KEYS[: len(weights)], bits.cpu().numpy(), carrier=carrier, projection=projection, link=link,
        margin=margin, scale=scale,
    )  # fmt: skip


def assert_embeds_as_the_reference(weights, bits, carrier, projection, tolerance=1e-5, **settings):
    loss, y, gradients = embed(weights, bits, carrier, projection, outer=1.5, **settings)
    expected_loss, expected_y, expected = embed_reference(weights, bits, carrier, projection, **settings)
    assert_close(loss, expected_loss, tolerance)
    assert_close(y, expected_y, tolerance)
    for weight, gradient, wanted in zip(weights, gradients, expected, strict=True):
        assert gradient.dtype == weight.dtype
        assert_close(gradient, 1.5 * wanted, tolerance if weight.dtype == torch.float32 else 0.01)


def layers():
    """Ragged layers, longer and shorter than a block of signs, one of them with a dead filter."""
    weights = [random(7, 3, 3, 3, seed=1), random(5, 1000, seed=2), random(3, 5, seed=3)]
    weights[0][2] = 0
    return weights


def bits_of(total):
    return (torch.arange(total, device=DEVICE) * 7 % 5 % 2).to(torch.uint8)


@pytest.mark.parametrize("carrier", ["unit_filters", "unit_filter_mean"])
def test_signs_turn_filters_around(carrier):
    weights, bits = layers(), bits_of(50)
    signs = [torch.tensor([1.0, -1.0] * len(w))[: len(w)].to(DEVICE) for w in weights]
    settings = (KEYS[: len(weights)], carrier, "sketch", 0.05)
    _, y, residual, norms = embedding_loss.forward(weights, bits, *settings, "bce", 0.8, torch.cat(signs))
    gradients = embedding_loss.backward(torch.tensor(1.0, device=DEVICE), weights, residual, norms, *settings)
    turned = [w * s.reshape(-1, *[1] * (w.ndim - 1)) for w, s in zip(weights, signs, strict=True)]
    _, expected, wanted = embed_reference(turned, bits, carrier, "sketch")
    assert_close(y, expected)
    for gradient, sign, by_turned in zip(gradients, signs, wanted, strict=True):
        assert_close(gradient, by_turned * sign.cpu().numpy().reshape(-1, *[1] * (by_turned.ndim - 1)))


@pytest.mark.parametrize("carrier", reference.CARRIERS)
@pytest.mark.parametrize(("projection", "total"), [("sketch", 50), ("rademacher", 5), ("gaussian", 3)])
def test_every_carrier_and_projection_equals_the_reference(carrier, projection, total):
    assert_embeds_as_the_reference(layers(), bits_of(total), carrier, projection)


@pytest.mark.parametrize("link", reference.LINKS)
def test_every_link_equals_the_reference(link):
    # y is of order 1: a hinge has bits on both sides, a periodic link goes around more than once
    assert_embeds_as_the_reference(layers(), bits_of(40), "flat", "sketch", 3e-5, link=link, scale=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("total", [1, 32, 33, 256, 2048, 4096, 8192])
@pytest.mark.parametrize("carrier", ["flat", "unit_filters"])
def test_sketches_of_any_length_equal_the_reference(carrier, total):
    # 9 000 weights: runs shorter than a block of signs, as long as one, and longer
    assert_embeds_as_the_reference([random(3, 3000), random(4, 7)], bits_of(total), carrier, "sketch")


@pytest.mark.slow
@pytest.mark.parametrize("total", [1, 64, 300, 512, 2000, 8192])
@pytest.mark.parametrize("carrier", ["unit_filters", "unit_filter_mean"])
def test_filters_of_any_length_equal_the_reference(carrier, total):
    # shorter and longer than a block of signs and than what a filter's lanes take at a time, as long, and of one weight
    for sizes in (
        [(41, 1), (6, 31), (5, 32), (9, 100), (2, 511)],
        [(5, 512), (3, 513), (3, 4096), (3, 4097), (1, 9001)],
    ):
        weights = [random(*size, seed=seed) for seed, size in enumerate(sizes)]
        loss, y, gradients = embed(weights, bits_of(total), carrier, "sketch")
        expected_loss, expected_y, expected = embed_reference(weights, bits_of(total), carrier, "sketch")
        assert_close(loss, expected_loss, 1e-5)
        assert_close(y, expected_y, 1e-5)
        for gradient, wanted in zip(gradients, expected, strict=True):
            assert_close(gradient, wanted, 1e-5, at_least=1.0)  # that of a filter of one weight is 0


@pytest.mark.slow
@pytest.mark.parametrize(("projection", "total"), [("rademacher", 37), ("gaussian", 33)])
def test_dense_matrices_of_more_rows_than_a_program_takes(projection, total):
    assert_embeds_as_the_reference([random(3, 50)], bits_of(total), "flat", projection)


@pytest.mark.parametrize("carrier", reference.CARRIERS)
def test_dtypes_may_be_mixed_and_gradients_come_back_in_each(carrier):
    weights = [random(4, 30), random(3, 40, dtype=torch.bfloat16), random(5, 20), random(6, 9, dtype=torch.float16)]
    assert_embeds_as_the_reference(weights, bits_of(32), carrier, "sketch")


@pytest.mark.parametrize("count", [1, 16, 17, 64, 65])
def test_addresses_are_those_of_the_tensors_and_never_zero(count):
    tensors = [torch.empty(0 if index == 3 else 5, device=DEVICE) for index in range(count)]
    table = address_table(tensors, torch.device(DEVICE)).tolist()
    assert len(table) == (16 if count <= 16 else -(-count // 64) * 64)
    for tensor, address in zip(tensors, table, strict=False):
        assert address == tensor.data_ptr() or tensor.numel() == 0
    assert all(address in {tensor.data_ptr() for tensor in tensors} - {0} for address in table)


def test_empty_layers_have_empty_gradients():
    weights = [random(0, 3), random(4, 30), random(3, 0, 2)]
    _, y, gradients = embed(weights, bits_of(32), "unit_filters", "sketch")
    _, expected_y, expected = reference.embedding_loss(
        [weights[1].cpu().numpy()], KEYS[1:2], bits_of(32).cpu().numpy(),
        carrier="unit_filters", projection="sketch", link="bce", margin=0.8, scale=0.05,
    )  # fmt: skip
    assert [tuple(gradient.shape) for gradient in gradients] == [(0, 3), (4, 30), (3, 0, 2)]
    assert_close(y, expected_y, 1e-5)
    assert_close(gradients[1], expected[0], 1e-5)


@pytest.mark.parametrize("carrier", ["unit_filters", "unit_filter_mean"])
def test_filters_scaled_to_the_ends_of_float32_keep_their_direction(carrier):
    weight = random(5, 60)
    scaled = weight * torch.tensor([1e-30, 1e-20, 1.0, 1e20, 1e30], device=DEVICE)[:, None]
    plain, stretched = (embed([w], bits_of(32), carrier, "sketch") for w in (weight, scaled))
    assert_close(stretched[1], plain[1].cpu().double().numpy(), 1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in stretched[2])


def test_the_loss_follows_the_live_weights():
    weights = layers()
    before = embed(weights, bits_of(32), "flat", "sketch")[0]
    for weight in weights:
        weight *= -5
    after = embed(weights, bits_of(32), "flat", "sketch")[0]
    assert abs(after - before) > 0.01 * abs(before)
    assert_close(after, embed_reference(weights, bits_of(32), "flat", "sketch")[0], 1e-5)


def test_weights_of_any_memory_layout_give_the_same():
    weight = random(6, 4, 3, 3)
    strided = weight.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    for plain, other in zip(
        embed([weight], bits_of(32), "unit_filters", "sketch")[2],
        embed([strided], bits_of(32), "unit_filters", "sketch")[2],
        strict=True,
    ):
        assert torch.equal(plain, other)


def test_a_nan_weight_reaches_the_loss():
    weights = [random(4, 30), random(3, 40)]
    weights[1][0, 0] = float("nan")
    for carrier, link in zip(reference.CARRIERS, reference.LINKS, strict=True):
        assert torch.isnan(embed(weights, bits_of(32), carrier, "sketch", link=link)[0]), (carrier, link)


@pytest.mark.parametrize("carrier", reference.CARRIERS)
def test_the_same_input_gives_the_same_bits_twice(carrier):
    first, second = (embed([random(4, 30), random(3, 40)], bits_of(50), carrier, "sketch") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


# Sketch and project


@pytest.mark.slow
@pytest.mark.parametrize(
    ("projection", "count", "total"),
    [
        *(("sketch", count, total) for count in (0, 1, 31, 4097, 9001) for total in (1, 50, 256, 4096, 5000)),
        *((kind, count, total) for kind in ("rademacher", "gaussian") for count in (0, 1, 129) for total in (1, 33)),
    ],
)
@pytest.mark.parametrize("key", [KEYS[0], -1])
def test_bare_projections_and_their_adjoints_equal_the_reference(projection, count, total, key):
    w, g, unsigned = random(count, seed=1), random(total, seed=2), key % 2**64
    y = embedding_loss.project(w, key, total, projection, 0.5)
    assert_close(y, 0.5 * reference.projection_sums(w.cpu().numpy(), unsigned, total, projection), 1e-5)
    out = embedding_loss.project_adjoint(g, key, count, projection, 0.5)
    assert_close(out, 0.5 * reference.projection_adjoint(g.cpu().numpy(), unsigned, count, projection), 1e-5)


def test_a_bare_projection_reads_values_at_any_distance():
    w, g = random(900, 2)[:, 1], random(64, 2)[:, 1]
    assert torch.equal(*(embedding_loss.project(x, 3, 40, "sketch", 1.0) for x in (w, w.contiguous())))
    assert torch.equal(*(embedding_loss.project_adjoint(x, 3, 90, "sketch", 1.0) for x in (g, g.contiguous())))


# The real compiler

# A row: the kernel, its warps, the types of its arguments in order, and the sets of constants it is compiled with. An
# argument that is 1 among the constants is what the launcher makes of an integer that happens to be 1.
COMPILE = r"""
import json, re, subprocess, sys, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wmengine.kernels import (
    carriers, cross_entropy, embedding_loss, launches, layers, projection, soft_nearest_neighbor)

LAYERS = {"LAYERS": 32, "DTYPE": tl.float32}
VALUES = [LAYERS | {"SCRATCH": False, "UNIT": True}, LAYERS | {"DTYPE": tl.bfloat16, "SCRATCH": True, "UNIT": False}]
TILES = [(x, launches.chosen("cross_entropy", classes), classes, vector, one) for x, classes, vector, one in (
    ("fp32", 10, 2, {}), ("fp32", 1000, 4, {}), ("bf16", 1000, 8, {}), ("bf16", 8191, 1, {}), ("fp32", 32000, 4, {}),
    ("bf16", 50257, 1, {}), ("fp32", 10**5, 4, {}), ("bf16", 10**5, 8, {}), ("bf16", 10**5 + 1, 1, {}),
    ("fp32", 1, 1, {"rows": 1, "classes": 1, "stride": 1}))]
KERNELS = [
    (layers.addresses_kernel, 1, "*i64" + 16 * " i64", [{}]),
    (layers.many_addresses_kernel, 1, "*i64" + 64 * " i64", [{}]),
    (projection.sketch_tables_kernel, 1, "*i64 *i32 *i32", [{"LAYERS": 1, "BUCKETS": n} for n in (32, 256, 8192)]),
    (projection.sketch_sums_kernel, 8, "*i64 *fp32 *i64 *fp32 *i32 *i32 *fp32",
     [v | {"BUCKETS": n} for v, n in zip(VALUES[:1] * 3 + VALUES[1:], (32, 256, 8192, 256))]),
    (projection.dense_sums_kernel, 2, "*i64 *fp32 *i64 *fp32 *fp32 i32",
     [v | {"PROJECTION": p} for v in VALUES for p in (1, 2)] + [VALUES[0] | {"PROJECTION": 1, "total": 1}]),
    *[(projection.adjoint_kernel, warps, "*fp32 fp32 *fp32 *i64 *fp32 *i64 *i32 *i32 i32",
       [LAYERS | {"BUCKETS": 256, "SCRATCH": p == 1, "PROJECTION": p} for p in kinds])
      for warps, kinds in ((2, (0,)), (4, (0, 1, 2)), (8, (0, 1, 2)))],
    (projection.adjoint_kernel, 4, "*fp32 fp32 *fp32 *i64 *fp32 *i64 *i32 *i32 i32",
     [LAYERS | {"BUCKETS": 32, "SCRATCH": False, "PROJECTION": 1, "total": 1}]),
    (carriers.inverse_norms_kernel, 4, "*i64 *i64 *fp32", [LAYERS]),
    (carriers.column_means_kernel, 4, "*i64 *i64 *fp32 *fp32", [LAYERS | {"UNIT": u} for u in (False, True)]),
    (carriers.filter_gradients_kernel, 4, "*fp32 fp32 *fp32 *i64 *i64 *i64 *fp32 *fp32 *i32 *i32",
     [LAYERS | {"BUCKETS": n, "UNIT": u, "SOURCE": s} for n, u, s in (
         (32, True, 0), (256, True, 0), (8192, True, 0), (256, True, 1), (256, True, 2), (256, False, 2))]),
    (embedding_loss.total_kernel, 8, "*fp32 *fp32 i32 i32 i32 fp32", [{}, {"groups": 1, "width": 1, "total": 1}]),
    (embedding_loss.link_kernel, 4, "*fp32 *u8 *fp32 *fp32 i32 fp32", [{"LINK": link} for link in range(4)]),
    *[(cross_entropy.rows_kernel, tiles.warps,
       f"*{x} *i64 *fp32 *i64 *fp32 *fp32 *fp32 *i8 *{x} i32 i32 i32 i32 fp32 i32",
       [{"WEIGHTED": True, "GROUPED": True, "SMOOTH": kind, "GRADIENT": not kind} | tiles.blocks
        | cross_entropy.row_blocks(tiles, classes, vector) | one for kind in (False, True)])
      for x, tiles, classes, vector, one in TILES],
    *[(cross_entropy.gradient_kernel, tiles.warps,
       f"*fp32 *{x} *i64 *fp32 *fp32 *fp32 *{x} i32 i32 i32 fp32 i32",
       [{"WEIGHTED": False, "VECTOR": vector} | tiles.blocks | one])
      for x, tiles, classes, vector, one in TILES],
    (cross_entropy.gradient_kernel, 8, "*fp32 *fp32 *i64 *fp32 *fp32 *fp32 *fp32 i32 i32 i32 fp32 i32",
     [{"WEIGHTED": True, "VECTOR": 1, "TILE": 1, "STEP": 4096}]),
    (cross_entropy.weights_kernel, 8, "*i64 *fp32 *fp32 i32 i32",
     [{"LABELLED": True, "WEIGHTED": False}, {"LABELLED": False, "WEIGHTED": True}]),
    (cross_entropy.finish_kernel, 8, "*fp32 *i8 *i64 *fp32 *fp32 *fp32 *i64 *fp32 *i32 i32 i32",
     [{"GROUPED": True, "ALONE": False}, {"GROUPED": False, "ALONE": True, "rows": 1, "groups": 1}]),
    (cross_entropy.chunks_kernel, 8, "*fp32 *i32 *fp32 *fp32 *fp32 *i64 i32 i32", [{}, {"groups": 1}]),
    *[(cross_entropy.scale_kernel, 8, f"*{x} *fp32 i32", [{"BLOCK": 4096}]) for x in ("fp32", "bf16")],
    *[(soft_nearest_neighbor.distances_kernel, tile // 8, "*fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32 i32",
       [{"TILE": tile, "STEP": 32}]) for tile in (16, 64)],
    (soft_nearest_neighbor.rows_kernel, 4, "*fp32 *i64 *fp32 *fp32 *fp32 *fp32 i32 i32",
     [{"STEP": 32}, {"STEP": 1024}]),
    (soft_nearest_neighbor.weights_kernel, 4, "*fp32 *fp32 *fp32 *i64 *fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32",
     [{"GRADIENT": True, "STEP": 32}, {"GRADIENT": True, "STEP": 1024}, {"GRADIENT": False, "STEP": 1024}]),
    *[(soft_nearest_neighbor.gradient_kernel, tile // 8, "*fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32 i32",
       [{"TILE": tile, "STEP": 32}]) for tile in (16, 64)],
]

result = []
for kernel, warps, types, variants in KERNELS:
    for constants in variants:
        left = iter(types.split())
        signature, constexprs, hints = {}, {}, {}
        for index, name in enumerate(kernel.arg_names):
            own = None if name.isupper() else next(left)
            if name in constants:
                signature[name], constexprs[(index,)] = "constexpr", constants[name]
            else:
                signature[name] = own
                if own.startswith("*"):
                    hints[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constexprs, hints)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        cubin = compiled.asm["cubin"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
                                   capture_output=True, text=True, check=True).stdout
        result.append({
            "kernel": kernel.__name__,
            "constants": str(constants),
            "elf": cubin[:4] == b"\x7fELF",
            "target": ".target sm_90" in compiled.asm["ptx"],
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        })
json.dump(result, sys.stdout)
"""


@pytest.mark.slow
def test_every_kernel_compiles_to_hopper_machine_code_that_keeps_its_registers(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    compiled = json.loads(run.stdout)
    from wmengine.kernels import carriers, layers, projection, soft_nearest_neighbor

    modules = (carriers, cross_entropy, embedding_loss, layers, projection, soft_nearest_neighbor)
    written = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {one["kernel"] for one in compiled} == written, "a kernel that is not compiled here is not tested"
    for one in compiled:
        assert one["elf"], one
        assert one["target"], one
        # sine and cosine of a large argument keep a table on the stack, on a path that is hardly ever taken
        assert one["stack"] == 0 or "'LINK': 3" in one["constants"], one
