"""Mark neural networks while they train, and prove with an exact p-value whose copy a suspect is.

Importing this package loads the standard library only: every public name is imported when it is first used (PEP 562).
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wmengine._optional import missing

if TYPE_CHECKING:
    from wmengine import errors, ops
    from wmengine.embed import Embedder
    from wmengine.export import export_onnx
    from wmengine.key import Key
    from wmengine.ops import get_num_threads, set_num_threads
    from wmengine.sandbox import Limits
    from wmengine.scan import scan
    from wmengine.schemes import SCHEMES, scheme
    from wmengine.suspects.endpoint.suspect import endpoint
    from wmengine.verify import Verdict, verify
    from wmengine.watermark import Watermark

__version__ = "0.1.0"

__all__ = [
    "SCHEMES",
    "Embedder",
    "Key",
    "Limits",
    "Verdict",
    "Watermark",
    "__version__",
    "endpoint",
    "errors",
    "export_onnx",
    "get_num_threads",
    "ops",
    "scan",
    "scheme",
    "set_num_threads",
    "verify",
]

_HOMES = {
    "Embedder": "embed",
    "Key": "key",
    "Limits": "sandbox",
    "SCHEMES": "schemes",
    "Verdict": "verify",
    "Watermark": "watermark",
    "endpoint": "suspects.endpoint.suspect",
    "export_onnx": "export",
    "get_num_threads": "ops",
    "scan": "scan",
    "scheme": "schemes",
    "set_num_threads": "ops",
    "verify": "verify",
}
_MODULES = ("errors", "ops")


class _Package(ModuleType):
    """Keeps `wmengine.verify` the function: importing the module of that name would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        raise missing(error) from error
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
