"""A scan's rows: verdicts, from their journal to Parquet, with the q-value that only all of them together have."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from wmengine.errors import ScanError, printable
from wmengine.facts import fact
from wmengine.judging.judge import Finding
from wmengine.judging.verdict import PROVING, from_dict, verdict_of
from wmengine.judging.verification import caveats
from wmengine.marks.watermark import Watermark
from wmengine.parts.statistics.sequential import e_bh
from wmengine.scanning.journal import Journal, Plan
from wmengine.scanning.listing import Listed
from wmengine.scanning.schema import batch_of_rows, schema_of

Row = dict[str, Any]

DECISIONS = ("owned", "not_proven", "other_task", "error")
THIS = "this file"  # what a suspect is called while it is judged: its name comes to an error with the row
_ROWS_A_GROUP = 10_000
_HALF = 500  # characters, of an error


def rows_of(
    suspect: str, sha256: str | None, marks: Sequence[Watermark], found: Sequence[Finding], seconds: float, plan: Plan
) -> list[Row]:
    """One row for each mark; `seconds` of the suspect are shared out among them. An error begins with its name; that a
    mark cannot concern the suspect is none."""
    checked = plan.derivation == "checked"
    found = [_named(each, suspect) for each in found]
    return [
        verdict_of(
            finding,
            mark,
            suspect=shown(suspect),
            sha256=sha256,
            alpha=plan.alpha,
            tests=plan.tests,
            derivation=plan.derivation,
            settings=plan.settings,
            seconds=seconds / len(marks),
            caveats=tuple(caveats(finding, mark, plan.alpha, plan.tests, checked=checked)),
        ).to_dict()
        for mark, finding in zip(marks, found, strict=True)
    ]


def _named(finding: Finding, suspect: str) -> Finding:
    if finding.error is None:
        return finding
    if finding.other_task:
        return replace(finding, error=None, facts=(fact("other_task", reason=printable(finding.error, _HALF)),))
    return replace(finding, error=_about(suspect, finding.error))


def shown(suspect: str) -> str:
    """A path as a table can hold it: bytes of a file name that are no UTF-8 become escapes."""
    return suspect.encode("utf-8", "backslashreplace").decode() if not suspect.isascii() else suspect


def _about(suspect: str, error: str) -> str:
    said = error.removeprefix(THIS) if error.startswith(THIS) else f": {error}"
    return _in_error(suspect) + printable(said, _HALF)


def _in_error(suspect: str) -> str:
    return printable(suspect, _HALF)


def renamed(rows: Sequence[Row], suspect: str, judged: str) -> list[Row]:
    """The rows of the suspect that was judged as those of one with the same bytes."""
    said = len(_in_error(judged))
    return [
        row | {"suspect": shown(suspect), "error": row["error"] and _in_error(suspect) + row["error"][said:]}
        for row in rows
    ]


def copied(rows: Sequence[Row], original: str) -> list[Row]:
    """The rows of a suspect that is a copy of another one, which was judged: no time, and a fact."""
    same = fact("same_bytes", original=printable(original))
    first = {"code": same.code, "values": dict(same.values)}
    return [
        row | {"seconds": 0.0, "facts": [first, *row["facts"]], "notes": [str(same), *row["notes"]]} for row in rows
    ]


def of_every_name(rows: Sequence[Row], suspect: Listed) -> list[Row]:
    """The rows of a suspect for each name that its file has."""
    others = (copied(renamed(rows, name, suspect.name), suspect.name) for name in suspect.names[1:])
    return [*rows, *(row for other in others for row in other)]


def check_stored(journal: Journal, plan: Plan) -> None:
    """Raises ScanError where a journal's rows are not such as a scan of this plan writes."""
    import pyarrow

    for place in sorted(journal.judged()):
        name = plan.suspects[place].name
        try:
            for row, commitment in zip(journal.rows(place), plan.watermarks, strict=True):
                verdict = from_dict(row)
                if (verdict.commitment, verdict.tests, verdict.alpha) != (commitment, plan.tests, plan.alpha):
                    raise ValueError("a row is of another scan")
                error = _in_error(name) if verdict.error is None else verdict.error
                if verdict.suspect != shown(name) or not error.startswith(_in_error(name)):
                    raise ValueError("a row is of another suspect")
                if json.loads(verdict.to_json()) != row:
                    raise ValueError("a row is not as a verdict is written")
                batch_of_rows([row | {"q_value": 1.0}], plan.left_out)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, pyarrow.ArrowException) as error:
            raise journal.damaged(error) from None


def table_of(journal: Journal, plan: Plan) -> Any:
    """All rows as a pyarrow.Table."""
    import pyarrow

    return pyarrow.Table.from_batches(_batches(journal, plan), schema=schema_of(plan.left_out))


def write_parquet(journal: Journal, plan: Plan, path: str | os.PathLike[str]) -> None:
    """All rows into one Parquet file, which appears at once when it is whole. Raises ScanError where it cannot."""
    from pyarrow import parquet

    partial = f"{os.fspath(path)}.{secrets.token_hex(8)}.partial"
    try:
        # Others may write to the folder, too: never through a link, or to a file, that is there already.
        with open(partial, "xb") as file:
            with parquet.ParquetWriter(file, schema_of(plan.left_out), compression="zstd") as writer:
                for batch in _batches(journal, plan):
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())  # the journal goes when the table is there
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ScanError(
            f"{os.fspath(path)} cannot be written ({reason}): make room for it; every suspect is judged, and the same "
            "command writes the table"
        ) from None


def _batches(journal: Journal, plan: Plan) -> Iterator[Any]:
    evidence = [
        row["log10_e"] if row["error"] is None and row["null"] in PROVING else -math.inf
        for *_, rows in journal.all_rows()
        for row in rows
    ]
    q_values = iter(e_bh(evidence, plan.tests))
    group: list[Row] = []
    for place, first, judged, rows in journal.all_rows():
        suspects = plan.suspects
        if place != judged:
            rows = renamed(rows, suspects[place].name, suspects[judged].name)
        if place != first:
            rows = copied(rows, suspects[first].name)
        group += of_every_name([row | {"q_value": next(q_values)} for row in rows], suspects[place])
        if len(group) >= _ROWS_A_GROUP:
            yield batch_of_rows(group, plan.left_out)
            group = []
    if group:
        yield batch_of_rows(group, plan.left_out)
