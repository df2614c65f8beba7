"""`wmengine demo`."""

from pathlib import Path
from typing import Annotated

import typer

from wmengine.cli.app import app
from wmengine.cli.options import JsonOption
from wmengine.cli.output import fail, print_json


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where report, table, marks, key and models go.")
    ] = Path("wmengine-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Shorter training, the same proofs.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Mark a small network, make the copies that a thief would make, and prove whose every copy is."""
    from wmengine.demo import print_table, run_demo

    result = run_demo(out, quick)
    if as_json:
        print_json(result.to_json())
    else:
        print_table(result)
    return 0 if result.proven else fail(f"not every verdict is as it should be: see {result.report}")
