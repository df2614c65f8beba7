"""What a scan is about: each file once, however it is named, and nothing that strangers make for free."""

import errno
import hashlib
import http.server
import io
import json
import math
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter

import fsspec
import onnx
import pyarrow.parquet as parquet
import pytest
from scan_models import by_pair, stranger

from wmengine.cli import main
from wmengine.errors import SuspectError, WatermarkError
from wmengine.sandbox import Limits
from wmengine.scanning import listing
from wmengine.scanning.listing import list_suspects, watermark_files
from wmengine.scanning.scanner import scan


def test_patterns_folders_and_files_may_be_mixed_and_overlap(bucket):
    models = bucket / "models"
    table = scan([str(models / "stranger[12].onnx"), models / "stranger1.onnx", models / "deep"], bucket / "registry")
    names = {os.path.basename(row["suspect"]) for row in table.to_pylist()}
    assert names == {"stranger1.onnx", "stranger2.onnx", "worn.onnx"}


def test_a_bucket_is_scanned_through_fsspec(bucket, store):
    for name in ("copy.onnx", "stranger1.onnx"):
        store.pipe(f"/bucket/{name}", (bucket / "models" / name).read_bytes())
    store.pipe("/bucket/notes.txt", b"no model")
    table = scan("memory://bucket/", bucket / "registry" / "first.wm")
    assert table.schema.metadata == {b"empty files left out": b"0", b"other files left out": b"1"}
    rows = by_pair(table)
    assert {pair[0]: row["decision"] for pair, row in rows.items()} == {
        "copy.onnx": "owned",
        "stranger1.onnx": "not_proven",
    }


def test_an_empty_folder_is_said_to_be_empty(bucket, tmp_path):
    with pytest.raises(ValueError, match=r"no \.onnx file to scan"):
        scan(tmp_path, bucket / "registry")
    with pytest.raises(WatermarkError, match="no watermark in"):
        scan(bucket / "models", tmp_path)


