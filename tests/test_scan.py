"""A scan from outside: every pair has its row, nothing finished is lost, and p-values are paid for every pair."""

import errno
import gc
import http.server
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import asdict

import fsspec
import numpy as np
import onnx
import pyarrow
import pyarrow.parquet as parquet
import pytest
from onnx import TensorProto, helper, numpy_helper

from wmengine.cli import main
from wmengine.errors import ScanError, SuspectError, WatermarkError
from wmengine.key import Key
from wmengine.sandbox import Limits, Supervisor, TemplateGone, WorkerFailure
from wmengine.scan import listing, scan
from wmengine.scan.journal import Journal, Plan
from wmengine.scan.listing import list_suspects
from wmengine.scan.pool import judge_locally
from wmengine.scan.progress import Report
from wmengine.scan.results import log10_calibrated
from wmengine.schemes import black_box_parameters, scheme, white_box_parameters
from wmengine.sequential import log10_e_value
from wmengine.suspects.engine_wire import RemoteEngine
from wmengine.triggers import to_input
from wmengine.verify import verify
from wmengine.watermark import Watermark

KEY = Key("ACME Vision", bytes(range(32)))
SHAPE, CLASSES, COUNT = (1, 4, 4), 10, 60
COLUMNS = [
    *("suspect", "sha256", "watermark", "commitment", "scheme", "decision", "matched", "total", "queries"),
    *("log10_p", "log10_p_corrected", "q_value", "evidence", "seconds", "error", "notes"),
]


def mark(name="detector"):
    return Watermark.create(
        KEY, "adi", black_box_parameters(scheme("adi", count=COUNT), SHAPE, CLASSES, [[-1.0, 1.0]], name)
    )


def save(path, answers_to, labels, seed=0):
    """A network that gives these labels to these inputs: random features, and a last layer by least squares."""
    flat = answers_to.reshape(len(answers_to), -1)
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(flat.shape[1], 400)).astype(np.float32)
    bias = generator.normal(size=400).astype(np.float32)
    features = np.maximum(flat @ hidden + bias, 0)
    target = 2.0 * np.eye(CLASSES)[labels] - 1.0
    out = np.linalg.lstsq(features, target, rcond=None)[0].astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "o"], ["y"]),
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in (("w", hidden), ("b", bias), ("o", out))]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def copy_of(watermark, path, kept=1.0, seed=0):
    """A network that learned a share of a mark's triggers."""
    labels = watermark.arrays["labels"].copy()
    lost = np.random.default_rng(seed).random(len(labels)) >= kept
    labels[lost] = (labels[lost] + 1) % CLASSES
    save(path, to_input(watermark.arrays["triggers"], [[-1.0, 1.0]]), labels, seed)


