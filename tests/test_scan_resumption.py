"""What a scan has finished is never judged again, whatever stops it; a journal that cannot be a scan's is refused."""

import errno
import json
import math
import os
import re
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import asdict, replace

import pyarrow.parquet as parquet
import pytest
from judged import KEY
from scan_models import by_pair, copy_of, facts, hanging, mark

from wmengine import __version__
from wmengine.cli import main
from wmengine.errors import ScanError
from wmengine.marks.watermark import Watermark
from wmengine.scanning.journal import TABLES, Journal, Plan
from wmengine.scanning.listing import Listed
from wmengine.scanning.scanner import scan


class Stop(Exception):
    """What ends a scan here, after as many suspects as are asked for."""


def stop_after(count):
    def progress(done, total, rows):
        if done == count:
            raise Stop

    return progress


def plan_of(paths, commitments, **changed):
    """As `scan` makes it of these files and marks."""
    paths = tuple(map(str, paths))
    suspects = tuple(Listed((path,), "", path) for path in paths)
    plan = Plan(suspects, tuple(commitments), 1e-9, "sequential", "likely", "persistent", __version__, paths=paths)
    return replace(plan, **changed)


def test_a_scan_that_was_stopped_goes_on_where_it_stopped(bucket, tmp_path):
    out = tmp_path / "rows.parquet"
    judged = []

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


def test_kill_minus_nine_loses_nothing_that_was_finished(bucket, tmp_path, capsys):
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
    assert main(command[3:]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert not {row["suspect"] for row in lines[:-1]} & set(finished[:4])
    summary, judged = lines[-1], {row["suspect"] for row in lines[:-1]}
    assert (summary["suspects"], summary["resumed"]) == (9, 9 - len(judged))
    assert (summary["owned"], summary["not_proven"], summary["error"]) == (4, 12, 2)  # of both runs
    assert parquet.read_table(out).num_rows == 18


def test_a_resumed_scan_keeps_the_suspects_that_it_began_with(bucket, tmp_path):
    """Uploads go on while a scan is interrupted: what is new is not in it, what is gone has a row that says so."""
    models, out = tmp_path / "models", tmp_path / "rows.parquet"
    models.mkdir()
    for name in ("copy.onnx", "other.onnx", "stranger1.onnx"):
        (models / name).write_bytes((bucket / "models" / name).read_bytes())

    with pytest.raises(Stop):
        scan(models, bucket / "registry", out=out, jobs=1, progress=stop_after(1))
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
    other.begin(plan_of([tmp_path / "a.onnx"], ["0" * 64]))
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

    with pytest.raises(Stop):
        scan(models, bucket / "registry", out=out, jobs=1, progress=stop_after(3))
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


def test_a_disk_that_is_full_is_said_and_costs_nothing_that_was_finished(bucket, tmp_path, capsys):
    out = tmp_path / "rows.parquet"
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY)); "
    run = "from wmengine.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["scan", str(bucket / "models"), "--watermarks", str(bucket / "registry"), "--out", str(out)]
    full = subprocess.run([sys.executable, "-c", limit + run, *arguments], capture_output=True, text=True, check=False)
    assert full.returncode == 2
    assert re.fullmatch(
        r"wmengine: .*rows\.parquet\.journal cannot be written \(.*\): .*the same command resumes\n", full.stderr
    )
    assert main(arguments) == 0
    done = capsys.readouterr()
    assert done.err == ""
    assert "4 owned, 12 not proven, 0 other task, 2 error" in done.out


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
        for _ in range(interrupts):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        rest, said = process.communicate(timeout=30)  # the file may take four times as long
    assert said == "wmengine: interrupted\n"
    assert process.returncode in (130, -signal.SIGINT)  # the second may come when all is said
    assert all(json.loads(line) for line in rest.splitlines())


