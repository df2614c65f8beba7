"""What the documents promise: examples that run as typed, links that lead somewhere, and what they say of the code."""

import ast
import hashlib
import hmac
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from operating import operating_point

import wmengine
from wmengine.attacks.page import PAGE
from wmengine.cli import main
from wmengine.identity.key import Key
from wmengine.judging.verdict import Verdict
from wmengine.marks.catalogue import SCHEMES, scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.parts.sources.integers import IntegerWeights
from wmengine.parts.sources.passports import Passports
from wmengine.parts.sources.weights import Weights
from wmengine.parts.training.covert import Covert
from wmengine.parts.training.link import Link
from wmengine.parts.training.spread import Spread
from wmengine.parts.triggers.pictures import abstract_images
from wmengine.scanning.schema import schema_of
from wmengine.suspects.base import InputSpec

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}


def examples(page):
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


def rows_below(page, header):
    """The cells of the table rows below a header, up to the table's end."""
    lines = PAGES[page].split(header)[1].splitlines()[2:]
    end = next((place for place, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]


# A few batches teach nothing: that the marks say so is part of the example's promise.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the mark .* does not prove itself")
def test_the_examples_of_the_readme_run_as_they_are_typed(tmp_path, monkeypatch, capsys):
    import lightning.pytorch as lightning
    import transformers
    from torch.nn import functional

    embed, go_on, fit, weigh, mix, split, ship, light, face, check, survive = examples("README.md")
    assert (embed.count("\n"), check.count("\n")) == (10, 5)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32 * 36, 10)
    )
    images, labels = torch.rand(192, 1, 8, 8), torch.randint(10, (192,))
    loader = list(zip(images.split(64), labels.split(64), strict=True))
    names = {"model": model, "optimizer": torch.optim.Adam(model.parameters()), "loader": loader, "images": images}
    exec(embed, names)
    names["checkpoint"] = {"marks": names["emb"].state_dict()}
    before = [mark.commitment for mark in names["emb"].watermarks()]
    exec(go_on, names)
    assert [mark.commitment for mark in names["emb"].watermarks()] == before
    loops = {**names, "class_weights": torch.ones(10), "average": names["model"], "lightning": lightning}
    loops["my_loss"], loops["mixup"] = functional.multi_margin_loss, lambda x, y: (x, functional.one_hot(y, 10).float())
    exec(fit, loops)
    loops["x"], loops["y"] = loops["emb"].mix(images[:64], labels[:64])
    for example in (weigh, split):
        exec(example, loops)
        loops["loss"].backward()
    loops["x"], loops["y"] = images[:64], labels[:64]
    for example in (mix, ship, light):
        exec(example, loops)
    assert [mark.commitment for mark in loops["marks"]] == before
    tokens = torch.randint(5, 40, (8, 12))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    loops["bert"] = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **sizes))
    loops["ids"], loops["mask"] = tokens, torch.ones_like(tokens)
    loops["dataset"] = [{"input_ids": row, "attention_mask": row * 0 + 1, "labels": row[0] % 2} for row in tokens]
    loops["arguments"] = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    exec(face, loops)
    loops["trainer"].train()
    shutil.copy("model.onnx", "suspect.onnx")
    exec(check, {})
    printed = capsys.readouterr().out
    assert len(re.findall(r"^(owned|not_proven) \d+/(256|100) -?\d", printed, re.MULTILINE)) == 2
    exec(survive, {**names, "labels": labels})
    assert float(capsys.readouterr().out) <= 0.0


@pytest.mark.slow
def test_the_example_of_a_preset_keeps_what_every_preset_promises(capsys):
    (example,) = (each for each in examples("schemes.md") if "wm.Preset(" in each)
    exec(example, {})
    assert "acme_widest" in capsys.readouterr().out


