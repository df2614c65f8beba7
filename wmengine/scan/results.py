"""A scan's rows: from scores to Parquet, with what many tests cost paid."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from wmengine.errors import ScanError, printable
from wmengine.judge import Score, is_owned
from wmengine.scan.journal import Journal, Plan
from wmengine.scan.listing import Listed
from wmengine.sequential import e_bh
from wmengine.watermark import Watermark

DECISIONS = ("owned", "not_proven", "error")
EMPTY = "empty files left out"
_ROWS_A_GROUP = 10_000


def rows_of(
    suspect: str, sha256: str | None, marks: Sequence[Watermark], scores: Sequence[Score], seconds: float, plan: Plan
) -> list[dict[str, Any]]:
    """One row for each mark; `seconds` of the suspect are shared out among them."""
    return [
        {
            "suspect": shown(suspect),
            "sha256": sha256,
            "watermark": mark.name,
            "commitment": mark.commitment,
            "scheme": mark.scheme,
            "decision": decision(score, plan),
            "matched": score.matched,
            "total": score.total,
            "queries": score.queries,
            "log10_p": score.log10_p,
            "log10_p_corrected": corrected(score.log10_p, plan),
            "evidence": None if score.evidence is None else asdict(score.evidence),
            "seconds": seconds / len(marks),
            "error": score.error,
            "notes": list(score.notes),
            "log10_e": score.log10_e if score.log10_e is not None else log10_calibrated(score.log10_p),
        }
        for mark, score in zip(marks, scores, strict=True)
    ]


def shown(suspect: str) -> str:
    """A path as a table can hold it: bytes of a file name that are no UTF-8 become escapes."""
    return suspect.encode("utf-8", "backslashreplace").decode() if not suspect.isascii() else suspect


def corrected(log10_p: float, plan: Plan) -> float:
    """A p-value times the number of tests of the scan (Bonferroni), at most 1."""
    return min(0.0, log10_p + math.log10(plan.tests))


def decision(score: Score, plan: Plan) -> str:
    """ "owned" where the corrected p-value reaches the scan's alpha."""
    if score.error is not None:
        return "error"
    return "owned" if is_owned(corrected(score.log10_p, plan), plan.alpha) else "not_proven"


def log10_calibrated(log10_p: float) -> float:
    """log10 of an e-value made of a p-value: (1 − p + p ln p) / (p ln² p), the mean of κ p^(κ−1) over κ in [0, 1].

    Vovk and Wang, "E-values: calibration, combination and applications", 2021, equation 2.
    """
    ln = log10_p * math.log(10.0)
    if ln > -1e-4:
        return math.log10(0.5 - ln / 6.0)  # its series at p = 1, where the quotient cancels
    return math.log10(1.0 + math.exp(ln) * (ln - 1.0)) - log10_p - 2.0 * math.log10(-ln)


def renamed(rows: Sequence[dict[str, Any]], suspect: str, judged: str) -> list[dict[str, Any]]:
    """The rows of the suspect that was judged as those of one with the same bytes: errors name the file, too."""
    before, after = printable(judged), printable(suspect)
    return [
        row | {"suspect": shown(suspect), "error": row["error"] and row["error"].replace(before, after)} for row in rows
    ]


def copied(rows: Sequence[dict[str, Any]], original: str) -> list[dict[str, Any]]:
    """The rows of a suspect that is a copy of another one, which was judged: no time, and a note."""
    note = f"the same bytes as {printable(original)}, judged once"
    return [row | {"seconds": 0.0, "notes": [note, *row["notes"]]} for row in rows]


def of_every_name(rows: Sequence[dict[str, Any]], suspect: Listed) -> list[dict[str, Any]]:
    """The rows of a suspect for each name that its file has."""
    others = (copied(renamed(rows, name, suspect.name), suspect.name) for name in suspect.names[1:])
    return [*rows, *(row for other in others for row in other)]


def check_stored(journal: Journal, plan: Plan) -> None:
    """Raises ScanError where a journal's rows are not such as a scan of this plan writes."""
    import pyarrow

    schema = _schema(plan)
    names = {*schema.names, "log10_e"} - {"q_value"}
    for place in sorted(journal.judged()):
        try:
            for row, commitment in zip(journal.rows(place), plan.watermarks, strict=True):
                if row.keys() != names or row["commitment"] != commitment:
                    raise ValueError("a row is of another scan")
                float(row["log10_e"])
                pyarrow.RecordBatch.from_pylist([row | {"q_value": 1.0}], schema=schema)
        except (ValueError, TypeError, AttributeError, OverflowError, pyarrow.ArrowException) as error:
            raise journal.damaged(error) from None


def table_of(journal: Journal, plan: Plan) -> Any:
    """All rows as a pyarrow.Table."""
    import pyarrow

    return pyarrow.Table.from_batches(_batches(journal, plan), schema=_schema(plan))


def write_parquet(journal: Journal, plan: Plan, path: str | os.PathLike[str]) -> None:
    """All rows into one Parquet file, which appears at once when it is whole. Raises ScanError where it cannot."""
    from pyarrow import parquet

    partial = f"{os.fspath(path)}.{secrets.token_hex(8)}.partial"
    try:
        # Others may write to the folder, too: never through a link, or to a file, that is there already.
        with open(partial, "xb") as file:
            with parquet.ParquetWriter(file, _schema(plan), compression="zstd") as writer:
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
    import pyarrow

    evidence = [
        row["log10_e"] if row["error"] is None else -math.inf for *_, rows in journal.all_rows() for row in rows
    ]
    q_values = iter(e_bh(evidence, plan.tests))
    schema, group = _schema(plan), []
    for place, first, judged, rows in journal.all_rows():
        suspects = plan.suspects
        if place != judged:
            rows = renamed(rows, suspects[place].name, suspects[judged].name)
        if place != first:
            rows = copied(rows, suspects[first].name)
        group += of_every_name([row | {"q_value": next(q_values)} for row in rows], suspects[place])
        if len(group) >= _ROWS_A_GROUP:
            yield pyarrow.RecordBatch.from_pylist(group, schema=schema)
            group = []
    if group:
        yield pyarrow.RecordBatch.from_pylist(group, schema=schema)


def _schema(plan: Plan) -> Any:
    """The table's columns; its metadata hold how many empty files were left out."""
    import pyarrow

    text, whole, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    evidence = pyarrow.struct(
        [("test", text), ("matched", whole), ("asked", whole), ("chance", real), ("log10_share", real)]
    )
    return pyarrow.schema(
        [
            ("suspect", text), ("sha256", text), ("watermark", text), ("commitment", text), ("scheme", text),
            ("decision", text), ("matched", whole), ("total", whole), ("queries", whole), ("log10_p", real),
            ("log10_p_corrected", real), ("q_value", real), ("evidence", evidence), ("seconds", real), ("error", text),
            ("notes", pyarrow.list_(text)),
        ],
        {EMPTY: str(plan.empty)},
    )  # fmt: skip
