"""Where the features of `response` come from: what goes into a network's last layer, or pooled inputs."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from wmengine._optional import require
from wmengine.suspects.answers import to_array
from wmengine.suspects.base import Inputs, part_of, rows_of
from wmengine.suspects.given import DTYPES
from wmengine.suspects.weights import call, module_tensors

Tensors = Mapping[str, torch.Tensor]

POOLED = 4  # a side of inputs of which only pooled pixels are known
COUNTED = 64  # remainders by which tokens are counted of which nothing else is known
_MOST_RAW = 8192
_CHUNK = 256
_PRODUCTS = ("Gemm", "MatMul", "Conv")


@runtime_checkable
class Base(Protocol):
    """Where features come from. both: of inputs [n, ...] by name raw features [n, F], and what the network answers."""

    def both(self, inputs: Tensors) -> tuple[torch.Tensor, Any]: ...


class ModuleBase:
    """A torch module: what goes into the weight that runs last, in a copy of its own, in eval mode, without gradients.
    Threads may share it.

    Raises ValueError for a module that runs through no weight.
    """

    def __init__(self, model: torch.nn.Module, example: Tensors) -> None:
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        floats = (each for each in self._model.parameters() if each.is_floating_point())
        self._like = next(floats, torch.empty(0))
        weights = module_tensors(self._model, self._placed(example))
        if not weights:
            raise ValueError("its features are those of a network's last layer, and this network runs through none")
        self._seen: dict[int, torch.Tensor] = {}  # by thread
        self._model.get_submodule(weights[-1].path).register_forward_pre_hook(self._keep, with_kwargs=True)

    def both(self, inputs: Tensors) -> tuple[torch.Tensor, Any]:
        with torch.no_grad():
            answered = call(self._model, self._placed(inputs))
        answered = getattr(answered, "logits", answered)  # as models of transformers answer
        return self._seen.pop(threading.get_ident()).flatten(1).float(), answered

    def _placed(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Copies, as the model may write into them: floats in its own type, on its device."""
        device, dtype = self._like.device, self._like.dtype
        return {
            name: rows.detach().to(device, dtype if rows.is_floating_point() else rows.dtype, copy=True)
            for name, rows in inputs.items()
        }

    def _keep(self, _: torch.nn.Module, given: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        self._seen[threading.get_ident()] = [*given, *named.values()][0]


class FunctionBase:
    """A function of which nothing but answers is known: pictures pooled to 4 x 4, how many tokens of a row leave which
    remainder by 64, other inputs as they are."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def both(self, inputs: Tensors) -> tuple[torch.Tensor, Any]:
        given = {name: rows.detach().cpu() for name, rows in inputs.items()}
        given = {name: rows.float() if rows.is_floating_point() else rows for name, rows in given.items()}
        raw, *_ = given.values()
        if not raw.is_floating_point():
            raw = torch.nn.functional.one_hot(raw.long() % COUNTED, COUNTED).sum(1).float()
        elif raw.ndim == 4:
            raw = torch.nn.functional.adaptive_avg_pool2d(raw, POOLED)
        copies = {name: rows.numpy().copy() for name, rows in given.items()}
        return raw.flatten(1), self._function(copies if len(copies) > 1 else next(iter(copies.values())))


class OnnxBase:
    """An ONNX file, whose features are what goes into its last product. Threads may share it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        onnx, runtime = require("onnx", extra="cpu"), require("onnxruntime", extra="cpu")
        model = onnx.load(os.fspath(path))
        products = [node for node in model.graph.node if node.op_type in _PRODUCTS]
        if not products:
            raise ValueError(f"{os.fspath(path)} holds no product of weights, whose input its features would be")
        self._wanted = [products[-1].input[0], model.graph.output[0].name]
        if self._wanted[0] not in {value.name for value in model.graph.output}:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(self._wanted[0]))
        self._session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        taken = self._session.get_inputs()
        fixed = [each.shape[0] for each in taken if each.shape and isinstance(each.shape[0], int)]
        if fixed:
            raise ValueError(f"{os.fspath(path)} takes batches of {fixed[0]} only: export it for any")
        self._types = {each.name: DTYPES.get(each.type, "float32") for each in taken}

    def __call__(self, inputs: Any) -> NDArray[np.floating[Any]]:
        given = inputs if isinstance(inputs, Mapping) else {"input": inputs}
        found: NDArray[np.floating[Any]] = self._session.run(self._wanted[1:], self._fed(given))[0]
        return found

    def both(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        found = {name: to_array(rows) for name, rows in inputs.items()}
        raw, answered = self._session.run(self._wanted, self._fed(found))
        return torch.from_numpy(raw).flatten(1).float(), answered

    def _fed(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Inputs by their own names where the file has these, else in its order."""
        if len(inputs) != len(self._types):
            raise ValueError(f"the file takes {', '.join(self._types)}: give a sample with as many inputs")
        names = inputs if inputs.keys() == self._types.keys() else self._types
        return {name: rows.astype(self._types[name]) for name, rows in zip(names, inputs.values(), strict=True)}


def base_of(network: Any, example: Tensors) -> Base:
    """The source of a network's features: of a module, a path or a function; example: [1, ...] by name."""
    if isinstance(network, torch.nn.Module):
        return ModuleBase(network, example)
    if isinstance(network, str | os.PathLike):
        return OnnxBase(network)
    return network if isinstance(network, Base) else FunctionBase(network)


def tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(rows) for name, rows in inputs.items()}


def features_of(base: Base, parts: Iterable[Inputs]) -> NDArray[np.float32]:
    """Raw features [n, F] of inputs, some at a time. Raises ValueError where these are too many or no numbers."""
    found = []
    for inputs in parts:
        for at in range(0, rows_of(inputs), _CHUNK):
            found.append(base.both(tensors(part_of(inputs, at, at + _CHUNK)))[0].cpu().numpy())
            if found[-1].shape[1] > _MOST_RAW:
                raise ValueError(
                    f"the base's last layer takes {found[-1].shape[1]} numbers, and features are of at most "
                    f"{_MOST_RAW}: give a control with a smaller one first"
                )
    raw = np.concatenate(found)
    if not np.isfinite(raw).all():
        raise ValueError("the base's features hold NaN or Inf")
    return raw
