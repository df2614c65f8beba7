"""A scan from outside: every pair has its row, nothing finished is lost, and p-values are paid for every pair."""

import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from dataclasses import fields

import numpy as np
import onnx
import pyarrow
import pyarrow.parquet as parquet
import pytest
from judged import KEY, black_box, images
from processes import template_of
from scan_models import CLASSES, COUNT, SHAPE, by_pair, copy_of, facts, hanging, mark, save, stranger, weights_mark

from wmengine.cli import main
from wmengine.errors import ScanError, WatermarkError
from wmengine.identity.key import Key
from wmengine.judging.judge import Finding, failed
from wmengine.judging.verdict import Verdict, from_dict, log10_calibrated
from wmengine.judging.verification import verify
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.sandbox import Limits, Supervisor, TemplateGone, WorkerFailure
from wmengine.scanning import pool
from wmengine.scanning.pool import judge_locally
from wmengine.scanning.progress import Report
from wmengine.scanning.scanner import scan
from wmengine.suspects.base import InputSpec, rows_of
from wmengine.suspects.engine_wire import LOAD, RUN, RemoteEngine
from wmengine.suspects.model_file import LocalSource, read_model
from wmengine.suspects.onnx_file import OnnxSuspect, open_engine, shared_supervisor


def test_every_pair_has_its_row_and_the_right_decision(bucket, tmp_path):
    out = tmp_path / "rows.parquet"
    told = []
    table = scan(bucket / "models", bucket / "registry", out=out, jobs=2, progress=lambda *news: told.append(news[:2]))
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


def other_tasks():
    """Marks of other tasks than the files of `scan_models`, and what is said of such a file."""
    tokens = Task({"ids": InputSpec((16,), "int64")}, CLASSES, [(0, 99)])
    pair = Task({"ids": InputSpec((16,), "int64"), "mask": InputSpec((16,), "int64")}, CLASSES, [(0, 99)])
    shapes = [[64, 64]] * 9
    features = Task({"x": InputSpec((1, 4, 4), "float32")}, value_range=[[-1.0, 1.0]], weights=lambda: (shapes, [8]))
    preset, deep = scheme("adi_tokens", count=COUNT), scheme("deepsigns")
    as_others = "takes inputs [N, 1, 4, 4] and the watermark's triggers"
    return {
        "pictures": (black_box((3, 8, 8), name="pictures"), as_others),
        "classes": (black_box((1, 4, 4), 7, name="classes"), "answers with 10 classes and the watermark has 7"),
        "tokens": (Watermark.create(KEY, preset, preset.describe(tokens, "tokens")), as_others),
        "pair": (Watermark.create(KEY, preset, preset.describe(pair, "pair")), as_others),
        "features": (
            Watermark.create(KEY, deep, deep.describe(features, "features")),
            "has 2 weights, and the mark is in number 9",
        ),
    }


def test_a_mark_of_another_task_is_no_error_says_why_and_is_paid_for(bucket):
    """A thief who makes a copy look like another task's keeps it from being owned, and its row says what he changed."""
    marks = other_tasks()
    path = bucket / "models" / "copy.onnx"
    rows = by_pair(scan(path, [mark(), *(each for each, _ in marks.values())]))
    assert rows["copy.onnx", "detector"]["decision"] == "owned"
    for name, (watermark, said) in marks.items():
        row = rows["copy.onnx", name]
        assert (row["decision"], row["error"], row["log10_p"], row["queries"]) == ("other_task", None, 0.0, 0)
        assert row["tests"] == len(marks) + 1
        (note,) = [each for each in row["notes"] if "as in a model of another task, or a copy made to look" in each]
        assert said in note
        verdict = verify(path, watermark)  # whoever asks for one mark has asked for the wrong one
        assert verdict.decision == "error"
        assert said in verdict.error


