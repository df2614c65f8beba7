"""What a scan has finished, on disk: a SQLite file beside its output, so that nothing judged is judged again.

The journal begins with the plan: the suspects, the watermarks, and everything that a p-value depends on. A resumed scan
must have the same plan, because the number of tests was fixed by it before the first query.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What was fixed before the first query. tests = suspects × watermarks; engine: the version that scores."""

    suspects: tuple[str, ...]
    watermarks: tuple[str, ...]  # commitments
    alpha: float
    queries: str
    adapters: str
    isolation: str
    engine: str
    provider: str = "cpu"

    @property
    def tests(self) -> int:
        return len(self.suspects) * len(self.watermarks)


class Journal:
    """The finished suspects of one scan. One writer; a row that `add` returned from survives a power cut."""

    def __init__(self, path: str | os.PathLike[str], plan: Plan) -> None:
        """Open or create. Raises ValueError, saying what differs, where the file belongs to another scan."""
        self.path = os.fspath(path)
        try:
            self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        except sqlite3.OperationalError:
            raise ValueError(
                f"{self.path} cannot be written: give --out in a folder that exists and is yours"
            ) from None
        try:
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute("CREATE TABLE IF NOT EXISTS plan (text TEXT NOT NULL)")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS suspects (place INTEGER PRIMARY KEY, sha256 TEXT, rows TEXT NOT NULL)"
            )
            stored = self._database.execute("SELECT text FROM plan").fetchone()
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise ValueError(f"{self.path} is no journal of a scan ({error}); move it away") from None
        if stored is None:
            self._database.execute("INSERT INTO plan VALUES (?)", [json.dumps(asdict(plan))])
            return
        difference = _difference(json.loads(stored[0]), json.loads(json.dumps(asdict(plan))))
        if difference:
            self._database.close()
            raise ValueError(
                f"{self.path} belongs to a scan of other {difference}: finish that one with its own command, or choose "
                "another --out; the number of tests is fixed before the first query"
            )

    def finished(self) -> set[int]:
        """Places of the suspects that are done."""
        return {place for (place,) in self._database.execute("SELECT place FROM suspects")}

    def hashes(self) -> dict[str, int]:
        """The first place that was finished with each hash."""
        query = "SELECT sha256, MIN(place) FROM suspects WHERE sha256 IS NOT NULL GROUP BY sha256"
        return dict(self._database.execute(query).fetchall())

    def add(self, place: int, sha256: str | None, rows: Sequence[dict[str, Any]]) -> None:
        """A suspect's rows, one for each watermark; on disk when this returns."""
        self._database.execute("INSERT OR REPLACE INTO suspects VALUES (?, ?, ?)", [place, sha256, json.dumps(rows)])

    def rows(self, place: int) -> list[dict[str, Any]]:
        """The rows of a finished suspect."""
        (text,) = self._database.execute("SELECT rows FROM suspects WHERE place = ?", [place]).fetchone()
        found: list[dict[str, Any]] = json.loads(text)
        return found

    def all_rows(self) -> Iterator[dict[str, Any]]:
        """Every row, suspects in the order of the plan; one suspect in memory at a time."""
        for (text,) in self._database.execute("SELECT rows FROM suspects ORDER BY place"):
            yield from json.loads(text)

    def close(self, remove: bool = False) -> None:
        """Close, and with `remove` delete: its results are elsewhere now."""
        self._database.close()
        if remove:
            for suffix in ("", "-wal", "-shm"):
                if os.path.exists(self.path + suffix):
                    os.unlink(self.path + suffix)


def _difference(stored: dict[str, Any], asked: dict[str, Any]) -> str:
    names: Iterable[str] = (name for name in asked if stored.get(name) != asked[name])
    return " and ".join(names)
