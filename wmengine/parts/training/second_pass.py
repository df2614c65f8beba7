"""Mixed rows, and a term of the loss in which some triggers run through the live network once more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from wmengine.parts.base import Setting
from wmengine.parts.training.mixed_rows import MixedRows
from wmengine.suspects import outputs
from wmengine.suspects.weights import arguments, module_tensors

ROWS = 16  # that run once more, a step


class SecondPass(MixedRows):
    """What a scheme makes of these rows is its `extra`. The network runs as it will be judged, in eval mode, so that
    neither its statistics nor the user's random numbers notice."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._dtypes = {name: rows.dtype for name, rows in setting.example.items()}

    # A step that is compiled breaks here: gradients are taken in it, and hooks come and go.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def term(self, model: torch.nn.Module) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        with in_eval_mode(model):
            return self.extra(model, next(model.parameters()).device)

    def extra(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        """The term; model: in eval mode."""
        raise NotImplementedError

    def some(self, count: int, among: torch.Tensor | None = None) -> torch.Tensor:
        """Numbers of up to `count` triggers, or of these, each once."""
        size = len(self._labels) if among is None else len(among)
        chosen = torch.randperm(size, generator=self._generator)[:count]
        return chosen if among is None else among[chosen]

    def trigger_rows(self, chosen: torch.Tensor, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Triggers by their numbers, inputs and labels; copies, as a network may write into its input."""
        at = chosen.to(device, non_blocking=True)
        inputs = {name: self._on(rows, device, self._dtypes[name])[at] for name, rows in self._inputs.items()}
        return inputs, self._on(self._labels, device, torch.int64)[at]


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """With gradients; the training flags come back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def logits_of(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """float32 [N, C]: the logits among what the network answers, with other parameters in place of some of its own
    where given. Raises ValueError where it answers with none."""
    given, named = arguments(model, inputs)
    found = outputs.logits_of(torch.func.functional_call(model, dict(parameters or {}), given, named))
    if not isinstance(found, torch.Tensor) or found.ndim != 2:
        what = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"this scheme runs the network once more, which must answer with logits [n, C], not {what}")
    return found.float()


@contextmanager
def keeping(model: torch.nn.Module, paths: Sequence[str]) -> Iterator[list[torch.Tensor]]:
    """While this lasts, what goes into the layers at `paths` when they first run: [N, F] each, flattened, in that
    order."""
    seen: list[torch.Tensor] = []
    ran: set[str] = set()

    def keep(path: str, given: tuple[torch.Tensor, ...]) -> None:
        if path not in ran:  # a layer may run twice, and its first run counts
            ran.add(path)
            seen.append(given[0].flatten(1))

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, given, path=path: keep(path, given))
        for path in paths
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def last_layers(setting: Setting, count: int) -> list[str]:
    """Paths of the last `count` layers with weights, in the order of execution; of all where there are fewer."""
    return list(dict.fromkeys(each.path for each in module_tensors(setting.model, setting.example)))[-count:]
