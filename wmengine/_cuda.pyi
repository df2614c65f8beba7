"""What csrc/cuda/bindings.cpp exports: device addresses, a stream and sizes in, results in device memory."""

def device_count() -> int: ...
def sketch_workspace(count: int, buckets: int) -> int: ...
def sketch(
    device: int,
    stream: int,
    w: int,
    count: int,
    key: int,
    buckets: int,
    total: int,
    scale: float,
    workspace: int,
    y: int,
) -> None: ...
def sketch_adjoint(
    device: int,
    stream: int,
    g: int,
    total: int,
    key: int,
    buckets: int,
    scale: float,
    accumulate: bool,
    count: int,
    out: int,
) -> None: ...
def project_workspace(count: int, total: int, kind: int) -> int: ...
def project(
    device: int,
    stream: int,
    w: int,
    count: int,
    key: int,
    total: int,
    kind: int,
    scale: float,
    workspace: int,
    y: int,
) -> None: ...
def project_adjoint(
    device: int,
    stream: int,
    g: int,
    total: int,
    key: int,
    kind: int,
    scale: float,
    accumulate: bool,
    count: int,
    out: int,
) -> None: ...
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
