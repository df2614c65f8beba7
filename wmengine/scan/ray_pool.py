"""The suspects of a scan over a Ray cluster: an agent on every node runs the local pool, the driver shares out.

An agent is a Ray actor. It gets shards of suspects, judges them in sandboxed workers of its own, and streams back what
is done; rows go into the driver's journal as they arrive. An agent that is lost, with its node or alone, costs what it
had not yet sent: that goes to other agents, a suspect at most TRIES times. Hashes are claimed in one place, so that
files with equal bytes are judged once in the whole cluster.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from wmengine import __version__
from wmengine._optional import require
from wmengine._processors import available
from wmengine.errors import ScanError, SuspectError
from wmengine.judge import Score
from wmengine.sandbox import Limits
from wmengine.scan.journal import Plan
from wmengine.scan.pool import Hashes, Judged, judge_locally
from wmengine.scan.results import rows_of
from wmengine.watermark import Watermark

TRIES = 3  # of a suspect whose agent is lost, and of a node whose agents are lost before they bring anything
SUSPECTS_A_THREAD = 32  # in one shard, at most
SENT_AHEAD = 64  # results of a shard that the driver has not taken yet; then its agent waits
LOOK_FOR_NODES, SAY_WAITING = 10.0, 30.0  # seconds

_log = logging.getLogger(__name__)


class Agent:
    """The actor of one node."""

    def __init__(self, plan: Plan, marks: Sequence[Watermark], limits: Limits, claims: Any, folder: str) -> None:
        self._plan, self._marks, self._limits = plan, marks, limits
        self._hashes = ClusterHashes(claims)
        with contextlib.suppress(OSError):
            os.chdir(folder)  # relative paths are the driver's; `start` says where they lead nowhere

    def start(self, version: str, samples: Sequence[str]) -> None:
        """Raises ScanError unless this node has the driver's engine and sees files that the driver sees."""
        if version != __version__:
            raise ScanError(
                f"it has wmengine {__version__} and the driver has {version}: install the same on every node"
            )
        for sample in samples:
            if not os.path.lexists(sample):
                raise ScanError(
                    f"it does not see {sample}: put suspects on storage that every node mounts, or give URLs"
                )

    def judge(self, places: Sequence[int], jobs: int) -> Iterator[Judged]:
        """What the local pool gives for these places of the plan, as it is done."""
        yield from judge_locally(self._plan, self._marks, places, self._hashes, jobs, self._limits)


class ClusterHashes(Hashes):
    """Claims of hashes that are kept by an actor for the whole cluster."""

    def __init__(self, claims: Any) -> None:
        self._claims = claims
        self._ray = require("ray", extra="ray")

    def claim(self, sha256: str, place: int) -> int:
        return int(self._ray.get(self._claims.claim.remote(sha256, place)))


@dataclass(eq=False)
class _Shard:
    """Suspects that an agent has been given; those in `left` have not come back."""

    news: Any  # a stream of Judged
    left: set[int]
    threads: int
    alone: bool

    @property
    def busy(self) -> int:
        return min(self.threads, len(self.left))


@dataclass(eq=False)
class _Node:
    """An agent and what it is doing. started: what its `start` will give, None once that has come.

    brought: whether any suspect has come back.
    """

    node: str
    address: str
    actor: Any
    jobs: int
    started: Any
    shards: list[_Shard] = field(default_factory=list)
    brought: bool = False

    @property
    def free(self) -> int:
        """Threads that nothing has been given to."""
        if self.started is not None or any(shard.alone for shard in self.shards):
            return 0
        return self.jobs - sum(shard.busy for shard in self.shards)


def judge_on_ray(
    plan: Plan,
    marks: Sequence[Watermark],
    places: Sequence[int],
    hashes: Hashes,
    jobs: int | None,
    limits: Limits,
    address: str,
) -> Generator[Judged, None, None]:
    """What `judge_locally` gives, from every node of the Ray cluster at `address`; "local" starts one here.

    jobs: suspects at a time on each node, by default its CPUs as Ray counts them. Closing the iterator stops the
    agents. Raises ScanError where there is no cluster, or where no node of it can go on.
    """
    if not places:
        return
    with (
        _connected(address, jobs) as ray,
        contextlib.closing(_Driver(ray, plan, marks, places, hashes, jobs, limits)) as driver,
    ):
        yield from driver.run()


