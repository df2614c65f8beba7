"""Mark neural networks while they train, and prove with an exact p-value whose copy a suspect is.

Importing this package loads the standard library only: every public name is imported when it is first used (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

from wmengine._optional import missing
from wmengine._version import __version__

if TYPE_CHECKING:
    from wmengine import attacks, errors, ops, testing
    from wmengine.identity.key import Key
    from wmengine.judging.verdict import Verdict
    from wmengine.judging.verification import verify, verify_all
    from wmengine.marking.certification import certify
    from wmengine.marking.data import mark_of, trigger_set
    from wmengine.marking.embedder import Embedder
    from wmengine.marking.emmark import emmark
    from wmengine.marking.export import export_onnx
    from wmengine.marking.fingerprint import fingerprint
    from wmengine.marking.lightning import MarkingCallback
    from wmengine.marking.passports import passport, passport_accuracy
    from wmengine.marking.serving import response
    from wmengine.marking.transformers import MarkedTrainer
    from wmengine.marking.unmarked import controls
    from wmengine.marks.catalogue import SCHEMES, scheme
    from wmengine.marks.preset import Preset
    from wmengine.marks.watermark import Watermark
    from wmengine.ops import get_num_threads, set_num_threads
    from wmengine.sandbox import Limits
    from wmengine.scanning.scanner import scan
    from wmengine.suspects.endpoint.suspect import endpoint

__all__ = [
    "SCHEMES",
    "Embedder",
    "Key",
    "Limits",
    "MarkedTrainer",
    "MarkingCallback",
    "Preset",
    "Verdict",
    "Watermark",
    "__version__",
    "attacks",
    "certify",
    "controls",
    "emmark",
    "endpoint",
    "errors",
    "export_onnx",
    "fingerprint",
    "get_num_threads",
    "mark_of",
    "ops",
    "passport",
    "passport_accuracy",
    "response",
    "scan",
    "scheme",
    "set_num_threads",
    "testing",
    "trigger_set",
    "verify",
    "verify_all",
]

_HOMES = {
    "Embedder": "marking.embedder",
    "Key": "identity.key",
    "Limits": "sandbox",
    "MarkedTrainer": "marking.transformers",
    "MarkingCallback": "marking.lightning",
    "Preset": "marks.preset",
    "SCHEMES": "marks.catalogue",
    "Verdict": "judging.verdict",
    "Watermark": "marks.watermark",
    "certify": "marking.certification",
    "controls": "marking.unmarked",
    "emmark": "marking.emmark",
    "endpoint": "suspects.endpoint.suspect",
    "export_onnx": "marking.export",
    "fingerprint": "marking.fingerprint",
    "get_num_threads": "ops",
    "mark_of": "marking.data",
    "passport": "marking.passports",
    "passport_accuracy": "marking.passports",
    "response": "marking.serving",
    "scan": "scanning.scanner",
    "scheme": "marks.catalogue",
    "set_num_threads": "ops",
    "trigger_set": "marking.data",
    "verify": "judging.verification",
    "verify_all": "judging.verification",
}
_MODULES = ("attacks", "errors", "ops", "testing")


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
