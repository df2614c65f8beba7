"""What the demo promises: both marks prove every copy, neither the independent network, on a page that stands alone."""

import io
import json
import re
from dataclasses import replace

import pytest

import wmengine
from wmengine import demo
from wmengine.report import demo as report

pytestmark = pytest.mark.slow
COPIES = ["marked", "fine-tuned", "pruned", "float16", "int8", "folded", "renamed"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(result, its folder, what was said) of one short run with a key that is already there."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    folder.mkdir()
    wmengine.Key(demo.OWNER, bytes(range(32))).save(folder / "demo.key")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK", replace(demo.QUICK, epochs=10, thief_epochs=2))
        return demo.run_demo(folder, quick=True, progress=said.append), folder, said


def test_both_marks_prove_every_copy_and_accuse_nobody_else(finished):
    result, _, _ = finished
    assert result.proven
    assert [row.file for row in result.rows if row.kind == "copy"] == [f"models/{name}.onnx" for name in COPIES]
    (stranger,) = [row for row in result.rows if row.kind == "stranger"]
    assert stranger.file == "models/independent.onnx"
    assert stranger.white_box.decision == stranger.black_box.decision == "not_proven"


def test_students_of_its_answers_are_good_networks_that_neither_mark_proves(finished):
    result, _, _ = finished
    students = [row for row in result.rows if row.kind == "student"]
    assert [row.file for row in students] == ["models/distilled.onnx", "models/extracted.onnx"]
    for row in students:
        assert row.accuracy > 0.8
        assert row.white_box.decision == row.black_box.decision == "not_proven"


def test_the_weights_lose_no_bit_where_only_the_file_changed(finished):
    result, _, _ = finished
    for row in result.rows:
        if row.kind == "copy" and row.model != "fine-tuned":
            assert row.white_box.matched == row.white_box.total == 256


def test_every_verdict_is_of_the_file_with_its_derivation_checked(finished):
    result, folder, _ = finished
    hashes = set()
    for row in result.rows:
        assert (folder / row.file).is_file()
        for verdict in (row.white_box, row.black_box):
            assert verdict.derivation == "checked"
            assert verdict.suspect.endswith(row.file.rpartition("/")[2])
            hashes.add(verdict.sha256)
    assert len(hashes) == len(result.rows)


def test_the_key_the_marks_and_the_models_verify_without_the_demo(finished):
    _, folder, _ = finished
    for name in ("sketch", "adi"):
        verdict = wmengine.verify(folder / "models/int8.onnx", folder / f"{name}.wm", key=folder / "demo.key")
        assert verdict.owned


def test_the_renamed_file_shares_no_name_with_the_original(finished):
    onnx = pytest.importorskip("onnx")
    _, folder, _ = finished

    def names(file):
        graph = onnx.load(folder / "models" / file).graph
        values = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
        return values | {name for node in graph.node for name in (node.name, *node.input, *node.output)} - {""}

    assert not names("marked.onnx") & names("renamed.onnx")


def test_the_copies_are_what_they_are_called(finished):
    onnx = pytest.importorskip("onnx")
    _, folder, _ = finished

    def graph(name):
        return onnx.load(folder / f"models/{name}.onnx").graph

    def operators(name):
        return {node.op_type for node in graph(name).node}

    assert "BatchNormalization" in operators("marked")
    assert "BatchNormalization" not in operators("folded")
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators("int8")
    halves = [
        tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph("float16").initializer if len(tensor.dims) > 1
    ]
    assert halves
    assert all(halves)
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in graph("pruned").initializer if len(tensor.dims) > 1]
    assert sum(int((weight == 0).sum()) for weight in weights) / sum(
        weight.size for weight in weights
    ) == pytest.approx(0.5, abs=0.001)


def test_other_keys_find_chance_in_the_marked_network(finished):
    result, _, _ = finished
    assert len(result.others) == demo.QUICK.other_keys
    assert max(bits for bits, _ in result.others) < 177  # owned by their number from 177 of 256 bits
    assert max(hits for _, hits in result.others) < 34  # and from 34 of 100 triggers


def test_the_accuracy_cost_has_an_interval_around_it(finished):
    result, _, _ = finished
    difference, low, high = result.accuracy_cost
    assert -1 <= low <= difference <= high <= 1
    marked, independent = result.rows[:2]
    assert difference == pytest.approx(independent.accuracy - marked.accuracy)
    assert result.test_images == 600


def test_the_table_is_also_json(finished):
    result, folder, _ = finished
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in table["rows"]] == [row.model for row in result.rows]
    assert table["rows"][0]["white_box"]["decision"] == "owned"
    assert table["rows"][0]["black_box"]["total"] == 100
    assert table["accuracy_cost"]["level"] == 0.95


def test_the_page_stands_alone(finished):
    _, folder, _ = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", page)
    assert len(sources) == 3
    assert all(source.startswith("data:image/") for source in sources)
    assert "<script" not in page
    assert "<link" not in page


def test_the_page_shows_every_number_of_the_table_and_says_what_they_mean(finished):
    result, folder, _ = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    for row in result.rows:
        assert row.model in page
        assert f"{row.white_box.matched} / 256" in page
        assert f"{row.black_box.matched} / 100" in page
    assert "this suspect depends on material made with this key" in page
    assert "it does not say theft" in page


def test_nothing_in_a_verdict_becomes_markup(finished):
    result, _, _ = finished
    hostile = replace(result.rows[0].white_box, decision="error", error='"><script>alert(1)</script>', suspect="<b>")
    rows = (replace(result.rows[0], white_box=hostile, model="<img src=x>"), *result.rows[1:])
    marks = [wmengine.Watermark.load(result.report.parent / f"{name}.wm") for name in ("sketch", "adi")]
    digits, labels = (values[:20].numpy() for values in demo.load_digits().owner)
    page = report.page(replace(result, rows=rows), marks, digits, labels)
    assert "<script" not in page
    assert "<img src=x>" not in page
    assert "&lt;script&gt;" in page


def test_the_printed_table_has_a_line_for_every_model(finished):
    result, _, _ = finished
    out = io.StringIO()
    demo.print_table(result, out)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines[:-4])) <= 80
    for row in result.rows:
        (line,) = [line for line in lines if line.strip().startswith(row.model)]
        assert f"{row.white_box.matched}/256" in line
        assert f"{row.black_box.matched}/100" in line
        assert line.count("owned" if row.kind == "copy" else "not proven") == 2
    assert any(line.startswith("Accuracy cost of both marks: ") and "95 % interval" in line for line in lines)
    assert any(str(result.report) in line for line in lines)


def test_progress_is_told_to_whoever_listens_and_otherwise_only_to_a_terminal(finished, capsys):
    _, _, said = finished
    assert said[0].startswith("training a marked network")
    demo.to_terminal("nobody is here")
    assert capsys.readouterr() == ("", "")
