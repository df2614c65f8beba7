"""What the command line promises: exit statuses, one JSON object, one line for an error, and no passphrase in sight."""

import dataclasses
import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from judged import KEY, black_box, images
from onnx import TensorProto, helper, numpy_helper

import wmengine
from wmengine import SCHEMES, info
from wmengine.cli import main

CLASSES = 10
SHAPE = (1, 8, 8)


def write_classifier(path: Path, inputs: np.ndarray, labels: np.ndarray) -> Path:
    """An ONNX model that answers each of `inputs` [N, ...] with its label: nearest input, then a table."""
    flat = inputs.reshape(len(inputs), -1).astype(np.float32)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    weights = {"nearest": 300.0 * unit.T, "table": 10.0 * np.eye(CLASSES, dtype=np.float32)[labels]}
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("MatMul", ["flat", "nearest"], ["similarity"]),
            helper.make_node("Softmax", ["similarity"], ["which"]),
            helper.make_node("MatMul", ["which", "table"], ["logits"]),
        ],
        "classifier",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *inputs.shape[1:]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def made(message=None):
    return black_box(SHAPE, CLASSES, 100, name="detector-v3", message=message)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an owner's key and mark, a copy that answers every trigger, a stranger, and no model at all."""
    folder = tmp_path_factory.mktemp("house")
    KEY.save(folder / "acme.key")
    mark = made()
    mark.save(folder / "acme.wm")
    made("a customer").save(folder / "customer.wm")
    black_box((3, 8, 8), name="photos").save(folder / "photos.wm")
    write_classifier(folder / "copy.onnx", images(mark), mark.arrays["labels"])
    other = np.random.default_rng(1)
    write_classifier(folder / "stranger.onnx", other.normal(size=(50, *SHAPE)), other.integers(CLASSES, size=50))
    (folder / "broken.onnx").write_bytes(b"no model at all")
    (folder / "folder.parquet").mkdir()
    (folder / "bytes").write_bytes(b"\xff\xfe")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture
def run(house, capfd, monkeypatch):
    """Run a command in the house: (status, what it printed, what it complained of)."""
    monkeypatch.chdir(house)

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.mark.parametrize(
    ("suspect", "decision", "status"),
    [("copy.onnx", "owned", 0), ("stranger.onnx", "not_proven", 1), ("broken.onnx", "error", 2)],
)
def test_the_exit_status_of_verify_is_its_decision(run, suspect, decision, status):
    done, out, err = run("verify", suspect, "--watermark", "acme.wm", "--json")
    verdict = json.loads(out)
    assert (done, verdict["decision"], err) == (status, decision, "")
    assert list(verdict) == [*(field.name for field in dataclasses.fields(wmengine.Verdict)), "notes"]


@pytest.mark.parametrize(
    ("suspect", "marks", "decisions", "status"),
    [
        ("copy.onnx", ["customer.wm", "acme.wm", "photos.wm"], ["not_proven", "owned", "error"], 0),
        ("stranger.onnx", ["acme.wm", "photos.wm"], ["not_proven", "error"], 1),
        ("broken.onnx", ["acme.wm", "photos.wm"], ["error", "error"], 2),
    ],
)
def test_several_watermarks_give_a_line_each_and_one_status(run, suspect, marks, decisions, status):
    """0 where any says owned, 2 only where none could be looked for."""
    options = [option for mark in marks for option in ("--watermark", mark)]
    done, out, err = run("verify", suspect, *options, "--json")
    verdicts = [json.loads(line) for line in out.splitlines()]
    assert (done, err, [verdict["decision"] for verdict in verdicts]) == (status, "", decisions)
    text = run("verify", suspect, *options)
    assert text[0] == status
    assert text[2].count("\n") == decisions.count("error")


def test_the_sequential_test_asks_less(run):
    verify = ("verify", "copy.onnx", "--watermark", "acme.wm", "--json", "--test")
    sequential, fixed = (json.loads(run(*verify, test)[1]) for test in ("sequential", "fixed"))
    assert sequential["decision"] == fixed["decision"] == "owned"
    assert sequential["queries"] < fixed["queries"] == 100
    assert "test must be one of fixed, sequential" in run(*verify, "few")[2]


def test_verify_says_in_words_what_the_json_holds(run):
    status, out, err = run("verify", "copy.onnx", "--watermark", "acme.wm", "--key", "acme.key")
    assert (status, err) == (0, "")
    assert out.startswith("copy.onnx: owned\n")
    for part in ("100 of 100 symbols", "-99.40 (owned at -9.00 or less)", "derivation  checked"):
        assert part in out


