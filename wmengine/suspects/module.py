"""A torch module, or any function, as a suspect: asked in eval mode, on its own device and in its own dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wmengine.carriers import ModuleTensor, Tensor, evaluating, module_tensors, unwrap
from wmengine.errors import SuspectError
from wmengine.suspects.adapters import AS_RECORDED, Adapter, Range
from wmengine.suspects.answers import Outputs
from wmengine.suspects.base import ask_in_chunks, one_line

if TYPE_CHECKING:
    import torch


class ModuleSuspect:
    """A torch module. Its training flags, buffers, device and dtype are left as they were.

    Zeros of the input shape are run through it to find its weights in order of execution; without a shape, or where
    that fails, they come in order of registration, and the notes say so.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = unwrap(module)
        self.name = f"module {type(self.module).__name__}"
        self.sha256: str | None = None
        self.notes: list[str] = []

    def adapters(self, trigger_shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]:
        return [AS_RECORDED]  # it is called as its owner's loop calls it

    def close(self) -> None:
        pass

    def query(self, inputs: NDArray[np.float32], num_classes: int | None = None) -> NDArray[Any]:
        self.notes = []

        def run(rows: NDArray[np.float32]) -> Outputs:
            try:
                return _outputs(self.module(self._input(rows)))
            except Exception as error:  # whatever the module's own code raises
                raise SuspectError(f"{self.name} fails on inputs {list(rows.shape)} ({one_line(error)})") from None

        with evaluating(self.module):
            return ask_in_chunks(run, inputs, num_classes, self.name, self.notes)

    def tensors(self, input_shape: Sequence[int] | None = None) -> list[Tensor]:
        self.notes = []
        return [
            Tensor(np.ascontiguousarray(filters(weight.detach()).float().cpu().numpy()), path)
            for path, weight, filters in self._weights(input_shape)
        ]

    def _weights(self, input_shape: Sequence[int] | None) -> list[ModuleTensor]:
        reason = "no input shape is known"
        if input_shape is not None:
            try:
                return module_tensors(self.module, self._input(np.zeros((1, *input_shape), np.float32)))
            except Exception as error:  # whatever the module's own code raises
                reason = f"it fails on zeros of shape {list(input_shape)}: {one_line(error)}"
        self.notes.append(f"weights were read in order of registration, as {reason}")
        return module_tensors(self.module)

    def _input(self, rows: NDArray[np.float32]) -> torch.Tensor:
        import torch

        like = next((value for value in self.module.parameters() if value.is_floating_point()), None)
        batch = torch.from_numpy(rows)
        return batch if like is None else batch.to(device=like.device, dtype=like.dtype)


class CallableSuspect:
    """A function from float32 [N, ...] to scores [N, C] or labels [N], as a NumPy array or a torch tensor."""

    def __init__(self, function: Callable[[NDArray[np.float32]], Any]) -> None:
        self.function = function
        self.name = f"callable {getattr(function, '__name__', type(function).__name__)}"
        self.sha256: str | None = None
        self.notes: list[str] = []

    def adapters(self, trigger_shape: Sequence[int], value_range: Range, every: bool = True) -> list[Adapter]:
        return [AS_RECORDED]  # it is documented to take what the mark recorded

    def close(self) -> None:
        pass

    def query(self, inputs: NDArray[np.float32], num_classes: int | None = None) -> NDArray[Any]:
        self.notes = []

        def run(rows: NDArray[np.float32]) -> Outputs:
            try:
                return _outputs(self.function(rows.copy()))  # a copy: it may work in place
            except Exception as error:  # whatever the function raises
                raise SuspectError(f"{self.name} fails on inputs {list(rows.shape)} ({one_line(error)})") from None

        return ask_in_chunks(run, inputs, num_classes, self.name, self.notes)

    def tensors(self, input_shape: Sequence[int] | None = None) -> list[Tensor]:
        raise SuspectError(f"{self.name} shows no weights; verify a white-box watermark on a file or a module")


def _outputs(result: Any) -> Outputs:
    if isinstance(result, Mapping):
        return [(str(name), value) for name, value in result.items()]
    if isinstance(result, tuple):
        return [(str(index), value) for index, value in enumerate(result)]
    return [("output", result)]
