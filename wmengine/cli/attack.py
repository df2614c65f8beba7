"""`wmengine attack` and `wmengine attacks`."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from wmengine.cli.app import app
from wmengine.cli.options import JsonOption, check_file
from wmengine.cli.output import print_json, print_table


@app.command()
def attack(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which attack: `wmengine attacks` lists them.")],
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="An .onnx or .safetensors file, or package.module:function, which returns a torch module.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write; ONNX for a torch module.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="The thief's data: an array `inputs`, or several by the model's names for them; perhaps `labels`.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An option of the attack, its value in JSON or a word; a student is given as MODEL is.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there already.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Do to a copy of a model what a thief would do to hide whose it is; the model itself is left as it is."""
    from wmengine.attacks import attack as find
    from wmengine.attacks import run

    options = find(name).options(dict(map(_parsed, option or ())))
    given = None if data is None else _load(data)
    student = options.get("student")
    own = {"student": _model(student)} if isinstance(student, str) else {}
    run(name, _model(model), given, out=out, overwrite=force, seed=seed, **(options | own))
    if as_json:
        print_json({"out": str(out), "attack": name, "options": options, "seed": seed})
    else:
        print(", ".join([str(out), name, *(f"{each}={json.dumps(value)}" for each, value in options.items())]))
    return 0


@app.command()
def attacks(as_json: JsonOption = False) -> int:
    """List the attacks: what each takes of a model, what data it needs, its options, and what it promises."""
    from wmengine.attacks import ATTACKS

    needs = {
        name: [
            *(["module"] if each.takes == "module" else []),
            *{"": [], "inputs": ["inputs"], "labels": ["inputs", "labels"]}[each.needs],
        ]
        for name, each in ATTACKS.items()
    }
    if as_json:
        print_json(
            [
                {"name": name, "family": each.family, "takes": each.takes, "needs": needs[name]}
                | {"options": dict(each.defaults), "promise": each.promise, "paper": each.paper}
                for name, each in ATTACKS.items()
            ]
        )
        return 0
    rows = []
    for name, each in ATTACKS.items():
        options = " ".join(f"{option}={json.dumps(value)}" for option, value in each.defaults.items())
        rows.append((name, each.family, ", ".join(needs[name]), options, each.promise))
    print_table(("attack", "family", "needs", "options", "promise"), rows)
    return 0


def _parsed(option: str) -> tuple[str, Any]:
    name, equals, value = option.partition("=")
    if not equals:
        raise ValueError(f"--option {option} has no value: write NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _load(path: Path) -> Any:
    """(inputs, labels) or inputs alone of an .npz file; inputs are a dict where they have other names."""
    import zipfile

    import numpy as np

    check_file(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file}
            arrays = {
                name: each.astype(np.float32) if each.dtype == np.float64 else each for name, each in arrays.items()
            }
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{path} must be an .npz file with an array `inputs`") from None
    for name, each in arrays.items():
        if each.ndim == 0:
            raise ValueError(f"{path} must hold a row for each input, and {name} is one value alone")
    labels = arrays.pop("labels", None)
    if not arrays:
        raise ValueError(f"{path} must be an .npz file with an array `inputs`, and it has none")
    inputs = arrays["inputs"] if arrays.keys() == {"inputs"} else arrays
    return inputs if labels is None else (inputs, labels)


def _model(given: str) -> Any:
    """The path of a file, or the torch module that the named function returns."""
    from wmengine.attacks.files import reason

    home, colon, name = given.partition(":")
    if not colon or Path(given).suffix in (".onnx", ".safetensors") or os.path.exists(given):
        return Path(given)
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(home), name)()
    except Exception as error:
        raise ValueError(
            f"{given} must be package.module:function, a function that makes the model ({reason(error)})"
        ) from error
    if not hasattr(model, "state_dict"):
        raise ValueError(f"{given} returned {type(model).__name__}, and must return a torch module")
    return model