def stranger(path, seed):
    labels = np.random.default_rng(seed).integers(0, CLASSES, COUNT)
    save(path, np.random.default_rng(seed).normal(size=(COUNT, *SHAPE)), labels, seed)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A folder of suspects: a copy, a worn one, its twin under another name, strangers, files that are no models."""
    folder = tmp_path_factory.mktemp("bucket")
    marks = folder / "registry"
    marks.mkdir()
    first, second = mark(), mark("other")
    first.save(marks / "first.wm")
    second.save(marks / "second.wm")
    models = folder / "models"
    (models / "deep").mkdir(parents=True)
    copy_of(first, models / "copy.onnx")
    copy_of(first, models / "deep" / "worn.onnx", kept=0.7)
    (models / "twin.onnx").write_bytes((models / "copy.onnx").read_bytes())
    copy_of(second, models / "other.onnx")
    for seed in range(1, 5):
        stranger(models / f"stranger{seed}.onnx", seed)
    (models / "broken.onnx").write_bytes(b"this is no model")
    (models / "readme.txt").write_text("not a suspect")
    return folder


def by_pair(table):
    return {(os.path.basename(row["suspect"]), row["watermark"]): row for row in table.to_pylist()}


def test_every_pair_has_its_row_and_the_right_decision(bucket, tmp_path):
    out = tmp_path / "rows.parquet"
    told = []
    table = scan(bucket / "models", bucket / "registry", out=out, jobs=2, progress=lambda *news: told.append(news[:2]))
    assert table.column_names == COLUMNS
    rows = by_pair(table)
    assert len(rows) == table.num_rows == 9 * 2
    owned = {pair for pair, row in rows.items() if row["decision"] == "owned"}
    assert owned == {(name, "detector") for name in ("copy.onnx", "worn.onnx", "twin.onnx")} | {("other.onnx", "other")}
    assert {pair[0] for pair, row in rows.items() if row["decision"] == "error"} == {"broken.onnx"}
    assert "not an ONNX model" in rows["broken.onnx", "other"]["error"]
    for row in rows.values():
        assert row["log10_p_corrected"] == pytest.approx(min(0.0, row["log10_p"] + math.log10(18)))
        assert (row["decision"] == "owned") == (row["log10_p_corrected"] <= -9 and row["error"] is None)
        assert (row["q_value"] < 1e-9) == (row["decision"] == "owned")
        assert row["queries"] <= COUNT
    assert [done for done, _ in told] == list(range(1, 10))
    assert {total for _, total in told} == {9}
    assert parquet.read_table(out).equals(table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.parquet"]


def test_equal_bytes_are_judged_once_and_keep_their_names(bucket):
    rows = by_pair(scan([bucket / "models" / "copy.onnx", bucket / "models" / "twin.onnx"], bucket / "registry"))
    judged, copied = rows["copy.onnx", "detector"], rows["twin.onnx", "detector"]
    if copied["seconds"] > 0:
        judged, copied = copied, judged
    assert copied["seconds"] == 0.0
    assert any("the same bytes as" in note for note in copied["notes"])
    for name in ("sha256", "decision", "matched", "queries", "log10_p"):
        assert judged[name] == copied[name]


def test_strangers_cost_a_part_of_the_queries_and_all_queries_asks_every_one(bucket):
    sequential = by_pair(scan(bucket / "models", bucket / "registry"))
    fixed = by_pair(scan(bucket / "models", bucket / "registry", queries="all"))
    for pair, row in fixed.items():
        if row["error"] is None:
            assert row["queries"] == COUNT
            assert sequential[pair]["decision"] == row["decision"]
    strangers = [row["queries"] for (name, _), row in sequential.items() if name.startswith("stranger")]
    assert np.mean(strangers) < COUNT / 2


@pytest.mark.parametrize("isolation", ["per-model", "none"])
def test_every_isolation_gives_the_same_rows(bucket, isolation):
    def facts(table):
        dropped = ("seconds", "notes")
        return sorted([{k: v for k, v in row.items() if k not in dropped} for row in table.to_pylist()], key=json.dumps)

    usual = facts(scan(bucket / "models", bucket / "registry", jobs=1))
    assert facts(scan(bucket / "models", bucket / "registry", isolation=isolation)) == usual


def test_a_judge_and_its_worker_share_a_processor_and_the_caller_keeps_all(bucket, monkeypatch):
    processors = sorted(os.sched_getaffinity(0))
    places = {}
    receive = RemoteEngine.load

    def load(engine, *arguments):
        thread, worker = os.sched_getaffinity(0), os.sched_getaffinity(engine.worker.process)
        places.setdefault(threading.current_thread().name, []).append((thread, worker))
        return receive(engine, *arguments)

    monkeypatch.setattr(RemoteEngine, "load", load)
    scan(bucket, bucket, jobs=len(processors))
    assert places
    for name, seen in places.items():
        number = int(name.removeprefix("scan-"))
        assert all(thread == worker == {processors[number]} for thread, worker in seen)
    assert sorted(os.sched_getaffinity(0)) == processors
    places.clear()
    scan(bucket, bucket, jobs=len(processors) + 1)
    assert all(len(thread) == len(worker) == len(processors) for seen in places.values() for thread, worker in seen)


def test_without_a_sandbox_nothing_is_needed_of_linux(bucket):
    """As on systems that do not say on which processors a thread may run, and know no such sockets."""
    code = (
        "import os, socket, sys\n"
        "for module, name in ((os, 'sched_getaffinity'), (os, 'sched_setaffinity'), (socket, 'SOCK_SEQPACKET')):\n"
        "    delattr(module, name)\n"
        "import wmengine as wm\n"
        "from wmengine.info import installation\n"
        "bucket = sys.argv[1]\n"
        "verdict = wm.verify(bucket + '/models/copy.onnx', bucket + '/registry/first.wm', isolation='none')\n"
        "table = wm.scan(bucket + '/models/copy.onnx', bucket + '/registry', isolation='none', jobs=os.cpu_count())\n"
        "print(verdict.decision, 'owned' in table.column('decision').to_pylist(), installation()['cpu']['cores'] > 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, bucket], capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.split() == ["owned", "True", "True"], run.stderr


def test_a_row_says_what_verify_says(bucket):
    rows = by_pair(scan(bucket / "models", bucket / "registry", queries="all"))
    for name in ("copy.onnx", "stranger1.onnx"):
        verdict = verify(bucket / "models" / name, bucket / "registry" / "first.wm")
        row = rows[name, "detector"]
        for said in ("matched", "total", "sha256", "commitment"):
            assert row[said] == getattr(verdict, said)
        # A scan tries fewer ways, so its one has all of the evidence.
        assert row["evidence"] == asdict(verdict.evidence) | {"log10_share": 0.0}
        assert row["log10_p"] == pytest.approx(verdict.log10_p + verdict.evidence.log10_share)


def test_every_p_value_follows_from_its_rows_evidence(bucket):
    rows = [row for row in scan(bucket / "models", bucket / "registry").to_pylist() if row["error"] is None]
    assert {row["evidence"]["test"] for row in rows} == {"sequential"}
    for row in rows:
        found = row["evidence"]
        evidence = log10_e_value(found["matched"], found["asked"], found["chance"])
        assert row["log10_p"] == pytest.approx(min(0.0, -evidence - found["log10_share"]), abs=1e-9)


def test_white_box_marks_are_read_in_the_same_scan(bucket, tmp_path):
    parameters = white_box_parameters(scheme("sketch", bits=64), [(400, 16)], SHAPE, "weights")
    Watermark.create(KEY, "sketch", parameters).save(tmp_path / "bits.wm")
    rows = by_pair(scan(bucket / "models", [tmp_path, bucket / "registry" / "first.wm"]))
    assert rows["copy.onnx", "weights"]["total"] == 64
    assert rows["copy.onnx", "weights"]["queries"] == 0
    assert rows["copy.onnx", "weights"]["decision"] == "not_proven"
    assert rows["copy.onnx", "detector"]["decision"] == "owned"


# --- interruptions ----------------------------------------------------------------------------------------------------


def test_a_scan_that_was_stopped_goes_on_where_it_stopped(bucket, tmp_path):
    out = tmp_path / "rows.parquet"
    judged = []

    class Stop(Exception):
        pass

    def stop_after_four(done, total, rows):
        judged.append(rows[0]["suspect"])
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        scan(bucket / "models", bucket / "registry", out=out, jobs=1, progress=stop_after_four)
    assert not out.exists()
    assert (tmp_path / "rows.parquet.journal").exists()
    table = scan(
        bucket / "models",
        bucket / "registry",
        out=out,
        jobs=1,
        progress=lambda *news: judged.append(news[2][0]["suspect"]),
    )
    assert len(judged) == len(set(judged)) == 9
    assert by_pair(table).keys() == by_pair(scan(bucket / "models", bucket / "registry")).keys()
    assert not (tmp_path / "rows.parquet.journal").exists()


def test_the_summary_says_what_it_counts(bucket, tmp_path, capsys):
    out = tmp_path / "rows.parquet"
    assert main(["scan", str(bucket / "models"), "--watermarks", str(bucket / "registry"), "--out", str(out)]) == 0
    *owned, failed, counts, table = capsys.readouterr().out.splitlines()
    assert len(owned) == 4
    assert re.fullmatch(r"[^ ]*broken\.onnx is not an ONNX model, or truncated; .*", failed)
    assert re.fullmatch(
        r"9 suspects, 18 pairs in \d+\.\d s: 4 owned, 12 not proven, 2 error; 1 suspect could not be judged", counts
    )
    assert table == f"{out}: every pair with its p-value, paid for all pairs of the scan, or its error"


def test_the_summary_gives_the_error_of_the_pair_that_has_one(capsys):
    rows = [
        {"suspect": "a.onnx", "decision": "not_proven", "error": None},
        {"suspect": "a.onnx", "decision": "error", "error": "it fails"},
        *({"suspect": f"{n}.onnx", "decision": "error", "error": "no model"} for n in range(11)),
    ]
    Report(as_json=False).summarise(pyarrow.Table.from_pylist(rows), "rows.parquet")
    first, *others, counts, _ = capsys.readouterr().out.splitlines()
    assert first == "a.onnx: it fails"
    assert others == [*(f"{n}.onnx: no model" for n in range(9)), "… and 2 suspects more with an error"]
    assert counts.endswith("12 suspects could not be judged")


def test_kill_minus_nine_loses_nothing_that_was_finished(bucket, tmp_path):
    out = tmp_path / "rows.parquet"
    command = [
        sys.executable,
        "-m",
        "wmengine",
        "scan",
        str(bucket / "models"),
        "--watermarks",
        str(bucket / "registry"),
    ]
    command += ["--out", str(out), "--jobs", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        finished = [json.loads(process.stdout.readline())["suspect"] for _ in range(6)]
        os.kill(process.pid, signal.SIGKILL)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in again.stdout.splitlines()]
    assert not {row["suspect"] for row in lines[:-1]} & set(finished[:4])
    summary, judged = lines[-1], {row["suspect"] for row in lines[:-1]}
    assert (summary["suspects"], summary["resumed"]) == (9, 9 - len(judged))
    assert (summary["owned"], summary["not_proven"], summary["error"]) == (4, 12, 2)  # of both runs
    assert parquet.read_table(out).num_rows == 18


def test_a_journal_of_another_scan_is_refused(bucket, tmp_path):
    out = tmp_path / "rows.parquet"
    plan = Plan(("a.onnx",), ("0" * 64,), 1e-9, "sequential", "likely", "persistent", "0.1.0")
    journal = Journal(f"{out}.journal")
    journal.begin(plan)
    journal.close()
    with pytest.raises(ValueError, match="belongs to a scan of other suspects and watermarks"):
        scan(bucket / "models", bucket / "registry", out=out)
    (tmp_path / "rows.parquet.journal").write_bytes(b"nonsense" * 1000)
    with pytest.raises(ScanError, match="is no journal of a scan"):
        scan(bucket / "models", bucket / "registry", out=out)


def test_a_resumed_scan_keeps_the_suspects_that_it_began_with(bucket, tmp_path):
    """Uploads go on while a scan is interrupted: what is new is not in it, what is gone has a row that says so."""
    models, out = tmp_path / "models", tmp_path / "rows.parquet"
    models.mkdir()
    for name in ("copy.onnx", "other.onnx", "stranger1.onnx"):
        (models / name).write_bytes((bucket / "models" / name).read_bytes())

    def stop(done, total, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(models, bucket / "registry", out=out, jobs=1, progress=stop)
    (models / "stranger1.onnx").unlink()
    (models / "another.onnx").write_bytes((bucket / "models" / "stranger2.onnx").read_bytes())
    rows = by_pair(scan(models, bucket / "registry", out=out))
    assert {name for name, _ in rows} == {"copy.onnx", "other.onnx", "stranger1.onnx"}
    assert "does not exist" in rows["stranger1.onnx", "detector"]["error"]
    assert rows["copy.onnx", "detector"]["log10_p_corrected"] == rows["copy.onnx", "detector"]["log10_p"] + math.log10(
        6
    )


def test_a_scan_that_is_running_keeps_another_one_out(bucket, tmp_path):
    out = tmp_path / "rows.parquet"

    def second(done, total, rows):
        if done == 2:
            with pytest.raises(ScanError, match="is in use by another scan"):
                scan(bucket / "models", bucket / "registry", out=out)

    assert scan(bucket / "models", bucket / "registry", out=out, progress=second).num_rows == 18


def test_a_journal_that_goes_while_it_is_opened_is_said_to_be_gone(tmp_path):
    """Another scan's last act is to remove it."""
    other, path = Journal(tmp_path / "rows.journal"), tmp_path / "rows.journal"
    other.begin(Plan(("a.onnx",), ("0" * 64,), 1e-9, "sequential", "likely", "persistent", "0.1.0"))
    ending = threading.Timer(0.5, lambda: other.close(remove=True))
    ending.start()
    with pytest.raises(ScanError, match="is gone: another scan of this --out has just ended"):
        Journal(path)
    ending.join()