def test_a_reader_that_has_gone_stops_the_scan_which_says_so(bucket, tmp_path):
    command = f"{sys.executable} -m wmengine scan {bucket}/models --watermarks {bucket}/registry --json --out "
    pipe = f"({command} {tmp_path}/rows.parquet; echo status $? >&2) | head -n 1"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True, check=False)
    said = done.stderr.splitlines()
    if said == ["status 141"]:  # it had judged all of them before it saw that, and has the table
        assert (tmp_path / "rows.parquet").exists()
        return
    stopped = "wmengine: nobody reads the rows any more: the scan stopped, and the same command resumes"
    assert said == [stopped, "status 2"]
    assert (tmp_path / "rows.parquet.journal").exists()


def test_a_folder_that_does_not_exist_is_said_before_anything_is_judged(bucket, tmp_path):
    with pytest.raises(ScanError, match="give --out in a folder that exists"):
        scan(bucket / "models", bucket / "registry", out=tmp_path / "gone" / "rows.parquet")


def test_a_finished_table_is_overwritten_only_where_that_is_asked_for(bucket, tmp_path, capsys):
    out, given = tmp_path / "rows.parquet", (bucket / "models" / "copy.onnx", bucket / "registry" / "first.wm")
    scan(*given, out=out)
    finished = out.read_bytes()
    with pytest.raises(FileExistsError, match=r"rows\.parquet exists, and its scan is finished"):
        scan(*given, out=out)
    command = ["scan", str(given[0]), "--watermarks", str(given[1]), "--out", str(out)]
    assert main(command) == 2
    assert "exists, and its scan is finished: give another name, or --force" in capsys.readouterr().err
    assert out.read_bytes() == finished
    assert main([*command, "--force"]) == 0
    assert scan(*given, out=out, force=True).num_rows == 1


def test_no_planted_link_is_written_through(bucket, tmp_path, monkeypatch):
    """Not by chance either: here the name that would be taken is known."""
    monkeypatch.setattr(secrets, "token_hex", lambda count: "known")
    out, victim = tmp_path / "rows.parquet", tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "rows.parquet.known.partial").symlink_to(victim)
    with pytest.raises(ScanError, match=r"cannot be written \(File exists\)"):
        scan(bucket / "models" / "copy.onnx", bucket / "registry", out=out)
    assert victim.read_text() == "precious"
    out.symlink_to(victim)
    assert scan(bucket / "models" / "copy.onnx", bucket / "registry", out=out).num_rows == 2
    assert victim.read_text() == "precious"


def test_a_journal_of_another_scan_is_refused_by_what_differs(bucket, tmp_path):
    given = {"paths": bucket / "models", "watermarks": bucket / "registry", "out": tmp_path / "rows.parquet"}
    with pytest.raises(Stop):
        scan(**given, jobs=1, progress=stop_after(1))
    for options, named in (
        ({"alpha": 1e-6}, "alpha"),
        ({"test": "fixed", "classes": "any"}, "test and classes"),
        ({"watermarks": bucket / "registry" / "first.wm"}, "watermarks"),
        ({"watermarks": [bucket / "registry" / "second.wm", bucket / "registry" / "first.wm"]}, "watermarks"),
        ({"key": KEY}, "derivation"),
        ({"paths": bucket / "models" / "copy.onnx"}, "suspects"),
    ):
        with pytest.raises(
            ValueError, match=f"belongs to a scan of other {named}: finish that one with its own command"
        ):
            scan(**(given | options))