def test_a_file_name_that_is_no_unicode_and_one_that_steers_terminals(bucket, tmp_path):
    data = (bucket / "models" / "copy.onnx").read_bytes()
    for name in (b"caf\xe9.onnx", b"red\x1b[31m.onnx"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(data + name)  # unknown bytes behind a model: both are judged, and are no models any more
    rows = scan(tmp_path, bucket / "registry" / "first.wm", out=tmp_path / "rows.parquet").to_pylist()
    assert {os.path.basename(row["suspect"]) for row in rows} == {"caf\\udce9.onnx", "red\x1b[31m.onnx"}
    assert all(row["error"] is None or row["error"].isprintable() for row in rows)


def test_an_error_names_each_copy_by_its_own_name(bucket, tmp_path, monkeypatch):
    """The name stands before what is said, and nowhere in it: `a` is in most words."""
    monkeypatch.chdir(tmp_path)
    names = ["\x1b[2J.onnx", "a", "this file", "z.onnx", "z.onnx.onnx"]
    for name in names:
        (tmp_path / name).write_bytes(b"garbage")
    (tmp_path / "link").symlink_to("a")
    for jobs in (1, 2):
        rows = scan([*names, "link"], bucket / "registry" / "first.wm", jobs=jobs).to_pylist()
        said = {row["suspect"]: row["error"] for row in rows}
        assert set(said) == {*names, "link"}
        begin = {name: name.replace("\x1b", "\\x1b") for name in said}
        rest = {error.removeprefix(begin[name]) for name, error in said.items()}
        assert rest == {" is not an ONNX model, or truncated; export or copy it again"}
        assert {row["notes"][0] for row in rows if row["notes"]} == {
            "the same bytes as \\x1b[2J.onnx, judged once",
            "the same bytes as a, judged once",
        }


def test_file_urls_are_read_with_the_care_that_local_files_are(bucket, tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    paths = [f"file://{bucket}/models/copy.onnx", f"file://{tmp_path}/pipe.onnx"]
    rows = by_pair(scan(paths, bucket / "registry" / "first.wm"))
    assert rows["copy.onnx", "detector"]["decision"] == "owned"
    assert "not a regular file" in rows["pipe.onnx", "detector"]["error"]


def listed(*paths):
    return [name for each in list_suspects(paths).suspects for name in each.names]


def test_a_pattern_gives_folders_and_follows_no_link_into_a_circle(tmp_path):
    (tmp_path / "models" / "deep").mkdir(parents=True)
    for name in ("a.onnx", "deep/B.ONNX", "[1].onnx", "notes.txt"):
        (tmp_path / "models" / name).write_text(name)
    for name in ("again", "and", "on"):
        (tmp_path / "models" / name).symlink_to(".")  # 3^40 paths, for who follows them
    own = [str(tmp_path / "models" / name) for name in ("[1].onnx", "a.onnx", "deep/B.ONNX")]
    notes = str(tmp_path / "models" / "notes.txt")
    for pattern in ("models", "*", "models/**", "**"):
        assert listed(tmp_path / pattern) == own
    assert listed(tmp_path / "models" / "*") == [*own, notes]  # what a pattern names itself may be called anything
    assert listed(tmp_path / "models/**/*.onnx") == own[:2]
    assert listed(tmp_path / "**/**/[!a]*.[Oo]*") == [own[0], own[2]]
    assert listed(tmp_path / "models" / "[1].onnx") == own[:1]
    with pytest.raises(FileNotFoundError, match="matches no file"):
        listed(tmp_path / "nowhere" / "*.onnx")


def test_what_holds_nothing_is_left_out_and_counted(bucket, tmp_path, capsys):
    """Each would be a pair that every p-value pays for, and costs its maker nothing."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "stolen.onnx").write_bytes((bucket / "models" / "copy.onnx").read_bytes())
    for number in range(20):
        (models / f"{number}.onnx").touch()
    for name in ("notes.txt", "model.safetensors"):
        (models / name).write_text(name)
    (models / "a link to a folder").symlink_to(tmp_path)
    os.mkfifo(models / "pipe.onnx")
    (models / "nowhere.onnx").symlink_to("nothing")
    (models / "itself.onnx").symlink_to("itself.onnx")
    out = tmp_path / "rows.parquet"
    command = ["scan", str(models), "--watermarks", str(bucket / "registry" / "first.wm"), "--out", str(out)]
    assert main(command) == 0
    assert "\n23 empty files were left out\n2 other files were left out\n" in capsys.readouterr().out
    (row,) = parquet.read_table(out).to_pylist()
    assert row["log10_p_corrected"] == row["log10_p"]
    assert main([*command, "--force", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["empty"], summary["others"]) == (23, 2)
    with pytest.raises(ValueError, match=r"no \.onnx file to scan, but 1 that are empty and 0 called otherwise"):
        scan(models / "nowhere*", bucket / "registry")
    (named,) = scan(models / "1.onnx", bucket / "registry" / "first.wm").to_pylist()  # by the caller
    assert "is empty" in named["error"]
    found = list_suspects([models, models / "notes.txt"])
    assert ([os.path.basename(each.name) for each in found.suspects], found.others) == (["notes.txt", "stolen.onnx"], 1)


def test_names_of_one_file_count_once_and_each_has_its_rows(bucket, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.onnx").write_bytes((bucket / "models" / "copy.onnx").read_bytes())
    (tmp_path / "b.onnx").write_bytes((bucket / "models" / "stranger1.onnx").read_bytes())
    for number in range(10):
        (tmp_path / f"link{number}.onnx").symlink_to("a.onnx")
        (tmp_path / "deep" / f"{number}.onnx").hardlink_to(tmp_path / "a.onnx")
    told = []
    table = scan(tmp_path, bucket / "registry", jobs=1, progress=lambda *news: told.append((*news[:2], len(news[2]))))
    rows = by_pair(table)
    assert len(rows) == table.num_rows == 22 * 2
    assert told == [(1, 2, 42), (2, 2, 2)]
    first = rows["a.onnx", "detector"]
    assert first["log10_p_corrected"] == first["log10_p"] + math.log10(2 * 2)
    for number in range(10):
        for name in (f"link{number}.onnx", f"{number}.onnx"):
            row = rows[name, "detector"]
            assert row["notes"][0] == f"the same bytes as {tmp_path}/a.onnx, judged once"
            for same in ("sha256", "decision", "matched", "queries", "log10_p_corrected", "q_value"):
                assert row[same] == first[same]


def test_a_name_that_is_led_elsewhere_speaks_for_no_other(bucket, tmp_path):
    """A stranger links to somebody's clean file, and once that is listed to a stolen one."""
    for source, name in (("stranger1.onnx", "clean.onnx"), ("copy.onnx", "stolen.onnx")):
        (tmp_path / name).write_bytes((bucket / "models" / source).read_bytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "m.onnx").hardlink_to(tmp_path / "clean.onnx")
    given = {"watermarks": bucket / "registry" / "first.wm", "jobs": 1, "out": tmp_path / "rows.parquet"}
    for link, make in (("a.onnx", "symlink_to"), ("b.onnx", "hardlink_to")):
        stranger(folder / "0.onnx", 1)
        getattr(folder / link, make)(tmp_path / "clean.onnx")

        def lead_elsewhere(done, total, rows, link=link, make=make):
            if done == 1:
                (folder / link).unlink()
                getattr(folder / link, make)(tmp_path / "stolen.onnx")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            scan(folder, **given, progress=lead_elsewhere)
        rows = by_pair(scan(folder, **given, force=True))
        decision, error = rows["m.onnx", "detector"]["decision"], rows["m.onnx", "detector"]["error"] or ""
        assert rows[link, "detector"]["decision"] == decision == {"a.onnx": "not_proven", "b.onnx": "error"}[link]
        assert ("is another file than the one that was listed" in error) == (link == "b.onnx")
        (folder / link).unlink()
        given["out"] = tmp_path / f"{link}.parquet"


def test_links_to_one_graph_are_as_many_models_as_there_are_weights_beside_them(bucket, tmp_path):
    """Else the clean weights beside one link would speak for the stolen ones beside another."""
    for folder, name in (("a", "stranger1.onnx"), ("b", "copy.onnx")):
        (tmp_path / folder).mkdir()
        model = onnx.load(bucket / "models" / name)
        onnx.save(model, tmp_path / folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "b" / "m.onnx").unlink()
    (tmp_path / "b" / "m.onnx").hardlink_to(tmp_path / "a" / "m.onnx")
    (tmp_path / "b" / "n.onnx").symlink_to("m.onnx")
    rows = scan(tmp_path, bucket / "registry" / "first.wm").to_pylist()
    assert [row["decision"] for row in rows] == ["not_proven", "owned", "owned"]
    assert rows[1]["log10_p_corrected"] == rows[1]["log10_p"] + math.log10(2)


def test_marks_are_given_as_files_folders_and_patterns(tmp_path):
    for name in ("a.wm", "b.WM", "c.key"):
        (tmp_path / name).touch()
    own = [tmp_path / "a.wm", tmp_path / "b.WM"]
    assert watermark_files([tmp_path]) == watermark_files([tmp_path / "*.[wW][mM]"]) == own
    assert watermark_files([tmp_path / "c.key", tmp_path / "no.wm"]) == [tmp_path / "c.key", tmp_path / "no.wm"]


def test_marks_may_lie_below_a_thousand_folders(tmp_path):
    (tmp_path / "/".join("d" * 500)).mkdir(parents=True)
    here = os.getcwd()
    os.chdir(tmp_path / "/".join("d" * 500))
    try:
        os.makedirs("/".join("d" * 600))
        (tmp_path / "a.wm").touch()
        assert watermark_files([tmp_path]) == [tmp_path / "a.wm"]
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


@pytest.mark.slow
def test_folders_may_be_nested_deeper_than_python_and_the_system_go(bucket, tmp_path):
    (tmp_path / "a.onnx").write_bytes((bucket / "models" / "copy.onnx").read_bytes())
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(2200):  # twice as many characters: more than a path may have
            os.mkdir("d")
            os.chdir("d")
        for pattern in ("", "**", "**/*.onnx"):
            first, *others = scan(tmp_path / pattern, bucket / "registry" / "first.wm").to_pylist()
            assert (os.path.basename(first["suspect"]), first["decision"]) == ("a.onnx", "owned")
            assert [row["decision"] for row in others] == ["error"]  # nobody can say what is there
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(bucket, monkeypatch):
    """The caller's own ends the scan before it begins; one below it, as any stranger can make, is an error."""
    listed, opened = os.scandir, os.open

    def refuse(function):
        def refusing(path, *more, **options):
            if os.fspath(path).endswith("deep"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return function(path, *more, **options)

        return refusing

    monkeypatch.setattr(os, "scandir", refuse(listed))
    monkeypatch.setattr(os, "open", refuse(opened))
    with pytest.raises(SuspectError, match=r"deep cannot be listed \(Permission denied\)"):
        scan(bucket / "models" / "deep", bucket / "registry")
    rows = by_pair(scan(bucket / "models", bucket / "registry"))
    assert "cannot be read (Permission denied)" in rows["deep", "detector"]["error"]
    assert rows["copy.onnx", "detector"]["decision"] == "owned"


STRANGE = [
    "clean.onnx::stolen.onnx", "memory:::bucket.onnx", "a?b=c.onnx", "a#b.onnx", "%2e%2e.onnx", "*.onnx", "[a]*.onnx",
    "s3://else/where.onnx", "http://127.0.0.1:9/x.onnx", "file:///etc/passwd.onnx", "a b.onnx",
]  # fmt: skip


@pytest.fixture
def store():
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/", recursive=True)


@pytest.mark.parametrize("resumed", [False, True])
def test_an_object_is_read_under_exactly_its_own_name(bucket, store, tmp_path, resumed):
    """As a URL, most of these would name something else: `clean.onnx::stolen.onnx` is `clean.onnx`, inside a store."""
    contents, model = {}, onnx.load(bucket / "models" / "stranger1.onnx")
    for number, name in enumerate(["clean.onnx", "a.onnx", *STRANGE]):
        model.doc_string = str(number)
        contents[f"memory:///bucket/{name}"] = model.SerializeToString()
        store.pipe(f"/bucket/{name}", contents[f"memory:///bucket/{name}"])
    given = {"paths": "memory://bucket", "watermarks": bucket / "registry" / "first.wm", "out": tmp_path / "r.parquet"}

    def stop(done, total, rows):
        raise KeyboardInterrupt

    if resumed:
        with pytest.raises(KeyboardInterrupt):
            scan(**given, jobs=1, progress=stop)
    rows = scan(**given).to_pylist()
    assert {row["suspect"]: row["sha256"] for row in rows} == {
        name: hashlib.sha256(content).hexdigest() for name, content in contents.items()
    }


def test_a_name_that_a_stores_client_takes_for_a_version_of_another_is_refused(bucket, store):
    store.pipe("/bucket/clean.onnx?versionId=1.onnx", (bucket / "models" / "copy.onnx").read_bytes())
    (row,) = scan("memory://bucket", bucket / "registry" / "first.wm").to_pylist()
    assert "holds ?versionId= in its name" in row["error"]


def test_a_store_too_may_be_nested_deeply_and_hold_empty_objects(bucket, store):
    store.pipe("/bucket/" + "d/" * 1200 + "a.onnx", (bucket / "models" / "copy.onnx").read_bytes())
    store.pipe("/bucket/empty.onnx", b"")
    (row,) = scan("memory://bucket", bucket / "registry" / "first.wm").to_pylist()
    assert (row["decision"], row["log10_p_corrected"]) == ("owned", row["log10_p"])


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
        time.sleep(1.7)
        return read(source, maximum_bytes)

    monkeypatch.setattr(listing.LocalSource, "read", slow)
    (row,) = scan(bucket / "models/copy.onnx", bucket / "registry/first.wm", limits=Limits(seconds=1.5)).to_pylist()
    assert row["decision"] == "owned"
