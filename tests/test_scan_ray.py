"""A scan on Ray, with two nodes on this machine: the local scan's rows, whatever is killed meanwhile."""

import importlib.util
import json
import os
import re
import secrets
import shutil
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
from scan_models import SHAPE, copy_of, hanging, mark, stranger

from wmengine import __version__
from wmengine.errors import ScanError
from wmengine.sandbox import Limits
from wmengine.scanning import ray_pool
from wmengine.scanning.scanner import scan

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'wmengine[ray]'"
)
pytestmark = pytest.mark.slow
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
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
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
    """What must not depend on where a suspect is judged; how long a file took to crash stands in its error."""
    rows = []
    for row in table.to_pylist():
        row["error"] = row["error"] and row["error"].partition(", after ")[0]
        rows.append({name: value for name, value in row.items() if name not in ("seconds", "settings")})
    return rows


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


def tasks(process=None):
    """Processes that judge, of all nodes below a process, this one unless told otherwise."""
    below = descendants(process or os.getpid())
    return [number for number, command in below.items() if command.startswith("ray::judge_shard")]


def a_task(process=None):
    """One of them, as soon as there is one: between two shards there may be none."""
    seen = []
    wait_until(lambda: seen.extend(tasks(process)) or seen)
    return seen[0]


@needs_ray
def test_the_rows_are_those_of_a_local_scan(bucket, cluster, usual, tmp_path):
    told, seen = [], set()

    def progress(done, total, rows):
        told.append(done)
        seen.update(tasks())

    out = tmp_path / "rows.parquet"
    table = scan(bucket / "models", bucket / "registry", out=out, ray=cluster.address, progress=progress)
    assert facts(table) == usual
    decisions = Counter(row["decision"] for row in usual)
    assert decisions == {"owned": COPIES, "not_proven": COPIES + 2 * STRANGERS, "error": 4}
    assert sum("SIGSEGV" in (row["error"] or "") for row in usual) == 2
    assert len(seen) == 2  # a process on each node, and the crashing file has ended neither
    assert told == list(range(1, len(usual) // 2 + 1))
    assert parquet.read_table(out).equals(table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.parquet"]
    wait_until(lambda: not tasks())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@needs_ray
def test_a_task_that_is_killed_costs_what_it_had_not_sent(bucket, cluster, usual, caplog):
    killed, judged = [], []

    def kill_one(done, total, rows):
        judged.append(rows[0]["suspect"])
        if done in (4, 12):
            killed.append(a_task())
            os.kill(killed[-1], signal.SIGKILL)

    assert facts(scan(bucket / "models", bucket / "registry", ray=cluster.address, progress=kill_one)) == usual
    assert len(set(killed)) == 2
    assert len(judged) == len(set(judged))
    assert "a task of the Ray cluster was lost (" in caplog.text


@needs_ray
def test_a_suspect_that_ends_its_task_is_given_up_and_the_others_are_not(bucket, cluster, usual):
    table = scan(bucket / "models", bucket / "registry", ray=cluster.address, isolation="none")
    for row, its_usual in zip(facts(table), usual, strict=True):
        if "crash.onnx" in row["suspect"]:
            assert "was given up: 3 times the task that judged it was lost" in row["error"]
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
        wait_until(lambda: not tasks())
    table = scan(bucket / "models", bucket / "registry", out=out, jobs=1, progress=stop_after(None))
    assert facts(table) == usual
    assert len(judged) == len(set(judged)) == len(usual) // 2


@needs_ray
def test_relative_paths_are_the_drivers_and_names_in_stores_are_exact(bucket, cluster, tmp_path, monkeypatch):
    """The store is a folder, as every process sees it."""
    for number, name in enumerate(("clean.onnx", "clean.onnx::stolen.onnx", "a#b?.onnx")):
        stranger(tmp_path / name, number)
    monkeypatch.chdir(tmp_path)
    for paths in (".", f"dir::file://{tmp_path}"[5:], "*.onnx"):
        own, others = (
            {row["suspect"]: row["sha256"] for row in scan(paths, bucket / "registry" / "first.wm", **ray).to_pylist()}
            for ray in ({}, {"ray": cluster.address})
        )
        assert own == others
        assert len(set(own.values())) == 3


@needs_ray
def test_a_hanging_file_holds_up_nothing_but_itself(bucket, cluster, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    hanging(folder / "a.onnx")
    for seed in range(6):
        stranger(folder / f"stranger{seed}.onnx", seed)
    order = []
    table = scan(
        folder,
        bucket / "registry",
        ray=cluster.address,
        limits=Limits(seconds=8.0),
        progress=lambda done, total, rows: order.append(os.path.basename(rows[0]["suspect"])),
    )
    assert order[-1] == "a.onnx"
    errors = {row["suspect"]: row["error"] for row in table.to_pylist() if row["error"]}
    assert errors.keys() == {str(folder / "a.onnx")}
    assert "took longer than 8 s" in errors[str(folder / "a.onnx")]


@needs_ray
@pytest.mark.parametrize(
    ("version", "sample", "words"),
    [
        ("0.0.0", None, r"and the driver has 0\.0\.0: install the same on every node"),
        (__version__, "/nowhere/b.onnx", "it does not see /nowhere/b.onnx: put suspects on storage that every node"),
    ],
)
def test_a_node_that_cannot_judge_says_so_before_it_does(version, sample, words):
    with pytest.raises(ScanError, match=words):
        next(ray_pool.judge_shard(version, sample, [], [0]))


@needs_ray
def test_what_a_node_lacks_ends_the_scan_and_is_said(bucket, cluster, monkeypatch):
    monkeypatch.setattr(ray_pool, "__version__", "0.0.0")
    with pytest.raises(ScanError, match=r"a node of the Ray cluster cannot judge: it has wmengine .* has 0\.0\.0"):
        scan(bucket / "models", bucket / "registry", ray=cluster.address)


@needs_ray
def test_a_process_that_is_connected_elsewhere_is_not_used(bucket, cluster):
    with pytest.raises(ValueError, match=f"connected to Ray at {cluster.address} already"):
        scan(bucket / "models", bucket / "registry", ray="local")


@needs_ray
def test_ctrl_c_ends_a_cluster_of_our_own_and_keeps_what_is_finished(bucket, tmp_path):
    """The last file holds the scan up until it is interrupted, however fast the others are."""
    models, out = shutil.copytree(bucket / "models", tmp_path / "models"), tmp_path / "rows.parquet"
    hanging(models / "z.onnx")
    command = [sys.executable, "-m", "wmengine", "scan", str(models)]
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
        os.kill(a_task(process.pid), signal.SIGKILL)
        finished |= {json.loads(process.stdout.readline())["suspect"] for _ in range(6)}
        below = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        rest, said = process.stdout.readlines(), process.stderr.read()
    (models / "z.onnx").write_bytes(b"it hangs no more")
    usual = facts(scan(models, bucket / "registry", jobs=1))
    assert process.returncode == 130
    *lost, last = said.splitlines()
    assert last == "wmengine: interrupted"
    # It may be stopped before it has noticed.
    assert all(re.fullmatch(r"a task of the Ray cluster was lost \(.*\)", line) for line in lost[:1]), said
    assert len(lost) < 2, said
    finished |= {json.loads(line)["suspect"] for line in rest}  # nothing of Ray's is among the rows
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
def test_a_lost_node_costs_nothing(bucket, cluster, usual):
    """The last test on this cluster: the second node does not come back."""
    import ray

    def lose_a_node(done, total, rows):
        if done == 8:
            cluster.remove_node(cluster.second, allow_graceful=False)

    assert facts(scan(bucket / "models", bucket / "registry", ray="auto", progress=lose_a_node)) == usual
    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)


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
    code = "import sys; from wmengine.scanning.scanner import scan; scan(sys.argv[1], sys.argv[2], ray=sys.argv[3])"
    command = [sys.executable, "-c", code, str(bucket / "models"), str(bucket / "registry"), address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert f"ScanError: there is no Ray cluster at {address}" in done.stderr
