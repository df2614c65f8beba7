"""`wmengine schemes`."""

from typing import Any

from wmengine.cli.app import app
from wmengine.cli.options import JsonOption
from wmengine.cli.output import print_json, print_table


@app.command()
def schemes(as_json: JsonOption = False) -> int:
    """List the schemes that can be embedded and verified, and what each needs beside a training loop."""
    from wmengine.marks.catalogue import SCHEMES
    from wmengine.marks.preset import Preset

    def parts(preset: Preset) -> dict[str, str]:
        shown: dict[str, Any] = {"source": preset.source, "symbols": preset.symbols, "training": preset.training}
        return {name: type(part).__name__ for name, part in shown.items()}

    if as_json:
        found = {}
        for name, preset in SCHEMES.items():
            about = {"kind": preset.kind, "name": name, "version": preset.version, "null": preset.null}
            about |= {"needs": list(preset.needs), "paper": preset.paper, "statistic": preset.statistic.identifier}
            found[name] = about | parts(preset) | {"options": preset.options}
        print_json(found)
        return 0
    rows = [
        (name, preset.kind, " × ".join(parts(preset).values()), preset.null, ", ".join(preset.needs), preset.paper)
        for name, preset in SCHEMES.items()
    ]
    print_table(("scheme", "kind", "parts", "null", "needs", "paper"), rows)
    return 0