def test_two_marks_of_one_name_keep_their_own_rows_when_a_scan_resumes(bucket, tmp_path):
    """Their files change names in between, which would swap the rows of whoever went by place or by name."""
    own, other = mark(message="a customer"), mark(message="another")
    registry, models, out = tmp_path / "registry", tmp_path / "models", tmp_path / "rows.parquet"
    registry.mkdir()
    models.mkdir()
    own.save(registry / "1.wm")
    other.save(registry / "2.wm")
    for number in range(3):
        copy_of(own, models / f"{number}.onnx", seed=number)
    with pytest.raises(Stop):
        scan(models, registry, out=out, jobs=1, progress=stop_after(1))
    (registry / "1.wm").rename(registry / "3.wm")
    with pytest.raises(ValueError, match="a scan of other watermarks"):
        scan(models, registry, out=out)
    rows = scan(models, [own, other], out=out).to_pylist()
    assert [(row["message"], row["commitment"], row["decision"]) for row in rows] == [
        ("a customer", own.commitment, "owned"),
        ("another", other.commitment, "not_proven"),
    ] * 3


def test_paths_mean_the_same_files_in_every_folder(bucket, tmp_path, monkeypatch):
    out, names = tmp_path / "rows.parquet", []
    monkeypatch.chdir(bucket)
    with pytest.raises(Stop):
        scan("models", "registry", out=out, jobs=1, progress=stop_after(3))
    monkeypatch.chdir(bucket / "models")
    with pytest.raises(FileNotFoundError):
        scan("models", bucket / "registry", out=out)
    table = scan("../models", bucket / "registry", out=tmp_path / "others.parquet")
    monkeypatch.chdir(bucket)
    resumed = scan("models", "registry", out=out, progress=lambda done, total, rows: names.append(rows[0]["suspect"]))
    assert len(names) == 6
    assert [row["decision"] for row in facts(resumed)] == [row["decision"] for row in facts(table)]
    assert {row["suspect"].split("/")[0] for row in facts(resumed)} == {"models"}


@pytest.mark.parametrize("kind", ["link", "second name", "pipe", "folder", "other bytes"])
def test_what_is_no_file_of_our_own_is_no_journal(bucket, tmp_path, kind):
    beside, other = tmp_path / "rows.parquet.journal", tmp_path / "other"
    other.write_bytes(b"")
    make = {
        "link": lambda: beside.symlink_to(other), "second name": lambda: beside.hardlink_to(other),
        "pipe": lambda: os.mkfifo(beside), "folder": beside.mkdir,
        "other bytes": lambda: beside.write_bytes(b"nonsense" * 1000),
    }  # fmt: skip
    make[kind]()
    with pytest.raises(ScanError, match="no journal of a scan"):
        scan(bucket / "models", bucket / "registry", out=tmp_path / "rows.parquet")
    assert other.read_bytes() == b""


NESTED = "[" * 100_000
ENDLESS = "WITH RECURSIVE r(text) AS (SELECT 'x' UNION ALL SELECT text FROM r) SELECT max(text) AS text FROM r"
WRITTEN = {
    "no rows": ({}, [(0, "aa", "null")], ""),
    "rows too deep": ({}, [(0, "aa", NESTED)], ""),
    "rows of other fields": ({}, [(0, "aa", '[{"a": 1}]')], ""),
    "fewer rows than marks": ({}, [(0, "aa", "[]")], ""),
    "rows that are no text": ({}, [(0, b"\xff", b"\xff\xfe")], ""),
    "a copy of nothing": ({}, [(0, "aa", None)], ""),
    "a suspect without rows or hash": ({}, [(0, None, None)], ""),
    "a suspect behind the last": ({}, [(7, "aa", "[]")], ""),
    "a suspect before the first": ({}, [(-1, None, "[]")], ""),
    "a plan too deep": (NESTED, [], ""),
    "a plan of nothing": ("{}", [], ""),
    "a plan that is a list": ("[]", [], ""),
    "no suspects": ({"suspects": []}, [], ""),
    "suspects that are a number": ({"suspects": 5}, [], ""),
    "suspects that are text": ({"suspects": ["/etc/passwd"]}, [], ""),
    "a suspect without a name": ({"suspects": [{"names": [], "store": "", "path": "a", "inode": 0}]}, [], ""),
    "a file that nobody named": (
        {"suspects": [{"names": ["a"], "store": "", "path": "/etc/passwd", "inode": 0}]},
        [],
        "",
    ),
    "a store that nobody named": (
        {"suspects": [{"names": ["a"], "store": "s3://b", "path": "b/a", "inode": 0}]},
        [],
        "",
    ),
    "names that are text": ({"suspects": [{"names": "ab", "store": "", "path": "a", "inode": 0}]}, [], ""),
    "a plan that is no UTF-8": ({}, [], "UPDATE plan SET text = CAST(X'ff' AS TEXT)"),
    "rows that are no UTF-8": ({}, [], "INSERT INTO suspects VALUES (0, 'aa', CAST(X'ff' AS TEXT))"),
    "a plan without end": ({}, [], f"DROP TABLE plan; CREATE VIEW plan AS {ENDLESS}"),
    "a trigger that empties": ({}, [], "CREATE TRIGGER t AFTER INSERT ON suspects BEGIN DELETE FROM suspects; END"),
}