def trigger_mark(message=None, baseline=None):
    preset = scheme("adi", count=60)
    task = Task({"input": InputSpec((1, 6, 6), "float32")}, num_classes=10, value_range=[[0.0, 1.0]])
    key, parameters = Key("ACME Vision", bytes(range(32))), preset.describe(task, "detector")
    return Watermark.create(key, preset, parameters, message=message, baseline=baseline)


@pytest.mark.parametrize("test", ["fixed", "sequential"])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("answers", ["scores", "labels"])
def test_the_example_of_evidence_computes_every_p_value_again(answers, kept, test, tmp_path, monkeypatch, capsys):
    mark, generator = trigger_mark(), np.random.default_rng(3)
    scores = generator.normal(size=(60, 10)).astype(np.float32)
    scores[np.arange(60), mark.symbols] += np.where(generator.random(60) < kept, 4.0, 0.0)
    place = {row.tobytes(): number for number, row in enumerate(mark.arrays["triggers"])}

    def suspect(inputs):
        seen = [place[row.tobytes()] for row in np.rint(inputs * 255.0).astype(np.uint8)]
        return scores[seen] if answers == "scores" else scores[seen].argmax(axis=1)

    verdict = wmengine.verify(suspect, mark, test=test)
    monkeypatch.chdir(tmp_path)
    Path("verdict.json").write_text(verdict.to_json(), encoding="utf-8")
    (example,) = examples("design.md")
    exec(example, {})
    assert float(capsys.readouterr().out) == pytest.approx(verdict.log10_p, abs=1e-9)
    assert verdict.owned == (kept > 0.0)


@pytest.mark.parametrize("clear", [3.0, 0.6])
def test_the_example_of_evidence_is_right_for_bits(clear, tmp_path, monkeypatch, capsys):
    preset = scheme("sketch")
    task = Task({"input": InputSpec((4,), "float32")}, weights=lambda: ([[512, 4]], [0]))
    mark = Watermark.create(Key("ACME Vision", bytes(32)), preset, preset.describe(task, "detector"))
    generator = np.random.default_rng(5)
    layer = torch.nn.Linear(4, 512, bias=False)
    pull = wmengine.ops.sketch_adjoint(
        (2.0 * mark.symbols - 1.0).astype(np.float32), int(mark.arrays["carrier_keys"][0]), layer.weight.numel()
    )
    values = clear * pull.reshape(512, 4) / pull.std() + generator.normal(size=(512, 4))
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(values))
    verdict = wmengine.verify(layer, mark)
    monkeypatch.chdir(tmp_path)
    Path("verdict.json").write_text(verdict.to_json(), encoding="utf-8")
    (example,) = examples("design.md")
    exec(example, {})
    assert float(capsys.readouterr().out) == pytest.approx(verdict.log10_p, abs=1e-9)
    assert verdict.owned


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


@pytest.mark.parametrize("message", [None, "customer-0042"])
def test_sections_4_and_10_are_enough_to_derive_a_mark(message):
    """With hash functions only, as another engine would."""
    secret = bytes(range(32))
    mark = trigger_mark(message, baseline={"matched": 3, "total": 60, "log10_p": "-0.2000"})
    identified = {"owner": mark.owner, "parameters": mark.parameters, "scheme": "adi/1"}
    identity = hashlib.sha256(b"wmengine/1/identity\0" + canonical(identified)).hexdigest()

    def subkey(family, purpose="", place="", **more):
        info = {"family": family, "identity": identity, "place": place, "purpose": purpose, **more}
        extracted = hmac.digest(bytes(32), secret, "sha256")
        return hmac.digest(extracted, b"wmengine/1/" + canonical(info) + b"\1", "sha256")

    with_message = {} if message is None else {"message": message}
    words = np.frombuffer(hashlib.shake_256(subkey("symbols", **with_message)).digest(4 * 80), "<u4")
    assert np.array_equal(mark.symbols, (words[words < 2**32 - 2**32 % 10] % 10)[:60])
    philox_key = int.from_bytes(subkey("geometry", "triggers")[:8], "little")
    assert np.array_equal(mark.arrays["triggers"], abstract_images(philox_key, 60, (1, 6, 6)))
    salt = subkey("commitment", **with_message)
    assert mark.salt == salt.hex()
    record = canonical({"created": mark.created, "baseline": mark.baseline})
    assert mark.record == hmac.digest(subkey("record", **with_message), record, "sha256").hex()
    stated = {"format": "wmengine/1", "owner": mark.owner, "parameters": mark.parameters, "scheme": "adi", "version": 1}
    stated |= {"arrays": {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in mark.arrays.items()}}
    stated |= {"total": 60, **with_message}
    hashed = b"wmengine/1/watermark-commitment\0" + canonical(stated) + salt
    assert mark.commitment == hashlib.sha256(hashed).hexdigest()


