"""The course of a mark of passports: the sign loss of live filters, and a second run of the network on passports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from wmengine.parts.base import Setting
from wmengine.parts.sources.passports import marked_channels, passports_of
from wmengine.parts.training.weight_term import carriers_in
from wmengine.suspects.computed import check_unsharded
from wmengine.suspects.outputs import logits_of
from wmengine.suspects.weights import ModuleTensor, arguments, filters_of, live_factors, live_filters

if TYPE_CHECKING:
    from wmengine.parts.training.passports import PassportSigns


class PassportNorm(torch.nn.Module):
    """A normalisation whose scale and shift are <W_o, p> of the weight before it, as `deepipr_v1` deploys it.

    passports: float [2, M], the average patches; some of no meaning until an Embedder puts a mark's there.
    """

    def __init__(self, norm: torch.nn.Module, layer: torch.nn.Module, seed: int) -> None:
        super().__init__()
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        # A tuple hides the layer from this module's own parameters: it is the network's, and saved once.
        self._behind = (layer,)
        self.norm = norm
        norm.weight = norm.bias = None  # type: ignore[assignment]
        norm.affine = False  # type: ignore[assignment]
        count = filters_of(layer)(weight)[0].numel()
        passports = torch.randn(2, count, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("passports", passports.to(weight.device, weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passports: torch.Tensor = self.passports  # type: ignore[assignment]
        (layer,) = self._behind
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        along = [1, -1, *[1] * (x.ndim - 2)]
        scale, shift = (each.reshape(along) for each in affine(filters_of(layer)(weight), passports))
        result: torch.Tensor = self.norm(x) * scale + shift
        return result


def affine(filters: torch.Tensor, passports: torch.Tensor) -> list[torch.Tensor]:
    """Scale and shift [O] that the average patches [2, M] of two passports give filters [O, ...].

    No matrix product, which autocast would round: of a scale its sign is the mark.
    """
    rows = filters.flatten(1)
    return [(rows * passport).sum(1) for passport in passports.to(rows.device, rows.dtype)]


def deployed(model: torch.nn.Module, carriers: Sequence[ModuleTensor]) -> list[str] | None:
    """Where the carriers' passports lie in a network that runs on them, or None where one of them has none."""
    paths = [(each.normalisation or "").removesuffix(".norm") for each in carriers]
    inside = all(isinstance(model.get_submodule(path), PassportNorm) for path in paths)
    return paths if inside else None


def through_passports(
    model: torch.nn.Module,
    carriers: Sequence[ModuleTensor],
    passports: Sequence[torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
) -> Any:
    """What the network answers where passports give the scales and shifts of the marked normalisations.

    All that the network keeps of what it saw, such as running statistics, stays as it was.
    """
    replaced = {name: buffer.clone() for name, buffer in model.named_buffers()}
    inside = deployed(model, carriers)
    for place, (carrier, passport) in enumerate(zip(carriers, passports, strict=True)):
        filters = live_filters(model, carrier)
        if inside is not None:
            replaced[f"{inside[place]}.passports"] = passport.to(filters.device, filters.dtype)
        else:
            scale, shift = affine(filters, passport)
            replaced |= {f"{carrier.normalisation}.weight": scale, f"{carrier.normalisation}.bias": shift}
    given, named = arguments(model, inputs)
    return torch.func.functional_call(model, replaced, given, named)


@contextmanager
def by_running_statistics(model: torch.nn.Module) -> Iterator[None]:
    """While this lasts batch normalisations go by what they keep, and keep nothing more."""
    kinds = torch.nn.modules.batchnorm._BatchNorm
    training = [module for module in model.modules() if isinstance(module, kinds) and module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class PassportCourse:
    """See `PassportSigns`. Nothing is hooked into the model; what is kept is the batch that `mix` saw last."""

    def __init__(self, training: PassportSigns, setting: Setting) -> None:
        self._training = training
        self._carriers = carriers_in(setting.model, setting.example, setting.preset_name, setting.mark.parameters)
        self._passports = [torch.from_numpy(each) for each in passports_of(setting.mark)]
        bits: NDArray[Any] = setting.mark.arrays[setting.symbols.name]
        self._signs = 2.0 * torch.tensor(bits, dtype=torch.float32) - 1.0
        channels = sum(sizes[0] for sizes in setting.mark.parameters["carriers"])
        self._chosen = torch.from_numpy(marked_channels(len(bits), channels))
        self._batch: tuple[dict[str, torch.Tensor], torch.Tensor] | None = None
        self.projected: torch.Tensor | None = None
        self._prepare(setting)

    def _prepare(self, setting: Setting) -> None:
        """Put a deployed branch's passports into the network."""
        model, name = setting.model, setting.preset_name
        inside = deployed(model, self._carriers)
        norms = [path for path, module in model.named_modules() if isinstance(module, PassportNorm)]
        if self._training.branch != "deployed":
            check_unsharded(model)
            for carrier in self._carriers:
                if getattr(model.get_submodule(carrier.normalisation or ""), "weight", None) is None:
                    raise ValueError(
                        f"scheme {name!r} gives the normalisation {carrier.normalisation!r} another scale, and it has "
                        "none: mark other weights with marked=, or a network without passports inside"
                    )
            return
        if inside is None or set(inside) != set(norms):
            raise ValueError(
                f"scheme {name!r} needs a network that runs on passports at the weights it marks, and nowhere else: "
                "model = wmengine.passport(model, sample) before the Embedder and the optimizer are made"
            )
        for path, passports in zip(inside, self._passports, strict=True):
            model.get_submodule(path).passports.copy_(passports)  # type: ignore[operator]

    def watch(self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor, task_rows: int) -> None:
        if self._training.branch != "deployed":
            rows = slice(None if self._training.triggers else task_rows)
            # Copies, as the network may write into its input.
            self._batch = {name: values[rows].clone() for name, values in inputs.items()}, labels[rows].clone()

    def rows(self, count: int, like: Mapping[str, torch.Tensor]) -> None:
        return None

    def term(self, model: torch.nn.Module) -> torch.Tensor:
        self._place(live_filters(model, self._carriers[0]).device)
        parts = []
        for carrier, passports in zip(self._carriers, self._passports, strict=True):
            scale, _ = affine(live_filters(model, carrier), passports)
            factors = live_factors(model, carrier)
            parts.append((scale if factors is None else scale * factors.detach().sign()).float())
        y = torch.cat(parts)[self._chosen]
        self.projected = y.detach()
        term = self._training.strength * (self._training.margin - self._signs * y).clamp(min=0.0).sum()
        if self._training.branch == "deployed" or not torch.is_grad_enabled():
            return term
        if self._batch is None:
            raise ValueError("passports train a branch on the batches that mix is given: call mix before loss")
        inputs, labels = self._batch
        with by_running_statistics(model) if self._training.branch == "shared" else nullcontext():
            answer = through_passports(model, self._carriers, self._passports, inputs)
        return term + torch.nn.functional.cross_entropy(logits_of(answer).float(), labels)

    def _place(self, device: torch.device) -> None:
        """Once on each device: a copy in every step would stall it."""
        if self._signs.device != device:
            self._signs, self._chosen = self._signs.to(device), self._chosen.to(device)
            self._passports = [each.to(device) for each in self._passports]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""