def test_a_suspect_that_cannot_be_judged_is_one_line_on_stderr(run):
    status, out, err = run("verify", "broken.onnx", "--watermark", "acme.wm")
    assert (status, out) == (2, "")
    assert err.startswith("wmengine: broken.onnx")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("verify", "nowhere.onnx", "--watermark", "acme.wm"), "nowhere.onnx"),
        (("verify", "copy.onnx", "--watermark", "nowhere.wm"), "nowhere.wm"),
        (("verify", "copy.onnx", "--watermark", "copy.onnx"), "copy.onnx"),
        (("verify", "copy.onnx", "--watermark", "acme.wm", "--key", "nowhere.key"), "nowhere.key"),
        (("verify", "copy.onnx", "--watermark", "acme.wm", "--alpha", "2"), "alpha must be between 0 and 1"),
        (("verify", "copy.onnx", "--watermark", "acme.wm", "--adversarial"), "--adversarial needs --key"),
        (("verify", "copy.onnx"), "Missing option '--watermark': see wmengine verify --help"),
        (("verify", "copy.onnx", "--watermark", "acme.wm", "--queries", "all"), "No such option: --queries"),
        (("verify", "copy.onnx", "--watermark", "acme.wm", "--device", "tpu"), "device must be"),
        (("verify", "copy.onnx", "--passphrase", "x"), "--passphrase"),
        (
            ("verify", "s3://user:w@bucket/copy.onnx", "--watermark", "acme.wm"),
            "s3://***@bucket/copy.onnx is no endpoint",
        ),
        (
            ("verify", "copy.onnx", "--watermark", "acme.wm", "--memory", "1e300"),
            "--memory must be above 0 and at most",
        ),
        (
            ("verify", "copy.onnx", "--watermark", "acme.wm", "--seconds", "1e300"),
            "--seconds must be above 0 and at most",
        ),
        (("verify", "copy.onnx", "--watermark", "acme.wm", "--seconds", "nan"), "--seconds must be above 0"),
        (("scan", "copy.onnx", "--watermarks", "acme.wm", "--out", "folder.parquet"), "folder.parquet is a folder"),
        (("keygen", "ACME", "--out", "other.key", "--passphrase-file", "bytes"), "bytes is no text"),
        (("keygen", "ACME", "--out", ""), "'.' is no name of a file"),
        (("verify", "copy.onnx", "--watermark", "acme.wm", "--labels", "bytes"), "bytes is no text in UTF-8"),
        (("verify", "copy.onnx", "--watermark", "acme.wm", "--labels", "pipe"), "pipe is not a file"),
        (("verify", "http://h/x", "--watermark", "acme.wm", "--endpoint-options", "pipe"), "pipe is not a file"),
        (
            ("verify", "copy.onnx", "--watermark", "acme.wm", "--classes", "any", "--clean", "pipe"),
            "pipe is not a file",
        ),
        (("attack", "noise", "copy.onnx", "--out", "other.onnx", "--data", "pipe"), "pipe is not a file"),
        (
            ("emmark", "pipe", "--key", "acme.key", "--name", "n", "--out", "o.onnx", "--watermark-out", "o.wm"),
            "pipe is not a file",
        ),
        (("scam",), "No such command 'scam'"),
        (("keygen", "ACME", "--out", "acme.key"), "acme.key exists already"),
        (("keygen", " ", "--out", "other.key"), "owner must be text without blanks at its ends"),
        (("keygen", "ACME", "--out", "other.key", "--passphrase-file", "nowhere"), "nowhere: No such file"),
    ],
)
def test_a_mistake_is_one_plain_line_that_names_the_thing_and_exits_2(run, arguments, named):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("wmengine: ")
    assert named in err
    assert err.count("\n") == 1
    status, out, err = run(*arguments, "--json")
    assert (status, list(json.loads(out))) == (2, ["error"])
    assert named in json.loads(out)["error"]
    assert named in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("verifi",), "No such command 'verifi' (did you mean verify?): see wmengine --help"),
        (("version",), "No such command 'version' (did you mean --version?): see wmengine --help"),
        (("help",), "No such command 'help' (did you mean --help?): see wmengine --help"),
        (("embed",), "No such command 'embed': see wmengine --help"),
        (
            ("scan", "--watermark", "x"),
            "No such option: --watermark (did you mean --watermarks?): see wmengine scan --",
        ),
        (("verify", "--optin", "x"), "No such option: --optin: see wmengine verify --help"),
        (
            ("verify", "--watermark", "a.wm", "b.wm", "copy.onnx"),
            "Got unexpected extra argument(s) (copy.onnx), and an option is named before each of its values: see",
        ),
    ],
)
def test_a_mistyped_command_is_told_what_is_near_and_nothing_else(run, arguments, said):
    status, _, err = run(*arguments)
    assert status == 2
    assert err.startswith(f"wmengine: {said}")


