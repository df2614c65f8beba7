"""Carriers: which tensors of a network can hold a mark, filters on axis 0, and how they are found again by structure.

Names never count: exporters rename, fold and transpose. What survives is a tensor's shape and its place in the order of
execution, so a mark names its carriers by that order, and `match_tensors` pairs them with a suspect's tensors shape by
shape. Where several pairings are possible, each one is a try that the p-value pays for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, islice, product
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from wmengine._optional import require

if TYPE_CHECKING:
    import torch

MAXIMUM_TRIES = 64

Shape = tuple[int, ...]
Array = TypeVar("Array", NDArray[Any], "torch.Tensor")


@dataclass(frozen=True)
class Tensor:
    """One weight of a suspect: values float32 [O, I/groups, *kernel], O filters, and its name there, only for notes."""

    values: NDArray[np.float32]
    source: str


@dataclass(frozen=True)
class Matching:
    """Carriers paired with tensors: one tuple per try, its entry l the index of carrier l's tensor, or None.

    `found` carriers have a tensor, whatever the try; `possible` counts the pairings there are, of which at most
    MAXIMUM_TRIES are tried, and the one that the mark recorded; `notes` say what was assumed.
    """

    tries: tuple[tuple[int | None, ...], ...]
    found: int
    possible: int
    notes: tuple[str, ...]


class ModuleTensor(NamedTuple):
    """A weight of a torch module: its module's path, the parameter, and what puts the filters of it on axis 0."""

    path: str
    weight: torch.nn.Parameter
    filters: Callable[[torch.Tensor], torch.Tensor]


def filters_first(weight: Array, groups: int, transposed: bool) -> Array:
    """A convolution's weight as [O, I/groups, *kernel]; a transposed one is stored as [I, O/groups, *kernel].

    Takes and gives a NumPy array or a torch tensor; a view where the layout allows it.
    """
    if not transposed:
        return weight
    channels_in, filters, *kernel = weight.shape
    grouped = weight.reshape(groups, channels_in // groups, filters, *kernel).swapaxes(1, 2)
    return grouped.reshape(groups * filters, channels_in // groups, *kernel)


def match_tensors(shapes: Sequence[Shape], tensors: Sequence[Tensor], indices: Sequence[int] | None = None) -> Matching:
    """Pair a mark's carriers (their shapes, in order of execution) with a suspect's tensors (in order of execution).

    Carriers of one shape and tensors of that shape are paired in order. As many of the one as of the other leave one
    pairing; otherwise every pairing that keeps the order is a try, up to MAXIMUM_TRIES in all, and those that leave out
    layers only before and after come first (a network inside a larger one, or cut short). Shapes must be equal, kernels
    included; only a carrier whose shape the suspect lacks altogether is also looked for without the kernel's axes of
    length 1 (a Linear [O, I] rewritten as a 1x1 convolution [O, I, 1, 1], a Conv1d as a Conv2d). indices: the carriers'
    recorded places among all weights of their network, increasing; where the suspect has a tensor of the right shape at
    every one of them, that pairing is the first try, beyond MAXIMUM_TRIES where it is not among the others. All of it
    depends on shapes and places alone, never on the symbols; verification pays for every try.
    """
    groups = [_orders(carriers, candidates) for carriers, candidates in _groups(shapes, tensors)]
    counts = [count for count, _ in groups]
    possible = math.prod(counts)
    share = max(  # of the tries, the same for every shape
        share
        for share in range(1, MAXIMUM_TRIES + 1)
        if math.prod(min(count, share) for count in counts) <= MAXIMUM_TRIES
    )
    tries: list[tuple[int | None, ...]] = []
    for pairing in product(*(list(islice(orders, share)) for _, orders in groups)):
        assigned: list[int | None] = [None] * len(shapes)
        for pairs in pairing:
            for carrier, tensor in pairs:
                assigned[carrier] = tensor
        tries.append(tuple(assigned))
    if indices is not None and _fits(indices, shapes, tensors):
        recorded = tuple(indices)
        tries = [recorded, *(pairing for pairing in tries if pairing != recorded)]
    found = sum(tensor is not None for tensor in tries[0])
    return Matching(tuple(tries), found, possible, tuple(_notes(len(shapes), found, possible, len(tries))))


def _fits(indices: Sequence[int], shapes: Sequence[Shape], tensors: Sequence[Tensor]) -> bool:
    """Whether the tensor at each carrier's recorded place has that carrier's shape."""
    return len(indices) == len(shapes) and all(
        index < len(tensors) and tensors[index].values.shape == tuple(shape)
        for index, shape in zip(indices, shapes, strict=True)
    )


def _notes(carriers: int, found: int, possible: int, tried: int) -> Iterator[str]:
    yield f"{found} of {carriers} carriers matched to the suspect's tensors by shape and order"
    if possible > tried:
        yield f"{tried} of the {possible} possible orders of tensors of equal shape were tried and paid for"
    elif tried > 1:
        yield f"{tried} orders of tensors of equal shape were tried and paid for"


def _groups(shapes: Sequence[Shape], tensors: Sequence[Tensor]) -> list[tuple[list[int], list[int]]]:
    """Carriers and candidate tensors (indices, in order) that may be paired with each other."""
    carriers = _by_shape(shapes)
    candidates = _by_shape([tensor.values.shape for tensor in tensors])
    loose_carriers = _by_shape([_without_unit_kernel(shape) for shape in shapes])
    loose_candidates = _by_shape([_without_unit_kernel(tensor.values.shape) for tensor in tensors])
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


def module_tensors(model: torch.nn.Module, sample: torch.Tensor | None = None) -> list[ModuleTensor]:
    """The weights of a model's convolutions, transposed convolutions and linear layers, each once.

    With a sample (a batch, on the model's device) they come in the order in which the sample runs through them, which
    is the order in an exported graph, and layers that it never reaches are left out. Without one they come in the order
    of registration. The model's training flags and buffers are left as they were.
    """
    torch = require("torch", extra="train")
    kinds = (torch.nn.modules.conv._ConvNd, torch.nn.Linear)
    layers = {module: path for path, module in model.named_modules() if isinstance(module, kinds)}
    order = list(layers) if sample is None else _execution_order(model, list(layers), sample)
    found: dict[int, ModuleTensor] = {}
    for layer in order:
        weight: Any = layer.weight
        if id(weight) not in found:
            found[id(weight)] = ModuleTensor(layers[layer], weight, _filters_of(layer))
    return list(found.values())


def _filters_of(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """How a layer's filters come to axis 0; only a convolution has groups, or may be transposed."""
    groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
    return lambda weight: filters_first(weight, groups, transposed)


def _execution_order(
    model: torch.nn.Module, layers: list[torch.nn.Module], sample: torch.Tensor
) -> list[torch.nn.Module]:
    order: dict[torch.nn.Module, None] = {}
    hooks = [layer.register_forward_pre_hook(lambda layer, _: order.setdefault(layer)) for layer in layers]
    try:
        with evaluating(model):
            model(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run a model without gradients and in eval mode; training flags, buffers and the random state come back after."""
    torch = require("torch", extra="train")
    training = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next((value.device for value in model.parameters() if value.device.type == "cuda"), None)
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[] if device is None else [device]):
            yield
    finally:
        for module, was in training:
            module.training = was
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The plain module inside torch.compile's and the data-parallel wrappers."""
    torch = require("torch", extra="train")
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = getattr(model, "_orig_mod")  # noqa: B009
        else:
            return model