def test_equal_bytes_are_judged_once_and_keep_their_names(bucket):
    rows = by_pair(scan([bucket / "models" / "copy.onnx", bucket / "models" / "twin.onnx"], bucket / "registry"))
    judged, copied = rows["copy.onnx", "detector"], rows["twin.onnx", "detector"]
    if copied["seconds"] > 0:
        judged, copied = copied, judged
    assert copied["seconds"] == 0.0
    assert any("the same bytes as" in note for note in copied["notes"])
    for name in ("sha256", "decision", "matched", "queries", "log10_p"):
        assert judged[name] == copied[name]


def test_strangers_cost_a_part_of_the_queries_and_the_fixed_test_asks_every_one(bucket):
    sequential = by_pair(scan(bucket / "models", bucket / "registry"))
    fixed = by_pair(scan(bucket / "models", bucket / "registry", test="fixed"))
    for pair, row in fixed.items():
        if row["error"] is None:
            assert row["queries"] == COUNT
            assert sequential[pair]["decision"] == row["decision"]
    strangers = [row["queries"] for (name, _), row in sequential.items() if name.startswith("stranger")]
    assert np.mean(strangers) < COUNT / 2


@pytest.mark.parametrize("isolation", ["per-model", "none"])
def test_every_isolation_gives_the_same_rows(bucket, isolation):
    def facts(table):
        dropped = ("seconds", "facts", "notes", "settings")
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


def test_a_suspect_like_the_one_before_takes_one_exchange(tmp_path, monkeypatch):
    triggers, asked = images(mark())[:16], []
    engine = open_engine("persistent", Limits(), eager=True)
    ask = engine.worker.ask
    monkeypatch.setattr(engine.worker, "ask", lambda doing, *rest: asked.append(doing) or ask(doing, *rest))
    for number, inputs in enumerate((triggers, triggers, triggers[:8])):
        asked.clear()
        assert engine.begin()
        stranger(tmp_path / "model.onnx", number)
        file = read_model(LocalSource(tmp_path / "model.onnx"), engine.locations)
        found = OnnxSuspect(file, engine=engine).answer({"x": inputs})
        assert asked == [[LOAD, RUN], [LOAD], [LOAD, RUN]][number]
        alone = OnnxSuspect(tmp_path / "model.onnx", isolation="none").answer({"x": inputs})
        np.testing.assert_array_equal(found.values, alone.values)
    engine.close()


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
    rows = by_pair(scan(bucket / "models", bucket / "registry", test="fixed"))
    for name in ("copy.onnx", "stranger1.onnx"):
        verdict = verify(bucket / "models" / name, bucket / "registry" / "first.wm")
        row = rows[name, "detector"]
        for said in ("matched", "total", "sha256", "commitment"):
            assert row[said] == getattr(verdict, said)
        # A scan tries fewer ways, so the recorded one has all of the evidence, and either statistic a half of it.
        told, share = json.loads(verdict.to_json())["evidence"], row["evidence"]["log10_share"]
        assert row["evidence"] == told | {"log10_share": share}
        assert share == pytest.approx(math.log10(0.5))
        if verdict.owned:
            assert row["log10_p"] == pytest.approx(verdict.log10_p + told["log10_share"] - share)


def test_a_row_is_a_verdict_wherever_it_is_written(bucket, tmp_path, capsys):
    """Table, JSON lines and `Verdict` have the same fields; only q-values wait for the last suspect."""
    names = [each.name for each in fields(Verdict)]
    out = tmp_path / "rows.parquet"
    command = ["scan", str(bucket / "models"), "--watermarks", str(bucket / "registry"), "--out", str(out), "--json"]
    assert main(command) == 0
    *lines, _ = map(json.loads, capsys.readouterr().out.splitlines())
    table = parquet.read_table(out)
    assert table.column_names == [*names, "notes"]
    rows = {(row["suspect"], row["commitment"]): row for row in table.to_pylist()}
    assert len(lines) == len(rows) == 9 * 2
    for line in lines:
        assert list(line) == [*names, "notes"]
        verdict = from_dict(line)
        assert json.loads(verdict.to_json()) == line
        row = rows[line["suspect"], line["commitment"]]
        assert row.pop("q_value") <= 1.0
        row["settings"] = json.loads(row["settings"])
        row["facts"] = [each | {"values": json.loads(each["values"])} for each in row["facts"]]
        assert row == {name: value for name, value in line.items() if name != "q_value"}