def test_a_line_is_not_wrapped_however_long_it_is(run):
    status, _, err = run("verify", "copy.onnx", "--watermark", "x" * 180)
    assert status == 2
    assert err.count("\n") == 1
    assert "x" * 180 in err


def test_a_name_moves_no_cursor_and_fits_every_terminal(house):
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for name in (b"e\x1b[2Jvil\n.onnx", b"\xff.onnx"):
        path = bytes(house) + b"/" + name
        Path(os.fsdecode(path)).write_bytes((house / "copy.onnx").read_bytes())
        done = command("verify", path, "--watermark", str(house / "acme.wm"), env=narrow)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[0].endswith(".onnx: owned")
        assert all(line.isprintable() for line in done.stdout.splitlines())
    assert command("schemes", env=narrow).returncode == 0


def test_a_traceback_is_shown_only_with_debug_which_may_stand_anywhere(run):
    wrong = ("verify", "copy.onnx", "--watermark", "nowhere.wm")
    assert "Traceback" not in run(*wrong)[2]
    assert "Traceback" in run("--debug", *wrong)[2]
    assert "Traceback" in run(*wrong, "--debug")[2]


def test_a_secret_that_others_can_read_is_refused_with_the_mend(run, house):
    for name in ("acme.key", "acme.wm"):
        (house / f"open-{name}").write_bytes((house / name).read_bytes())
        (house / f"open-{name}").chmod(0o644)
    for command in (
        ("verify", "copy.onnx", "--watermark", "acme.wm", "--key", "open-acme.key"),
        ("verify", "copy.onnx", "--watermark", "open-acme.wm"),
        ("scan", "copy.onnx", "--watermarks", "open-acme.wm", "--out", "open.parquet"),
    ):
        status, _, err = run(*command)
        assert status == 2
        assert f"chmod 600 open-acme.{'key' if 'open-acme.key' in command else 'wm'}" in err


def test_keygen_writes_a_key_that_loads_and_prints_a_commitment_that_dates_nothing(run, house):
    status, out, _ = run("keygen", "Bolt & Sons", "--out", "bolt.key", "--json")
    key = wmengine.Key.load(house / "bolt.key")
    assert status == 0
    assert json.loads(out) == {
        "owner": "Bolt & Sons",
        "commitment": key.commitment,
        "path": "bolt.key",
        "sealed": False,
    }
    assert (house / "bolt.key").stat().st_mode & 0o777 == 0o600
    out = run("keygen", "Bolt & Sons", "--out", "another.key")[1]
    assert f"commitment: {wmengine.Key.load(house / 'another.key').commitment}\n" in out
    assert "dates no mark" in out


def test_a_sealed_key_opens_with_its_passphrase_file_and_with_no_other(run, house):
    (house / "right").write_text("correct horse\n")
    (house / "wrong").write_text("battery staple\n")
    (house / "empty").write_text("\n")
    assert run("keygen", "ACME Vision", "--out", "sealed.key", "--passphrase-file", "right")[0] == 0
    assert b"ACME" not in (house / "sealed.key").read_bytes()
    verify = ("verify", "copy.onnx", "--watermark", "acme.wm", "--key", "sealed.key")
    # It opens, and is then found to be another key than the mark's; the others do not get that far.
    assert "was not made with this key" in run(*verify, "--passphrase-file", "right")[2]
    assert "does not open with this passphrase" in run(*verify, "--passphrase-file", "wrong")[2]
    assert "empty holds no passphrase" in run(*verify, "--passphrase-file", "empty")[2]
    assert "sealed.key is sealed" in run(*verify)[2]  # nobody to ask: stdin is no terminal


