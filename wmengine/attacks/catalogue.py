"""Finding attacks, ours and those brought through the entry point "wmengine.attacks", and carrying them out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from wmengine._entry_points import brought
from wmengine.attacks.attack import Attack
from wmengine.attacks.data import Data
from wmengine.attacks.forms import attack_file, attack_module
from wmengine.attacks.page import PAGE

ENTRY_POINT = "wmengine.attacks"


class _Attacks(Mapping[str, Attack]):
    """Every attack by name."""

    def __getitem__(self, name: str) -> Attack:
        return _every()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_every())

    def __len__(self) -> int:
        return len(_every())


ATTACKS: Mapping[str, Attack] = _Attacks()


def attack(name: str) -> Attack:
    """The attack of that name. Raises ValueError, listing those that exist, where there is none."""
    if name not in ATTACKS:
        raise ValueError(f"there is no attack {name!r}; the attacks are {', '.join(ATTACKS)}")
    return ATTACKS[name]


def run(
    name: str,
    model: Any,
    data: Any = None,
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Attack a model and return the attacked one; the model itself is left as it is.

    model: a torch module, or the path of an ONNX or safetensors file. data: the thief's (inputs, labels), inputs alone,
    or a DataLoader; `wmengine attacks` says what each attack needs. out: the file to write, for a model that is a file
    and for attacks that end in one (fp16, int8); an attacked module is exported to it. Its path is returned then, and a
    file that is there already is overwritten only if told. seed: of everything random; same seed, same result on the
    same machine. options: see `wmengine attacks --json`.

    Raises ValueError for an attack, an option, a value or a form of model that cannot work, saying what could;
    ImportError naming the extra where a package is missing.

        thief = wm.attacks.run("ftal", model, (x, y), epochs=5)
        path = wm.attacks.run("prune", "model.onnx", share=0.9, out="pruned.onnx")
    """
    chosen = attack(name)
    options = chosen.options(options)
    is_file = isinstance(model, str | os.PathLike)
    if is_file and chosen.takes == "module":
        raise ValueError(
            f"the attack {name!r} trains: give the torch module (on the command line package.module:function, which "
            f"returns it) and not {os.fspath(model)}"
        )
    if data is None and chosen.needs and not any(options[name] == value for name, value in chosen.unless.items()):
        also = "inputs" if chosen.needs == "inputs" else "(inputs, labels)"
        raise ValueError(f"the attack {name!r} needs data={also}")
    given = None if data is None else Data(data)
    if given is not None and chosen.needs == "labels" and not given.labelled:
        raise ValueError(f"the attack {name!r} needs labels: give data=(inputs, labels)")
    if out is not None and os.path.lexists(out) and not overwrite:
        raise ValueError(
            f"{os.fspath(out)} is there already: choose another name, or overwrite it (overwrite=True, --force)"
        )
    if is_file:
        return attack_file(chosen, Path(model), given, None if out is None else Path(out), seed, options)
    torch = sys.modules.get("torch")  # whoever holds a module has imported torch
    if torch is None or not isinstance(model, torch.nn.Module):
        raise TypeError(f"a model is a torch module or the path of a file, and {type(model).__name__} is neither")
    return attack_module(chosen, model, given, None if out is None else Path(out), seed, options)


@cache
def _every() -> dict[str, Attack]:
    found: dict[str, Attack] = {}
    for each in (*PAGE, *brought(ENTRY_POINT, Attack, "attacks")):
        if each.name in found:
            raise ValueError(f"two attacks are called {each.name}; uninstall one of the packages that bring them")
        found[each.name] = each
    return found
