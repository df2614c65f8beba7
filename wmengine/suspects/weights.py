"""The weights of a torch module: which tensors can hold a mark, filters on axis 0, and the normalisation behind them.

Names never count: a weight is known by its place in the order of execution. A filter is read as it stands after folding
the normalisation behind it, which exporters do and which undoes what flips a filter and its normalisation together.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from numpy.typing import NDArray

from wmengine._optional import require
from wmengine.suspects.base import one_line
from wmengine.suspects.computed import check_whole, is_adapter, is_trained, live_weight, whole

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", NDArray[Any], "torch.Tensor")


class ModuleTensor(NamedTuple):
    """A weight of a torch module: its module's path, the parameter (or what was computed in its place), what puts the
    filters of it on axis 0, the path of the normalisation that its output goes into, if there is one, and its name in
    its module."""

    path: str
    weight: torch.Tensor
    filters: Callable[[torch.Tensor], torch.Tensor]
    normalisation: str | None = None
    name: str = "weight"


def live_filters(model: torch.nn.Module, tensor: ModuleTensor) -> torch.Tensor:
    """A weight [O, ...] as it is now, looked up anew: it may have been replaced, or be computed from others."""
    return tensor.filters(live_weight(model.get_submodule(tensor.path), tensor.name))


def live_factors(model: torch.nn.Module, tensor: ModuleTensor) -> torch.Tensor | None:
    """[O], what folding multiplies the filters by: gamma / sqrt(running variance + eps), or gamma where no statistics
    are kept. Differentiable by gamma. None without a normalisation, or with one that scales nothing."""
    if tensor.normalisation is None:
        return None
    norm: Any = model.get_submodule(tensor.normalisation)
    weight = None if norm.weight is None else whole(norm.weight)
    variance = getattr(norm, "running_var", None)
    if variance is None:
        return weight
    scale: torch.Tensor = (variance.detach() + norm.eps).rsqrt()
    return scale if weight is None else scale * weight


def filters_first(weight: Array, groups: int, transposed: bool) -> Array:
    """A convolution's weight as [O, I/groups, *kernel]; a transposed one is stored as [I, O/groups, *kernel].

    Takes and gives a NumPy array or a torch tensor; a view where the layout allows it.
    """
    if not transposed:
        return weight
    channels_in, filters, *kernel = weight.shape
    grouped = weight.reshape(groups, channels_in // groups, filters, *kernel).swapaxes(1, 2)
    return grouped.reshape(groups * filters, channels_in // groups, *kernel)


def module_tensors(model: torch.nn.Module, example: Mapping[str, torch.Tensor] | None = None) -> list[ModuleTensor]:
    """The weights of a model's convolutions, transposed convolutions, linear and recurrent layers, each once.

    With an example (a batch of its inputs by name, on the model's device) they come in the order in which it runs
    through them, which is the order in an exported graph, each with the normalisation behind it, and layers that it
    never reaches are left out. Without one they come in the order of registration. A recurrent layer has several, for
    its input and for its state, by layer and direction, as torch holds them: [G·H, ...], all gates of one in one. The
    model's training flags and buffers are left as they were. Raises ValueError where it does not run on the example.
    """
    import torch

    kinds = (torch.nn.modules.conv._ConvNd, torch.nn.Linear, torch.nn.RNNBase, torch.nn.RNNCellBase)
    layers: dict[torch.nn.Module, str] = {}
    inside = " "  # an adapter, which stands for the layer that it wraps
    for path, module in model.named_modules():
        if path.startswith(f"{inside}."):
            continue
        if isinstance(module.base_layer if is_adapter(module) else module, kinds):
            layers[module] = path
            inside = path if is_adapter(module) else inside
    behind: dict[torch.nn.Module, str | None] = dict.fromkeys(layers)
    if example is not None:
        behind = _executed(model, layers, example)
    found: dict[int, ModuleTensor] = {}
    for layer, normalisation in behind.items():
        for name in _names(layer):
            stored = layer._parameters.get(name)  # of two layers that share it the first counts
            with torch.no_grad():
                weight = live_weight(layer, name) if stored is None else stored
            found.setdefault(id(weight), ModuleTensor(layers[layer], weight, filters_of(layer), normalisation, name))
    return list(found.values())


def _names(layer: Any) -> list[str]:
    """What a layer's weights are called, in the order in which it multiplies by them."""
    import torch

    if isinstance(layer, torch.nn.RNNBase):
        return [name for names in layer._all_weights for name in names if name.startswith("weight")]
    if isinstance(layer, torch.nn.GRUCell):
        return ["weight_ih", "weight_hh"]
    return ["weight_hh", "weight_ih"] if isinstance(layer, torch.nn.RNNCellBase) else ["weight"]


def filters_of(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """How a layer's filters come to axis 0; only a convolution has groups, or may be transposed."""
    layer = layer.base_layer if is_adapter(layer) else layer
    groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
    return lambda weight: filters_first(weight, groups, transposed)


def _executed(
    model: torch.nn.Module, layers: Mapping[torch.nn.Module, str], example: Mapping[str, torch.Tensor]
) -> dict[torch.nn.Module, str | None]:
    """The layers that an example runs through, in that order, each with the path of the normalisation behind it."""
    import torch

    normalisations: dict[torch.nn.Module, str] = {
        module: path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._NormBase)
    }
    behind: dict[torch.nn.Module, str | None] = {}
    # By the tensor's number: held, so that no number is used twice; one that was changed in place is another value.
    outputs: dict[int, tuple[torch.nn.Module, Any, int]] = {}

    def ran(layer: torch.nn.Module, _: Any, output: Any) -> None:
        if layer in behind:  # what is behind its first run counts, as in a graph its first use does
            return
        behind[layer] = None
        if isinstance(output, torch.Tensor) and _names(layer) == ["weight"]:  # of a recurrent one it is a state
            outputs[id(output)] = layer, output, output._version

    def normalises(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and id(inputs[0]) in outputs:
            layer, output, version = outputs[id(inputs[0])]
            if output._version == version and behind[layer] is None:
                behind[layer] = normalisations[module]

    hooks = [layer.register_forward_hook(ran) for layer in layers]
    hooks += [module.register_forward_pre_hook(normalises) for module in normalisations]
    try:
        with evaluating(model):
            call(model, {name: rows.clone() for name, rows in example.items()})  # it may write into them
    except Exception as error:  # whatever the model's own code raises
        shapes = ", ".join(f"{rows.dtype} {list(rows.shape)}" for rows in example.values())
        raise ValueError(f"the model does not run on inputs {shapes}: {one_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return behind


def trained_places(model: torch.nn.Module, tensors: Sequence[ModuleTensor]) -> list[int]:
    """The places of those that are trained, or computed from what is trained."""
    return [place for place, each in enumerate(tensors) if is_trained(model.get_submodule(each.path), each.name)]


def normalised_places(model: torch.nn.Module, tensors: Sequence[ModuleTensor]) -> list[int]:
    """The places of those that are trained and have a normalisation right behind them that is no other's."""
    first = {each.normalisation: place for place, each in reversed(list(enumerate(tensors)))}
    trained = trained_places(model, tensors)
    return sorted(place for path, place in first.items() if path is not None and place in trained)


def call(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    """What a model answers, given its inputs as `arguments` puts them."""
    given, named = arguments(model, inputs)
    return model(*given, **named)


def arguments(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as a model's forward takes them: one by place, several by name; by name too what is not its first
    parameter, by place what has other names there, and as the dict that they are where it takes a single parameter."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # TorchScript's
        return tuple(inputs.values()), {}
    named = [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    placed = [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.POSITIONAL_ONLY)]
    if set(inputs) <= set(named) and list(inputs) != placed[:1]:
        return (), dict(inputs)
    if len(inputs) > 1 and any(each.kind is each.VAR_KEYWORD for each in parameters):
        return (), dict(inputs)
    if len(inputs) > len(placed) == len(parameters) == 1 and not set(placed) <= set(inputs):
        return (dict(inputs),), {}
    return tuple(inputs.values()), {}


def going_into(model: torch.nn.Module, path: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[N, F]: what goes into the layer at `path` when it first runs on these inputs, flattened; differentiable."""
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(path)
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]) if not seen else None)
    try:
        call(model, inputs)
    finally:
        hook.remove()
    return seen[0].flatten(1)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run a model without gradients, in eval mode and uncompiled; training flags, buffers and the random state come
    back after."""
    torch = require("torch", extra="train")
    training = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next((value.device for value in model.parameters() if value.device.type == "cuda"), None)
    try:
        model.eval()
        # Not in the caller's inference mode either, where no tensor counts its changes.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.random.fork_rng(devices=[] if device is None else [device]),
            # What is compiled would be so anew for every hook.
            torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext(),
        ):
            yield
    finally:
        for module, was in training:
            module.training = was
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def unwrap(model: torch.nn.Module, *, pieces: bool = False) -> torch.nn.Module:
    """The plain module inside the wrappers of torch.compile, of data parallelism and of averaged weights.

    pieces: whether FullyShardedDataParallel may stay, whose parameters are pieces of no weight; else it is a
    ValueError. Raises TypeError for what is no module.
    """
    require("torch", extra="train")
    import torch

    if not issubclass(type(model), torch.nn.Module):
        raise TypeError(f"a model must be a torch.nn.Module, and {type(model).__name__} is none")
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    if not pieces:
        check_whole(model)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = getattr(model, "_orig_mod")  # noqa: B009
        else:
            return model