class _Driver:
    """Shares out suspects and takes what comes back."""

    def __init__(
        self,
        ray: Any,
        plan: Plan,
        marks: Sequence[Watermark],
        places: Sequence[int],
        hashes: Hashes,
        jobs: int | None,
        limits: Limits,
    ) -> None:
        self._ray, self._plan, self._marks, self._jobs = ray, plan, marks, jobs
        self._unfinished = set(places)
        self._fresh = deque(places)
        self._again: deque[int] = deque()  # lost once: one in a shard, so that whoever loses the agent stands out
        self._last: deque[int] = deque()  # lost more than once: the agent judges nothing else meanwhile
        self._lost_on: dict[int, list[str]] = {}  # nodes whose agents were lost with a suspect
        self._failures: dict[str, int] = {}  # a node's agents in succession that brought nothing
        self._copies: dict[int, list[Judged]] = {}  # of suspects that have not come back
        self._done: deque[Judged] = deque()
        self._trouble = "none has a CPU to give"
        self._nodes: dict[str, _Node] = {}
        self._next_look = 0.0
        self._samples = _samples([plan.suspects[place] for place in places])
        # Without it the scan stops, so it lives where the driver does; a loss of its claims costs second judgements.
        self._claims = (
            ray.remote(Hashes)
            .options(
                num_cpus=0,
                max_restarts=TRIES,
                max_task_retries=TRIES,
                scheduling_strategy=_on(ray.get_runtime_context().get_node_id()),
            )
            .remote(hashes.known())
        )
        self._stored = [ray.put(plan), ray.put(list(marks)), ray.put(limits)]

    def run(self) -> Iterator[Judged]:
        begun, said = time.monotonic(), False
        while self._unfinished or self._done:
            self._look_for_nodes()
            self._share_out()
            self._take_news()
            while self._done:
                yield self._done.popleft()
            if (
                not said
                and time.monotonic() - begun > SAY_WAITING
                and all(each.started for each in self._nodes.values())
            ):
                _log.warning("no node of the Ray cluster has started an agent yet: are its CPUs taken by other work?")
                said = True

    def close(self) -> None:
        """Kill the agents; their sandboxed workers go with them."""
        for actor in (*(node.actor for node in self._nodes.values()), self._claims):
            self._ray.kill(actor)

    def _look_for_nodes(self) -> None:
        """An agent for every node that has none: at first, now and then for nodes that join, and after a loss."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_FOR_NODES
        for found in self._ray.nodes():
            node, cpus = found["NodeID"], int(found["Resources"].get("CPU", 0))
            if found["Alive"] and cpus and node not in self._nodes and self._failures.get(node, 0) < TRIES:
                jobs = self._jobs or cpus
                actor = (
                    self._ray.remote(Agent)
                    .options(
                        num_cpus=min(jobs, cpus),
                        max_restarts=0,  # what an agent knows of its shards ends with it
                        max_concurrency=jobs + 1,
                        scheduling_strategy=_on(node),
                    )
                    .remote(*self._stored, self._claims, os.getcwd())
                )
                started = actor.start.remote(__version__, self._samples)
                self._nodes[node] = _Node(node, found["NodeManagerAddress"], actor, jobs, started)

    def _share_out(self) -> None:
        for node in self._nodes.values():
            while node.free > 0:
                places, alone = self._next_shard(node)
                if not places:
                    break
                threads = min(node.free, len(places))
                judge = node.actor.judge.options(
                    num_returns="streaming", _generator_backpressure_num_objects=SENT_AHEAD
                )
                node.shards.append(_Shard(judge.remote(places, threads), set(places), threads, alone))

    def _next_shard(self, node: _Node) -> tuple[list[int], bool]:
        """Places for this node, and whether it must judge nothing else meanwhile."""
        if not node.shards and (place := self._pick(self._last, node)) is not None:
            return [place], True
        if (place := self._pick(self._again, node)) is not None:
            return [place], False
        # Shards shrink towards the end, so that the nodes finish together.
        threads = sum(each.jobs for each in self._nodes.values())
        size = node.free * max(1, min(SUSPECTS_A_THREAD, len(self._fresh) // (4 * threads)))
        return [self._fresh.popleft() for _ in range(min(size, len(self._fresh)))], False

    def _pick(self, queue: deque[int], node: _Node) -> int | None:
        """A suspect to judge once more: on another node than before, where there is one."""
        working = {each.node for each in self._nodes.values() if each.started is None}
        for place in queue:
            if node.node not in self._lost_on[place] or working <= set(self._lost_on[place]):
                queue.remove(place)
                return place
        return None

    def _take_news(self) -> None:
        """Wait for one thing to happen: an agent has started, a suspect is done, a shard is over, an agent is lost."""
        waiting: dict[Any, tuple[_Node, _Shard | None]]
        waiting = {node.started: (node, None) for node in self._nodes.values() if node.started is not None}
        waiting |= {shard.news: (node, shard) for node in self._nodes.values() for shard in node.shards}
        if not waiting and self._unfinished:
            left = len(self._unfinished)
            raise ScanError(
                f"no node of the Ray cluster can go on: {self._trouble}; {left} suspects are left, and the same call "
                "resumes"
            )
        for happened in self._ray.wait(list(waiting), num_returns=1, timeout=1.0)[0]:
            node, shard = waiting[happened]
            try:
                if shard is None:
                    self._ray.get(happened)
                    node.started = None
                    continue
                following = next(happened, None)
                if following is None:
                    node.shards.remove(shard)
                    continue
                judged: Judged = self._ray.get(following)
            except self._ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, ScanError):
                    raise error.cause from error  # our own mistake: the scan ends with it
                self._lose(node, error.cause, for_good=True)
            except self._ray.exceptions.RayError as error:
                self._lose(node, error)
            else:
                self._failures.pop(node.node, None)
                node.brought = True
                shard.left.discard(judged.place)
                self._arrived(judged)

    def _arrived(self, judged: Judged) -> None:
        """A copy waits for its original: an agent may be lost that has claimed a hash and not sent its rows."""
        if judged.same_as in self._unfinished:
            self._copies.setdefault(judged.same_as, []).append(judged)
            return
        self._unfinished.remove(judged.place)
        self._done.append(judged)
        for copy in self._copies.pop(judged.place, ()):
            if copy.sha256 == judged.sha256:
                self._arrived(copy)
            else:  # given up, or another file by now: the copy is judged for itself
                self._ray.get(self._claims.forget.remote(copy.sha256))
                self._fresh.append(copy.place)

    def _lose(self, node: _Node, error: Exception, for_good: bool = False) -> None:
        """An agent is gone: what it had left is judged elsewhere, or given up."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        self._trouble = (
            f"the agent on {node.address} was lost ({lines[0]})" if not for_good else f"{node.address}: {lines[0]}"
        )
        _log.warning(self._trouble)
        del self._nodes[node.node]
        self._ray.kill(node.actor)
        if for_good:
            self._failures[node.node] = TRIES
        elif not node.brought and not any(shard.alone for shard in node.shards):  # else it may be the suspect's fault
            self._failures[node.node] = self._failures.get(node.node, 0) + 1
        self._next_look = 0.0
        for place in sorted(place for shard in node.shards for place in shard.left):
            lost_on = self._lost_on.setdefault(place, [])
            lost_on.append(node.node)
            if len(lost_on) < TRIES:
                (self._again if len(lost_on) == 1 else self._last).append(place)
                continue
            why = SuspectError(f"{self._plan.suspects[place]} was given up: {TRIES} times {self._trouble}")
            scores = [Score(0, mark.total, 0, 0.0, error=str(why)) for mark in self._marks]
            self._arrived(
                Judged(place, None, rows_of(self._plan.suspects[place], None, self._marks, scores, 0.0, self._plan))
            )


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


def _on(node: str) -> Any:
    strategies = require("ray.util.scheduling_strategies", extra="ray")
    return strategies.NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def _samples(names: Sequence[str]) -> list[str]:
    """Some files that are here, and so must be seen from every node."""
    local = [name for name in (names[0], names[-1], *names[:100]) if "://" not in name]
    return [name for name in local if os.path.lexists(name)][:2]