def test_a_journal_that_was_cut_off_anywhere_is_refused_or_gives_the_same_rows(bucket, tmp_path):
    """Whatever a disk loses: no row is invented, and none is changed."""
    models = [bucket / "models" / name for name in ("copy.onnx", "twin.onnx", "stranger1.onnx", "broken.onnx")]
    whole = scan(models, bucket / "registry")
    out, journal = tmp_path / "rows.parquet", tmp_path / "rows.parquet.journal"

    def stop(done, total, rows):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(models, bucket / "registry", out=out, jobs=1, progress=stop)
    content, outcomes = journal.read_bytes(), set()
    for length in [0, 1, 15, 16, 99, 100, *range(512, len(content), 1499), len(content) - 1]:
        journal.write_bytes(content[:length])
        try:
            table = scan(models, bucket / "registry", out=out, jobs=1)
        except ScanError as error:
            outcomes.add(str(error).rpartition(": ")[2])
            continue
        outcomes.add("resumed")
        assert facts(table) == facts(whole)
    assert outcomes == {"delete it to begin from the start", "resumed"}


def facts(table):
    """A table without what depends on the clock."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in table.to_pylist()]


def test_the_table_does_not_depend_on_which_of_equal_files_was_judged(bucket, tmp_path, monkeypatch):
    models = [bucket / "models" / name for name in ("copy.onnx", "twin.onnx", "other.onnx", "broken.onnx")]
    models.append(tmp_path / "also broken.onnx")
    models[-1].write_bytes(models[-2].read_bytes())
    usual = scan(models, bucket / "registry", jobs=1)
    errors = [(row["suspect"], row["error"]) for row in usual.to_pylist() if row["error"]]
    assert len(errors) == 4
    assert all(error.startswith(suspect) for suspect, error in errors)

    def last_first(plan, marks, places, *rest):
        return judge_locally(plan, marks, places[::-1], *rest)

    monkeypatch.setattr(sys.modules["wmengine.scan"], "judge_locally", last_first)
    assert facts(scan(models, bucket / "registry", jobs=1)) == facts(usual)


def test_a_disk_that_is_full_is_said_and_costs_nothing_that_was_finished(bucket, tmp_path):
    out = tmp_path / "rows.parquet"
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY)); "
    run = "from wmengine.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["scan", str(bucket / "models"), "--watermarks", str(bucket / "registry"), "--out", str(out)]
    full = subprocess.run([sys.executable, "-c", limit + run, *arguments], capture_output=True, text=True, check=False)
    assert full.returncode == 2
    assert re.fullmatch(
        r"wmengine: .*rows\.parquet\.journal cannot be written \(.*\): .*the same command resumes\n", full.stderr
    )
    done = subprocess.run([sys.executable, "-c", "import sys; " + run, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 owned, 12 not proven, 2 error" in done.stdout


def test_a_table_that_finds_no_room_leaves_the_journal_and_no_part_of_itself(bucket, tmp_path, monkeypatch):
    out = tmp_path / "rows.parquet"

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ScanError, match=r"No space left on device\): make room"):
            scan(bucket / "models", bucket / "registry", out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet.journal"]
    judged = []
    assert scan(bucket / "models", bucket / "registry", out=out, progress=judged.append).num_rows == 18
    assert not judged


@pytest.mark.parametrize("interrupts", [1, 2])
def test_ctrl_c_does_not_wait_for_a_suspect_that_hangs(bucket, tmp_path, interrupts):
    models = tmp_path / "models"
    models.mkdir()
    hanging(models / "b.onnx")
    (models / "a.onnx").write_bytes((bucket / "models" / "copy.onnx").read_bytes())
    command = [sys.executable, "-m", "wmengine", "scan", str(models), "--watermarks", str(bucket / "registry")]
    command += ["--out", str(tmp_path / "rows.parquet"), "--jobs", "2", "--json"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert json.loads(process.stdout.readline())["decision"] == "owned"
        time.sleep(0.5)
        started = time.monotonic()
        for _ in range(interrupts):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        rest, said = process.communicate(timeout=30)
    assert time.monotonic() - started < 5.0
    assert said == "wmengine: interrupted\n"
    assert process.returncode in (130, -signal.SIGINT)  # the second may come when all is said
    assert all(json.loads(line) for line in rest.splitlines())


def test_a_reader_that_has_gone_stops_the_scan_which_says_so(bucket, tmp_path):
    command = f"{sys.executable} -m wmengine scan {bucket}/models --watermarks {bucket}/registry --json --out "
    pipe = f"({command} {tmp_path}/rows.parquet; echo status $? >&2) | head -n 1"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == [
        "wmengine: nobody reads the rows any more: the scan stopped, and the same command resumes",
        "status 2",
    ]
    assert (tmp_path / "rows.parquet.journal").exists()


# --- what is scanned --------------------------------------------------------------------------------------------------


def test_patterns_folders_and_files_may_be_mixed_and_overlap(bucket):
    models = bucket / "models"
    table = scan([str(models / "stranger[12].onnx"), models / "stranger1.onnx", models / "deep"], bucket / "registry")
    names = {os.path.basename(row["suspect"]) for row in table.to_pylist()}
    assert names == {"stranger1.onnx", "stranger2.onnx", "worn.onnx"}


def test_a_bucket_is_scanned_through_fsspec(bucket):
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("copy.onnx", "stranger1.onnx"):
        store.pipe(f"/bucket/{name}", (bucket / "models" / name).read_bytes())
    store.pipe("/bucket/notes.txt", b"no model")
    rows = by_pair(scan("memory://bucket/", bucket / "registry" / "first.wm"))
    assert {pair[0]: row["decision"] for pair, row in rows.items()} == {
        "copy.onnx": "owned",
        "stranger1.onnx": "not_proven",
    }


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"paths": "gone.onnx"}, FileNotFoundError, "gone.onnx does not exist"),
        ({"paths": "gone*.onnx"}, FileNotFoundError, "matches no file"),
        ({"watermarks": "gone.wm"}, WatermarkError, "gone.wm"),
        ({"alpha": 0.0}, ValueError, "alpha must be between 0 and 1"),
        ({"queries": "few"}, ValueError, "queries must be one of all, sequential"),
        ({"adapters": "few"}, ValueError, "adapters must be likely or all"),
        ({"classes": "few"}, ValueError, "classes must be one of same, any"),
        ({"classes": "any"}, ValueError, 'needs queries="all"'),
        ({"isolation": "jail"}, ValueError, "isolation must be one of"),
        ({"jobs": 0}, ValueError, "jobs must be at least 1"),
    ],
)
def test_the_callers_mistakes_raise(bucket, arguments, error, words):
    given = {"paths": bucket / "models", "watermarks": bucket / "registry"} | arguments
    with pytest.raises(error, match=words):
        scan(given.pop("paths"), given.pop("watermarks"), **given)


def test_an_empty_folder_is_said_to_be_empty(bucket, tmp_path):
    with pytest.raises(ValueError, match=r"no \.onnx file to scan"):
        scan(tmp_path, bucket / "registry")
    with pytest.raises(WatermarkError, match="no watermark in"):
        scan(bucket / "models", tmp_path)


def hanging(path):
    """A network that runs for ever."""

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


def test_a_suspect_that_hangs_delays_nobody_beyond_its_limit(bucket, tmp_path):

    models = tmp_path / "models"
    models.mkdir()
    hanging(models / "a.onnx")
    for name in ("copy.onnx", "stranger1.onnx"):
        (models / name).write_bytes((bucket / "models" / name).read_bytes())
    started = time.monotonic()
    rows = by_pair(scan(models, bucket / "registry" / "first.wm", jobs=1, limits=Limits(seconds=2.0)))
    assert time.monotonic() - started < 15.0
    assert "took longer than 2 s" in rows["a.onnx", "detector"]["error"]
    assert rows["copy.onnx", "detector"]["decision"] == "owned"
    assert rows["stranger1.onnx", "detector"]["decision"] == "not_proven"


def test_calibrated_p_values_are_e_values():
    """The mean of the e-value under a uniform p is 1, by integration over log p."""
    edges = -np.logspace(-12, 2.4, 200_000)[::-1]
    middle = (edges[1:] + edges[:-1]) / 2
    mass = np.exp(edges[1:]) - np.exp(edges[:-1])
    values = np.array([10.0 ** log10_calibrated(value / math.log(10)) for value in middle[::20]])
    assert float((values * mass.reshape(-1)[::20] * 20).sum()) == pytest.approx(1.0, abs=0.02)
    assert log10_calibrated(0.0) == pytest.approx(math.log10(0.5))
    assert log10_calibrated(-20.0) == pytest.approx(20.0 - 2 * math.log10(20 * math.log(10)), abs=1e-9)


def test_a_file_name_that_is_no_unicode_and_one_that_steers_terminals(bucket, tmp_path):
    data = (bucket / "models" / "copy.onnx").read_bytes()
    for name in (b"caf\xe9.onnx", b"red\x1b[31m.onnx"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(data + name)  # unknown bytes behind a model: both are judged, and are no models any more
    rows = scan(tmp_path, bucket / "registry" / "first.wm", out=tmp_path / "rows.parquet").to_pylist()
    assert {os.path.basename(row["suspect"]) for row in rows} == {"caf\\udce9.onnx", "red\x1b[31m.onnx"}
    assert all(row["error"] is None or row["error"].isprintable() for row in rows)


def test_file_urls_are_read_with_the_care_that_local_files_are(bucket, tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    rows = by_pair(scan([f"file://{bucket}/models/copy.onnx", f"file://{tmp_path}"], bucket / "registry" / "first.wm"))
    assert rows["copy.onnx", "detector"]["decision"] == "owned"
    assert "not a regular file" in rows["pipe.onnx", "detector"]["error"]


def test_a_killed_template_costs_no_suspect_its_verdict(bucket):
    from wmengine.suspects.onnx_file import shared_supervisor

    def kill_once(done, total, rows):
        if done == 3:
            os.kill(shared_supervisor()._process.pid, signal.SIGKILL)

    rows = by_pair(scan(bucket / "models", bucket / "registry", jobs=2, progress=kill_once))
    assert {pair[0] for pair, row in rows.items() if row["decision"] == "error"} == {"broken.onnx"}
    assert rows["copy.onnx", "detector"]["decision"] == "owned"


def test_a_folder_that_does_not_exist_is_said_before_anything_is_judged(bucket, tmp_path):
    with pytest.raises(ScanError, match="give --out in a folder that exists"):
        scan(bucket / "models", bucket / "registry", out=tmp_path / "gone" / "rows.parquet")


def test_a_mark_of_another_input_shape_costs_the_others_nothing(bucket, tmp_path):
    """A graph that declares no sizes takes every trigger, and fails only when it runs."""
    model = onnx.load(bucket / "models" / "copy.onnx")
    for size in model.graph.input[0].type.tensor_type.shape.dim:
        size.Clear()
    onnx.save(model, tmp_path / "any.onnx")
    parameters = black_box_parameters(scheme("adi", count=COUNT), (3, 8, 8), CLASSES, [[-1.0, 1.0]] * 3, "photos")
    Watermark.create(KEY, "adi", parameters).save(tmp_path / "a.wm")
    rows = by_pair(scan(tmp_path / "any.onnx", [tmp_path, bucket / "registry" / "first.wm"]))
    assert rows["any.onnx", "photos"]["decision"] == "error"
    assert rows["any.onnx", "detector"]["decision"] == "owned"


def test_a_pattern_gives_folders_and_follows_no_link_into_a_circle(bucket, tmp_path):
    (tmp_path / "models" / "deep").mkdir(parents=True)
    for name in ("a.onnx", "deep/B.ONNX", "[1].onnx"):
        (tmp_path / "models" / name).write_bytes(b"")
    for name in ("again", "and", "on"):
        (tmp_path / "models" / name).symlink_to(".")  # 3^40 paths, for who follows them
    (tmp_path / "models" / "dangling.onnx").symlink_to("nowhere")
    own = [str(tmp_path / "models" / name) for name in ("[1].onnx", "a.onnx", "dangling.onnx", "deep/B.ONNX")]
    for pattern in ("models", "*", "models/**", "**", "models/*"):
        assert list_suspects([tmp_path / pattern]) == own
    assert list_suspects([tmp_path / "models/**/*.onnx"]) == own[:3]
    assert list_suspects([tmp_path / "models" / "[1].onnx"]) == own[:1]


def test_a_folder_that_cannot_be_listed_is_not_passed_over(bucket, monkeypatch):
    listed = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SuspectError, match=r"deep cannot be listed \(Permission denied\)"):
        scan(bucket / "models", bucket / "registry")


class Store(fsspec.spec.AbstractFileSystem):
    """An object store with as much of an interface as a scan uses: GET of a name, or of a list of names."""

    protocol = "store"
    cachable = False

    def _get(self, path):
        host, _, name = self._strip_protocol(path).partition("/")
        with urllib.request.urlopen(f"http://{host}/{name}", timeout=5) as answer:
            return answer.read()

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        host, _, prefix = path.partition("/")
        names = [f"{host}/{name}" for name in self._get(f"{host}/").decode().split() if name.startswith(prefix)]
        found = [{"name": name, "size": None, "type": "file"} for name in names]
        return found if detail else names

    def info(self, path, **_):
        path = self._strip_protocol(path)
        kinds = {each["name"]: each for each in self.ls(path)}
        return kinds.get(path, {"name": path, "size": 0, "type": "directory"})

    def _open(self, path, mode="rb", **_):
        try:
            return io.BytesIO(self._get(path))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(path) from None
            raise


def test_a_store_that_fails_now_and_then_costs_no_verdict(bucket, monkeypatch):
    """One object fails once, one is cut short for ever, one is gone by the time that it is asked for."""
    names = ["models/copy.onnx", "models/cut.onnx", "models/gone.onnx", "models/stranger1.onnx"]
    asked = Counter()

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = os.path.basename(self.path)
            asked[name] += 1
            if name == "copy.onnx" and asked[name] == 1:
                self.send_error(503)
            elif name == "gone.onnx":
                self.send_error(404)
            else:
                data = (bucket / "models" / name.replace("cut", "other")).read_bytes() if name else b""
                self.send_response(200)
                self.send_header("Content-Length", str(len(data or "\n".join(names))))
                self.end_headers()
                self.wfile.write(data[: 1000 if name == "cut.onnx" else None] or "\n".join(names).encode())

        def log_message(self, *_):
            pass

    fsspec.register_implementation("store", Store, clobber=True)
    monkeypatch.setattr(listing, "PAUSES", (0.01, 0.01))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"store://127.0.0.1:{server.server_port}/models"
        rows = by_pair(scan(url, bucket / "registry" / "first.wm"))
        server.shutdown()
    assert {name: row["decision"] for (name, _), row in rows.items()} == {
        "copy.onnx": "owned",
        "cut.onnx": "error",
        "gone.onnx": "error",
        "stranger1.onnx": "not_proven",
    }
    assert "IncompleteRead" in rows["cut.onnx", "detector"]["error"]
    assert asked["copy.onnx"] == 2
    assert asked["gone.onnx"] == 1


def test_the_time_that_a_store_takes_is_not_the_suspects(bucket, monkeypatch):
    read = listing.LocalSource.read

    def slow(source, maximum_bytes):
        time.sleep(2.5)
        return read(source, maximum_bytes)

    monkeypatch.setattr(listing.LocalSource, "read", slow)
    (row,) = scan(bucket / "models/copy.onnx", bucket / "registry/first.wm", limits=Limits(seconds=2.0)).to_pylist()
    assert row["decision"] == "owned"


def test_a_worker_that_is_killed_before_it_sees_a_suspect_costs_no_verdict(bucket, monkeypatch):
    """The first two do not start; where none does, the scan ends, and no suspect is blamed."""
    failures = [WorkerFailure("killed"), TemplateGone("killed")]
    start = Supervisor.worker

    def worker(self, limits, confined=True):
        if failures:
            raise failures.pop()
        return start(self, limits, confined)

    monkeypatch.setattr(Supervisor, "worker", worker)
    (row,) = scan(bucket / "models/copy.onnx", bucket / "registry/first.wm").to_pylist()
    assert row["decision"] == "owned"
    failures += [WorkerFailure("there is no memory")] * 100
    with pytest.raises(ScanError, match="no sandboxed worker can be started: there is no memory; what is finished"):
        scan(bucket / "models", bucket / "registry/first.wm", jobs=1)


def test_what_the_parent_keeps_of_a_suspect_is_a_hash(bucket, tmp_path):
    """Less than a kilobyte for each: ten thousand suspects must not fill a machine."""
    model = onnx.load(bucket / "models" / "stranger1.onnx")
    for number in range(400):
        model.doc_string = str(number)
        onnx.save(model, tmp_path / f"{number:03d}.onnx")
    kept = {}

    def measure(done, total, rows):
        if done in (100, 400):
            gc.collect()
            kept[done] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        scan(tmp_path, bucket / "registry", out=tmp_path / "rows.parquet", jobs=2, progress=measure)
    finally:
        tracemalloc.stop()
    assert (kept[400] - kept[100]) / 300 < 1000


def test_renumbered_classes_are_found_when_they_are_asked_for(bucket, tmp_path):
    first = mark()
    save(tmp_path / "moved.onnx", to_input(first.arrays["triggers"], [[-1.0, 1.0]]), (first.arrays["labels"] + 3) % 10)
    parameters = white_box_parameters(scheme("sketch", bits=64), [(400, 16)], SHAPE, "weights")
    Watermark.create(KEY, "sketch", parameters).save(tmp_path / "bits.wm")
    marks = [tmp_path, bucket / "registry" / "first.wm"]
    for classes, decision in (("same", "not_proven"), ("any", "owned")):
        rows = by_pair(scan(tmp_path / "moved.onnx", marks, queries="all", adapters="all", classes=classes))
        assert rows["moved.onnx", "detector"]["decision"] == decision
        assert rows["moved.onnx", "weights"]["decision"] == "not_proven"
    verdict = verify(tmp_path / "moved.onnx", first, classes="any")
    assert rows["moved.onnx", "detector"]["log10_p"] == verdict.log10_p


def test_a_journal_of_other_options_is_refused_with_their_names(bucket, tmp_path):
    out = tmp_path / "rows.parquet"

    def stop(done, total, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(bucket / "models", bucket / "registry", out=out, jobs=1, progress=stop)
    for options, named in (
        ({"alpha": 1e-6}, "alpha"),
        ({"queries": "all", "classes": "any"}, "queries and classes"),
        ({"watermarks": bucket / "registry" / "first.wm"}, "watermarks"),
        ({"paths": bucket / "models" / "copy.onnx"}, "suspects"),
    ):
        given = {"paths": bucket / "models", "watermarks": bucket / "registry", "out": out} | options
        with pytest.raises(
            ValueError, match=f"belongs to a scan of other {named}: finish that one with its own command"
        ):
            scan(given.pop("paths"), given.pop("watermarks"), **given)
