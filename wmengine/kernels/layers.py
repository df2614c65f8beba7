"""The table that lets one launch serve many layers: built and cached on the host, read by every program.

A *table* int64[FIELDS, LAYERS] describes the layers of one dtype. LAYERS is a power of two, and the columns that fill
it up begin at the largest integer, so that no item of a grid falls to them; a program finds its layer by comparing its
item's number with the first item of each.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from wmengine.kernels import launches

Tensor = torch.Tensor

# Fields of the table.
KEY = tl.constexpr(0)
FILTERS = tl.constexpr(1)  # rows O of the weight
COLUMNS = tl.constexpr(2)  # weights K of a filter
COUNT = tl.constexpr(3)  # values that the carrier reads: O·K, or K for a mean
FIRST_FILTER = tl.constexpr(4)  # where the layer's inverse norms stand
FIRST_VALUE = tl.constexpr(5)  # where its values stand in a float32 scratch array
FIRST_BLOCK = tl.constexpr(6)  # blocks of 4096 values before it
FIRST_GROUP = tl.constexpr(7)  # partial sums before it
GROUPS = tl.constexpr(8)  # partial sums of its own
FIRST_FILTER_TILE = tl.constexpr(9)
FIRST_COLUMN_TILE = tl.constexpr(10)
FIELDS = 11

BLOCK = tl.constexpr(4096)  # values whose signs come from one counter a lane
GAUSSIAN_UNIT = tl.constexpr(1024)  # values that a program of a Gaussian projection takes at a time
FILTER_TILE = tl.constexpr(4)  # filters that one program of the norms and of the gradient takes
COLUMN_TILE = tl.constexpr(32)  # columns that one program of the means takes

SKETCH = tl.constexpr(0)
RADEMACHER = tl.constexpr(1)
GAUSSIAN = tl.constexpr(2)


@triton.jit
def field(table, index: tl.constexpr, layer, LAYERS: tl.constexpr):
    """One field of one layer."""
    return tl.load(table + index * LAYERS + layer)


@triton.jit
def find_layer(table, index: tl.constexpr, item, LAYERS: tl.constexpr):
    """(layer of an item, number of the item within the layer); field ``index`` holds each layer's first item."""
    first = tl.load(table + index * LAYERS + tl.arange(0, LAYERS))
    layer = tl.sum((first <= item).to(tl.int32), axis=0) - 1
    return layer, item - field(table, index, layer, LAYERS)


@triton.jit
def layer_values(pointers, scratch, table, layer, DTYPE: tl.constexpr, SCRATCH: tl.constexpr, LAYERS: tl.constexpr):
    """Where a layer's values begin: in a tensor of its own, or in a float32 scratch array of all layers."""
    if SCRATCH:
        base = scratch + field(table, FIRST_VALUE, layer, LAYERS)
    else:
        base = tl.load(pointers + layer).to(tl.pointer_type(DTYPE))
    return base


@triton.jit(do_not_specialize=[f"a{index}" for index in range(16)])
def addresses_kernel(table, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15):
    """table[0 … 15] = the addresses: as arguments they need no copy to wait for, and a captured graph holds them."""
    tl.store(table + 0, a0)
    tl.store(table + 1, a1)
    tl.store(table + 2, a2)
    tl.store(table + 3, a3)
    tl.store(table + 4, a4)
    tl.store(table + 5, a5)
    tl.store(table + 6, a6)
    tl.store(table + 7, a7)
    tl.store(table + 8, a8)
    tl.store(table + 9, a9)
    tl.store(table + 10, a10)
    tl.store(table + 11, a11)
    tl.store(table + 12, a12)
    tl.store(table + 13, a13)
    tl.store(table + 14, a14)
    tl.store(table + 15, a15)


