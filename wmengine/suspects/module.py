"""A torch module, or any function, as a suspect: asked in eval mode, on its own device and in its own dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wmengine.errors import SuspectError
from wmengine.facts import Fact, fact
from wmengine.suspects.adapters import AS_RECORDED, Adapter, Range
from wmengine.suspects.answers import Outputs
from wmengine.suspects.base import (
    Answers,
    Inputs,
    Signature,
    Tensor,
    ask_in_chunks,
    one_line,
    part_of,
    rows_of,
)
from wmengine.suspects.class_names import numbers
from wmengine.suspects.computed import check_whole
from wmengine.suspects.outputs import outputs_of
from wmengine.suspects.weights import (
    ModuleTensor,
    call,
    evaluating,
    going_into,
    live_factors,
    live_filters,
    module_tensors,
    unwrap,
)

if TYPE_CHECKING:
    import torch


class ModuleSuspect:
    """A torch module. Its training flags, buffers, device and dtype are left as they were.

    Zeros of the mark's inputs are run through it to find its weights in order of execution; without them, or where
    that fails, they come in order of registration, and the facts say so. One input is passed by place, several by name
    where its forward takes these names.
    """

    settings: Mapping[str, Any] = {}

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = unwrap(module, pieces=True)
        self.name = f"module {type(self.module).__name__}"
        self.sha256: str | None = None
        self.facts: list[Fact] = []

    def adapters(self, shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]:
        return [AS_RECORDED]  # it is called as its owner's loop calls it

    def limit(self, inputs: Inputs, count: int) -> int:
        return count

    def close(self) -> None:
        """Nothing is held."""

    def answer(self, inputs: Inputs, num_classes: int | None = None) -> Answers:
        self.facts = []

        def run(rows: dict[str, NDArray[Any]]) -> Outputs:
            try:
                return outputs_of(call(self.module, self._tensors_of(rows)))
            except Exception as error:  # whatever the module's own code raises
                raise SuspectError(f"{self.name} fails on {_said(rows)} ({one_line(error)})") from None

        with evaluating(self.module):
            return ask_in_chunks(run, inputs, num_classes, self.name, self.facts)

    def tensors(self, signature: Signature | None = None) -> list[Tensor]:
        self.facts = []
        import torch

        if isinstance(self.module, torch.jit.ScriptModule):
            raise SuspectError(
                f"{self.name} is TorchScript and shows no layers: torch.jit.save it and verify that file"
            )
        check_whole(self.module)
        found = []
        with torch.no_grad():
            for each in self._weights(signature):
                factors = live_factors(self.module, each)
                # A copy: what NumPy has seen cannot be freed again, and fully_shard frees what it has gathered.
                filters = live_filters(self.module, each).to("cpu", torch.float32, copy=True)
                found.append(
                    Tensor(
                        np.ascontiguousarray(filters.numpy()),
                        each.path,
                        None if factors is None else factors.to("cpu", torch.float32, copy=True).numpy(),
                    )
                )
        return found

    def activations(self, place: int, inputs: Inputs) -> NDArray[np.float32]:
        self.facts = []
        check_whole(self.module)
        try:
            tensors = self._tensors_of(part_of(inputs, 0, 1))
            weights = module_tensors(self.module, tensors)
            if place >= len(weights):
                raise SuspectError(f"{self.name} has {len(weights)} weights, and the mark is in number {place + 1}")
            parts = []
            with evaluating(self.module):
                for start in range(0, rows_of(inputs), 32):
                    rows = self._tensors_of(part_of(inputs, start, start + 32))
                    parts.append(going_into(self.module, weights[place].path, rows).float().cpu().numpy())
        except SuspectError:
            raise
        except Exception as error:  # whatever the module's own code raises
            raise SuspectError(f"{self.name} fails on {_said(inputs)} ({one_line(error)})") from None
        return np.concatenate(parts)

    def _weights(self, signature: Signature | None) -> list[ModuleTensor]:
        reason = "no inputs are known"
        if signature is not None:
            zeros = {name: np.zeros((1, *spec.shape), _numpy(spec.dtype)) for name, spec in signature.items()}
            try:
                return module_tensors(self.module, self._tensors_of(zeros))
            except Exception as error:  # whatever the module's own code raises
                reason = f"it fails on zeros, {_said(zeros)}: {one_line(error)}"
        self.facts.append(fact("registration_order", reason=reason))
        return module_tensors(self.module)

    def _tensors_of(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Copies, as the module may write into them: floats in its own dtype, on its device."""
        import torch

        like = next((value for value in self.module.parameters() if value.is_floating_point()), None)
        found = {}
        for name, rows in inputs.items():
            batch = torch.tensor(rows)
            if like is not None:
                batch = batch.to(like.device, like.dtype if batch.is_floating_point() else None)
            found[name] = batch
        return found


class CallableSuspect:
    """A function from one input [N, ...], or a dict of several by name, to scores [N, C] or labels [N], as a NumPy
    array or a torch tensor, or to several of these."""

    settings: Mapping[str, Any] = {}

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self.name = f"callable {getattr(function, '__name__', type(function).__name__)}"
        self.sha256: str | None = None
        self.facts: list[Fact] = []

    def adapters(self, shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]:
        return [AS_RECORDED]  # it is documented to take what the mark recorded

    def limit(self, inputs: Inputs, count: int) -> int:
        return count

    def close(self) -> None:
        """Nothing is held."""

    def answer(self, inputs: Inputs, num_classes: int | None = None) -> Answers:
        self.facts = []

        def run(rows: dict[str, NDArray[Any]]) -> Outputs:
            given = {name: values.copy() for name, values in rows.items()}  # it may work in place
            try:
                answer = self.function(given if len(given) > 1 else next(iter(given.values())))
                several = not isinstance(answer, list) or _are_outputs(answer, rows_of(rows))
                outputs = outputs_of(answer) if several else [("output", answer)]
                return [(name, _in_numbers(value)) for name, value in outputs]
            except Exception as error:  # whatever the function raises
                raise SuspectError(f"{self.name} fails on {_said(rows)} ({one_line(error)})") from None

        return ask_in_chunks(run, inputs, num_classes, self.name, self.facts)

    def tensors(self, signature: Signature | None = None) -> list[Tensor]:
        raise SuspectError(f"{self.name} shows no weights; verify a white-box watermark on a file or a module")

    def activations(self, place: int, inputs: Inputs) -> NDArray[np.float32]:
        raise SuspectError(f"{self.name} shows no activations; verify a white-box watermark on a file or a module")


def _are_outputs(answer: list[Any], rows: int) -> bool:
    """Whether a list is one of outputs, as a session of ONNX Runtime gives them, and not of what each row is answered
    with."""
    sizes = [(len(each),) if isinstance(each, list) else getattr(each, "shape", ()) for each in answer]
    return all(size[:1] == (rows,) and (len(size) > 1 or len(answer) != rows) for size in sizes)


def _in_numbers(value: Any) -> Any:
    """An output as it is, or in numbers where it holds maps or texts, as models of scikit-learn answer."""
    first = value[0] if isinstance(value, list) and value else value
    text = isinstance(first, str) or (isinstance(value, np.ndarray) and value.dtype.kind in "OUS")
    if not text and not isinstance(first, dict):
        return value
    found = numbers(np.asarray(value) if text else value)
    return value if found is None else found


def _numpy(dtype: str) -> str:
    return "float32" if dtype == "bfloat16" else dtype


def _said(inputs: Inputs) -> str:
    return "inputs " + ", ".join(str(list(rows.shape)) for rows in inputs.values())
