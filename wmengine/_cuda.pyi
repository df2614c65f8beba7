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
    suspects: int,
    rows: int,
    classes: int,
    expected: int,
    sets: int,
    predicted: int,
    counts: int,
    invalid: int,
) -> None: ...
