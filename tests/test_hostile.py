"""Hostile files from outside: whatever a file does, its own rows say so, and nobody else's verdict knows of it.

WMENGINE_FUZZ=20000 makes the run of mutants that long; its seed is WMENGINE_FUZZ_SEED.
"""

import hashlib
import math
import os
import re
from collections import Counter
from dataclasses import replace

import hostile_files
import hostile_graphs
import hostile_runs
import numpy as np
import onnx
import pytest
from hostile_models import SECRET, classifier, constant, model, node, value
from judged import white_box
from lying_service import LIES
from mutations import mutants, seeds
from processes import children, template_of
from scan_models import CLASSES, SHAPE, copy_of, mark, stranger

from wmengine import ops
from wmengine.errors import SuspectError
from wmengine.judging.asking import Terms
from wmengine.judging.judge import judge_suspect
from wmengine.judging.verification import verify
from wmengine.sandbox import Limits, Supervisor
from wmengine.scanning import pool
from wmengine.scanning.scanner import scan
from wmengine.suspects import onnx_file
from wmengine.suspects.answers import ABSTAINED, choose_readings, highest
from wmengine.suspects.model_file import LocalSource, read_model
from wmengine.suspects.onnx_file import OnnxSuspect, open_engine

CORPUS = hostile_files.CORPUS | hostile_graphs.CORPUS | hostile_runs.CORPUS
LIMITS = Limits(seconds=3.0, memory_bytes=512 << 20, answer_bytes=32 << 20)
AMPLE = replace(LIMITS, seconds=100.0)  # for what must end by itself, on a busy machine too
CARRIER = (400, 16)
MARK = mark()
BITS = white_box([CARRIER], name="weights", shape=SHAPE, bits=64)
OWNED, FREE, STAMPED = "owned, not_proven", "not_proven, not_proven", "not_proven, owned"


def stamped(path):
    """A network whose weights hold the bits."""
    signs = (2.0 * BITS.arrays["bits"] - 1.0).astype(np.float32)
    direction = ops.sketch_adjoint(signs, int(BITS.arrays["carrier_keys"][0]), math.prod(CARRIER))
    noise = np.random.default_rng(0).normal(size=CARRIER).astype(np.float32)
    weight = noise + 3 * (direction / direction.std()).reshape(CARRIER)
    last = np.random.default_rng(1).normal(size=(CARRIER[0], CLASSES)).astype(np.float32)
    nodes = [
        node("Flatten", "x", "f"),
        node("Gemm", "f w", "h", transB=1),
        node("Relu", "h", "r"),
        node("MatMul", "r o", "y"),
    ]
    onnx.save(model(nodes, [constant("w", weight), constant("o", last)]), path)


def renamed(path, number):
    """Other bytes, the same network: a file is judged only once."""
    path.write_bytes(path.read_bytes() + onnx.ModelProto(producer_name=f"honest {number}").SerializeToString())


def honest(path, number):
    """One of three honest files → what is to be said of it."""
    make, verdict = [
        (lambda path: copy_of(MARK, path), OWNED),
        (lambda path: stranger(path, 3), FREE),
        (stamped, STAMPED),
    ][number % 3]
    make(path)
    renamed(path, number)
    return verdict


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry")
    MARK.save(folder / "1.wm")
    BITS.save(folder / "2.wm")
    return folder


def by_suspect(table):
    rows = {}
    for row in table.to_pylist():
        rows.setdefault(row["suspect"], {})[row["scheme"]] = row
    return rows


def verdicts(rows):
    return f"{rows['adi']['decision']}, {rows['sketch']['decision']}"


def check_text(row):
    for text in filter(None, [row["error"], *row["notes"]]):
        assert text.isprintable(), row
        assert len(text) <= 1000, row


def refusal(row):
    """Why a mark could not be looked for, or ""."""
    return row["error"] or "".join(row["notes"] if row["decision"] == "other_task" else ())