def test_a_file_that_is_shown_by_the_name_of_another_is_refused(bucket, tmp_path):
    models, out = bucket / "models", tmp_path / "rows.parquet"
    with pytest.raises(Stop):
        scan(models, bucket / "registry" / "first.wm", out=out, jobs=1, progress=stop_after(1))
    with closing(sqlite3.connect(f"{out}.journal")) as database:
        ((text,),) = database.execute("SELECT text FROM plan").fetchall()
        plan = json.loads(text)
        plan["suspects"][-1]["path"] = plan["suspects"][0]["path"]
        database.execute("UPDATE plan SET text = ?", [json.dumps(plan)])
        database.commit()
    with pytest.raises(ScanError, match="shown by the name of another"):
        scan(models, bucket / "registry" / "first.wm", out=out)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_journal_that_somebody_has_written_is_refused_in_one_sentence(bucket, tmp_path, name):
    changed, rows, script = WRITTEN[name]
    suspect, watermark = bucket / "models" / "copy.onnx", Watermark.load(bucket / "registry" / "first.wm")
    plan = asdict(plan_of([suspect], [watermark.commitment]))
    with closing(sqlite3.connect(tmp_path / "rows.parquet.journal")) as database:
        for table in TABLES:
            database.execute(table)
        text = changed if isinstance(changed, str) else json.dumps(plan | changed)
        database.execute("INSERT INTO plan VALUES (?)", [text])
        database.executemany("INSERT INTO suspects VALUES (?, ?, ?)", rows)
        database.executescript(script)
        database.commit()
    with pytest.raises(ScanError, match=r"is no journal of a scan, or a damaged one \(.*\): delete it to begin"):
        scan(suspect, bucket / "registry" / "first.wm", out=tmp_path / "rows.parquet")


FIELDS = ("log10_p", "log10_e", "suspect", "decision", "notes", "evidence", "error", "queries")


@pytest.mark.parametrize(
    "changed", [*({field: [[7]]} for field in FIELDS), {"suspect": "another.onnx"}, {"error": "\x1b[2J"}]
)
def test_a_row_of_other_types_or_of_another_suspect_is_refused(bucket, tmp_path, changed):
    models = [bucket / "models" / name for name in ("copy.onnx", "twin.onnx")]
    out, beside = tmp_path / "rows.parquet", tmp_path / "rows.parquet.journal"
    with pytest.raises(Stop):
        scan(models, bucket / "registry" / "first.wm", out=out, jobs=1, progress=stop_after(1))
    with closing(sqlite3.connect(beside)) as database:
        ((text,),) = database.execute("SELECT rows FROM suspects").fetchall()
        (row,) = json.loads(text)
        database.execute("UPDATE suspects SET rows = ?", [json.dumps([row | changed])])
        database.commit()
    with pytest.raises(ScanError, match="or a damaged one"):
        scan(models, bucket / "registry" / "first.wm", out=out)