def test_every_file_the_documents_link_to_exists():
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not target.startswith(("http://", "https://")):
                assert (folder / target).exists(), f"{page} links to {target}"


def test_every_heading_the_documents_link_to_is_there():
    def anchors(text):
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    headings = {page: anchors(text) for page, text in PAGES.items()}
    for page, text in PAGES.items():
        for target, heading in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", text):
            assert heading in headings[Path(target).name if target else page], f"{page} links to {target}#{heading}"


def test_the_documented_commands_have_the_options_that_they_are_typed_with(capsys):
    text = "\n".join(PAGES.values())
    for command in ("demo", "keygen", "verify", "scan", "schemes", "info", "attack", "attacks", "emmark"):
        main([command, "--help"])
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        for line in re.findall(rf"^    (?:\S+/)?wmengine {command}\b(.*)$", text, re.MULTILINE):
            assert set(re.findall(r"(?<=\s)--[a-z-]+", line)) <= known, line


def test_the_documented_defaults_are_those_of_the_presets():
    """docs/schemes.md has one table row for each preset, which ends in its numbers."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGES["schemes.md"], re.MULTILINE)
    documented = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert documented.keys() == SCHEMES.keys()
    for name, preset in SCHEMES.items():
        options = preset.options
        if isinstance(preset.source, IntegerWeights):
            expected = [str(options["bits"]), str(options["spare"])]
        elif preset.kind == "black-box":
            expected = [str(options.get("count", options.get("bits")))]
            expected = [f"{options['strength']:g}", *expected] if "strength" in options else expected
        elif isinstance(preset.training, Spread):
            expected = [str(options["bits"]), f"{options['margin']:g}"]
        elif isinstance(preset.source, Weights):
            margin = f"{options['margin']:g}" if options["link"] in ("hinge", "mse") else ""
            expected = [options["link"], str(options["bits"]), f"{options['strength']:g}", margin]
        elif isinstance(preset.source, Passports):
            expected = [f"at most {options['bits']}", f"{options['strength']:g}", f"{options['margin']:g}"]
        elif isinstance(preset.training, Link):
            margin = f"{options['margin']:g}" if options["link"] in ("hinge", "mse") else ""
            expected = [options["link"], str(options["bits"]), f"{options['strength']:g}", margin]
        elif isinstance(preset.training, Covert):
            expected = [str(options["bits"]), f"{options['strength']:g}", f"{options['critic']:g}"]
        else:
            assert documented[name][1].startswith(f"{options['groups']} × {options['members']}")
            expected = [str(options["bits"]), f"{options['strength']:g}", f"{options['pull']:g}"]
        assert documented[name][-len(expected) :] == expected
        said = PAGES["schemes.md"].replace("\n", " ")
        assert preset.null == "exact" or f"the null `{preset.null}`" in said
        assert f"`{preset.statistic.identifier}`" in PAGES["schemes.md"].replace("\n", " ")


def test_what_schemes_need_is_explained_and_nothing_else():
    explained = {word for word, _ in rows_below("schemes.md", "| needs | what to give |")}
    assert explained == {need for preset in SCHEMES.values() for need in preset.needs}


def test_every_attack_is_documented_with_its_options():
    """docs/attacks.md has one table row for each attack of the page, its defaults in the second cell."""
    documented = {
        name: options for name, options, *_ in rows_below("attacks.md", "| attack | options | what is left |")
    }
    for attack in PAGE:
        shown = ", ".join(f"`{name}={json.dumps(value)}`" for name, value in attack.defaults.items())
        assert documented.pop(f"`{attack.name}`") == shown
    assert not documented


@pytest.mark.slow
def test_the_examples_of_attacks_run_as_they_are_typed(tmp_path, monkeypatch):
    use, add = examples("attacks.md")
    monkeypatch.chdir(tmp_path)
    model, images = torch.nn.Linear(16, 10), torch.rand(32, 16)
    wmengine.export_onnx(model, images[:1], "model.onnx")
    names = {"model": model, "images": images}
    exec(use, names)
    assert (names["thief"].weight == 0).sum() == 144
    assert names["path"].name == "int8.onnx"
    exec(add, names)
    weights = {"w": np.array([[-3.0, 0.01]], np.float32)}
    names["CLIP"].run(weights, None, **names["CLIP"].defaults)
    assert weights["w"].tolist() == [[np.float32(-0.1), np.float32(0.01)]]


def test_every_field_of_a_verdict_is_in_its_table_and_in_that_of_scans():
    fields = {*Verdict.__dataclass_fields__, "notes"}
    for page, header in {"design.md": "| field | meaning |", "scan.md": "| column | meaning |"}.items():
        documented = {name for cells in rows_below(page, header) for name in re.findall(r"`(\w+)`", cells[0])}
        assert documented == fields, page
    assert set(schema_of({}).names) == fields


def test_every_parameter_and_array_of_every_preset_is_documented():
    def table(header):
        rows = rows_below("design.md", header)
        return {name: set(re.findall(r"`(\w+)`", cell)) for names, cell in rows for name in names.split(", ")}

    fields, arrays = table("| part | fields |"), table("| part | arrays |")
    parts = {part for preset in SCHEMES.values() for part in (preset.source, preset.symbols)}
    for part in parts:
        name = f"`{type(part).__name__}`"
        assert set(part.fields) <= fields[name], name
        assert arrays[name]
    assert fields.keys() - arrays.keys() == {"every preset", "a source with material"}
    assert {"name", "inputs", "statistic"} <= fields["every preset"]


def test_imports_only_go_down_the_floors_of_the_house():
    floors = {}
    for floor, files, _ in rows_below("design.md", "| floor | files | what |"):
        floors |= {name.removesuffix("/").removesuffix(".py"): int(floor) for name in re.findall(r"`([^`]+)`", files)}
    package = ROOT / "wmengine"
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name for name in there if not name.startswith("_")} == floors.keys() - {"csrc", "__main__"}
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for imported in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
            if own in floors and imported in floors:
                assert floors[own] >= floors[imported], f"{path.relative_to(package)} imports {imported}"


def imports_of(tree):
    """The parts of the engine that a file imports, also where it does so late."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "wmengine":
            inside = node.module.split(".")[1:]
            yield from inside[:1] or (alias.name for alias in node.names)


def test_the_table_of_operating_points_is_what_is_computed():
    bars = {"10^-9": 9.0, "10^-9 / 10^6 pairs": 15.0, "2^-64": 64 * math.log10(2), "2^-128": 128 * math.log10(2)}
    rows = rows_below("design.md", "<!-- operating points:begin -->\n")
    assert len(rows) == 12
    for classes, bar, *cells in rows:
        p0, half = 1 / int(classes), bars[bar] + math.log10(2)  # matches has half of the evidence
        for rate, cell in zip((1.0, 0.8, 0.6, 0.5, 0.4), cells[:-1], strict=True):
            proven, queries = operating_point(rate, p0, 100, half)
            assert cell == f"{100 * proven:.1f} %, {queries:.0f}"
        proven, queries = operating_point(p0, p0, 100, half)
        assert proven <= 10.0**-half
        assert cells[-1] == f"{queries:.0f}"
