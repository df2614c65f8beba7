"""Files of models that attacks read and write: ONNX with its external weights, safetensors, each put in place whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INLINE = 1 << 30  # bytes of a model from which its weights lie beside it: one protobuf message ends at 2 GB
FLOATS = ("float16", "bfloat16", "float32", "float64")


def floating(array: NDArray[Any]) -> bool:
    return array.dtype.name in FLOATS


def cast(name: str, values: NDArray[Any], before: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Values in another type. Raises ValueError where one is not finite any more, which was `before`."""
    with np.errstate(over="ignore", invalid="ignore"):
        made = values.astype(dtype)
    if (np.isfinite(before) & ~np.isfinite(made)).any():
        raise ValueError(f"{name} would hold numbers that are not finite in {made.dtype}: no product is left")
    return made


def reason(error: Exception) -> str:
    """What another library complains of, in the words of its first line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def check_out(out: Path | None, suffix: str, attack: str) -> Path:
    """Where to write. Raises ValueError where there is nothing, another kind of file, or no folder to write into."""
    if out is None:
        raise ValueError(f"the attack {attack!r} ends in a file here: give out=, the {suffix} file to write")
    if out.suffix != suffix:
        raise ValueError(f"{out} must end in {suffix}, as what is written is such a file")
    if out.is_dir():
        raise ValueError(f"{out} is a folder: choose another name")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder: make it first")
    beside = out.with_name(f"{out.name}.data")
    if beside.exists() and not out.exists():
        raise ValueError(f"{beside} may hold another model's weights: choose another name than {out.name}")
    return out


@contextmanager
def written(out: Path) -> Iterator[Path]:
    """A path to write to, of the same name in a folder beside it; moved to `out`, with its PATH.data, if all went well.

    Another folder and not another name, because a model names the file that holds its weights.
    """
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".attack-") as folder:
        draft = Path(folder) / out.name
        yield draft
        beside = draft.with_name(f"{draft.name}.data")
        if beside.exists():
            os.replace(beside, out.with_name(beside.name))
        os.replace(draft, out)


def read_onnx(path: Path) -> Any:
    """The onnx.ModelProto with its external weights in it. Raises ValueError for what is no ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError

    if path.suffix != ".onnx":
        raise ValueError(f"{path} holds no graph, which this attack needs: give the .onnx file")
    try:
        model = onnx.load(path)
        if not model.graph.node:
            raise DecodeError("no graph is in it")
        return model
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{path} cannot be read as an ONNX file ({' '.join(str(error).split())})") from None


def write_onnx(model: Any, path: Path) -> None:
    """Write a model, its weights in PATH.data where it is large."""
    import onnx

    large = model.ByteSize() > INLINE
    onnx.save(model, path, save_as_external_data=large, location=f"{path.name}.data" if large else None)


def initializers(model: Any) -> dict[str, NDArray[Any]]:
    """The values of a model's initializers, by name."""
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def set_initializers(model: Any, values: Mapping[str, NDArray[Any]]) -> None:
    """Put values in the place of those of that name, of the same shape and type."""
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[tensor.name]), tensor.name))


def read_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str] | None]:
    """A file's tensors by name, and its metadata. Raises ValueError for what is no safetensors file."""
    import ml_dtypes  # noqa: F401  # through which NumPy knows bfloat16
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a safetensors file ({error})") from None


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: dict[str, str] | None) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, metadata)