def test_who_is_owned_is_asked_every_trigger_and_the_sequential_number_stays_beside(bucket):
    copy, own = bucket / "models" / "deep" / "worn.onnx", bucket / "registry" / "first.wm"
    whole = verify(copy, own)
    for isolation in ("persistent", "none"):
        (row,) = scan(copy, own, isolation=isolation).to_pylist()
        assert (row["queries"], row["matched"], row["total"]) == (COUNT, whole.matched, COUNT)
        assert row["log10_p"] == pytest.approx(whole.log10_p, abs=0.31)
        (first,) = [json.loads(each["values"]) for each in row["facts"] if each["code"] == "asked_whole"]
        assert first["queries"] < COUNT
        assert -9 > first["log10_p"] > row["log10_p"]


@pytest.mark.parametrize("then", ["is a stranger", "fails when all is asked"])
def test_what_a_worker_says_of_who_is_owned_counts_as_far_as_fresh_ones_say_it_too(bucket, monkeypatch, then):
    stranger_then = then == "is a stranger"
    asked, told = [], iter([(24, 24.0, 20.0), (9, 0.5, None) if stranger_then else (24, 24.0, 20.0)])

    def judge(suspect, marks, terms):
        asked.append(terms.sequential)
        if not stranger_then and not terms.sequential:
            return [failed(mark, "it ended") for mark in marks]
        matched, evidence, log10_e = next(told)
        return [Finding(matched, COUNT, COUNT, -evidence, log10_e) for _ in marks]

    monkeypatch.setattr(pool, "judge_suspect", judge)
    (row,) = scan(bucket / "models" / "copy.onnx", bucket / "registry" / "first.wm", jobs=1).to_pylist()
    assert asked == ([True, False] if stranger_then else [True, False, True])
    assert row["decision"] == ("not_proven" if stranger_then else "owned")
    if stranger_then:
        assert row["log10_e"] < 1.0, "an e-value that a corrupted worker made up is worth nothing"


def test_what_a_decision_leans_on_stands_in_its_row(bucket, tmp_path):
    short = black_box(SHAPE, CLASSES, 25, name="short")
    short.save(tmp_path / "short.wm")
    copy_of(short, tmp_path / "copy.onnx")
    given = tmp_path / "copy.onnx", tmp_path / "short.wm"
    for key, derivation in ((None, "not_checked"), (KEY, "checked")):
        (row,) = scan(*given, key=key).to_pylist()
        assert (row["decision"], row["derivation"]) == ("owned", derivation)
        codes = {each["code"] for each in row["facts"]}
        assert "leans_on_date" in codes  # as p is above 2^-128
        assert ("not_derived" in codes) == (key is None)
    with pytest.raises(WatermarkError, match="belongs to 'ACME Vision' and the key to 'Bolt'"):
        scan(*given, key=Key.generate("Bolt"))


def test_watermarks_may_be_objects_and_two_of_one_name_are_two(bucket):
    """Other labels for another customer: the copy knows those of one of them."""
    marks = [mark(), mark(message="Bolt & Sons")]
    rows = scan(bucket / "models" / "copy.onnx", marks).to_pylist()
    assert [(row["watermark"], row["message"], row["decision"]) for row in rows] == [
        ("detector", None, "owned"),
        ("detector", "Bolt & Sons", "not_proven"),
    ]
    assert [row["commitment"] for row in rows] == [each.commitment for each in marks]
    with_its_file = scan(bucket / "models" / "copy.onnx", [marks[0], bucket / "registry" / "first.wm"])
    assert with_its_file.num_rows == 1  # the same mark twice