@triton.jit(do_not_specialize=[f"a{index}" for index in range(64)])
def many_addresses_kernel(
    table, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21,
    a22, a23, a24, a25, a26, a27, a28, a29, a30, a31, a32, a33, a34, a35, a36, a37, a38, a39, a40, a41, a42,
    a43, a44, a45, a46, a47, a48, a49, a50, a51, a52, a53, a54, a55, a56, a57, a58, a59, a60, a61, a62, a63,
):  # fmt: skip
    """table[0 … 63] = the addresses."""
    addresses_kernel(table, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
    addresses_kernel(table + 16, a16, a17, a18, a19, a20, a21, a22, a23, a24, a25, a26, a27, a28, a29, a30, a31)
    addresses_kernel(table + 32, a32, a33, a34, a35, a36, a37, a38, a39, a40, a41, a42, a43, a44, a45, a46, a47)
    addresses_kernel(table + 48, a48, a49, a50, a51, a52, a53, a54, a55, a56, a57, a58, a59, a60, a61, a62, a63)


def address_table(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """int64 addresses of `tensors` on the device, written on the current stream.

    Places that no tensor needs, and those of empty tensors, hold an address too: Triton takes 0 for an int32, and would
    compile the kernel again for every number of tensors.
    """
    name, kernel, width = "addresses", addresses_kernel, 16
    if len(tensors) > width:
        name, kernel, width = "many_addresses", many_addresses_kernel, 64
    size = -(-len(tensors) // width) * width
    table = torch.empty(size, dtype=torch.int64, device=device)
    addresses = [tensor.data_ptr() for tensor in tensors]
    spare = max(addresses)
    addresses = [address or spare for address in addresses] + [spare] * (size - len(tensors))
    options = launches.chosen(name).options()
    for first in range(0, size, width):
        kernel[(1,)](table[first:], *addresses[first : first + width], **options)
    return table


@dataclass(frozen=True)
class Batch:
    """The layers of one dtype: what one launch can take. Sizes count items of the kernels' grids."""

    indices: tuple[int, ...]
    dtype: torch.dtype
    table: Tensor
    layers: int
    blocks: int
    groups: int
    filter_tiles: int
    column_tiles: int


@dataclass(frozen=True)
class Plan:
    batches: tuple[Batch, ...]
    filters: int
    values: int
    buckets: int


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])[:-1].astype(np.int64)


@functools.cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` on the device, ready for every stream: the copy is waited for, what the other streams do is not."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "an operator met new weights inside a CUDA graph capture: run the step once before capturing it, so that "
            "its table of layers is on the GPU"
        )
    stream = _upload_stream(device)

    def copied() -> Tensor:
        with torch.cuda.stream(stream):
            uploaded = tensor.pin_memory().to(device, non_blocking=True)
        stream.synchronize()
        return uploaded

    # In a thread of its own: what this one allocates may belong to a graph (torch.compile's reduce-overhead), which
    # wants all of it back.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(copied).result()


# Tables that a captured graph reads: it does so at every replay, whatever the caches below have dropped since.
_CAPTURED: list[Tensor] = []


def in_use(tensor: Tensor) -> Tensor:
    """`tensor`, whose memory now outlives what the current stream is about to do with it."""
    if tensor.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            _CAPTURED.append(tensor)
        else:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


# A plan is a pure function of its arguments, kept because a training loop asks for the same one at every step.
@functools.lru_cache(maxsize=64)
def make_plan(
    shapes: tuple[tuple[int, int], ...],
    dtypes: tuple[torch.dtype, ...],
    keys: tuple[int, ...],
    total: int,
    mean: bool,
    projection: int,
    device: torch.device,
) -> Plan:
    """Tables and grid sizes for weights of `shapes` (filters, weights a filter), a batch for each dtype."""
    sketch = projection == SKETCH.value
    buckets = max(32, triton.next_power_of_2(total)) if sketch else 32
    filters, columns = (np.array(sizes, np.int64) for sizes in zip(*shapes, strict=True))
    counts = columns if mean else filters * columns
    blocks = -(-counts // BLOCK.value)
    unit = GAUSSIAN_UNIT.value if projection == GAUSSIAN.value else max(buckets, BLOCK.value)
    units = -(-counts // unit)
    # About 8 programs for each of an H100's 132 multiprocessors, fewer where partial sums are wide: their traffic must
    # stay small beside the weights', but 4 are needed to hide what loads wait for. Fixed, so that a result does not
    # depend on the card.
    most = min(1056, max(1, 2**21 // (buckets if sketch else total)))
    groups = np.minimum(units, np.maximum(1, most * units // max(1, int(units.sum()))))
    batches = []
    for dtype in dict.fromkeys(dtypes):
        own = np.array([index for index, one in enumerate(dtypes) if one == dtype])
        layers = triton.next_power_of_2(len(own))
        filter_tiles = -(-filters[own] // FILTER_TILE.value)
        column_tiles = -(-columns[own] // COLUMN_TILE.value)
        table = np.zeros((FIELDS, layers), np.int64)
        for name, row, fill in (
            (KEY, np.array([keys[index] for index in own], np.uint64).view(np.int64), 0),
            (FILTERS, filters[own], 0),
            (COLUMNS, columns[own], 1),
            (COUNT, counts[own], 0),
            (FIRST_FILTER, _starts(filters)[own], 0),
            (FIRST_VALUE, _starts(counts)[own], 0),
            (FIRST_BLOCK, _starts(blocks[own]), np.iinfo(np.int64).max),
            (FIRST_GROUP, _starts(groups[own]), np.iinfo(np.int64).max),
            (GROUPS, groups[own], 1),
            (FIRST_FILTER_TILE, _starts(filter_tiles), np.iinfo(np.int64).max),
            (FIRST_COLUMN_TILE, _starts(column_tiles), np.iinfo(np.int64).max),
        ):
            table[name.value] = fill
            table[name.value, : len(own)] = row
        batches.append(
            Batch(
                indices=tuple(int(index) for index in own),
                dtype=dtype,
                table=_upload(table, device),
                layers=layers,
                blocks=int(blocks[own].sum()),
                groups=int(groups[own].sum()),
                filter_tiles=int(filter_tiles.sum()),
                column_tiles=int(column_tiles.sum()),
            )
        )
    return Plan(tuple(batches), int(filters.sum()), int(counts.sum()), buckets)
