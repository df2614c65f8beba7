"""What is installed, what it runs on, and what is wrong with it: all that a bug report needs, as one value."""

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from wmengine._processors import available
from wmengine._version import __version__
from wmengine.sandbox import supported

LIBRARIES = (
    *("numpy", "scipy", "safetensors", "cryptography", "onnx", "onnx-ir"),
    *("onnxruntime", "onnxruntime-gpu", "torch", "triton", "ray"),
)
# What each extra must bring before its part of the engine works.
EXTRAS = {
    "cpu or gpu": ("onnxruntime",),
    "train": ("torch", "onnxscript"),
    "demo": ("onnxruntime", "torch", "onnxscript", "sklearn"),
    "endpoint": ("grpc",),
    "gguf": ("gguf",),
    "ray": ("ray",),
}


def installation() -> dict[str, Any]:
    """Everything about this installation, as values that JSON can hold; "problems" is what is wrong, in sentences."""
    problems: list[str] = []
    return {
        "wmengine": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name)) is not None},
        "cpu": _processor(problems),
        "gpu": _graphics(problems),
        "onnx_providers": _onnx_providers(problems),
        "sandbox": supported(),
        "missing_extras": _missing_extras(),
        "problems": problems,
    }


def describe(found: dict[str, Any]) -> str:
    """`installation()` as aligned text."""
    cpu, gpu = found["cpu"], found["gpu"]
    cuda = "built" if gpu["cuda_module"] else "not built"
    missing = [f"{extra} (needs {', '.join(packages)})" for extra, packages in found["missing_extras"].items()]
    rows = [
        ("wmengine", found["wmengine"]),
        ("python", f"{found['python']} on {found['platform']}"),
        *found["libraries"].items(),
        ("instruction set", cpu["instruction_set"] or "wmengine._cpu does not load"),
        ("threads", f"{cpu['threads'] or 'none'} on {cpu['cores']} cores"),
        ("GPU", "; ".join(gpu["devices"]) or "none found"),
        ("CUDA module", cuda),
        ("ONNX providers", ", ".join(found["onnx_providers"]) or "none"),
        ("sandbox", ", ".join(f"{name} {'yes' if there else 'NO'}" for name, there in found["sandbox"].items())),
        ("missing extras", "; ".join(missing) or "none"),
    ]
    lines = [f"{name:<16}  {value}" for name, value in rows]
    lines += [f"PROBLEM: {problem}" for problem in found["problems"]] or ["nothing is wrong with this installation"]
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor(problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"cores": len(available()), "instruction_set": None, "threads": None}
    try:
        from wmengine import _cpu, ops
    except ImportError as error:
        problems.append(f"wmengine._cpu does not load ({error}): install wmengine again")
        return found
    return found | {"instruction_set": _cpu.instruction_set(), "threads": ops.get_num_threads()}


def _graphics(problems: list[str]) -> dict[str, Any]:
    devices = _nvidia_cards()
    built = importlib.util.find_spec("wmengine._cuda") is not None
    loads = False
    if built:
        try:
            module = importlib.import_module("wmengine._cuda")
            loads = True
            if devices and module.device_count() == 0:
                problems.append("wmengine._cuda sees no GPU: the driver is older than the CUDA it was built with")
        except ImportError as error:
            problems.append(f"wmengine._cuda was built but does not load ({error}): build it again on this machine")
    elif devices:
        problems.append("there is a GPU but wmengine._cuda was not built: install nvcc and build with WMENGINE_CUDA=ON")
    return {"devices": devices, "cuda_module": loads}


def _nvidia_cards() -> list[str]:
    """Name, driver and memory of each NVIDIA card, asked of the driver's own tool; no CUDA context is made for it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def _onnx_providers(problems: list[str]) -> list[str]:
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name) is not None]
    if len(installed) == 2:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall both, then install the one you want"
        )
    if not installed:
        return []
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at import
    try:
        runtime = importlib.import_module("onnxruntime")
        providers: Sequence[str] = runtime.get_available_providers()
    except (ImportError, AttributeError) as error:
        # Uninstalling one of the two packages takes files of the other along and leaves an empty namespace.
        problems.append(
            f"{installed[0]} is installed but does not work ({error}): pip install --force-reinstall {installed[0]}"
        )
        return []
    if "onnxruntime-gpu" in installed and "CUDAExecutionProvider" not in providers:
        problems.append("onnxruntime-gpu is installed but offers no CUDA provider: reinstall wmengine[gpu]")
    return list(providers)


def _missing_extras() -> dict[str, list[str]]:
    """Extra → the packages it lacks; importing none of them."""
    lacking = {
        extra: [name for name in packages if name not in sys.modules and importlib.util.find_spec(name) is None]
        for extra, packages in EXTRAS.items()
    }
    return {extra: packages for extra, packages in lacking.items() if packages}