def test_fifty_customers_marks_of_one_model_are_asked_once(bucket, tmp_path, monkeypatch):
    marks = [mark(message=f"customer {number}") for number in range(50)]
    copy_of(marks[7], tmp_path / "leaked.onnx")
    stranger(tmp_path / "stranger.onnx", 1)
    asked = Counter()
    answer = OnnxSuspect.answer

    def count(suspect, inputs, num_classes=None):
        asked[suspect.sha256] += rows_of(inputs)
        return answer(suspect, inputs, num_classes)

    monkeypatch.setattr(OnnxSuspect, "answer", count)
    rows = scan(tmp_path, marks, test="fixed").to_pylist()
    assert [(row["suspect"].rpartition("/")[2], row["message"]) for row in rows if row["decision"] == "owned"] == [
        ("leaked.onnx", "customer 7")
    ]
    assert {row["queries"] for row in rows} == {COUNT}
    assert all(
        "50 watermarks share these triggers or carriers: they were observed once" in row["notes"] for row in rows
    )
    again = 2 * 8  # what proves is put to a fresh worker once more, and eight questions of it twice over
    assert sorted(asked.values()) == [COUNT, 2 * COUNT + again]


def test_white_box_marks_are_read_in_the_same_scan(bucket, tmp_path):
    weights_mark().save(tmp_path / "bits.wm")
    rows = by_pair(scan(bucket / "models", [tmp_path, bucket / "registry" / "first.wm"]))
    assert rows["copy.onnx", "weights"]["total"] == 64
    assert rows["copy.onnx", "weights"]["queries"] == 0
    assert rows["copy.onnx", "weights"]["decision"] == "not_proven"
    assert rows["copy.onnx", "detector"]["decision"] == "owned"


def test_the_summary_says_what_it_counts(bucket, tmp_path, capsys):
    out = tmp_path / "rows.parquet"
    assert main(["scan", str(bucket / "models"), "--watermarks", str(bucket / "registry"), "--out", str(out)]) == 0
    *owned, failed, counts, others, table = capsys.readouterr().out.splitlines()
    assert (len(owned), others) == (4, "1 other file was left out")
    assert re.fullmatch(r"[^ ]*broken\.onnx is not an ONNX model, or truncated; .*", failed)
    assert re.fullmatch(
        r"9 suspects, 18 pairs in \d+\.\d s: 4 owned, 12 not proven, 0 other task, 2 error; "
        "1 suspect could not be judged",
        counts,
    )
    assert table == f"{out}: every pair with its p-value, paid for all pairs of the scan, or its error"


def test_the_summary_gives_the_error_of_the_pair_that_has_one(capsys):
    rows = [
        {"suspect": "a.onnx", "decision": "not_proven", "error": None},
        {"suspect": "a.onnx", "decision": "error", "error": "a.onnx fails"},
        *({"suspect": f"{n}.onnx", "decision": "error", "error": f"{n}.onnx is no model"} for n in range(11)),
    ]
    Report(as_json=False).summarise(pyarrow.Table.from_pylist(rows), "rows.parquet")
    first, *others, counts, _ = capsys.readouterr().out.splitlines()
    assert first == "a.onnx fails"
    assert others == [*(f"{n}.onnx is no model" for n in range(9)), "… and 2 suspects more with an error"]
    assert counts.endswith("12 suspects could not be judged")


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

    monkeypatch.setattr(sys.modules["wmengine.scanning.scanner"], "judge_locally", last_first)
    assert facts(scan(models, bucket / "registry", jobs=1)) == facts(usual)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"paths": "gone.onnx"}, FileNotFoundError, "gone.onnx does not exist"),
        ({"paths": "gone*.onnx"}, FileNotFoundError, "matches no file"),
        ({"watermarks": "gone.wm"}, WatermarkError, "gone.wm"),
        ({"alpha": 0.0}, ValueError, "alpha must be between 0 and 1"),
        ({"test": "few"}, ValueError, "test must be one of fixed, sequential"),
        ({"adapters": "few"}, ValueError, "adapters must be one of likely, all"),
        ({"classes": "few"}, ValueError, "classes must be one of same, any"),
        ({"classes": "any"}, ValueError, 'needs test="fixed"'),
        ({"isolation": "jail"}, ValueError, "isolation must be one of"),
        ({"jobs": 0}, ValueError, "jobs must be at least 1"),
    ],
)
def test_the_callers_mistakes_raise(bucket, arguments, error, words):
    given = {"paths": bucket / "models", "watermarks": bucket / "registry"} | arguments
    with pytest.raises(error, match=words):
        scan(given.pop("paths"), given.pop("watermarks"), **given)


