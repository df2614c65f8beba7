"""Imports that may be missing: `require("torch", extra="train")` returns the module or says what to install.

Use it inside the function that needs the package, never at the top of a module that `import wmengine` reaches:

    torch = require("torch", extra="train")

A module that cannot work without such a package at all (wmengine.embed) may import it at its top: the lazy attributes
of `wmengine` turn the failure into the same error.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

# The package as it is imported, and the extra of wmengine that brings it.
EXTRAS = {
    "onnxruntime": "cpu",
    "torch": "train",
    "triton": "train",
    "onnxscript": "train",
    "sklearn": "demo",
    "grpc": "endpoint",
    "gguf": "gguf",
    "ray": "ray",
    "lightning": "lightning",
    "transformers": "transformers",
}


def require(module: str, *, extra: str) -> Any:
    """Import `module` ("torch", "onnxruntime.quantization") and return it.

    Raises ImportError naming the extra of wmengine that brings it. A package that is there but broken raises its own
    error unchanged: installing it once more would not be the mend.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ImportError(_advice(module, extra), name=error.name) from error


def not_compiled(error: ImportError) -> ImportError:
    """The error to raise instead of `error` in sources that were never built, which hide an installed wmengine from who
    runs beside them."""
    if importlib.util.find_spec("wmengine._cpu") is not None:
        return error
    root = Path(__file__).resolve().parent.parent
    return ImportError(
        f"wmengine was imported from its sources in {root}, which are not compiled: run elsewhere to use the installed "
        f"one, or pip install -e {root}",
        name="wmengine._cpu",
    )


def missing(error: ModuleNotFoundError) -> ImportError:
    """The error to raise instead of `error`: with the extra's name where the package is one of ours to bring."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return error
    return ImportError(_advice(package, EXTRAS[package]), name=error.name)


def _advice(module: str, extra: str) -> str:
    either = " (or 'wmengine[gpu]' for NVIDIA cards)" if extra == "cpu" else ""
    package = module.partition(".")[0]
    return f"{package} is not installed: pip install 'wmengine[{extra}]'{either}"
