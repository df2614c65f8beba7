"""Weights that are computed from others: parametrisations and hooks, adapters, shards; read as they are now."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


_PIECES = (
    "FullyShardedDataParallel cuts weights into pieces, and only marks of triggers go with it: shard with "
    "torch.distributed.fsdp.fully_shard"
)
_ADDED = set[type]()  # classes of adapters that were seen to merge by addition


def live_weight(layer: Any, name: str = "weight") -> torch.Tensor:
    """A layer's weight as it is now, differentiable by what it is computed from, with nothing of the layer changed.

    Of an adapter of peft the weight that merging makes; of shards (fully_shard) the whole. Raises ValueError for an
    adapter that is not merged by addition, and for pieces.
    """
    weight = whole(_computed(layer, name))
    if weight.ndim < 2:  # a model that was cut after its Embedder was made does not show by what
        raise ValueError(_PIECES)
    return weight


def whole(tensor: Any) -> torch.Tensor:
    """A tensor that fully_shard may have cut, put together again; differentiable."""
    found: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def is_trained(layer: torch.nn.Module, name: str = "weight") -> bool:
    """Whether a layer's weight is trained, or anything that it is computed from."""
    stored = layer._parameters.get(name)
    if stored is not None:
        return stored.requires_grad
    return any(each.requires_grad for part, each in layer.named_parameters() if "bias" not in part)


def is_adapter(layer: torch.nn.Module) -> bool:
    """Whether a layer of peft adds to the weight of another, such as LoRA."""
    return hasattr(layer, "get_delta_weight") and hasattr(layer, "base_layer")


def in_pieces(model: torch.nn.Module) -> bool:
    """Whether torch's FullyShardedDataParallel has cut the model's parameters into pieces of no weight."""
    return any(type(each).__name__ == "FullyShardedDataParallel" for each in model.modules())


def check_whole(model: torch.nn.Module) -> None:
    """Raises ValueError for a model in pieces, where weights are to be read."""
    if in_pieces(model):
        raise ValueError(_PIECES)


def check_unsharded(model: torch.nn.Module) -> None:
    """Raises ValueError for a model in shards or pieces, where weights are to be changed or written."""
    if in_pieces(model) or any(hasattr(each, "reshard") and hasattr(each, "unshard") for each in model.modules()):
        raise ValueError(
            "the model's weights are sharded: load what torch.distributed.checkpoint.state_dict.get_model_state_dict "
            "gives with full_state_dict=True into a plain model, and take that"
        )


