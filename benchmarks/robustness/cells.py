"""Rows of the table and where they lie: each a small Parquet file the moment it is measured, later one file a problem.

A file appears whole or not at all, so whatever ends a run, the next one goes on with the cells that are missing.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow
from pyarrow import parquet


@dataclass(frozen=True)
class Row:
    """One cell, measured.

    key: of everything that says what was to be measured, not of the code that did: `commit` says that, and for the base
    `network_commit`, None where that was not kept. base: the network that the steps (a JSON list of attacks with their
    options) began with. accuracy of `tested` inputs, from 0 to 1, with its 95 % interval (Wilson's). loss: accuracy
    lost on the same inputs, in points of 100, with its 95 % interval (Tango's), against the marked network; of the
    marked network itself against its unmarked twin, what the mark costs.

    matched of total symbols, a stranger matching each with `chance`; log10_p and decision as `verify` gives them,
    log10_p_matches and log10_p_soft by one statistic alone, log10_p_labels_soft by the soft one from labels alone where
    the mark is read from answers. All None without a mark. seconds: the steps and the judging, or of an untouched
    network its training. versions: of packages, JSON.
    """

    key: str
    problem: str
    recipe: str
    preset: str
    seed: int
    attack: str
    base: str
    steps: str
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    tested: int
    loss: float | None
    loss_low: float | None
    loss_high: float | None
    matched: int | None
    total: int | None
    chance: float | None
    log10_p: float | None
    log10_p_matches: float | None
    log10_p_soft: float | None
    log10_p_labels_soft: float | None
    decision: str | None
    seconds: float
    versions: str
    commit: str
    device: str
    threads: int
    date: str
    network_commit: str | None = None


def schema() -> Any:
    """The Arrow schema: a column for each field, one that may be None nullable."""
    columns = []
    for name, kind in get_type_hints(Row).items():
        kinds = get_args(kind) or (kind,)
        arrow = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}[kinds[0]]
        columns.append(pyarrow.field(name, arrow, nullable=len(kinds) > 1))
    return pyarrow.schema(columns)


def write(out: Path, row: Row) -> None:
    """Keep a row under OUT/PROBLEM; one of the same key is replaced."""
    _write(out / row.problem / f"{row.key}.parquet", [row])


def read(out: Path, problem: str) -> dict[str, Row]:
    """Every row of a problem by its key; of two with one key the one that was measured last."""
    files = [out / f"{problem}.parquet", *sorted((out / problem).glob("*.parquet"))]
    rows = [Row(**row) for file in files if file.exists() for row in parquet.read_table(file).to_pylist()]
    return {row.key: row for row in rows}


def gather(out: Path, problem: str) -> list[Row]:
    """Put all rows of a problem into OUT/PROBLEM.parquet, and return them. No run may be writing meanwhile."""
    rows = sorted(read(out, problem).values(), key=lambda row: (row.preset, row.attack, row.seed, row.key))
    single = list((out / problem).glob("*.parquet"))
    if single:
        _write(out / f"{problem}.parquet", rows)
    for file in single:
        file.unlink()
    return rows


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    table = pyarrow.Table.from_pylist([vars(row) for row in rows], schema=schema())
    with open(partial, "xb") as file:
        parquet.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