def test_one_passphrase_file_opens_everything(run, house, tmp_path):
    (tmp_path / "secret").write_text("open sesame\n")
    KEY.save(tmp_path / "sealed.key", "open sesame")
    for number, message in enumerate((None, "a customer")):
        made(message).save(tmp_path / f"{number}.wm", "open sesame")
    options = ["--key", str(tmp_path / "sealed.key"), "--passphrase-file", str(tmp_path / "secret"), "--json"]
    marks = ["--watermark", str(tmp_path / "0.wm"), "--watermark", str(tmp_path / "1.wm")]
    status, out, _ = run("verify", "copy.onnx", *marks, *options)
    assert (status, [json.loads(line)["derivation"] for line in out.splitlines()]) == (0, ["checked", "checked"])
    status, out, _ = run(
        "scan", "copy.onnx", "--watermarks", str(tmp_path), "--out", str(tmp_path / "r.parquet"), *options
    )
    assert (status, json.loads(out.splitlines()[-1])["owned"]) == (0, 1)


def test_a_passphrase_from_a_pipe_opens_everything(run, tmp_path):
    """As `--passphrase-file <(…)` gives it: it can be read once."""
    KEY.save(tmp_path / "sealed.key", "open sesame")
    made().save(tmp_path / "sealed.wm", "open sesame")
    reading, writing = os.pipe()
    with open(writing, "w") as pipe:
        pipe.write("open sesame\nand more\n")
    given = ["--key", str(tmp_path / "sealed.key"), "--passphrase-file", f"/dev/fd/{reading}"]
    status, out, err = run("verify", "copy.onnx", "--watermark", str(tmp_path / "sealed.wm"), *given, "--json")
    os.close(reading)
    assert (status, err, json.loads(out)["derivation"]) == (0, "", "checked")


def test_a_passphrase_without_end_is_none(run, tmp_path):
    status, _, err = run("keygen", "ACME", "--out", str(tmp_path / "a.key"), "--passphrase-file", "/dev/zero")
    assert (status, "longer than 4096 bytes" in err) == (2, True)


def test_marks_that_a_shell_put_among_the_suspects_are_no_suspects(run, tmp_path):
    """`--watermarks DIR/*.wm` is one option and many paths; a stranger's file of that name is elsewhere."""
    out = ["--out", str(tmp_path / "r.parquet")]
    status, _, err = run("scan", "copy.onnx", "--watermarks", "acme.wm", "customer.wm", *out)
    assert status == 2
    assert "customer.wm stands among the suspects: give --watermarks once, with the folder of the marks" in err
    (tmp_path / "strange.wm").write_text("a stranger's")
    scan = ["scan", "copy.onnx", str(tmp_path / "strange.wm"), "--watermarks", "acme.wm", *out, "--json"]
    status, text, _ = run(*scan)
    assert (status, json.loads(text.splitlines()[-1])["error"]) == (0, 1)


def test_on_a_terminal_the_passphrase_is_asked_for_and_not_echoed(house):
    """keygen --seal asks twice, verify once, and scan once for all watermarks of a folder."""

    def converse(arguments: list[str], answers: list[str]) -> tuple[int, str]:
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(house)
            os.execv(sys.executable, [sys.executable, "-m", "wmengine", *arguments])
        shown, read_until = b"", 0
        while select.select([terminal], [], [], 60)[0]:
            try:
                shown += os.read(terminal, 1024)
            except OSError:  # Linux's way of saying that the other side has gone
                break
            if answers and shown[read_until:].endswith(b": "):
                read_until = len(shown)
                os.write(terminal, answers.pop(0).encode() + b"\n")
        os.close(terminal)  # hangs up on a command that waits for more
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()

    status, shown = converse(["keygen", "ACME", "--out", "asked.key", "--seal"], ["open sesame", "open sesame"])
    assert status == 0, shown
    assert "open sesame" not in shown
    assert wmengine.Key.load(house / "asked.key", passphrase="open sesame").owner == "ACME"
    verify = ["verify", "copy.onnx", "--watermark", "acme.wm", "--key", "asked.key"]
    status, shown = converse(verify, ["open sesame"])
    assert status == 2
    assert "Passphrase of asked.key:" in shown
    assert "is sealed" not in shown
    (house / "sealed").mkdir()
    for number, message in enumerate((None, "a customer")):
        made(message).save(house / "sealed" / f"{number}.wm", "open sesame")
    scan = ["scan", "copy.onnx", "--watermarks", "sealed", "--out", "sealed.parquet"]
    status, shown = converse(scan, ["open sesame"])
    assert status == 0, shown
    assert "Passphrase of sealed/0.wm and 1 more:" in shown
    assert "copy.onnx: owned" in shown
    verify = ["verify", "copy.onnx", "--watermark", "sealed/1.wm", "--watermark", "sealed/0.wm"]
    status, shown = converse(verify, ["open sesame"])
    assert (status, shown.count("Passphrase of")) == (0, 1)


