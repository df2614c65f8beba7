"""The forms of a model that attacks take, each made from a torch module or a file, and the result put back."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wmengine._optional import require
from wmengine.attacks.attack import Attack
from wmengine.attacks.data import Data, Inputs
from wmengine.attacks.files import (
    cast,
    check_out,
    floating,
    initializers,
    read_onnx,
    read_safetensors,
    reason,
    set_initializers,
    write_onnx,
    write_safetensors,
    written,
)
from wmengine.attacks.training import placed
from wmengine.suspects.weights import evaluating, unwrap

if TYPE_CHECKING:
    import torch

SUFFIXES = (".onnx", ".safetensors")


def attack_module(
    attack: Attack, model: torch.nn.Module, data: Data | None, out: Path | None, seed: int, options: Mapping[str, Any]
) -> Any:
    """The attacked copy of a torch module, in eval mode; with `out`, the ONNX file that it is exported to."""
    torch = require("torch", extra="train")
    plain = unwrap(model)
    if out is not None or attack.takes == "file":
        out = check_out(out, ".onnx", attack.name)
    exported = out is not None or attack.takes == "graph"
    if exported and data is None:
        raise ValueError(f"for {attack.name!r} or for out= a torch module is exported: give data=inputs, a row or more")
    example = _example(plain, data) if data is not None and (exported or attack.takes == "module") else None
    if out is not None and attack.takes in ("file", "module"):
        # Of what trains too: after hours of training it is too late to learn that torch cannot export the model.
        with tempfile.TemporaryDirectory() as folder:
            source = _export(plain, example, Path(folder) / "model.onnx")
            if attack.takes == "file":
                return attack_file(attack, source, data, out, seed, options)
    attacked = copy.deepcopy(plain)
    random = np.random.default_rng(seed)
    if attack.takes == "weights":
        _attack_parameters(attack, attacked, random, options)
    elif attack.takes == "graph":
        _attack_exported(attack, attacked, example, random, options)
    else:
        devices = range(torch.cuda.device_count())  # manual_seed seeds every one
        with torch.random.fork_rng(devices=devices):
            # Not the seed itself: layers drawn anew would be those that an owner drew who chose the same.
            torch.manual_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))
            attacked = attack.run(attacked, data, random, **options)
    attacked.eval()
    if out is None:
        return attacked
    with written(out) as draft:
        _export(attacked, example, draft)
    return out


def attack_file(
    attack: Attack, source: Path, data: Data | None, out: Path | None, seed: int, options: Mapping[str, Any]
) -> Path:
    """The attacked file, written to `out`, which is as it was if anything fails."""
    if source.suffix not in SUFFIXES:
        raise ValueError(f"{source} must be a file of {' or '.join(SUFFIXES)}, or a torch module")
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist, or is no file")
    out = check_out(out, source.suffix, attack.name)
    if out.exists() and os.path.samefile(source, out):
        raise ValueError(f"{out} is the model itself, which stays as it is: choose another name to write to")
    random = np.random.default_rng(seed)
    with written(out) as draft:
        if attack.takes == "file":
            attack.run(source, draft, data, **options)
        elif attack.takes == "weights" and source.suffix == ".safetensors":
            tensors, metadata = read_safetensors(source)
            write_safetensors(draft, tensors | _attacked(attack, tensors, random, options), metadata)
        else:
            model = read_onnx(source)
            if attack.takes == "weights":
                set_initializers(model, _attacked(attack, initializers(model), random, options))
            else:
                attack.run(model, random, **options)
            write_onnx(model, draft)
    return out


def _attacked(
    attack: Attack, arrays: Mapping[str, NDArray[Any]], random: np.random.Generator, options: Mapping[str, Any]
) -> dict[str, NDArray[Any]]:
    """The arrays that an attack on weights changed, in their own type; what it left alone keeps every bit."""
    own = {  # a mask of -inf is no weight
        name: array for name, array in arrays.items() if array.ndim > 1 and floating(array) and np.isfinite(array).all()
    }
    if not own:
        raise ValueError(f"the model holds no floating weights of two axes or more, which {attack.name!r} changes")
    weights = {name: array.astype(np.float32) for name, array in own.items()}
    with np.errstate(over="ignore", invalid="ignore"):  # `cast` tells of it
        attack.run(weights, random, **options)
    changed = {name: weights[name] != array.astype(np.float32) for name, array in own.items()}
    return {
        name: np.where(changed[name], cast(name, weights[name], array, array.dtype), array)
        for name, array in own.items()
        if changed[name].any()
    }


def _attack_parameters(
    attack: Attack, module: torch.nn.Module, random: np.random.Generator, options: Mapping[str, Any]
) -> None:
    parameters = {name: value for name, value in module.named_parameters() if value.is_floating_point()}
    arrays = {name: _array(value) for name, value in parameters.items() if value.ndim > 1}
    for name, values in _attacked(attack, arrays, random, options).items():
        _set(parameters[name], values)


def _attack_exported(
    attack: Attack, module: torch.nn.Module, example: Inputs, random: np.random.Generator, options: Mapping[str, Any]
) -> None:
    """Attack the graph that torch traces, which keeps the names of parameters, and take over what changed."""
    with tempfile.TemporaryDirectory() as folder:
        path = _export(module, example, Path(folder) / "model.onnx", fold_batchnorm=False)
        model, original = read_onnx(path), read_onnx(path)
    attack.run(model, random, **options)
    pairs = zip(model.graph.initializer, original.graph.initializer, strict=True)
    names = {tensor.name for tensor, before in pairs if tensor != before}
    changed = {name: values for name, values in initializers(model).items() if name in names}
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name, values in changed.items():
        if name not in held or tuple(held[name].shape) != values.shape:
            raise ValueError(f"{attack.name!r} changed {name}, which the module does not hold: attack its ONNX file")
        _set(held[name], values)
    for name, values in changed.items():  # tied parameters are one in the module, and need not be in the graph
        if not np.array_equal(_array(held[name]), values.astype(_array(held[name]).dtype), equal_nan=True):
            raise ValueError(f"{name} is tied to another parameter, which {attack.name!r} changed otherwise")


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """NumPy has no bfloat16, and float32 holds every value of it."""
    values = tensor.detach().cpu()
    return values.numpy() if str(values.dtype) in ("torch.float16", "torch.float64") else values.float().numpy()


def _set(tensor: torch.Tensor, values: NDArray[Any]) -> None:
    torch = require("torch", extra="train")
    like = values if values.dtype.name in ("float16", "float32", "float64") else values.astype(np.float32)
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(np.array(like)))


def _example(model: torch.nn.Module, data: Data) -> Inputs:
    """One row, on the model's device. Raises ValueError where the model does not run on it."""
    torch = require("torch", extra="train")
    example = placed(model, data.example())
    named = example if isinstance(example, Mapping) else {"": example}
    with evaluating(model), torch.no_grad():
        try:
            model(**example) if isinstance(example, Mapping) else model(example)
        except Exception as error:
            rows = ", ".join(f"{name} {rows.dtype} {list(rows.shape)}".lstrip() for name, rows in named.items())
            raise ValueError(f"the model does not run on a row of data, {rows} ({reason(error)})") from error
    return example


def _export(model: torch.nn.Module, example: Inputs, path: Path, fold_batchnorm: bool = True) -> Path:
    from wmengine.marking.export import export_onnx

    try:
        return export_onnx(model, example, path, fold_batchnorm)
    except (ImportError, OSError):
        raise
    except Exception as error:
        raise ValueError(
            f"torch cannot export this {type(model).__name__} to ONNX ({type(error).__name__}; torch.onnx.export says "
            "more): attack the module without out=, or a file that you exported"
        ) from error
