"""A scan from outside: every pair has its row, nothing finished is lost, and p-values are paid for every pair."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pyarrow.parquet as parquet
import pytest
from onnx import TensorProto, helper, numpy_helper

from wmengine.errors import WatermarkError
from wmengine.key import Key
from wmengine.scan import scan
from wmengine.scan.journal import Journal, Plan
from wmengine.scan.results import log10_calibrated
from wmengine.schemes import black_box_parameters, scheme, white_box_parameters
from wmengine.triggers import to_input
from wmengine.verify import verify
from wmengine.watermark import Watermark

KEY = Key("ACME Vision", bytes(range(32)))
SHAPE, CLASSES, COUNT = (1, 4, 4), 10, 60
COLUMNS = [
    *("suspect", "sha256", "watermark", "scheme", "decision", "matched", "total", "queries", "log10_p"),
    *("log10_p_corrected", "q_value", "seconds", "error", "notes"),
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


def test_a_row_says_what_verify_says(bucket):
    rows = by_pair(scan(bucket / "models", bucket / "registry", queries="all"))
    for name in ("copy.onnx", "stranger1.onnx"):
        verdict = verify(bucket / "models" / name, bucket / "registry" / "first.wm")
        row = rows[name, "detector"]
        assert (row["matched"], row["total"], row["sha256"]) == (verdict.matched, verdict.total, verdict.sha256)


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
    assert lines[-1]["owned"] + lines[-1]["not_proven"] + lines[-1]["error"] == len(lines) - 1
    assert parquet.read_table(out).num_rows == 18


def test_a_journal_of_another_scan_is_refused(bucket, tmp_path):
    out = tmp_path / "rows.parquet"
    plan = Plan(("a.onnx",), ("0" * 64,), 1e-9, "sequential", "likely", "persistent", "0.1.0")
    Journal(f"{out}.journal", plan).close()
    with pytest.raises(ValueError, match="belongs to a scan of other suspects and watermarks"):
        scan(bucket / "models", bucket / "registry", out=out)
    (tmp_path / "rows.parquet.journal").write_bytes(b"nonsense" * 1000)
    with pytest.raises(ValueError, match="is no journal of a scan"):
        scan(bucket / "models", bucket / "registry", out=out)


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


def test_a_suspect_that_hangs_delays_nobody_beyond_its_limit(bucket, tmp_path):
    from wmengine.sandbox import Limits

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
    models = tmp_path / "models"
    models.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), models / "a.onnx")
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
    with pytest.raises(ValueError, match="give --out in a folder that exists"):
        scan(bucket / "models", bucket / "registry", out=tmp_path / "gone" / "rows.parquet")