def test_sealing_needs_somebody_to_ask(run):
    status, _, err = run("keygen", "ACME", "--out", "never.key", "--seal")
    assert status == 2
    assert "give --passphrase-file" in err
    assert not Path("never.key").exists()


def test_schemes_lists_every_preset_with_its_null(run):
    status, out, _ = run("schemes", "--json")
    assert status == 0
    assert {name: preset["null"] for name, preset in json.loads(out).items()} == {
        name: preset.null for name, preset in SCHEMES.items()
    }
    needs = {name: preset["needs"] for name, preset in json.loads(out).items()}
    assert needs["sketch"] == []
    assert needs["ewe_keyed"] == ["samples", "labels"]
    assert needs["emmark"] == ["file"]
    text = run("schemes")[1]
    assert all(name in text and preset.paper in text for name, preset in SCHEMES.items())


@pytest.mark.parametrize(("proven", "status"), [(True, 0), (False, 2)])
def test_a_demo_that_proves_too_little_or_too_much_fails(run, monkeypatch, proven, status):
    measured = SimpleNamespace(proven=proven, report=Path("elsewhere/report.html"), to_json=lambda: {"rows": []})
    asked = []
    monkeypatch.setattr("wmengine.demo.run_demo", lambda out, quick: asked.append((out, quick)) or measured)
    done, out, err = run("demo", "--quick", "--out", "elsewhere", "--json")
    assert (done, json.loads(out), asked) == (status, {"rows": []}, [(Path("elsewhere"), True)])
    assert ("elsewhere/report.html" in err) is not proven


def test_info_tells_versions_instruction_set_threads_and_providers(run):
    status, out, _ = run("info", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["wmengine"] == wmengine.__version__
    assert found["cpu"]["threads"] == wmengine.get_num_threads()
    assert found["cpu"]["instruction_set"]
    assert "CPUExecutionProvider" in found["onnx_providers"]
    text = run("info")[1]
    assert f"instruction set   {found['cpu']['instruction_set']}" in text


def test_info_names_what_is_wrong_with_an_installation(monkeypatch):
    versions = {"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"}
    monkeypatch.setattr(info, "_version", versions.get)
    monkeypatch.setattr(info, "_nvidia_cards", lambda: ["NVIDIA Test"])
    monkeypatch.setitem(sys.modules, "wmengine._cuda", None)
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    found = info.installation()
    problems = " ".join(found["problems"])
    assert "onnxruntime and onnxruntime-gpu are both installed" in problems
    assert "offers no CUDA provider" in problems
    assert "there is a GPU but wmengine._cuda was not built" in problems
    text = info.describe(found)
    assert text.count("PROBLEM: ") == len(found["problems"]) >= 3


def command(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wmengine", *arguments], capture_output=True, text=True, check=False, **options
    )


def test_help_and_version_are_answers_and_not_errors():
    assert command("--version").stdout == f"wmengine {wmengine.__version__}\n"
    for arguments in ((), ("--help",), ("-h",), ("verify", "--help"), ("scan", "-h")):
        done = command(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage: wmengine" in done.stdout


def test_a_shell_completes_commands_and_options():
    for words, found in (("wmengine ver", "verify"), ("wmengine scan --water", "--watermarks")):
        asked = {"_WMENGINE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = command(env={**os.environ, **asked})
        assert (done.returncode, done.stdout.split(), done.stderr) == (0, [found], "")


def test_a_reader_that_has_gone_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m wmengine schemes --json | true", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_an_answer_that_nobody_reads_is_not_a_verdict(house):
    """0 would say that the suspect is owned."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "wmengine", "verify", "stranger.onnx", "--watermark", "acme.wm"],
        cwd=house,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("shell", "status"),
    [
        ("verify nowhere.onnx --watermark acme.wm 2>/dev/full", 2),
        ("verify nowhere.onnx --watermark acme.wm 2>&-", 2),
        ("verify stranger.onnx --watermark acme.wm >&- 2>&-", 1),
        ("attacks >&-", 0),
    ],
)
def test_the_status_stands_where_nothing_can_be_said(house, shell, status):
    done = subprocess.run(f"{sys.executable} -m wmengine {shell}", shell=True, cwd=house, check=False)
    assert done.returncode == status


def test_the_command_starts_without_anything_heavy():
    code = "import sys; from wmengine.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert not loaded & {"torch", "onnxruntime", "onnx_ir", "scipy", "matplotlib", "cryptography", "numpy"}
