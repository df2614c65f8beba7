"""A scan on Ray, with two nodes on this machine: the local scan's rows, whatever is killed meanwhile."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as parquet
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_scan import SHAPE, copy_of, mark, stranger

from wmengine import __version__
from wmengine.errors import ScanError
from wmengine.sandbox import Limits
from wmengine.scan import ray_pool, scan
from wmengine.scan.journal import Plan
from wmengine.scan.pool import Hashes, Judged

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'wmengine[ray]'"
)
STRANGERS, COPIES = 24, 6


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """Two marks; copies of one network, strangers, a file that is no model, and one that kills what runs it."""
    folder = tmp_path_factory.mktemp("bucket")
    (folder / "registry").mkdir()
    (folder / "models").mkdir()
    first, second = mark(), mark("other")
    first.save(folder / "registry" / "first.wm")
    second.save(folder / "registry" / "second.wm")
    copy_of(first, folder / "models" / "copy0.onnx")
    for number in range(1, COPIES):
        (folder / "models" / f"copy{number}.onnx").write_bytes((folder / "models" / "copy0.onnx").read_bytes())
    for seed in range(STRANGERS):
        stranger(folder / "models" / f"stranger{seed}.onnx", seed)
    (folder / "models" / "broken.onnx").write_bytes(b"this is no model")
    crashing(folder / "models" / "crash.onnx")
    return folder


def crashing(path):
    """ONNX Runtime 1.31 dies of SIGSEGV in an Attention without bias."""
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("Attention", ["r", "q"], ["y"], domain="com.microsoft", num_heads=1),
    ]
    weights = [
        numpy_helper.from_array(np.array([-1, 4, 4]), "shape"),
        numpy_helper.from_array(np.ones((4, 12), np.float32), "q"),
    ]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])]
    taken = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", given, taken, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


@pytest.fixture(scope="module")
def cluster():
    """A head and a second node with a CPU each; a killed node is missed after a second instead of half a minute."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    import ray
    from ray.cluster_utils import Cluster

    store = 80 << 20
    health = {"health_check_period_ms": 300, "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 0}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": False,
            "object_store_memory": store,
            "_system_config": health,
        },
    )
    cluster.second = cluster.add_node(num_cpus=1, object_store_memory=store)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def usual(bucket):
    """The rows of a local scan."""
    return facts(scan(bucket / "models", bucket / "registry", jobs=1))


def facts(table):
    """What must not depend on where a suspect is judged; of equal files, which one is judged may.

    How long a file took to crash stands in its error.
    """
    rows = []
    for row in table.to_pylist():
        row["notes"] = [note for note in row["notes"] if "the same bytes as" not in note]
        row["error"] = row["error"] and row["error"].partition(", after ")[0]
        rows.append({name: value for name, value in row.items() if name != "seconds"})
    return rows


def judged_once(table):
    """Suspects of the first mark that were judged themselves."""
    return sum(row["watermark"] == "detector" and row["seconds"] > 0 for row in table.to_pylist())


