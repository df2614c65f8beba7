"""What csrc/cpu/bindings.cpp exports: addresses (int) and sizes in, results written where the caller said."""

from collections.abc import Sequence

# (address of the values, address of the gradient or 0, filters, size of a filter, Philox key)
Weight = tuple[int, int, int, int, int, int]

def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def set_instruction_set(name: str) -> None: ...
def thread_count() -> int: ...
def set_thread_count(count: int) -> None: ...
def use_large_pages(address: int, bytes: int) -> None: ...
def carrier_projection(
    weights: Sequence[Weight],
    carrier: int,
    projection: int,
    total: int,
    scale: float,
    signs: int,
    inverse_norms: int,
    y: int,
) -> None: ...
def link_loss(y: int, bits: int, total: int, link: int, margin: float, residual: int) -> float: ...
def embedding_backward(
    weights: Sequence[Weight],
    carrier: int,
    projection: int,
    total: int,
    factor: float,
    inverse_norms: int,
    residual: int,
) -> None: ...
def projection_adjoint(
    g: int, total: int, count: int, key: int, projection: int, factor: float, accumulate: bool, out: int
) -> None: ...
def marked_cross_entropy(
    logits: int,
    stored: int,
    rows: int,
    classes: int,
    stride: int,
    labels: int,
    weight: int,
    group: int,
    groups: int,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    loss: int,
    group_loss: int,
    group_hits: int,
    normalizers: int,
    denominator: int,
    gradient: int,
) -> None: ...
def marked_cross_entropy_backward(
    logits: int,
    stored: int,
    rows: int,
    classes: int,
    stride: int,
    labels: int,
    weight: int,
    label_smoothing: float,
    ignore_index: int,
    factor: float,
    normalizers: int,
    gradient: int,
) -> None: ...
def match_counts(
    scores: int,
    stored: int,
    rows: int,
    classes: int,
    expected: int,
    group: int,
    groups: int,
    predicted: int,
    at: int,
    histogram: int,
    hits: int,
    invalid: int,
    levels: int,
) -> None: ...
def label_matches(
    predicted: int, suspects: int, expected: int, sets: int, places: int, wide: bool, largest: int, counts: int
) -> None: ...
def bit_matches(messages: int, suspects: int, registry: int, rows: int, total: int, counts: int) -> None: ...
def best_bit_matches(
    messages: int, suspects: int, registry: int, rows: int, total: int, best: int, counts: int, indices: int
) -> None: ...
