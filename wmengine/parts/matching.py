"""How a mark's carriers are found again in a suspect: by shape and by place in the order of execution, not by name.

Exporters rename, fold and transpose. What survives is a tensor's shape and its place in the order of execution; names
count in files without a graph only, which seldom passed an exporter. Where several pairings are possible, each one is a
hypothesis that the p-value pays for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product

import numpy as np

from wmengine.facts import Fact, fact
from wmengine.suspects.base import Tensor, Weight

MAXIMUM_TRIES = 64

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Matching:
    """Carriers paired with tensors: one tuple per try, its entry l the index of carrier l's tensor, or None.

    `found` carriers have a tensor, whatever the try; `possible` counts the pairings there are, of which at most
    MAXIMUM_TRIES are tried, and those that the mark recorded; `facts` say what was assumed.
    """

    tries: tuple[tuple[int | None, ...], ...]
    found: int
    possible: int
    facts: tuple[Fact, ...]


def match_tensors(
    shapes: Sequence[Shape],
    tensors: Sequence[Tensor],
    indices: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Matching:
    """Pair a mark's carriers (their shapes, in order of execution) with a suspect's tensors (in order of execution).

    Carriers of one shape and tensors of that shape are paired in order. As many of the one as of the other leave one
    pairing; otherwise every pairing that keeps the order is a try, up to MAXIMUM_TRIES in all, and those that leave out
    layers only before and after come first (a network inside a larger one, or cut short). Shapes must be equal, kernels
    included; only a carrier whose shape the suspect lacks altogether is also looked for without the kernel's axes of
    length 1 (a Linear [O, I] rewritten as a 1x1 convolution [O, I, 1, 1], a Conv1d as a Conv2d). indices: the carriers'
    recorded places among all weights of their network, increasing; where the suspect has a tensor of the right shape at
    every one of them, that pairing is the first try, beyond MAXIMUM_TRIES where it is not among the others. Tensors
    without a graph are paired in their own order and in that of their names, half of the tries each; names: what the
    carriers' modules were called, by which these are tried before all else. All of it depends
    on shapes, places and names alone, never on the symbols; verification pays for every try.
    """
    orders = [list(range(len(tensors)))]
    if any(tensor.by_name is not None for tensor in tensors):
        orders.append(sorted(orders[0], key=lambda number: tensors[number].by_name or 0))
    tries: dict[tuple[int | None, ...], None] = {}
    if names is not None and len(orders) > 1 and (named := _named(names, shapes, tensors)):
        tries[named] = None
    if indices is not None and _fits(indices, shapes, tensors):
        tries[tuple(indices)] = None
    possible = 0
    for order in orders:
        count, pairings = _pairings(shapes, [tensors[number] for number in order], MAXIMUM_TRIES // len(orders))
        possible = max(possible, count)
        tries |= {tuple(None if place is None else order[place] for place in pairing): None for pairing in pairings}
    found = sum(tensor is not None for tensor in next(iter(tries)))
    return Matching(tuple(tries), found, possible, tuple(_facts(len(shapes), found, possible, len(tries))))


def fitted(shapes: Sequence[Shape], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors as the carriers have them, where there are more of these than tensors of their shape.

    A matrix that holds those of queries, keys and values is three, and three are one where all tensors of their shape
    are taken up so, in the order of the carriers. Where no graph tells how it lies, one of swapped
    axes is turned (of a transposed convolution, or a transformer's Conv1D).
    """
    wanted, have = Counter(map(tuple, shapes)), Counter(tensor.shape for tensor in tensors)
    found: list[Tensor] = []
    for tensor in tensors:
        filters, channels, *kernel = tensor.shape
        third, swapped = (filters // 3, channels, *kernel), (channels, filters, *kernel)
        if tensor.shape in wanted:
            found.append(tensor)
        elif filters % 3 == 0 and have[third] < wanted[third]:
            found += [_part(tensor, third, part) for part in range(3)]
        elif tensor.by_name is not None and have[swapped] < wanted[swapped]:
            found.append(_turned(tensor, swapped))
        else:
            found.append(tensor)
    for fused in wanted.keys() - have:
        third = (fused[0] // 3, *fused[1:])
        if fused[0] % 3 == 0 and 3 * wanted[fused] + wanted[third] == have[third]:
            parts = iter([tensor for tensor in found if tensor.shape == third])
            ordered = [
                _whole([next(parts) for _ in range(3)], fused) if shape == fused else next(parts)
                for shape in map(tuple, shapes)
                if shape in (fused, third)
            ]
            found = [tensor for tensor in found if tensor.shape != third] + ordered
    return found


def _whole(parts: Sequence[Tensor], shape: Shape) -> Tensor:
    def read() -> Weight:
        return np.concatenate([part.values for part in parts]), None  # no normalisation is behind all three

    return Tensor.unread(shape, parts[0].source, read, parts[0].by_name)


def _part(tensor: Tensor, shape: Shape, part: int) -> Tensor:
    def read() -> Weight:
        values, factors = tensor.read()
        rows = slice(part * shape[0], (part + 1) * shape[0])
        return values[rows], None if factors is None else factors[rows]

    return Tensor.unread(shape, tensor.source, read, tensor.by_name)


def _turned(tensor: Tensor, shape: Shape) -> Tensor:
    def read() -> Weight:
        return np.ascontiguousarray(tensor.values.swapaxes(0, 1)), None  # factors are of filters, which it had not

    return Tensor.unread(shape, tensor.source, read, tensor.by_name)


def _pairings(
    shapes: Sequence[Shape], tensors: Sequence[Tensor], most: int
) -> tuple[int, list[tuple[int | None, ...]]]:
    """How many pairings keep the order of both, and the first of them, up to `most`."""
    groups = [_orders(carriers, candidates) for carriers, candidates in _groups(shapes, tensors)]
    counts = [count for count, _ in groups]
    share = max(  # of the tries, the same for every shape
        share for share in range(1, most + 1) if math.prod(min(count, share) for count in counts) <= most
    )
    tries: list[tuple[int | None, ...]] = []
    for pairing in product(*(list(islice(orders, share)) for _, orders in groups)):
        assigned: list[int | None] = [None] * len(shapes)
        for pairs in pairing:
            for carrier, tensor in pairs:
                assigned[carrier] = tensor
        tries.append(tuple(assigned))
    return math.prod(counts), tries


def _fits(indices: Sequence[int], shapes: Sequence[Shape], tensors: Sequence[Tensor]) -> bool:
    """Whether there is a place for each carrier, and the tensor there has that carrier's shape."""
    return len(indices) == len(shapes) and all(
        index < len(tensors) and tensors[index].shape == tuple(shape)
        for index, shape in zip(indices, shapes, strict=True)
    )


def _named(names: Sequence[str], shapes: Sequence[Shape], tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The tensors of these modules, all behind one prefix, as of a module that holds the network: the shortest there
    is; None where one of them is not there."""
    places: dict[str, int] = {}
    for number, tensor in enumerate(tensors):
        places.setdefault(tensor.source.rpartition(".")[0], number)
    first = names[0]
    before = {path[: len(path) - len(first)] for path in places if f".{path}".endswith(f".{first}")}
    for prefix in sorted(before, key=len):
        found = [places.get(prefix + name) for name in names]
        if _fits([place for place in found if place is not None], shapes, tensors):
            return tuple(place for place in found if place is not None)
    return None


def _facts(carriers: int, found: int, possible: int, tried: int) -> Iterator[Fact]:
    yield fact("carriers", found=found, carriers=carriers)
    if tried > 1:
        many = f"10^{math.log10(possible):.0f}"  # thousands of layers have more orders than Python writes digits
        yield fact("pairings", tried=tried, possible=max(possible, tried) if possible < 10**18 else many)


def _groups(shapes: Sequence[Shape], tensors: Sequence[Tensor]) -> list[tuple[list[int], list[int]]]:
    """Carriers and candidate tensors (indices, in order) that may be paired with each other."""
    carriers = _by_shape(shapes)
    candidates = _by_shape([tensor.shape for tensor in tensors])
    loose_carriers = _by_shape([_without_unit_kernel(shape) for shape in shapes])
    loose_candidates = _by_shape([_without_unit_kernel(tensor.shape) for tensor in tensors])
    groups: list[tuple[list[int], list[int]]] = []
    for loose, members in loose_carriers.items():
        exact = {shape for shape in carriers if _without_unit_kernel(shape) == loose}
        if all(shape in candidates for shape in exact):
            groups.extend((carriers[shape], candidates[shape]) for shape in carriers if shape in exact)
        else:
            groups.append((members, loose_candidates.get(loose, [])))
    return groups


def _by_shape(shapes: Sequence[Shape]) -> dict[Shape, list[int]]:
    places: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        places.setdefault(tuple(shape), []).append(index)
    return places


def _without_unit_kernel(shape: Shape) -> Shape:
    return (*shape[:2], *(size for size in shape[2:] if size != 1))


def _orders(carriers: list[int], tensors: list[int]) -> tuple[int, Iterator[list[tuple[int, int]]]]:
    """How many pairings keep the order of both, and the pairings themselves."""
    if len(tensors) >= len(carriers):
        chosen = _choices(tensors, len(carriers))
        return math.comb(len(tensors), len(carriers)), (list(zip(carriers, some, strict=True)) for some in chosen)
    chosen = _choices(carriers, len(tensors))
    return math.comb(len(carriers), len(tensors)), (list(zip(some, tensors, strict=True)) for some in chosen)


def _choices(items: list[int], count: int) -> Iterator[tuple[int, ...]]:
    """Every choice of `count` items in order, those without gaps first."""
    starts = range(min(len(items) - count + 1, MAXIMUM_TRIES))  # a hostile file may have a million layers
    windows = dict.fromkeys(tuple(items[start : start + count]) for start in starts)
    yield from windows
    yield from (some for some in combinations(items, count) if some not in windows)
