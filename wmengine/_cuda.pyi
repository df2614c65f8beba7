"""What csrc/cuda/bindings.cpp exports: device addresses, a stream and sizes in, results in device memory."""

def device_count() -> int: ...
def match_counts(
    device: int,
    stream: int,
    outputs: int,
    dtype: int,
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
    device: int,
    stream: int,
    predicted: int,
    dtype: int,
    suspects: int,
    rows: int,
    expected: int,
    sets: int,
    counts: int,
) -> None: ...
def bit_matches(
    device: int,
    stream: int,
    messages: int,
    suspects: int,
    registry: int,
    registered: int,
    total: int,
    counts: int,
) -> None: ...
def best_bit_matches_workspace(suspects: int, registered: int, best: int) -> int: ...
def best_bit_matches(
    device: int,
    stream: int,
    messages: int,
    suspects: int,
    registry: int,
    registered: int,
    total: int,
    best: int,
    workspace: int,
    counts: int,
    indices: int,
) -> None: ...
