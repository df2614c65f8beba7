"""Suspects × watermarks: a folder or a bucket of untrusted files, judged on every core, resumed where it stopped."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from wmengine._processors import available
from wmengine._version import __version__
from wmengine.identity.key import Key
from wmengine.judging.asking import TESTS
from wmengine.judging.orders import CLASSES
from wmengine.judging.verification import check_choice, check_derivations
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Need
from wmengine.sandbox import Limits
from wmengine.scanning.journal import Journal, Plan
from wmengine.scanning.listing import Listing, held_anywhere, list_suspects, load_watermarks
from wmengine.scanning.pool import Hashes, Judged, judge_locally
from wmengine.scanning.results import check_stored, copied, of_every_name, renamed, table_of, write_parquet
from wmengine.suspects.devices import check_device
from wmengine.suspects.onnx_file import ISOLATION

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Marks = Paths | Watermark | Sequence[Watermark | str | os.PathLike[str]]
# Told after every suspect: how many are done, how many there are, and its rows.
Progress = Callable[[int, int, list[dict[str, Any]]], None]


def scan(
    paths: Paths,
    watermarks: Marks,
    *,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    jobs: int | None = None,
    alpha: float = 1e-9,
    test: str = "sequential",
    key: Key | str | os.PathLike[str] | None = None,
    adapters: str = "likely",
    classes: str = "same",
    isolation: str = "persistent",
    limits: Limits | None = None,
    passphrase: str | None = None,
    progress: Progress | None = None,
    ray: str | None = None,
    device: str = "cpu",
) -> Any:
    """Judge every suspect with every watermark → pyarrow.Table, a row for each pair.

    paths: ONNX files, checkpoints, folders, patterns, URLs of object stores (through fsspec), where only ONNX files are
    read; below folders checkpoints are listed where a mark lies in weights. watermarks: Watermarks, .wm files or
    folders of them. out: a Parquet file; finished suspects go to a journal beside it (`<out>.journal`) as they are
    done, and the same call resumes after an interruption. force: a table that is finished is overwritten. jobs:
    suspects at a time, by default the cores. alpha: of the whole scan: a pair is "owned" where its p-value times the
    number of all pairs is at most alpha; that number is fixed before the first query. test: "sequential" stops asking a
    suspect when the answer is clear, "fixed" asks every trigger. key: the owner's Key or its file: every watermark is
    derived from it again and compared, and `derivation` is "checked" in all rows. adapters: "likely" puts triggers on
    another scale than the recorded one only to graphs that begin by rescaling their input, "all" to every suspect, as
    `verify` does. classes: "same" order as the marks', or "any", with test="fixed": every order is tried and paid for,
    for black-box marks, as `verify` does without clean data. isolation, limits and device: see OnnxSuspect. ray: the
    address of a Ray cluster to judge on ("auto" on one of its nodes), or "local" for one started here; jobs are then
    those of the whole cluster, and models run on its CPUs.

    A suspect that cannot be judged has the decision "error", and the scan goes on; one that a mark cannot concern, as
    it takes other inputs or answers other classes, has "other_task", and a fact says why. Files with equal bytes are
    judged once. Several names of one file count as one suspect, each with its rows, and empty files below a folder as
    none.
    Raises FileExistsError for a table that is finished, FileNotFoundError, WatermarkError, SuspectError (a folder or
    store that cannot be listed) or ValueError for what is wrong with the arguments; ScanError where the scan cannot go
    on: another one has the journal, a disk is full, no sandbox starts, no node of the Ray cluster is left. What was
    finished is kept.
    """
    check_choice("test", test, TESTS)
    check_choice("adapters", adapters, ("likely", "all"))
    check_choice("classes", classes, CLASSES)
    check_choice("isolation", isolation, ISOLATION)
    if classes == "any" and test != "fixed":
        raise ValueError('classes="any" needs test="fixed", as one order must fit all answers')
    if ray is not None and device != "cpu":
        raise ValueError(f"device={device!r} is for this machine's own GPU: leave ray= out, or the device")
    if ray is not None:
        from wmengine.scanning.ray_pool import check_ray

        check_ray(ray)  # before there is a journal
    check_device(device)
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be between 0 and 1, and it is {alpha}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, and it is {jobs}")
    if out is not None and os.path.isdir(out):
        raise ValueError(f"{os.fspath(out)} is a folder: give the name of a Parquet file")
    marks = load_watermarks(_several(watermarks), passphrase)
    check_derivations(marks, key, passphrase)
    beside = ":memory:" if out is None else f"{os.fspath(out)}.journal"
    if out is not None and not force and os.path.lexists(out) and not os.path.lexists(beside):
        raise FileExistsError(f"{os.fspath(out)} exists, and its scan is finished: give another name, or --force")
    asked = tuple(map(held_anywhere, _several(paths)))
    journal = Journal(beside)
    try:
        stored = journal.plan
        resumes = stored is not None and stored.paths == asked
        reads = any(mark.preset.source.needs == Need.TENSORS for mark in marks)
        found: Plan | Listing = stored if resumes and stored else list_suspects(_several(paths), checkpoints=reads)
        plan = Plan(
            suspects=found.suspects,
            watermarks=tuple(mark.commitment for mark in marks),
            alpha=alpha,
            test=test,
            adapters=adapters,
            classes=classes,
            isolation=isolation,
            engine=__version__,
            device=device,
            derivation="not_checked" if key is None else "checked",
            paths=asked,
            empty=found.empty,
            others=found.others,
        )
        journal.begin(plan)
        if stored is not None:
            check_stored(journal, plan)
    except BaseException:
        journal.close(remove=journal.plan is None)
        raise
    try:
        finished = journal.finished()
        left = [place for place in range(len(plan.suspects)) if place not in finished]
        hashes = Hashes(journal.hashes())
        if ray is None:
            jobs = jobs or len(available())
            judged = judge_locally(plan, marks, left, hashes, jobs, limits or Limits())
        else:
            from wmengine.scanning.ray_pool import judge_on_ray

            judged = judge_on_ray(plan, marks, left, hashes, jobs, limits or Limits(), ray)
        with closing(judged):
            _run(journal, plan, judged, progress)
        if out is None:
            return table_of(journal, plan)
        write_parquet(journal, plan, out)
    except BaseException:
        journal.close()
        raise
    journal.close(remove=True)
    from pyarrow import parquet

    with parquet.ParquetFile(out) as file:  # read_table loads much more of pyarrow first
        return file.read()


def _run(journal: Journal, plan: Plan, judged: Any, progress: Progress | None) -> None:
    """Write down every suspect as it is done; a copy of one that is still being judged waits for it."""
    finished = journal.finished()
    copies: dict[int, list[Judged]] = {}
    untold: deque[tuple[int, int, list[dict[str, Any]]]] = deque()  # how many are finished with it, its place, its rows

    def record(one: Judged, rows: list[dict[str, Any]]) -> None:
        journal.add(one.place, one.sha256, rows if one.same_as is None else None)
        finished.add(one.place)
        untold.append((len(finished), one.place, rows))

    def copy_rows(one: Judged) -> list[dict[str, Any]]:
        assert one.same_as is not None
        original = plan.suspects[one.same_as].name
        return copied(renamed(journal.rows(one.same_as), plan.suspects[one.place].name, original), original)

    for some in judged:
        with journal.together():
            for one in some:
                if one.same_as is not None and one.same_as not in finished:
                    copies.setdefault(one.same_as, []).append(one)
                    continue
                record(one, one.rows if one.same_as is None else copy_rows(one))
                for copy in copies.pop(one.place, ()):
                    record(copy, copy_rows(copy))
        try:
            while untold:
                done, place, rows = untold.popleft()
                if progress is not None:
                    progress(done, len(plan.suspects), of_every_name(rows, plan.suspects[place]))
        except BaseException:
            journal.forget([place for _, place, _ in untold])  # or no run would ever tell of them
            raise


def _several(paths: Any) -> list[Any]:
    return [paths] if isinstance(paths, str | os.PathLike | Watermark) else list(paths)
