"""Networks that run on passports: `passport` prepares one, `passport_accuracy` says what passports are worth to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wmengine._optional import require
from wmengine.marks.watermark import Watermark

if TYPE_CHECKING:
    import torch


def passport(model: torch.nn.Module, sample: Any, marked: str | Sequence[int] = "all") -> torch.nn.Module:
    """Prepare a network for `deepipr_v1`, in place, and return it: the scale and shift of its normalisations are from
    now on computed from the weight before them and from passports that it holds.

        model = wmengine.passport(model, x[:2])
        emb = wmengine.Embedder(model, key, ["deepipr_v1"], sample=x[:64], name="detector-v3")

    The passports are the mark's once an Embedder is made. sample: a batch of inputs, a tensor or a dict by name.
    marked: "all" trained weights with a normalisation right behind them, or some of their places in the order of
    execution, as the scheme's option. The other schemes of passports need no preparation: they leave the network as it
    is. Raises ValueError where there is nothing to prepare.
    """
    require("torch", extra="train")
    from wmengine.parts.training.passport_course import PassportNorm
    from wmengine.suspects.weights import module_tensors, normalised_places, unwrap

    inner = unwrap(model)
    every = module_tensors(inner, _named(sample, inner))
    places = normalised_places(inner, every)
    chosen = places if isinstance(marked, str) else sorted({int(place) for place in marked})
    if not chosen or not set(chosen) <= set(places):
        raise ValueError(
            f"passports are for trained weights with a normalisation right behind them; here these are {places}, and "
            f"marked is {marked!r}"
        )
    for place in chosen:
        path = every[place].normalisation or ""
        norm = inner.get_submodule(path)
        if norm.weight is None:
            raise ValueError(f"the normalisation {path!r} has no scale that passports could give, or has them already")
        parent, _, name = path.rpartition(".")
        setattr(inner.get_submodule(parent), name, PassportNorm(norm, inner.get_submodule(every[place].path), place))
    return model


def passport_accuracy(model: torch.nn.Module, mark: Watermark, inputs: Any, labels: torch.Tensor) -> float:
    """The share of inputs that a network answers right when it runs on the passports of `mark`, the true one or a
    forged one, such as `Watermark.create(another_key, mark.preset, mark.parameters)`.

    inputs: [n, ...] or a dict by name, run as one batch; labels: int64 [n]. A branch with statistics of its own, which
    a plain network does not hold, takes them from this batch. The model is left as it was. Raises ValueError for a mark
    without passports and for a model that it does not fit.

    A wrong passport ruins accuracy (Fan et al. 2019, section 4), but a right one proves little: <W_o, p> = γ_o is O
    linear equations for M unknowns, and has a solution wherever M >= O. What proves is the mark's p-value.
    """
    torch = require("torch", extra="train")
    from wmengine.parts.sources.passports import passports_of
    from wmengine.parts.training.passport_course import through_passports
    from wmengine.parts.training.passports import PassportSigns
    from wmengine.parts.training.weight_term import carriers_in
    from wmengine.suspects.outputs import logits_of
    from wmengine.suspects.weights import evaluating, unwrap

    training = mark.preset.training
    if not isinstance(training, PassportSigns):
        raise ValueError(f"a mark of the scheme {mark.scheme!r} has no passports")
    inner = unwrap(model)
    rows = _named(inputs, inner)
    carriers = carriers_in(inner, {name: values[:1] for name, values in rows.items()}, mark.scheme, mark.parameters)
    passports = [torch.from_numpy(each) for each in passports_of(mark)]
    with evaluating(inner):
        for carrier in carriers if training.branch == "separate" else ():
            inner.get_submodule(carrier.normalisation or "").train()
        answers = through_passports(inner, carriers, passports, {name: each.clone() for name, each in rows.items()})
    found = logits_of(answers).argmax(1)
    return float((found == labels.to(found.device)).double().mean())


def _named(rows: Any, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By name, tensors where the model is."""
    named = dict(rows) if isinstance(rows, dict) else {"input": rows}
    like = next(model.parameters(), None)
    if like is None:
        return named
    return {name: each.to(like.device) if hasattr(each, "to") else each for name, each in named.items()}