def everything_below(folder):
    return {path: path.lstat().st_size for path in sorted(folder.rglob("*"))}


def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(name))


def descriptors():
    return {
        name: os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{name}")
    }


ENDLESS = {name for name, each in CORPUS.items() if each.error is not None and "took longer" in each.error}

# A scan of a folder leaves these out; a caller that names them is told what they are.
HOLD_NOTHING = ("empty_file", "pipe", "unix_socket", "device", "link_to_itself", "link_to_nothing")


def folder_of(home, name):
    return home / ("endless" if name in ENDLESS else "ending") / name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, registry):
    """Every hostile file and honest ones between them, in two scans; what was there before and after them.

    Only for those that never end is the time short: what the others cost depends on what else the machine does.
    """
    home = tmp_path_factory.mktemp("corpus")
    working = home / "working"
    working.mkdir()
    expected = {}
    for number, (name, each) in enumerate(CORPUS.items()):
        folder = folder_of(home, name)
        folder.mkdir(parents=True)
        each.write(folder, folder / f"{name}.onnx")
        if number % 8 == 0 or name in ENDLESS:
            path = folder / "honest.onnx"
            expected[str(path)] = honest(path, len(expected))
    scan(home / "ending" / "truncated", registry, limits=LIMITS)  # what the first scan of a process opens for good
    before = everything_below(home)
    open_before, memory_before = descriptors(), memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # begins the peak anew
    here = os.getcwd()
    os.chdir(working)
    try:
        named = [folder_of(home, name) / f"{name}.onnx" for name in HOLD_NOTHING]
        rows = by_suspect(scan([home / "ending", *named], registry, jobs=2, limits=AMPLE))
        rows |= by_suspect(scan(home / "endless", registry, jobs=2, limits=LIMITS))
    finally:
        os.chdir(here)
    return {
        "rows": rows, "honest": expected, "home": home,
        "files": (before, everything_below(home)), "descriptors": (open_before, descriptors()),
        "memory": memory("VmHWM") - memory_before,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_file_costs_its_own_rows_and_says_why(corpus, name):
    rows = corpus["rows"][str(folder_of(corpus["home"], name) / f"{name}.onnx")]
    each = CORPUS[name]
    for row in rows.values():
        check_text(row)
        assert row["decision"] != "owned"
    if each.error is None:
        assert rows["adi"]["decision"] == "not_proven"
        assert rows["adi"]["error"] is None
        assert any(re.search(each.note, note) for note in [*rows["adi"]["notes"], ""]), rows["adi"]["notes"]
    else:
        assert rows["adi"]["decision"] in ("error", "other_task")
        assert re.search(each.error, refusal(rows["adi"])), refusal(rows["adi"])
    if each.weights is not None:
        said = rows["sketch"]["error"] or "; ".join(rows["sketch"]["notes"])
        assert re.search(each.weights, said), said


@pytest.mark.slow
def test_honest_files_between_them_keep_their_verdicts(corpus):
    assert len(corpus["honest"]) >= 12
    for path, verdict in corpus["honest"].items():
        assert verdicts(corpus["rows"][path]) == verdict
    assert len(corpus["rows"]) == len(CORPUS) + len(corpus["honest"])


@pytest.mark.slow
def test_nothing_outside_was_read_or_written(corpus):
    before, after = corpus["files"]
    assert before == after
    said = repr(corpus["rows"]).encode()
    assert SECRET not in said
    assert SECRET.hex().encode() not in said


@pytest.mark.slow
def test_the_scan_leaves_no_process_descriptor_or_memory_behind(corpus):
    before, after = corpus["descriptors"]
    assert len(after) <= len(before), set(after.values()) - set(before.values())
    assert "Z" not in children(os.getpid()).values()
    worker = onnx_file.shared_supervisor().worker(LIMITS)  # the template looks for ended ones when it is asked
    template = template_of(worker)
    worker.close()
    assert children(template) == {}
    assert corpus["memory"] < 300 << 20


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("answers_that_depend_on_their_batch", "answers change when the batch does"),
        ("random_answers", "answers change when the batch does, or from one time to the next"),
        ("not_a_number", "60 of 60 answers hold NaN or Inf or name no class, and count as misses"),
        ("labels_below_zero", "60 of 60 answers"),
    ],
)
def test_answers_that_are_no_votes_are_said_in_the_verdict(tmp_path, name, note):
    CORPUS[name].write(tmp_path, tmp_path / "m.onnx")
    verdict = verify(tmp_path / "m.onnx", MARK, isolation="per-model", limits=LIMITS)
    assert verdict.decision == "not_proven"
    assert any(note in said for said in verdict.notes), verdict.notes


