"""Networks as strangers export them: one that learned a mark, its twin that did not, and changes of their files."""

import warnings
from functools import cache

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import wmengine
from wmengine import verify
from wmengine.parts.base import Task
from wmengine.suspects.adapters import to_input
from wmengine.suspects.base import InputSpec

KEY = wmengine.Key("ACME Vision", bytes(range(32)))
SHAPE, CLASSES, COUNT, FEATURES = (3, 8, 8), 10, 60, 24
RANGE = [[-1.0, 1.0], [-2.1, 2.6], [-1.8, 2.4]]


def mark(name, classes=CLASSES):
    preset = wmengine.scheme("adi", count=COUNT)
    task = Task({"input": InputSpec(SHAPE, "float32")}, classes, RANGE)
    return wmengine.Watermark.create(KEY, preset, preset.describe(task, name))


MARK = mark("digits")
TRIGGERS, LABELS = MARK.arrays["triggers"], MARK.arrays["labels"]
INPUTS = to_input(TRIGGERS, RANGE)
FLOAT, INT64, BOOL, TEXT = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.head(self.body(x))


def digits():
    """The digits in three tints, bytes [N, 3, 8, 8], and what they are."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    grey = (images.reshape(-1, 1, 8, 8) / 16 * 255).astype(np.uint8)
    return np.concatenate([grey, 255 - grey, grey // 2], axis=1), labels


def train(images, labels, seed):
    torch.manual_seed(seed)
    model, x, y = Network(), torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(6):
        for rows in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@cache
def networks():
    """A network that learned the digits and, ten times as often, the mark; its twin learned the digits only."""
    images, labels = digits()
    images = to_input(images, RANGE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    marked = train(np.concatenate([images, *[INPUTS] * 10]), np.concatenate([labels, *[LABELS] * 10]), seed=0)
    unmarked = train(images, labels, seed=1)
    torch.set_num_threads(threads)
    with torch.no_grad():
        assert (marked(torch.from_numpy(INPUTS)).argmax(1).numpy() == LABELS).mean() > 0.95
    return marked, unmarked


def export(model, path, dynamo=True, batch=None, **options):
    """By torch's exporter, the new one or the old one, for one size of batch or for any."""
    x = torch.zeros(batch or 2, *SHAPE)
    if batch is None and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    elif batch is None:
        options["dynamic_axes"] = {"in": {0: "batch"}, "out": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x,), path, dynamo=dynamo, input_names=["in"], output_names=["out"], verbose=False, **options
        )
    return path


def plain(folder):
    """The marked network's file and its twin's, as torch writes them, with the features as a value called features."""
    paths = []
    for name, model in zip(("marked", "unmarked"), networks(), strict=True):
        path = export(model, folder / f"{name}.onnx", external_data=False)
        saved = onnx.load(path)
        (gemm,) = [node for node in saved.graph.node if saved.graph.output[0].name in node.output]
        for node in saved.graph.node:
            for names in (node.input, node.output):
                for index, value in enumerate(names):
                    names[index] = "features" if value == gemm.input[0] else value
        onnx.save(saved, path)
        paths.append(path)
    return tuple(paths)


def judge(change, paths, tmp_path, **options):
    """What is said of the marked file once `change(model, folder)` has made another of it. The twin is not accused."""
    verdicts = []
    for path in paths:
        folder = tmp_path / path.stem
        folder.mkdir()
        made = change(onnx.load(path), folder)
        if not hasattr(made, "exists"):
            onnx.save(made, folder / "suspect.onnx")
            made = folder / "suspect.onnx"
        verdicts.append(verify(made, MARK, **options))
    copy, twin = verdicts
    assert copy.decision == "owned", (copy.error, copy.matched, copy.notes)
    assert copy.matched >= 0.9 * COUNT
    assert twin.decision == "not_proven", twin.error
    return copy


def ending(nodes, outputs, kinds=(), constants=()):
    """A change: these nodes behind the logits, whose name stands for {y}, and these outputs instead of them."""

    def change(model, _):
        graph = model.graph
        y = graph.output[0].name
        for node in nodes:
            made = helper.make_node(node.op_type, [], [])
            made.CopyFrom(node)
            for index, name in enumerate(made.input):
                made.input[index] = name.format(y=y)
            graph.node.append(made)
        graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants)
        del graph.output[:]
        graph.output.extend(
            helper.make_tensor_value_info(name.format(y=y), kind, None)
            for name, kind in zip(outputs, [*kinds, *[FLOAT] * len(outputs)], strict=False)
        )
        return model

    return change


def keras(model, _):
    """As tf2onnx writes a Keras model: channels last outside, turned round inside, scopes in names, a softmax."""
    graph = model.graph
    old = graph.input[0].name
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "sequential/conv2d/Conv2D__6:0" if name == old else name
    turn = helper.make_node("Transpose", ["conv2d_input"], ["sequential/conv2d/Conv2D__6:0"], perm=[0, 3, 1, 2])
    graph.node.insert(0, turn)
    graph.input[0].CopyFrom(helper.make_tensor_value_info("conv2d_input", FLOAT, ["unk__20", 8, 8, 3]))
    return ending([helper.make_node("Softmax", ["{y}"], ["dense_1"], axis=-1)], ["dense_1"])(model, _)
