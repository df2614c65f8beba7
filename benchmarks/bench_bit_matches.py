"""`bit_matches`: bit strings read from suspects against a registry, all counts or the ten best rows of each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.harness import COPYING, Aim, Case, Contender
from wmengine import ops


class Size(NamedTuple):
    """`messages` of `bits` each, looked for among `rows`; `best` rows for each, or 0 for the counts of all pairs."""

    messages: int
    rows: int
    bits: int
    best: int


SIZES = [
    *(Size(64, rows, 256, 10) for rows in (100, 1000, 10_000, 100_000)),
    Size(1000, 100_000, 256, 10),
    Size(1, 1_000_000, 256, 10),
    *(Size(64, rows, 256, 0) for rows in (100, 1000, 10_000, 100_000)),
    Size(64, 10_000, 4096, 0),
]
GPU_SIZES = [Size(256, 1_000_000, 256, 0), Size(256, 1_000_000, 256, 10)]
QUICK_SIZES = [Size(8, 50, 64, 0), Size(5, 40, 72, 3)]
NUMPY, GEMM = "NumPy XOR and bitwise_count", "GEMM of ±1"
FAISS, NUMKONG, SIMSIMD, SCIPY = "faiss IndexBinaryFlat", "NumKong", "SimSIMD", "SciPy cdist"
SANE = 100_000_000  # byte comparisons that SciPy needs about a tenth of a second for
AIMS = {
    SIZES[3]: [Aim(FAISS, 1.0)],
    SIZES[4]: [Aim(FAISS, 1.0)],
    SIZES[9]: [Aim(NUMKONG, 1.0), Aim(SIMSIMD, 1.0), Aim(NUMPY, 1.0)],
}


def optional(name: str) -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def numpy_distances(messages: np.ndarray, registry: np.ndarray) -> np.ndarray:
    """int64[S, K] of uint64 words, message by message."""
    return np.stack([np.bitwise_count(registry ^ message).sum(axis=-1, dtype=np.int64) for message in messages])


def library_peers(
    size: Size, bits: np.ndarray, registry_bits: np.ndarray, messages: np.ndarray, registry: np.ndarray, threads: int
) -> tuple[list[Contender], dict[str, str]]:
    """Peers that read packed uint8 rows, and why others are missing. Their own packing is done beforehand."""
    peers, left_out = [], {}
    faiss, numkong, simsimd, scipy = (optional(name) for name in ("faiss", "numkong", "simsimd", "scipy.spatial"))
    for name, module in ((FAISS, faiss), (NUMKONG, numkong), (SIMSIMD, simsimd), (SCIPY, scipy)):
        if module is None:
            left_out[name] = "not installed"
    if faiss is not None:
        if size.best:
            faiss.omp_set_num_threads(threads)
            index = faiss.IndexBinaryFlat(size.bits)
            index.add(registry)
            peers.append(Contender(FAISS, lambda: index.search(messages, size.best), holds=registry.nbytes))
        else:
            left_out[FAISS] = "searches for the best rows only"
    if size.best:
        for name, module in ((NUMKONG, numkong), (SIMSIMD, simsimd), (SCIPY, scipy)):
            if module is not None:
                left_out[name] = "counts all pairs only"
        return peers, left_out
    if numkong is not None:
        packed = numkong.hammings_pack(registry, dtype="uint1")
        out = numkong.zeros((size.messages, size.rows), dtype="uint32")
        edges = [size.messages * part // threads for part in range(threads + 1)]
        pool = ThreadPoolExecutor(max(1, threads - 1))

        def part(begin: int, end: int) -> Any:
            return numkong.hammings_packed(messages, packed, out=out, start_row=begin, end_row=end)

        def by_parts() -> Any:
            # The caller works as well: it has a core to itself, and would only wait there.
            own, *others = pairwise(edges)
            jobs = [pool.submit(part, *other) for other in others]
            return [part(*own), *(job.result() for job in jobs)]

        peers.append(Contender(NUMKONG, by_parts, holds=registry.nbytes))
    if simsimd is not None:
        peers.append(
            Contender(
                SIMSIMD, lambda: simsimd.cdist(messages, registry, metric="hamming", dtype="bin8", threads=threads)
            )
        )
    if scipy is not None:
        if bits.size * size.rows <= SANE:
            left, right = bits.astype(bool), registry_bits.astype(bool)
            peers.append(Contender(SCIPY, lambda: scipy.distance.cdist(left, right, "hamming")))
        else:
            left_out[SCIPY] = "compares a byte a bit: seconds"
    return peers, left_out


def test_bit_matches(size: Size, compare: Callable[[Case], None], device: str) -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2, (size.messages, size.bits), dtype=np.uint8)
    registry_bits = rng.integers(0, 2, (size.rows, size.bits), dtype=np.uint8)
    best = size.best or None
    place = (lambda array: array) if device == "cpu" else (lambda array: torch.from_numpy(array).to(device))
    messages, registry = ops.pack_bits(place(bits)), ops.pack_bits(place(registry_bits))
    packed, packed_registry = ops.pack_bits(bits).data, ops.pack_bits(registry_bits).data
    words, words_registry = (np.ascontiguousarray(rows).view(np.uint64) for rows in _to_words(packed, packed_registry))

    def ours() -> Any:
        return ops.bit_matches(messages, registry, best)

    distances = numpy_distances(words[:8], words_registry)
    if best is None:
        assert np.array_equal(torch.as_tensor(ours())[:8].cpu().numpy(), size.bits - distances)
    else:
        counts, rows = (torch.as_tensor(part)[:8].cpu().numpy() for part in ours())
        assert np.array_equal(rows, np.argsort(distances, axis=1, kind="stable")[:, :best])
        assert np.array_equal(counts, size.bits - np.take_along_axis(distances, rows, axis=1))

    stored = torch.float32 if device == "cpu" else torch.bfloat16
    signs, signs_registry = (torch.from_numpy(part).to(device).to(stored) * 2 - 1 for part in (bits, registry_bits))

    def by_gemm() -> Any:
        products = signs @ signs_registry.T
        return products if best is None else products.topk(best, dim=1)

    gemm = GEMM if device == "cpu" else f"{GEMM}, bfloat16"
    opponents = [Contender(gemm, by_gemm, holds=stored.itemsize * (signs.numel() + signs_registry.numel()))]
    left_out = {}
    if device == "cpu":
        libraries, left_out = library_peers(size, bits, registry_bits, packed, packed_registry, torch.get_num_threads())
        opponents = [*libraries, *opponents]
        if best is None:
            opponents.append(Contender(NUMPY, lambda: numpy_distances(words, words_registry)))
    else:
        left_out[NUMPY] = left_out[FAISS] = "the bits are on the GPU"
    source = torch.from_numpy(packed_registry).to(device).flatten()
    source = source[: source.numel() // 8 * 8].view(torch.int64)
    room = torch.empty(size.messages, size.rows if best is None else 3 * best, dtype=torch.int32, device=device)
    compare(
        Case(
            operator="bit_matches",
            what="bit_matches" if best is None else f"bit_matches, best {best}",
            size=f"{size.messages} × {size.rows} × {size.bits}",
            bytes_moved=packed.nbytes + packed_registry.nbytes + 4 * room.numel(),
            ours=ours,
            floor=Contender("read and write", lambda: (source.sum(), room.fill_(1))),
            peers=opponents,
            left_out=left_out,
            aims=AIMS.get(size, []),
            headline=size in (SIZES[4], SIZES[9]),
            gpu_bound=COPYING,
            operations=size.messages * size.rows * size.bits,
            axis=("rows", size.rows) if (size.messages, size.bits) == (64, 256) else None,
        )
    )


def _to_words(*packed: np.ndarray) -> list[np.ndarray]:
    """Rows filled up with zero bytes to whole 64-bit words."""
    return [np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8))) for rows in packed]