def test_a_suspect_that_hangs_delays_nobody_beyond_its_limit(bucket, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    hanging(models / "a.onnx")
    for name in ("copy.onnx", "stranger1.onnx"):
        (models / name).write_bytes((bucket / "models" / name).read_bytes())
    rows = by_pair(scan(models, bucket / "registry" / "first.wm", jobs=1, limits=Limits(seconds=2.0)))
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


def test_a_killed_template_costs_no_suspect_its_verdict(bucket):
    def kill_once(done, total, rows):
        if done == 3:
            os.kill(template_of(shared_supervisor().worker(Limits())), signal.SIGKILL)

    rows = by_pair(scan(bucket / "models", bucket / "registry", jobs=2, progress=kill_once))
    assert {pair[0] for pair, row in rows.items() if row["decision"] == "error"} == {"broken.onnx"}
    assert rows["copy.onnx", "detector"]["decision"] == "owned"


def test_a_mark_of_another_input_shape_costs_the_others_nothing(bucket, tmp_path):
    """A graph that declares no sizes takes every trigger, and fails only when it runs."""
    model = onnx.load(bucket / "models" / "copy.onnx")
    for size in model.graph.input[0].type.tensor_type.shape.dim:
        size.Clear()
    onnx.save(model, tmp_path / "any.onnx")
    black_box((3, 8, 8), CLASSES, COUNT, name="photos").save(tmp_path / "a.wm")
    rows = by_pair(scan(tmp_path / "any.onnx", [tmp_path, bucket / "registry" / "first.wm"]))
    assert rows["any.onnx", "photos"]["decision"] == "other_task"
    assert "this file fails when it runs" in str(rows["any.onnx", "photos"]["notes"])
    assert rows["any.onnx", "detector"]["decision"] == "owned"


def test_a_worker_that_is_killed_before_it_sees_a_suspect_costs_no_verdict(bucket, monkeypatch):
    """The first two do not start; where none does, the scan ends, and no suspect is blamed."""
    failures = [WorkerFailure("killed"), TemplateGone("killed")]
    start = Supervisor.worker

    def worker(self, *asked):
        if failures:
            raise failures.pop()
        return start(self, *asked)

    monkeypatch.setattr(Supervisor, "worker", worker)
    (row,) = scan(bucket / "models/copy.onnx", bucket / "registry/first.wm").to_pylist()
    assert row["decision"] == "owned"
    failures += [WorkerFailure("there is no memory")] * 100
    with pytest.raises(ScanError, match="no sandboxed worker can be started: there is no memory; what is finished"):
        scan(bucket / "models", bucket / "registry/first.wm", jobs=1)


@pytest.mark.slow
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
    save(tmp_path / "moved.onnx", images(first), (first.arrays["labels"] + 3) % 10)
    weights_mark().save(tmp_path / "bits.wm")
    marks = [tmp_path, bucket / "registry" / "first.wm"]
    for classes, decision in (("same", "not_proven"), ("any", "owned")):
        rows = by_pair(scan(tmp_path / "moved.onnx", marks, test="fixed", adapters="all", classes=classes))
        assert rows["moved.onnx", "detector"]["decision"] == decision
        assert rows["moved.onnx", "weights"]["decision"] == "not_proven"
    verdict = verify(tmp_path / "moved.onnx", first, classes="any")
    assert rows["moved.onnx", "detector"]["log10_p"] == verdict.log10_p
