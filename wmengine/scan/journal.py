"""What a scan has finished, on disk: a SQLite file beside its output, so that nothing judged is judged again.

The journal begins with the plan: the suspects, the watermarks, and everything that a p-value depends on. A resumed scan
has the same plan, because the number of tests was fixed by it before the first query: its suspects too are those that
were listed then, whatever has come since.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from wmengine.errors import ScanError


@dataclass(frozen=True)
class Plan:
    """What was fixed before the first query. tests = suspects × watermarks; engine: the version that scores.

    paths: as they were given, of which suspects is the list; folder: where they were, if one of them is relative.
    """

    suspects: tuple[str, ...]
    watermarks: tuple[str, ...]  # commitments
    alpha: float
    queries: str
    adapters: str
    isolation: str
    engine: str
    provider: str = "cpu"
    classes: str = "same"
    paths: tuple[str, ...] = ()
    folder: str = ""

    @property
    def tests(self) -> int:
        return len(self.suspects) * len(self.watermarks)


class Journal:
    """The finished suspects of one scan. One writer; a row that `add` returned from survives a power cut.

    Everything raises ScanError where the file cannot be written, or is no whole journal.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or create, and keep every other scan out. plan: of the scan that it belongs to, None for a new one."""
        self.path = os.fspath(path)
        self.plan: Plan | None = None
        try:
            self._database = sqlite3.connect(self.path, timeout=1.0, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._cannot(error) from None
        try:
            self._execute("PRAGMA locking_mode=EXCLUSIVE")
            self._execute("PRAGMA journal_mode=WAL")
            self._execute("PRAGMA synchronous=FULL")
            self._execute("CREATE TABLE IF NOT EXISTS plan (text TEXT NOT NULL)")
            self._execute("CREATE TABLE IF NOT EXISTS suspects (place INTEGER PRIMARY KEY, sha256 TEXT, rows TEXT)")
            (state,) = self._execute("PRAGMA integrity_check(1)").fetchone()
            if state != "ok":
                raise self._damaged(state)
            stored = self._execute("SELECT text FROM plan").fetchone()
            if stored is not None:
                self.plan = self._read_plan(stored[0])
        except BaseException:
            self._database.close()
            raise

    def begin(self, plan: Plan) -> None:
        """Raises ValueError, saying what differs, where the journal belongs to another scan."""
        if self.plan is None:
            self._execute("INSERT INTO plan VALUES (?)", [json.dumps(asdict(plan))])
            self.plan = plan
            return
        # Other paths may lead to the same suspects.
        names = [each.name for each in fields(Plan) if each.name != "paths"]
        other = [name for name in names if getattr(self.plan, name) != getattr(plan, name)]
        if other:
            named = " and ".join(name.replace("folder", "working folder") for name in other)
            raise ValueError(
                f"{self.path} belongs to a scan of other {named}: finish that one with its own command, "
                "choose another --out, or delete the file to give up what it has finished; the number of tests is "
                "fixed before the first query"
            )

    def finished(self) -> set[int]:
        """Places of the suspects that are done."""
        return {place for (place,) in self._execute("SELECT place FROM suspects")}

    def hashes(self) -> dict[str, int]:
        """The first place that was judged with each hash."""
        query = "SELECT sha256, MIN(place) FROM suspects WHERE sha256 IS NOT NULL AND rows IS NOT NULL GROUP BY sha256"
        return dict(self._execute(query).fetchall())

    def add(self, place: int, sha256: str | None, rows: Sequence[dict[str, Any]] | None) -> None:
        """A suspect's rows, one for each watermark, or None where a suspect with the same hash has them; on disk when
        this returns."""
        text = None if rows is None else json.dumps(rows)
        self._execute("INSERT OR REPLACE INTO suspects VALUES (?, ?, ?)", [place, sha256, text])

    def rows(self, place: int) -> list[dict[str, Any]]:
        """The rows of a suspect that was judged itself."""
        return self._rows(self._execute("SELECT rows FROM suspects WHERE place = ?", [place]).fetchone()[0])

    def all_rows(self) -> Iterator[tuple[int, int, int, list[dict[str, Any]]]]:
        """(place, first, judged, rows) of every suspect, in the order of the plan.

        first: the first place with the same hash; judged: the first of them that was judged itself. All have its rows,
        so that the table does not depend on which one that was.
        """
        firsts = dict(self._execute("SELECT sha256, MIN(place) FROM suspects GROUP BY sha256").fetchall())
        judged = self.hashes()
        for place, sha256 in self._execute("SELECT place, sha256 FROM suspects ORDER BY place").fetchall():
            first, source = (firsts[sha256], judged[sha256]) if sha256 else (place, place)
            yield place, first, source, self.rows(source)

    def close(self, remove: bool = False) -> None:
        """Close, and with `remove` delete: its results are elsewhere now."""
        self._database.close()
        if remove and self.path != ":memory:":
            for suffix in ("-wal", "-shm", ""):  # this order: a new scan may begin as soon as the last is gone
                if os.path.exists(self.path + suffix):
                    os.unlink(self.path + suffix)

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        try:
            return self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            if self.path != ":memory:" and not os.path.exists(self.path):
                raise ScanError(
                    f"{self.path} is gone: another scan of this --out has just ended, or somebody has deleted it; run "
                    "the command again"
                ) from None
            raise self._cannot(error) from None
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None

    def _rows(self, text: str) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = json.loads(text)
        except (ValueError, TypeError) as error:
            raise self._damaged(error) from None
        return found

    def _read_plan(self, text: str) -> Plan:
        try:
            stored: dict[str, Any] = json.loads(text)
            known = {each.name for each in fields(Plan)} & stored.keys()
            return Plan(**{name: _as_tuple(stored[name]) for name in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise self._damaged(error) from None

    def _cannot(self, error: sqlite3.Error) -> ScanError:
        if "locked" in str(error):
            return ScanError(f"{self.path} is in use by another scan: let that one end, or choose another --out")
        return ScanError(
            f"{self.path} cannot be written ({error}): give --out in a folder that exists, is yours and has room; what "
            "was finished is kept, and the same command resumes"
        )

    def _damaged(self, error: object) -> ScanError:
        return ScanError(
            f"{self.path} is no journal of a scan, or a damaged one ({error}): delete it to begin from the start"
        )


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