@pytest.mark.parametrize(
    "name", ["attention_without_a_bias", "loop_without_end", "doubling_concatenations", "hard_link"]
)
def test_verify_gives_a_cause_and_the_next_call_a_verdict(tmp_path, name):
    folder = tmp_path / "models" / name
    folder.mkdir(parents=True)
    CORPUS[name].write(folder, folder / "m.onnx")
    limits = replace(LIMITS, seconds=1.5) if name in ENDLESS else AMPLE
    verdict = verify(folder / "m.onnx", MARK, isolation="per-model", limits=limits)
    assert verdict.decision == "error"
    assert re.search(CORPUS[name].error, verdict.error)
    copy_of(MARK, folder / "copy.onnx")
    assert verify(folder / "copy.onnx", MARK, isolation="per-model", limits=LIMITS).owned


@pytest.mark.slow
def test_what_a_model_leaves_in_its_worker_is_not_charged_to_the_next(tmp_path, registry):
    """Files of which each takes most of the memory, good and bad in turn, through one worker."""
    for number in range(6):
        size = 30 << 20
        weight = np.zeros((size // 4 // 400, 400), np.float32)
        weight[number] = 1
        fit = node("Slice", "f none none", "e") if number % 2 else node("Identity", "f", "e")
        nodes = [node("Flatten", "x", "f"), fit, node("MatMul", "e w", "y")]
        big = [constant("w", weight), constant("none", np.array([0]))]
        onnx.save(model(nodes, big), tmp_path / f"{number}a.onnx")
        copy_of(MARK, tmp_path / f"{number}b.onnx")
        renamed(tmp_path / f"{number}b.onnx", number)
    rows = by_suspect(scan(tmp_path, registry, jobs=1, limits=Limits(20.0, 300 << 20)))
    for number in range(6):
        assert verdicts(rows[str(tmp_path / f"{number}b.onnx")]) == OWNED


@pytest.mark.parametrize("megabytes", [24, 32, 40, 80])
def test_a_model_larger_than_its_workers_memory_is_told_so(tmp_path, megabytes):
    weight = constant("w", np.ones((megabytes << 18, 1), np.float32))
    onnx.save(model([node("Flatten", "x", "f"), node("MatMul", "f w", "y")], [weight]), tmp_path / "m.onnx")
    verdict = verify(tmp_path / "m.onnx", MARK, limits=Limits(20.0, 64 << 20))
    assert "needs more memory than it may have" in verdict.error


def test_a_batch_is_as_large_as_memory_has_room_for(tmp_path):
    inputs = [value("x", shape=[4000, 3, 224, 224])]
    onnx.save(model([node("Flatten", "x", "y")], inputs=inputs), tmp_path / "m.onnx")
    suspect = OnnxSuspect(tmp_path / "m.onnx")
    with pytest.raises(SuspectError, match="a fixed batch of 4000, and at most 445 can be asked at once"):
        suspect.answer({"x": np.zeros((1, 3, 224, 224), np.float32)})


def test_outputs_are_chosen_without_a_look_at_their_values():
    """Each of these would be terabytes of float64."""
    big = [np.broadcast_to(np.int8(0), (32, 1 << 36)), np.broadcast_to(np.int64(0), (32, 1 << 36, 2))]
    outputs = [(str(index), array) for index, array in enumerate([*big, np.zeros((32, CLASSES), np.float32)])]
    assert choose_readings(outputs, 32, CLASSES, "m.onnx")[0].output == 2
    with pytest.raises(SuspectError, match=f"answers with {1 << 36} classes"):
        choose_readings(outputs[:2], 32, CLASSES, "m.onnx")


def test_an_output_that_loses_its_width_abstains(tmp_path):
    """The first batch has scores of all classes in both outputs, the second in one of them."""
    cut = [
        node("Shape", "x", "shape"), node("Gather", "shape zero", "n", axis=0), node("Sub", "n few", "more"),
        node("Mul", "more ten", "ends"), node("Slice", "s zero ends one", "z"), node("Identity", "s", "y"),
    ]  # fmt: skip
    numbers = {"zero": 0, "one": 1, "few": 28, "ten": 10}
    constants = [constant(name, np.array([number])) for name, number in numbers.items()]
    onnx.save(classifier(*cut, initializers=constants, outputs=[value("z"), value("y")]), tmp_path / "m.onnx")
    MARK.save(tmp_path / "m.wm")
    (row,) = scan(tmp_path / "m.onnx", tmp_path / "m.wm", test="fixed").to_pylist()
    assert (row["decision"], row["error"]) == ("not_proven", None)
    assert highest(np.zeros((3, 0))).tolist() == [ABSTAINED] * 3


@pytest.mark.parametrize("error", [IndexError("index 7"), RecursionError("too deep"), MemoryError(), KeyError("x")])
def test_whatever_goes_wrong_with_a_suspect_is_its_own_row(tmp_path, monkeypatch, error):
    copy_of(MARK, tmp_path / "a.onnx")
    stranger(tmp_path / "b.onnx", 1)
    judge, copy = pool.judge_suspect, hashlib.sha256((tmp_path / "a.onnx").read_bytes()).hexdigest()

    def fail(suspect, *arguments):
        if suspect.sha256 != copy:
            raise error
        return judge(suspect, *arguments)

    monkeypatch.setattr(pool, "judge_suspect", fail)
    MARK.save(tmp_path / "m.wm")
    owned, failed = scan(tmp_path, tmp_path / "m.wm", jobs=1).to_pylist()
    assert (owned["decision"], failed["decision"]) == ("owned", "error")
    assert failed["error"].startswith(f"{tmp_path}/b.onnx ")


def test_a_file_that_is_longer_than_it_says_is_refused():
    with pytest.raises(SuspectError, match="changes while it is read"):
        OnnxSuspect("/proc/self/status")


def telling(lie, number=0):
    """A model that `lying_service` knows by its text; it may name other files."""
    return classifier(doc_string=f"<lie: {lie}> location {number}")


@pytest.fixture(scope="module")
def lies(tmp_path_factory, registry):
    """Every lie, and an honest file behind it, through one worker."""
    folder = tmp_path_factory.mktemp("lies")
    expected = {}
    for number, lie in enumerate(LIES):
        (folder / f"{number:03}").mkdir()
        onnx.save(telling(lie, number), folder / f"{number:03}" / "liar.onnx")
        path = folder / f"{number:03}" / "~honest.onnx"
        expected[lie] = str(path), honest(path, number)
    patch = pytest.MonkeyPatch()
    with Supervisor("lying_service") as supervisor:
        patch.setattr(onnx_file, "shared_supervisor", lambda: supervisor)
        try:
            limits = Limits(seconds=2.0, memory_bytes=512 << 20, answer_bytes=16 << 20)
            rows = by_suspect(scan(folder, registry, jobs=1, limits=limits))
            worker = supervisor.worker(LIMITS)
            template = template_of(worker)
            worker.close()
            left = children(template)
        finally:
            patch.undo()
    return folder, rows, expected, left


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_a_worker_that_lies_is_no_more_than_an_error_and_the_next_file_is_judged(lies, lie):
    folder, rows, expected, left = lies
    number = list(LIES).index(lie)
    liar = rows[str(folder / f"{number:03}" / "liar.onnx")]
    path, verdict = expected[lie]
    assert verdicts(rows[path]) == verdict, rows[path]
    for row in liar.values():
        check_text(row)
        assert row["decision"] != "owned"
    said = [refusal(row) for row in liar.values() if refusal(row)]
    if LIES[lie][2] is None:
        assert not said
    elif LIES[lie][2]:
        assert any(re.search(LIES[lie][2], error.removeprefix(str(folder))) for error in said), said
    assert left == {}


def test_a_model_that_does_not_let_go_of_its_worker_is_not_put_down_to_the_next(tmp_path, monkeypatch):
    onnx.save(telling("never let go"), tmp_path / "liar.onnx")
    with Supervisor("lying_service") as supervisor:
        monkeypatch.setattr(onnx_file, "shared_supervisor", lambda: supervisor)
        engine = open_engine("persistent", Limits(seconds=2.0, memory_bytes=512 << 20))
        images = {"x": np.zeros((2, 1, 4, 4), np.float32)}
        liar = read_model(LocalSource(tmp_path / "liar.onnx"), engine.locations)
        OnnxSuspect(liar, engine=engine).answer(images)
        assert engine.begin()
        honest(tmp_path / "honest.onnx", 0)
        next_one = read_model(LocalSource(tmp_path / "honest.onnx"), engine.locations)
        assert OnnxSuspect(next_one, engine=engine).answer(images).values.shape == (2, 10)  # of a fresh worker
        engine.close()


class Bytes:
    """A source in memory; beside it lie 64 bytes of weights."""

    name = "mutant.onnx"

    def __init__(self, data):
        self.data = data

    def read(self, maximum_bytes):
        return self.data

    def read_beside(self, location, maximum_bytes):
        if location != "w.bin":
            raise SuspectError(f"{location} is missing")
        return bytes(64)


@pytest.mark.slow
def test_mutants_are_judged_or_refused_in_one_sentence():
    """Through the same engine, adapters and scores as a scan's files; only ONNX Runtime, in its worker, may crash."""
    count = int(os.environ.get("WMENGINE_FUZZ", "700"))
    seed = int(os.environ.get("WMENGINE_FUZZ_SEED", "1"))
    outcomes, causes = Counter(), Counter()
    engine, limits = None, Limits(seconds=5.0, memory_bytes=512 << 20, answer_bytes=16 << 20)
    for data in mutants(seeds(), seed, count):
        if engine is None or not engine.begin():
            if engine is not None:
                engine.close()
            engine = open_engine("persistent", limits)
        try:
            suspect = OnnxSuspect(read_model(Bytes(data), engine.locations), engine=engine)
            found = judge_suspect(suspect, [MARK, BITS], Terms(sequential=True, log10_bar=10.0))
        except SuspectError as error:
            outcomes["refused"] += 1
            said = [str(error)]
        else:
            outcomes["judged" if found[0].error is None else "failed"] += 1
            assert max(each.log10_p for each in found) <= 0.0
            assert min(each.log10_p for each in found) > -9
            said = [str(text) for each in found for text in (each.error, *each.facts) if text is not None]
        for text in said:
            assert text.isprintable()
            assert len(text) <= 1000
            causes.update(
                re.findall(r"was killed by \w+ while asked to [a-z ]+|took longer|no answer|without a question", text)
            )
    engine.close()
    print(dict(outcomes), dict(causes))
    assert min(outcomes[kind] for kind in ("refused", "judged", "failed")) > count / 20
    assert not {cause for cause in causes if "no answer" in cause or "without a question" in cause}