def descendants(process):
    """Process numbers and command lines of everything below a process."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue  # it has ended
    found, waiting = {}, [process]
    while waiting:
        parent = waiting.pop()
        below = [child for child, its in parents.items() if its == parent]
        found |= {child: commands[child] for child in below}
        waiting += below
    return found


def is_alive(process):
    return os.path.exists(f"/proc/{process}/exe")  # a process that has ended but was not waited for has none


def wait_until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def agents():
    return [process for process, command in descendants(os.getpid()).items() if command.startswith("ray::Agent")]


# --- with Ray ---------------------------------------------------------------------------------------------------------


@needs_ray
def test_the_rows_are_those_of_a_local_scan(bucket, cluster, usual, tmp_path):
    told, seen = [], set()

    def progress(done, total, rows):
        told.append(done)
        wait_until(lambda: len(agents()) == 2)
        seen.update(agents())

    out = tmp_path / "rows.parquet"
    table = scan(bucket / "models", bucket / "registry", out=out, ray=cluster.address, progress=progress)
    assert facts(table) == usual
    decisions = Counter(row["decision"] for row in usual)
    assert decisions == {"owned": COPIES, "not_proven": COPIES + 2 * STRANGERS, "error": 4}
    assert sum("SIGSEGV" in (row["error"] or "") for row in usual) == 2
    assert judged_once(table) == STRANGERS + 1 + 2  # in the whole cluster, and the two that are errors
    assert len(seen) == 2  # an agent on each node, and the crashing file has ended neither
    assert told == list(range(1, len(usual) // 2 + 1))
    assert parquet.read_table(out).equals(table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.parquet"]
    wait_until(lambda: not agents())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@needs_ray
def test_an_agent_that_is_killed_costs_nothing(bucket, cluster, usual):
    killed = []

    def kill_one(done, total, rows):
        if done in (4, 12):
            killed.append(agents()[0])
            os.kill(killed[-1], signal.SIGKILL)

    assert facts(scan(bucket / "models", bucket / "registry", ray=cluster.address, progress=kill_one)) == usual
    assert len(set(killed)) == 2


@needs_ray
def test_a_suspect_that_ends_its_agent_is_given_up_and_the_others_are_not(bucket, cluster, usual):
    table = scan(bucket / "models", bucket / "registry", ray=cluster.address, isolation="none")
    for row, its_usual in zip(facts(table), usual, strict=True):
        if "crash.onnx" in row["suspect"]:
            assert "was given up: 3 times the agent on" in row["error"]
        else:
            assert row == its_usual


@needs_ray
def test_a_scan_is_resumed_on_the_cluster_and_off_it(bucket, cluster, usual, tmp_path):
    out = tmp_path / "rows.parquet"
    judged = []

    class Stop(Exception):
        pass

    def stop_after(count):
        def progress(done, total, rows):
            judged.append(rows[0]["suspect"])
            if done == count:
                raise Stop

        return progress

    for count in (5, 14):
        with pytest.raises(Stop):
            scan(bucket / "models", bucket / "registry", out=out, ray=cluster.address, progress=stop_after(count))
    table = scan(bucket / "models", bucket / "registry", out=out, jobs=1, progress=stop_after(None))
    assert facts(table) == usual
    assert len(judged) == len(set(judged)) == len(usual) // 2
    assert judged_once(table) == STRANGERS + 1 + 2


@needs_ray
def test_a_hanging_file_holds_up_nothing_but_itself(bucket, cluster, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    hanging(folder / "a.onnx")
    for seed in range(8):
        stranger(folder / f"stranger{seed}.onnx", seed)
    order = []
    table = scan(
        folder,
        bucket / "registry",
        ray=cluster.address,
        limits=Limits(seconds=2.0),
        progress=lambda done, total, rows: order.append(os.path.basename(rows[0]["suspect"])),
    )
    assert order[-1] == "a.onnx"
    errors = {row["suspect"]: row["error"] for row in table.to_pylist() if row["error"]}
    assert len(errors) == 1
    assert "took longer than 2 s" in errors[str(folder / "a.onnx")]


def hanging(path):
    def value(name, kind=TensorProto.FLOAT, shape=None):
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])], "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("v")],
        [value("c2", TensorProto.BOOL, []), value("v2")],
    )  # fmt: skip
    true = numpy_helper.from_array(np.array(True), "true")
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)], "g",
        [value("x", shape=["N", *SHAPE])], [value("y")], [true],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@needs_ray
def test_a_process_that_is_connected_elsewhere_is_not_used(bucket, cluster):
    with pytest.raises(ValueError, match=f"connected to Ray at {cluster.address} already"):
        scan(bucket / "models", bucket / "registry", ray="local")


@needs_ray
def test_ctrl_c_ends_a_cluster_of_our_own_and_keeps_what_is_finished(bucket, usual, tmp_path):
    out = tmp_path / "rows.parquet"
    command = [sys.executable, "-m", "wmengine", "scan", str(bucket / "models")]
    command += ["--watermarks", str(bucket / "registry"), "--out", str(out), "--json", "--jobs", "1"]
    ray = [*command, "--ray", "local"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        ray,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored, where we run in the background
    ) as process:
        finished = {json.loads(process.stdout.readline())["suspect"] for _ in range(2)}
        below = descendants(process.pid)
        os.kill(next(number for number, name in below.items() if name.startswith("ray::Agent")), signal.SIGKILL)
        finished |= {json.loads(process.stdout.readline())["suspect"] for _ in range(6)}
        below |= descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        rest, said = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = said.splitlines()
    assert len(lines) == 2, said
    assert re.fullmatch(r"the agent on [0-9.]+ was lost \(The actor died .*\)", lines[0])
    assert lines[1] == "wmengine: interrupted"
    finished |= {json.loads(line)["suspect"] for line in rest.splitlines()}  # nothing of Ray's is among the rows
    assert any("raylet" in name for name in below.values())
    wait_until(lambda: not any(map(is_alive, below)))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in again.stdout.splitlines()][:-1]
    left = {row["suspect"] for row in usual} - finished
    judged = {row["suspect"] for row in rows}
    assert judged <= left
    assert len(left - judged) <= 1  # written down when the interruption came, and not yet printed
    assert facts(parquet.read_table(out)) == usual


@needs_ray
def test_a_lost_node_costs_nothing(bucket, cluster, usual, caplog):
    """The last test on this cluster: the second node does not come back."""
    import ray

    def lose_a_node(done, total, rows):
        if done == 1:
            wait_until(lambda: len(agents()) == 2)
        if done == 6:
            running = agents()
            cluster.remove_node(cluster.second, allow_graceful=False)
            wait_until(lambda: not all(map(is_alive, running)))

    assert facts(scan(bucket / "models", bucket / "registry", ray="auto", progress=lose_a_node)) == usual
    assert "was lost (" in caplog.text
    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)


# --- without Ray ------------------------------------------------------------------------------------------------------


class Stream:
    """What Ray's stream of results is to the driver; a lost agent's raises."""

    def __init__(self, results):
        self.results = iter(results)

    def __next__(self):
        return next(self.results)


class FakeRay:
    """As much of Ray as the driver uses, in this process. Agents do what `script(node, places)` gives.

    A script gives Judged, or an error to raise instead of what would follow.
    """

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause):
                super().__init__(str(cause))
                self.cause = cause

    def __init__(self, script, nodes=2, refusal=None):
        self.script, self.refusal = script, refusal
        self.given = []  # (node, places, threads) of every shard
        self.listed = [
            {"NodeID": str(number), "Alive": True, "Resources": {"CPU": 4.0}, "NodeManagerAddress": f"10.0.0.{number}"}
            for number in range(nodes)
        ]

    def nodes(self):
        return self.listed

    def put(self, value):
        return value

    def get(self, value):
        if isinstance(value, Exception):
            raise value
        return value

    def wait(self, waiting, num_returns, timeout):
        return waiting[:1], waiting[1:]

    def kill(self, actor):
        pass

    def get_runtime_context(self):
        return self

    def get_node_id(self):
        return "driver"

    def remote(self, what):
        return FakeActor(self, what)


class FakeActor:
    def __init__(self, ray, what):
        self.ray, self.what = ray, what

    def options(self, scheduling_strategy=None, **_):
        if scheduling_strategy is not None:
            self.node = scheduling_strategy
        return self

    def remote(self, *arguments):
        if self.what is Hashes:
            self.hashes = Hashes(*arguments)
        return self

    @property
    def forget(self):
        return FakeCall(self.hashes.forget)

    @property
    def start(self):
        return FakeCall(lambda version, samples: self.ray.refusal or f"started {id(self)}")

    @property
    def judge(self):
        return FakeCall(self._judge)

    def _judge(self, places, threads):
        self.ray.given.append((self.node, list(places), threads))
        return Stream(self.ray.script(self.node, places))


class FakeCall:
    def __init__(self, function):
        self.remote = function

    def options(self, **_):
        return self


def drive(monkeypatch, fake, count=40):
    """What the driver yields for suspects 0 … count − 1 of a scan with one mark, by place."""
    monkeypatch.setattr(ray_pool, "_on", lambda node: node)
    plan = Plan(tuple(f"{place}.onnx" for place in range(count)), ("m",), 1e-9, "all", "likely", "persistent", "0")
    driver = ray_pool._Driver(fake, plan, [mark()], range(count), Hashes({}), None, Limits())
    found = list(driver.run())
    assert len(found) == len({judged.place for judged in found})
    return {judged.place: judged for judged in found}


def done(place, same_as=None, sha256=None):
    return Judged(place, sha256 or f"hash {place}", [], same_as)


def lost(why="its process died"):
    return FakeRay.exceptions.RayError(f"{why}\nand a page of details")


def test_one_guilty_suspect_is_singled_out_and_given_up(monkeypatch):
    def script(node, places):
        for place in places:
            if place == 7:
                yield lost()
                return
            yield done(place)

    fake = FakeRay(script, nodes=1)
    found = drive(monkeypatch, fake)
    assert found.keys() == set(range(40))
    assert {place for place, judged in found.items() if judged.sha256 is None} == {7}
    assert found[7].rows[0]["decision"] == "error"
    assert found[7].rows[0]["error"].endswith("3 times the agent on 10.0.0.0 was lost (its process died)")
    assert sum(7 in places for _, places, _ in fake.given) == 3
    assert ("0", [7], 1) in fake.given


def test_a_node_that_only_loses_agents_is_left_out(monkeypatch):
    def script(node, places):
        if node == "1":
            yield lost()
            return
        yield from map(done, places)

    fake = FakeRay(script)
    found = drive(monkeypatch, fake, count=400)
    assert {judged.sha256 is None for judged in found.values()} == {False}
    given = Counter(place for node, places, _ in fake.given for place in places if node == "1")
    assert set(given.values()) == {1}  # what was lost there is judged elsewhere


def test_where_no_node_goes_on_the_scan_ends_and_says_why(monkeypatch):
    refusal = FakeRay.exceptions.RayTaskError(ScanError("it does not see /data/a.onnx"))
    with pytest.raises(
        ScanError, match=r"no node .*10\.0\.0\.[01]: it does not see /data/a\.onnx; 40 suspects are left"
    ):
        drive(monkeypatch, FakeRay(None, refusal=refusal))
    with pytest.raises(ScanError, match="none has a CPU to give"):
        drive(monkeypatch, FakeRay(None, nodes=0))


def test_our_own_mistakes_end_the_scan(monkeypatch):
    def script(node, places):
        yield FakeRay.exceptions.RayTaskError(KeyError("a bug"))

    with pytest.raises(KeyError, match="a bug"):
        drive(monkeypatch, FakeRay(script))


def test_a_copy_waits_for_its_original_and_is_judged_itself_where_that_is_given_up(monkeypatch):
    """Place 3 has claimed the bytes of 4 and 5; its agents are always lost."""
    asked = Counter()

    def script(node, places):
        for place in places:
            asked[place] += 1
            if place == 3:
                yield lost()
                return
            if place in (4, 5) and asked[place] == 1:
                yield done(place, same_as=3, sha256="bytes")
            elif place == 5:
                yield done(5, same_as=4, sha256="bytes")
            else:
                yield done(place, sha256="bytes" if place == 4 else None)

    found = drive(monkeypatch, FakeRay(script), count=8)
    assert found.keys() == set(range(8))
    assert found[3].rows[0]["decision"] == "error"
    assert (found[4].same_as, found[5].same_as) == (None, 4)
    assert list(found).index(4) < list(found).index(5)


def test_shards_use_every_thread_and_shrink_towards_the_end(monkeypatch):
    fake = FakeRay(lambda node, places: map(done, places))
    drive(monkeypatch, fake, count=3000)
    sizes = [len(places) for _, places, _ in fake.given]
    assert sizes[0] == 4 * ray_pool.SUSPECTS_A_THREAD
    assert max(sizes[-3:]) <= 4
    assert {node for node, _, _ in fake.given} == {"0", "1"}


def test_an_agent_refuses_another_version_and_a_node_without_the_files(tmp_path):
    agent = ray_pool.Agent(None, [], Limits(), None, os.getcwd()) if importlib.util.find_spec("ray") else None
    if agent is None:
        pytest.skip("Ray is not installed: pip install 'wmengine[ray]'")
    here = tmp_path / "a.onnx"
    here.write_bytes(b"")
    agent.start(__version__, [str(here)])
    with pytest.raises(ScanError, match=r"has 0\.0\.0: install the same on every node"):
        agent.start("0.0.0", [])
    with pytest.raises(ScanError, match=r"does not see /nowhere/b\.onnx"):
        agent.start(__version__, [str(here), "/nowhere/b.onnx"])


def test_a_missing_ray_is_named_with_its_extra(bucket, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"ray is not installed: pip install 'wmengine\[ray\]'"):
        scan(bucket / "models", bucket / "registry", ray="local", out=tmp_path / "rows.parquet")
    assert not list(tmp_path.iterdir())


def test_rays_client_is_refused(bucket):
    with pytest.raises(ValueError, match="Ray's client cannot stream"):
        scan(bucket / "models", bucket / "registry", ray="ray://10.0.0.1:10001")


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense"])
def test_an_address_where_nobody_listens_is_refused_at_once(bucket, address):
    """In a process of its own: this one may be connected."""
    code = "import sys; from wmengine.scan import scan; scan(sys.argv[1], sys.argv[2], ray=sys.argv[3])"
    command = [sys.executable, "-c", code, str(bucket / "models"), str(bucket / "registry"), address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert f"ScanError: there is no Ray cluster at {address}" in done.stderr


def test_where_nothing_is_left_no_cluster_is_needed():
    plan = Plan(("a.onnx",), ("m",), 1e-9, "all", "likely", "persistent", "0")
    assert list(ray_pool.judge_on_ray(plan, [], [], Hashes({}), None, Limits(), "10.0.0.1:6379")) == []
