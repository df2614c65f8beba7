"""What commands print: JSON, tables fitted to the terminal, and errors of one line."""

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any


def fail(message: str, status: int = 2) -> int:
    """Say on stderr, in one line, what went wrong; the status."""
    from wmengine.errors import printable

    with contextlib.suppress(OSError):  # the status says it too
        if sys.stderr is not None:
            print(f"wmengine: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    return status


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table fitted to the terminal, or plain aligned columns where stdout is none."""
    if sys.stdout is not None and sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(*headers, box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in (headers, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
