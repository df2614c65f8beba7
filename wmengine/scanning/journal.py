"""What a scan has finished, on disk: a SQLite file beside its output, so that nothing judged is judged again.

The journal begins with the plan: the suspects, the watermarks, and everything that a p-value depends on. A resumed scan
has the same plan, because the number of tests was fixed by it before the first query: its suspects too are those that
were listed then, whatever has come since. What is read back is checked, as somebody else may have written it.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from wmengine.errors import ScanError
from wmengine.scanning.listing import Listed
from wmengine.scanning.schema import EMPTY, OTHERS

TABLES = (
    "CREATE TABLE plan (text TEXT NOT NULL)",
    "CREATE TABLE suspects (place INTEGER PRIMARY KEY, sha256 TEXT, rows TEXT)",
)


@dataclass(frozen=True)
class Plan:
    """What was fixed before the first query. tests = suspects × watermarks; engine: the version that scores.

    paths: what was to be scanned, as it holds in any working folder; suspects is the list of it, without the `empty`
    files that hold nothing and the `others`, that are called otherwise than models.
    """

    suspects: tuple[Listed, ...]
    watermarks: tuple[str, ...]  # commitments
    alpha: float
    test: str
    adapters: str
    isolation: str
    engine: str
    device: str = "cpu"
    derivation: str = "not_checked"
    classes: str = "same"
    paths: tuple[str, ...] = ()
    empty: int = 0
    others: int = 0

    @cached_property
    def tests(self) -> int:
        return len(self.suspects) * len(self.watermarks)

    @property
    def left_out(self) -> dict[str, str]:
        """What the metadata of the table say."""
        return {EMPTY: str(self.empty), OTHERS: str(self.others)}

    @cached_property
    def settings(self) -> dict[str, str]:
        """How suspects are asked, as every row says it."""
        names = ("test", "classes", "adapters", "isolation", "device")
        return {name: getattr(self, name) for name in names}


class Journal:
    """The finished suspects of one scan. One writer; a row that `add` returned from survives a power cut.

    Everything raises ScanError where the file cannot be written, or is no whole journal.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or create, and keep every other scan out. plan: of the scan that it belongs to, None for a new one."""
        self.path = os.fspath(path)
        self.plan: Plan | None = None
        if self.path != ":memory:" and not _is_own_file(self.path):
            raise ScanError(f"{self.path} is a link or no regular file, and no journal of a scan: choose another --out")
        try:
            self._database = sqlite3.connect(self.path, timeout=1.0, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._cannot(error) from None
        self._database.text_factory = lambda text: text.decode(errors="replace")  # checked with all else that is read
        try:
            self._execute("PRAGMA trusted_schema=OFF")
            self._execute("PRAGMA locking_mode=EXCLUSIVE")
            self._execute("PRAGMA journal_mode=WAL")
            self._execute("PRAGMA synchronous=FULL")
            there = {str(sql) for (sql,) in self._execute("SELECT sql FROM sqlite_master")}
            if not there <= set(TABLES):  # a view may have no end, a trigger may undo what is written
                raise self.damaged("it holds other tables than a journal")
            for table in TABLES:
                if table not in there:
                    self._execute(table)
            (state,) = self._execute("PRAGMA integrity_check(1)").fetchone()
            if state != "ok":
                raise self.damaged(state)
            stored = self._execute("SELECT text FROM plan").fetchone()
            if stored is not None:
                self.plan = self._read_plan(stored[0])
                self._check_places(self.plan)
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
        names = [each.name for each in fields(Plan) if each.name not in ("paths", "empty", "others")]
        other = [name for name in names if getattr(self.plan, name) != getattr(plan, name)]
        if other:
            raise ValueError(
                f"{self.path} belongs to a scan of other {' and '.join(other)}: finish that one with its own command, "
                "choose another --out, or delete the file to give up what it has finished; the number of tests is "
                "fixed before the first query"
            )

    def finished(self) -> set[int]:
        """Places of the suspects that are done."""
        return {place for (place,) in self._execute("SELECT place FROM suspects")}

    def judged(self) -> set[int]:
        """Places of those among them that have rows of their own."""
        return {place for (place,) in self._execute("SELECT place FROM suspects WHERE rows IS NOT NULL")}

    def hashes(self) -> dict[str, int]:
        """The first place that was judged with each hash."""
        query = "SELECT sha256, MIN(place) FROM suspects WHERE sha256 IS NOT NULL AND rows IS NOT NULL GROUP BY sha256"
        return dict(self._execute(query).fetchall())

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is added within is on disk when this ends; all of it or, where it is interrupted, none."""
        with self._database:
            self._execute("BEGIN")
            yield
            self._execute("COMMIT")

    def add(self, place: int, sha256: str | None, rows: Sequence[dict[str, Any]] | None) -> None:
        """A suspect's rows, one for each watermark, or None where a suspect with the same hash has them; on disk when
        this returns, or `together` does."""
        text = None if rows is None else json.dumps(rows)
        self._execute("INSERT OR REPLACE INTO suspects VALUES (?, ?, ?)", [place, sha256, text])

    def forget(self, places: Sequence[int]) -> None:
        """Have these suspects judged again."""
        self._database.executemany("DELETE FROM suspects WHERE place = ?", [[place] for place in places])

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

    def damaged(self, error: object) -> ScanError:
        """What to raise where this is no journal of a scan."""
        return ScanError(
            f"{self.path} is no journal of a scan, or a damaged one ({error}): delete it to begin from the start"
        )

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
            raise self.damaged(error) from None

    def _check_places(self, plan: Plan) -> None:
        judged = self.hashes()
        for place, sha256, has_rows in self._execute("SELECT place, sha256, rows IS NOT NULL FROM suspects"):
            if not 0 <= place < len(plan.suspects) or not (has_rows or sha256 in judged):
                raise self.damaged(f"it holds suspect {place} without its rows")
            if not isinstance(sha256, str | None):
                raise self.damaged(f"it holds suspect {place} without its hash")

    def _rows(self, text: str) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = json.loads(text)
            if self.plan is None or not isinstance(found, list) or len(found) != len(self.plan.watermarks):
                raise ValueError("a suspect has other rows than one for each watermark")
        except (ValueError, TypeError, RecursionError) as error:
            raise self.damaged(error) from None
        return found

    def _read_plan(self, text: str) -> Plan:
        try:
            stored: dict[str, Any] = json.loads(text)
            known = {each.name for each in fields(Plan)} & stored.keys()
            plan = Plan(**{name: _as_tuple(stored[name]) for name in known})
            suspects = tuple(_read_listed(each, plan.paths) for each in plan.suspects)
            if not suspects or not plan.watermarks or {type(plan.empty), type(plan.others)} != {int}:
                raise ValueError("a plan of nothing")
            return replace(plan, suspects=suspects)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self.damaged(error) from None

    def _cannot(self, error: sqlite3.Error) -> ScanError:
        if "locked" in str(error):
            return ScanError(f"{self.path} is in use by another scan: let that one end, or choose another --out")
        return ScanError(
            f"{self.path} cannot be written ({error}): give --out in a folder that exists, is yours and has room; what "
            "was finished is kept, and the same command resumes"
        )


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_own_file(path: str) -> bool:
    """Whether nothing is there, or a regular file that has no other name."""
    try:
        status = os.lstat(path)
    except OSError:  # who opens it says why
        return True
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _is_below(path: str, asked: str) -> bool:
    """Whether a file may have been listed for what was asked: a file, a folder, or a pattern in a folder."""
    plain = re.split(r"[*?[]", asked)[0]
    above = os.path.normpath(asked if plain == asked else os.path.dirname(plain))
    return os.path.commonpath([above, os.path.normpath(path)]) == above


def _read_listed(stored: Any, paths: Sequence[str]) -> Listed:
    """A suspect of a stored plan. Raises ValueError, TypeError or KeyError for what is none."""
    names, store, path, inode = stored["names"], stored["store"], stored["path"], stored["inode"]
    if type(inode) is not int or type(names) is not list or not names:
        raise ValueError("a suspect without a name")
    if not all(isinstance(text, str) for text in (*names, store, path)):
        raise ValueError("a suspect whose name is no text")
    if not store and path != names[0] and not path.endswith(f"/{names[0]}"):
        raise ValueError("a suspect that is shown by the name of another")
    if store not in paths if store else not any(_is_below(path, asked) for asked in paths):
        raise ValueError("a suspect that nobody asked for")
    return Listed(tuple(names), store, path, inode)
