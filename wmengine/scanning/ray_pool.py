"""The suspects of a scan over a Ray cluster: shards of them are Ray's tasks, each streams back what it has judged.

A task judges its shard as the local pool does, in a sandboxed worker of its own. What it had not yet sent when it was
lost, with its node or alone, is judged again, one suspect a task, at most TRIES times in all. Files with equal bytes
are judged once in a shard; from then on the driver's hashes decide, as those of a local scan do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from wmengine._optional import require
from wmengine._processors import available
from wmengine._version import __version__
from wmengine.errors import ScanError
from wmengine.judging.judge import failed
from wmengine.marks.watermark import Watermark
from wmengine.sandbox import Limits
from wmengine.scanning.journal import Plan
from wmengine.scanning.pool import Hashes, Judged, judge_locally
from wmengine.scanning.results import THIS, rows_of

TRIES = 3  # of a suspect whose task is lost
SUSPECTS_A_SHARD = 32  # at most

_log = logging.getLogger(__name__)


def judge_shard(version: str, sample: str | None, stored: Sequence[Any], places: Sequence[int]) -> Iterator[Judged]:
    """What the local pool gives for these places of the plan; `stored` refers to plan, watermarks and limits.

    Raises ScanError unless this node has the driver's engine, and sees a file that the driver sees.
    """
    if version != __version__:
        raise ScanError(f"it has wmengine {__version__} and the driver has {version}: install the same on every node")
    if sample is not None and not os.path.lexists(sample):
        raise ScanError(f"it does not see {sample}: put suspects on storage that every node mounts, or give URLs")
    plan, marks, limits = require("ray", extra="ray").get(list(stored))
    for some in judge_locally(plan, marks, places, Hashes({}), 1, limits):
        for each in some:  # noqa: UP028 (Ray sends into what yields, and a list takes nothing)
            yield each


def judge_on_ray(
    plan: Plan,
    marks: Sequence[Watermark],
    places: Sequence[int],
    hashes: Hashes,
    jobs: int | None,
    limits: Limits,
    address: str,
) -> Generator[list[Judged], None, None]:
    """What `judge_locally` gives, from every node of the Ray cluster at `address`; "local" starts one here.

    jobs: suspects at a time in the whole cluster, by default its CPUs as Ray counts them. Closing the iterator ends the
    tasks. Raises ScanError where there is no cluster, or a node of it cannot judge.
    """
    if not places:
        return
    with _connected(address, jobs) as ray:
        task = ray.remote(judge_shard).options(num_cpus=1, num_returns="streaming", max_retries=0)
        stored = [ray.put(each) for each in (plan, list(marks), limits)]
        local = (each.path for each in (plan.suspects[place] for place in places[:100]) if not each.store)
        sample = next(filter(os.path.lexists, local), None)
        slots = _slots(ray, jobs)
        size = max(1, min(SUSPECTS_A_SHARD, len(places) // (4 * slots)))  # small enough for all to finish together
        shards = deque(list(places[start : start + size]) for start in range(0, len(places), size))
        lost: Counter[int] = Counter()
        running: dict[Any, list[int]] = {}  # a stream of Judged → places that it has not given yet
        try:
            while shards or running:
                while shards and len(running) < (jobs or 2 * slots):  # some wait on the nodes for a CPU
                    shard = shards.popleft()
                    running[task.remote(__version__, sample, stored, shard)] = shard
                (stream,), _ = ray.wait(list(running), num_returns=1)
                try:
                    judged: Judged | None = next((ray.get(news) for news in stream), None)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, ScanError):
                        raise ScanError(
                            f"a node of the Ray cluster cannot judge: {error.cause}; the same call resumes"
                        ) from None
                    raise error.cause from error  # our own mistake: the scan ends with it
                except ray.exceptions.RayError as error:
                    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    _log.warning("a task of the Ray cluster was lost (%s)", why)
                    for place in running.pop(stream):
                        lost[place] += 1
                        if lost[place] < TRIES:
                            shards.appendleft([place])
                        else:
                            yield [_given_up(plan, marks, place, why)]
                    continue
                if judged is None:
                    del running[stream]
                    slots = _slots(ray, jobs)  # nodes may have joined
                    continue
                running[stream].remove(judged.place)
                first = judged.place if judged.sha256 is None else hashes.claim(judged.sha256, judged.place)
                yield [judged if first == judged.place else Judged(judged.place, judged.sha256, [], first)]
        finally:
            for stream in running:
                ray.cancel(stream, force=True)


def _slots(ray: Any, jobs: int | None) -> int:
    """How many suspects are judged at a time."""
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < 1:
        raise ScanError("no node of the Ray cluster has a CPU to give")
    return min(jobs or cpus, cpus)


def _given_up(plan: Plan, marks: Sequence[Watermark], place: int, why: str) -> Judged:
    error = f"{THIS} was given up: {TRIES} times the task that judged it was lost ({why})"
    findings = [failed(mark, error) for mark in marks]
    return Judged(place, None, rows_of(plan.suspects[place].name, None, marks, findings, 0.0, plan))


def check_ray(address: str) -> None:
    """Raises ValueError for an address that cannot do, ImportError, with the mend, where there is no Ray."""
    if address.startswith("ray://"):
        raise ValueError(
            f"{address}: Ray's client cannot stream; run the scan on a node of the cluster, with its HOST:PORT"
        )
    if find_spec("ray") is None:
        require("ray", extra="ray")


@contextlib.contextmanager
def _connected(address: str, jobs: int | None) -> Iterator[Any]:
    """Ray, connected as asked, with its own statistics and chatter off; a cluster that was started here ends here."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if "ray" not in sys.modules:  # which reads these when it is imported
        # Ray writes what it has to say of lost nodes to stdout, where the rows are.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
        if address == "local":
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # as Ray does for a cluster of its own, without saying so
    ray = require("ray", extra="ray")
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address not in ("auto", there):
            raise ValueError(f"this process is connected to Ray at {there} already: give that address, not {address}")
        yield ray
        return
    if address not in ("local", "auto"):
        _check_answers(address)
    folder = None
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        # Ray's sockets lie deep below this folder, and their paths must be short.
        folder = tempfile.mkdtemp(prefix="wmengine-ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp"))
        cores = jobs or len(available())
        options |= {"num_cpus": cores, "include_dashboard": False, "_temp_dir": folder}
    try:
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ScanError(f"there is no Ray cluster to work with at {address}: {line}") from None
        yield ray
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check_answers(address: str) -> None:
    """Raises ScanError where nobody listens: Ray would try for minutes and then end the process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except (OSError, ValueError) as error:
        raise ScanError(f"there is no Ray cluster at {address} ({error}): give HOST:PORT, auto or local") from None
