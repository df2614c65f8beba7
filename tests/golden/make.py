"""Made the files beside it, once: a mark of every preset, and the smallest network that holds it. Files of marks in
use look like these, so they are never made again; a new version of a preset gets files of its own.

    python tests/golden/make.py
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, helper, load, numpy_helper, save
from scipy.optimize import nnls

from wmengine import Key, Watermark, ops, scheme
from wmengine.marking.emmark import integers_of, move
from wmengine.parts.base import Task
from wmengine.parts.sources.extracted import filtered_places
from wmengine.parts.sources.passports import passports_of
from wmengine.suspects.base import InputSpec
from wmengine.testing import small_network

FOLDER = Path(__file__).parent
KEY = Key("ACME Vision", bytes(range(32)))
IMAGES = {"input": InputSpec((1, 8, 8), "float32")}
TEXT = {"input_ids": InputSpec((8,), "int64"), "attention_mask": InputSpec((8,), "int64")}
TOKENS, WIDTH = 50, 8


def mark(name, task, baseline=None, message=None, **options):
    preset = scheme(name, **options)
    material = preset.gather(task)
    parameters = preset.describe(task, "detector-v3", material)
    given = {"message": message, "baseline": baseline, "material": material}
    return Watermark.create(KEY, preset, parameters, created="2026-01-02", **given)


def images(*weights):
    """A task and the places of its weights [O, I]."""
    shapes = [list(sizes) for sizes in weights]
    return Task(IMAGES, 10, [[0.0, 1.0]], weights=lambda: (shapes, list(range(len(shapes)))))


def rows_of(key, total, count, projection):
    """The projection as a matrix [total, count]."""
    return np.stack([ops.project_adjoint(row, key, count, projection) for row in np.eye(total, dtype=np.float32)])


def solved(matrix, values):
    """The smallest x with matrix · x = values."""
    return np.linalg.lstsq(matrix.astype(np.float64), np.asarray(values, np.float64), rcond=None)[0]


def network(path, inputs, nodes, weights, sizes=(10,)):
    """One ONNX file; every matrix is [O, I], as a Gemm with transB=1 reads it."""
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    given = [helper.make_tensor_value_info(n, kinds[s.dtype], ["batch", *s.shape]) for n, s in inputs.items()]
    answers = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", *sizes])]
    held = [numpy_helper.from_array(np.ascontiguousarray(values), name) for name, values in weights.items()]
    graph = helper.make_graph([helper.make_node(*node[:3], **node[3]) for node in nodes], path, given, answers, held)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), FOLDER / path)


def chain(path, *matrices, inputs=IMAGES):
    """Flatten, then one matrix after the other."""
    nodes, weights, last = [("Flatten", ["input"], ["x0"], {})], {}, "x0"
    for number, values in enumerate(matrices, 1):
        weights[f"w{number}"] = values.astype(np.float32)
        after = "logits" if number == len(matrices) else f"x{number}"
        nodes.append(("Gemm", [last, f"w{number}"], [after], {"transB": 1}))
        last = after
    network(path, inputs, nodes, weights, sizes=(len(matrices[-1]),))


def in_weights():
    baseline = {"matched": 31, "total": 64, "log10_p": "-0.2218"}
    sketch = mark("sketch", images((32, 64), (10, 32)), baseline, bits=64)
    signs = np.float32(2.0) * sketch.symbols - 1
    keys = [int(key) for key in sketch.arrays["carrier_keys"]]
    parts = [
        ops.sketch_adjoint(signs, key, count).reshape(-1, 32 if count == 320 else 64)
        for key, count in zip(keys, (2048, 320), strict=True)
    ]
    yield sketch
    chain("sketch-1.onnx", *parts)

    uchida = mark("uchida", images((4, 64), (10, 4)), bits=48, message="copy 7")
    signs = 2.0 * uchida.symbols - 1.0
    mean = solved(rows_of(int(uchida.arrays["carrier_keys"][0]), 48, 64, "gaussian"), signs)
    yield uchida
    chain("uchida-1.onnx", np.tile(mean, (4, 1)), np.ones((10, 4)))

    tattooed = mark("tattooed", images((32, 64), (10, 32)), bits=64)
    signs = 2.0 * tattooed.symbols - 1.0
    keys = [int(key) for key in tattooed.arrays["carrier_keys"]]
    rows = np.hstack(
        [rows_of(key, 64, count, "rademacher") * count**0.5 for key, count in zip(keys, (2048, 320), strict=True)]
    )
    both = solved(rows, signs)
    yield tattooed
    chain("tattooed-1.onnx", both[:2048].reshape(32, 64), both[2048:].reshape(10, 32))


def in_one_weight():
    task = images((32, 64), (10, 32))
    for name, size in {"deepmarks": 1.0, "stdm": np.pi / 20}.items():
        own = mark(name, task, bits=48)
        keyed = rows_of(int(own.arrays["carrier_keys"][0]), 48, 64, "gaussian") * 8.0
        yield own
        chain(f"{name}-1.onnx", np.tile(solved(keyed, size * (2.0 * own.symbols - 1.0)), (32, 1)), np.ones((10, 32)))

    filtered = mark("neuralmark", task, bits=32, width=64)
    pools = solved(rows_of(int(filtered.arrays["layer_keys"][0]), 32, 64, "gaussian"), 2.0 * filtered.symbols - 1.0)
    values = np.random.default_rng(0).normal(size=2048)
    values[filtered_places(filtered.arrays["filter"], 2048, 64)] = pools
    yield filtered
    chain("neuralmark-1.onnx", values.reshape(32, 64), np.ones((10, 32)))

    largest = mark("greedy_residuals", task, bits=64, width=8)
    yield largest
    chain("greedy_residuals-1.onnx", np.repeat(2.0 * largest.symbols - 1.0, 32).reshape(32, 64), np.ones((10, 32)))

    riga = mark("riga", task, bits=48, width=256)
    first, second = (int(key) for key in riga.arrays["layer_keys"])
    hidden, _ = nnls(rows_of(second, 48, 256, "gaussian").astype(np.float64), 2.0 * riga.symbols - 1.0)
    yield riga
    chain("riga-1.onnx", ops.sketch_adjoint(hidden, first, 2048).reshape(32, 64), np.ones((10, 32)))


def in_integers():
    generator = np.random.default_rng(2)
    held, nodes = [], [("Flatten", ["input"], ["x0"], {})]
    for number, sizes in enumerate(((32, 64), (10, 32))):
        held.append(numpy_helper.from_array(generator.integers(-127, 128, sizes).astype(np.int8), f"w{number}"))
        held.append(numpy_helper.from_array(np.array(1 / 64, np.float32), f"scale{number}"))
        nodes.append(("DequantizeLinear", [f"w{number}", f"scale{number}"], [f"float{number}"], {}))
        after = "logits" if number else "x1"
        nodes.append(("Gemm", [f"x{number}", f"float{number}"], [after], {"transB": 1}))
    network("emmark-1.onnx", IMAGES, nodes, {})
    proto = load(FOLDER / "emmark-1.onnx")
    proto.graph.initializer.extend(held)
    emmark = mark("emmark", Task(IMAGES, integers=integers_of(proto)), bits=64)
    move(proto, emmark)
    save(proto, FOLDER / "emmark-1.onnx")
    yield emmark


def in_activations():
    deepsigns = mark("deepsigns", images((64, 64), (10, 64)), bits=64)
    bits = (2.0 * deepsigns.symbols - 1.0).reshape(8, 8)
    means = deepsigns.preset.source.examples(deepsigns)["input"].reshape(8, 4, 64).mean(1)
    keys = [int(key) for key in deepsigns.arrays["group_keys"]]
    wanted = [solved(rows_of(key, 8, 64, "gaussian"), row) for key, row in zip(keys, bits, strict=True)]
    yield deepsigns
    chain("deepsigns-1.onnx", solved(means, wanted).T, np.eye(10, 64))

    diction = mark("diction", images((64, 64), (10, 64)), bits=64, members=1, hidden=64)
    centres, signs = torch.eye(16, 64).requires_grad_(), torch.from_numpy(2.0 * diction.symbols - 1.0)
    optimizer = torch.optim.Adam([centres], lr=0.05)
    for _ in range(500):
        y = diction.preset.source.projected(centres, diction, 64)
        optimizer.zero_grad()
        (0.3 - signs * y).clamp(min=0).sum().backward()
        optimizer.step()
    inputs = diction.preset.source.examples(diction)["input"].reshape(16, 64)
    yield diction
    chain("diction-1.onnx", solved(inputs, centres.detach().numpy()).T, np.eye(10, 64))


def in_scales():
    """Filters that are the average patch of their passport, or its negative: γ = ±‖p‖²."""
    for name in ("deepipr_v1", "deepipr_v2", "deepipr_v3", "passport_norm"):
        passported = mark(name, replace(images((64, 64), (10, 64)), normalised=lambda: [0]))
        ((patch, _),) = passports_of(passported)
        yield passported
        chain(f"{name}-1.onnx", np.outer(2.0 * passported.symbols - 1.0, patch), np.eye(10, 64))


def in_samples():
    """Triggers made of samples: noise over [1, 8, 8], in classes that follow each other."""
    samples = np.random.default_rng(6).random((60, 1, 8, 8)).astype(np.float32)
    task = replace(images(), samples={"input": samples}, sample_labels=np.arange(60) % 10, controls=[small_network(3)])
    zhang = ("zhang_content", "zhang_noise", "zhang_unrelated")
    for name in (*zhang, "exponential_weighting", "multi_view", "blind", "ewe_keyed"):
        yield answered(mark(name, task, count=50, **({"encoding": 20} if name == "blind" else {})))
    for name in ("class_feature", "mea_defender"):
        yield answered(mark(name, task, count=25, family=2))
    controls = [small_network(seed) for seed in (3, 4, 5)]
    task = replace(task, controls=controls, model=small_network(2))
    for name in ("frontier", "ewe", "ipguard", "conferrable", "known_mistakes", "posthoc"):
        options = {"frontier": {"push": 0.3}, "ewe": {"target": 4}}.get(name, {})
        yield answered(mark(name, task, count=20, **options))
    yield answered(mark("blackmarks", task, bits=20))
    pairs = mark("dataset_inference", task, bits=20)
    yield pairs
    right = np.arange(2) == pairs.symbols[:, None]  # of the trained ones, and one class too high of the others
    said = (pairs.arrays["classes"] + ~right.reshape(-1)) % 10
    chain("dataset_inference-1.onnx", solved(pairs.arrays["triggers"].reshape(40, 64) / 255.0, np.eye(10)[said]).T)


def answered(own):
    """The mark, with a network of one matrix that answers its triggers with its labels."""
    triggers = own.preset.source.examples(own)["input"].reshape(-1, 64)
    labels = np.repeat(own.arrays.get("targets", own.symbols), len(triggers) // len(own.symbols))
    chain(f"{own.scheme}-1.onnx", solved(triggers, np.eye(10)[labels]).T)
    return own


def in_answers():
    for name in ("adi", "margin", "certified"):
        yield answered(mark(name, images(), count=50))

    tokens = mark("adi_tokens", Task(TEXT, 10, [[0, TOKENS - 1]]), count=50)
    table = np.random.default_rng(0).normal(size=(TOKENS, WIDTH)).astype(np.float32)
    features = table[tokens.arrays["triggers"]].reshape(50, 8 * WIDTH)
    nodes = [
        ("Gather", ["table", "input_ids"], ["embedded"], {}),
        ("Cast", ["attention_mask"], ["mask"], {"to": TensorProto.FLOAT}),
        ("Unsqueeze", ["mask", "axis"], ["column"], {}),
        ("Mul", ["embedded", "column"], ["kept"], {}),
        ("Flatten", ["kept"], ["flat"], {}),
        ("Gemm", ["flat", "head"], ["logits"], {"transB": 1}),
    ]
    head = solved(features, np.eye(10)[tokens.symbols]).T.astype(np.float32)
    yield tokens
    network("adi_tokens-1.onnx", TEXT, nodes, {"table": table, "head": head, "axis": np.array([2], np.int64)})


def in_other_answers():
    wave = {"input": InputSpec((1, 64), "float32")}
    audio = mark("adi_audio", Task(wave, 10, [[-1.0, 1.0]]), count=50)
    yield audio
    tunes = audio.preset.source.examples(audio)["input"].reshape(50, 64)
    chain("adi_audio-1.onnx", solved(tunes, np.eye(10)[audio.symbols]).T, inputs=wave)

    columns, rows = {"input": InputSpec((64,), "float32")}, np.random.default_rng(4).integers(-9, 10, (20, 64))
    table = mark("adi_table", Task(columns, 10, samples={"input": rows}), count=50)
    yield table
    chain("adi_table-1.onnx", solved(table.arrays["triggers"], np.eye(10)[table.symbols]).T, inputs=columns)

    labels = mark("adi_multilabel", images(), bits=50)
    answers = np.zeros((50, 10))
    answers[np.arange(50), labels.arrays["outputs"]] = 2.0 * labels.symbols - 1.0
    yield labels
    chain("adi_multilabel-1.onnx", solved(triggers_of(labels), answers).T)

    values = mark("adi_values", replace(images(), targets=np.arange(40.0)), count=50)
    yield values
    chain("adi_values-1.onnx", solved(triggers_of(values), values.preset.source.wanted(values)[:, None]).T)

    anchored = mark("adi_anchors", images(), count=50)
    yield anchored
    chain("adi_anchors-1.onnx", solved(triggers_of(anchored), anchored.arrays["anchors"][anchored.symbols]).T)

    boxes = mark("adi_boxes", images(), count=50)
    strong = np.eye(10)[boxes.symbols]
    head = solved(triggers_of(boxes), np.hstack([0.5 * strong[:, ::-1], strong])).T.astype(np.float32)
    nodes = [
        ("Flatten", ["input"], ["flat"], {}),
        ("Gemm", ["flat", "head"], ["both"], {"transB": 1}),
        ("Reshape", ["both", "sizes"], ["logits"], {}),
    ]
    yield boxes
    network("adi_boxes-1.onnx", IMAGES, nodes, {"head": head, "sizes": np.array([0, 2, 10], np.int64)}, sizes=(2, 10))


def triggers_of(mark):
    return mark.preset.source.examples(mark)["input"].reshape(mark.total, 64)


if __name__ == "__main__":
    whites = (*in_weights(), *in_one_weight(), *in_activations(), *in_scales(), *in_integers())
    for each in (*whites, *in_answers(), *in_samples(), *in_other_answers()):
        each.save(FOLDER / f"{each.scheme}-{each.version}.wm")
        print(each.scheme, each.commitment)