def plain(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, or where weights of it are computed a copy in eval mode that holds them as parameters.

    Raises ValueError for a sharded one.
    """
    import torch
    from torch.nn.utils import parametrize

    check_unsharded(model)
    if not any(is_adapter(each) or parametrize.is_parametrized(each) or _hooks(each) for each in model.modules()):
        return model
    # What a hook has computed is no leaf, and torch copies none.
    made = [value for each in model.modules() for value in vars(each).values() if isinstance(value, torch.Tensor)]
    model = copy.deepcopy(model, {id(value): value.detach().clone() for value in made}).eval()
    for path, layer in list(model.named_modules()):
        if is_adapter(layer):
            base: Any = layer.get_base_layer()
            base.weight = torch.nn.Parameter(live_weight(layer).detach())
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, base)
        if parametrize.is_parametrized(layer):
            values = {name: getattr(layer, name).detach() for name in layer.parametrizations}
            # torch's own removal takes the property from the class, which the copy shares with its original.
            layer.__class__ = type(layer).__bases__[0]
            del layer.parametrizations
            for name, value in values.items():
                layer.register_parameter(name, torch.nn.Parameter(value))
        for number, _, hook in _hooks(layer):
            hook.remove(layer)
            del layer._forward_pre_hooks[number]
    # What peft wraps a model in hides what its forward takes.
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def low_rank_pair(model: torch.nn.Module) -> str | None:
    """The path of a frozen linear layer with two trained ones beside it whose product has its shape, if there is one:
    an adapter that somebody built himself."""
    import torch

    for path, parent in model.named_modules():
        if is_adapter(parent) or isinstance(parent, torch.nn.Sequential):  # whose layers stand behind one another
            continue
        near = [
            each for each in parent.named_modules() if each[0].count(".") < 2 and isinstance(each[1], torch.nn.Linear)
        ]
        trained = [tuple(each.weight.shape) for _, each in near if each.weight.requires_grad]
        for name, base in parent.named_children():
            if not isinstance(base, torch.nn.Linear) or base.weight.requires_grad:
                continue
            rows, columns = base.weight.shape
            if any((rows, rank) in trained for rank, wide in trained if wide == columns and rank < min(rows, columns)):
                return f"{path}.{name}".lstrip(".")
    return None


def _computed(layer: Any, weight: str) -> Any:
    import torch
    from torch.nn.utils import parametrize
    from torch.nn.utils.prune import BasePruningMethod
    from torch.nn.utils.weight_norm import WeightNorm

    if is_adapter(layer):
        return _merged(layer)
    if parametrize.is_parametrized(layer, weight):
        training = [each for each in layer.parametrizations[weight].modules() if each.training]
        try:
            layer.parametrizations[weight].eval()  # read in training a spectral norm would go on with its estimate
            return getattr(layer, weight)
        finally:
            for each in training:
                each.training = True
    for _, name, hook in _hooks(layer):
        if name != weight:
            continue
        if isinstance(hook, WeightNorm):
            return hook.compute_weight(layer)
        if isinstance(hook, BasePruningMethod):
            return hook.apply_mask(layer)  # type: ignore[no-untyped-call]
        stored, left, right = (getattr(layer, f"{weight}_{part}") for part in ("orig", "u", "v"))
        # Copies: its next forward pass writes into both.
        return stored / torch.dot(left.clone(), hook.reshape_weight_to_matrix(stored).mv(right.clone()))
    return getattr(layer, weight)


def _merged(layer: Any) -> Any:
    if layer.merged or layer.disable_adapters:
        return live_weight(layer.base_layer)
    for name in layer.active_adapters:
        if name in getattr(layer, "lora_variant", ()):
            kind = type(layer.lora_variant[name]).__name__
            raise ValueError(f"the adapter {name!r} ({kind}) is not merged by addition: merge it, then mark the model")
    if type(layer) not in _ADDED:
        _check_added(layer)
        _ADDED.add(type(layer))
    return _added(layer)


def _added(layer: Any) -> Any:
    weight = live_weight(layer.base_layer)
    for name in layer.active_adapters:
        if name in getattr(layer, layer.adapter_layer_names[0]):
            weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight


def _check_added(layer: Any) -> None:
    """Raises ValueError unless a copy of the adapter, its weights moved, merges to what is read of it."""
    import torch

    if any(hasattr(each, "full_tensor") for each in layer.parameters()):  # shards, which nothing merges
        return
    moved = copy.deepcopy(layer).eval()
    try:
        with torch.no_grad():
            for path, each in moved.named_parameters():
                if not path.startswith("base_layer."):
                    each += 0.1 * torch.arange(each.numel(), device=each.device).cos().reshape(each.shape)
            read, base = _added(moved), live_weight(layer.base_layer)
            moved.merge()
            merged = live_weight(moved.base_layer)
            same = bool((read - merged).abs().max() <= 0.02 * (merged - base).abs().max())
    except Exception:  # of kinds that cannot say what they add
        same = False
    if not same:
        kind = type(layer).__module__.split(".")[-2]
        raise ValueError(f"the adapter ({kind}) is not merged by addition: merge it, then mark the model")


def _hooks(layer: torch.nn.Module) -> list[tuple[int, str, Any]]:
    """The hooks of a layer that compute a tensor before each forward pass: number, that tensor's name, hook."""
    from torch.nn.utils.prune import BasePruningMethod
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    found: list[tuple[int, str, Any]] = []
    for number, hook in layer._forward_pre_hooks.items():
        if isinstance(hook, BasePruningMethod):
            found.append((number, hook._tensor_name, hook))
        elif isinstance(hook, WeightNorm | SpectralNorm):
            found.append((number, hook.name, hook))
    return found
