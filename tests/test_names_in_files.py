"""Files that answer with names of classes: an order that file or mark holds is free, one said later is paid for."""

import math

import numpy as np
import onnx
import pytest
from judged import KEY, black_box, images
from onnx import TensorProto, helper, numpy_helper

from wmengine.cli import main
from wmengine.judging.verification import verify
from wmengine.suspects import open_suspect

NAMES = ["zebra", "ape", "yak", "bee", "wolf", "cow", "viper", "dog", "tern", "eel"]
SYNSETS = [
    f"n{number:08}"
    for number in (1440764, 1443537, 2085620, 1484850, 3888257, 1494475, 1496331, 2110341, 1498041, 2091032)
]
SHAPE, COUNT, CLASSES = (1, 8, 8), 60, 10
MARK, NAMED = black_box(SHAPE, CLASSES, COUNT), black_box(SHAPE, CLASSES, COUNT, class_names=NAMES)
MAPS = helper.make_sequence_type_proto(
    helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
)
LABEL = helper.make_tensor_value_info("label", TensorProto.STRING, ["N"])


def save(path, mark, nodes, outputs, texts=(), columns=range(CLASSES)):
    """A linear model that knows all triggers: "s" holds its scores, "k" its classes, its columns in this order."""
    flat = images(mark).reshape(COUNT, -1).astype(np.float64)
    weight = (np.linalg.pinv(flat) @ np.eye(CLASSES)[mark.symbols])[:, list(columns)]
    constants = [numpy_helper.from_array(weight.astype(np.float32), "w")]
    constants += [numpy_helper.from_array(np.array(held, object), name) for name, held in texts]
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["s"]),
        helper.make_node("ArgMax", ["s"], ["k"], axis=1, keepdims=0),
        *nodes,
    ]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])]
    graph = helper.make_graph(nodes, "g", given, outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def encoded(path, mark, names=NAMES, keys=range(CLASSES), **options):
    values = [names[key] for key in keys]
    node = helper.make_node(
        "LabelEncoder", ["k"], ["label"], domain="ai.onnx.ml", keys_int64s=list(keys), values_strings=values
    )
    return save(path, mark, [node], [LABEL], **options)


def mapped(path, mark, names=NAMES, **options):
    node = helper.make_node("ZipMap", ["s"], ["p"], domain="ai.onnx.ml", classlabels_strings=names)
    return save(path, mark, [node], [helper.make_value_info("p", MAPS)], **options)


def gathered(path, mark, names=NAMES, parts=1, **options):
    """From one constant, or where nobody holds the whole list, from two behind one another."""
    texts = [(f"names{part}", each) for part, each in enumerate(np.array_split(names, parts))]
    nodes = [
        helper.make_node("Concat", [name for name, _ in texts], ["names"], axis=0),
        helper.make_node("Gather", ["names", "k"], ["label"]),
    ]
    return save(path, mark, nodes, [LABEL], texts, **options)


def codes(verdict):
    return {each.code for each in verdict.facts}


@pytest.mark.parametrize("names", [NAMES, SYNSETS], ids=["words", "synsets"])
@pytest.mark.parametrize("write", [encoded, mapped, gathered])
def test_the_order_in_the_file_is_free(tmp_path, write, names):
    verdict = verify(write(tmp_path / "m.onnx", MARK, names), MARK)
    assert (verdict.owned, verdict.matched) == (True, COUNT)
    assert not codes(verdict) & {"names_paid", "abstained", "outside"}


def test_an_encoders_keys_are_its_order(tmp_path):
    assert verify(encoded(tmp_path / "m.onnx", MARK, keys=[3, 1, 4, 0, 5, 9, 2, 6, 8, 7]), MARK).matched == COUNT


def test_an_encoders_keys_may_be_a_tensor(tmp_path):
    """As ai.onnx.ml 4 writes them."""
    keys = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    for number, told in enumerate((numpy_helper.from_array(np.array(keys)), helper.make_tensor("k", 7, [10], keys))):
        node = helper.make_node(
            "LabelEncoder", ["k"], ["label"], domain="ai.onnx.ml", keys_tensor=told,
            values_tensor=numpy_helper.from_array(np.array([NAMES[key] for key in keys], object)),
        )  # fmt: skip
        path = save(tmp_path / f"{number}.onnx", MARK, [node], [LABEL])
        model = onnx.load(path)
        model.opset_import[1].version = 4
        onnx.save(model, path)
        assert verify(path, MARK).matched == COUNT


def test_names_of_too_few_classes_are_an_error(tmp_path):
    for write in (encoded, mapped, gathered):
        verdict = verify(write(tmp_path / "m.onnx", MARK), MARK, labels=NAMES[:9])
        assert verdict.error == "labels= names 9 classes and the watermark has 10; give all names"


@pytest.mark.parametrize("test", ["fixed", "sequential"])
@pytest.mark.parametrize("write", [encoded, mapped])
def test_classes_that_file_and_mark_call_alike_are_the_same_wherever_they_stand(tmp_path, write, test):
    """scikit-learn sorts names, as a mark need not."""
    order = np.argsort(NAMES)
    path = write(tmp_path / "m.onnx", NAMED, sorted(NAMES), columns=order)
    verdict = verify(path, NAMED, key=KEY, test=test, adversarial=True)
    assert verdict.owned
    moved = int((order != np.arange(CLASSES)).sum())
    assert f"{moved} of 10 classes stand elsewhere, by their names in suspect and watermark" in verdict.notes
    assert not verify(path, MARK).owned  # which has no names


def test_names_said_at_verification_are_paid_for_unless_they_are_the_marks(tmp_path):
    path, other = (gathered(tmp_path / f"{mark.commitment}.onnx", mark, parts=2) for mark in (NAMED, MARK))
    free, paid = verify(path, NAMED, labels=NAMES), verify(other, MARK, labels=NAMES)
    assert free.matched == paid.matched == COUNT
    assert "names_paid" not in codes(free)
    assert paid.log10_p >= free.log10_p
    (fact,) = [each for each in paid.facts if each.code == "names_paid"]
    assert fact.values["log10_orders"] == pytest.approx(math.lgamma(11) / math.log(10))
    assert paid.settings["labels"] == NAMES
    with pytest.raises(ValueError, match="adversarial=True takes no labels= but those that the watermark"):
        verify(path, MARK, labels=NAMES, key=KEY, adversarial=True)


def test_scores_stand_in_the_order_said_where_the_file_says_which_is_whose(tmp_path):
    """As scikit-learn's classifiers have them: names beside scores, both in the order of the alphabet."""
    order = np.argsort(NAMES)
    score = helper.make_tensor_value_info("s", TensorProto.FLOAT, ["N", CLASSES])
    label = helper.make_node(
        *("LabelEncoder", ["k"], ["label"]), domain="ai.onnx.ml",
        keys_int64s=[*range(CLASSES)], values_strings=sorted(NAMES),
    )  # fmt: skip
    each = [f"only {name}" for name in sorted(NAMES)]
    split = helper.make_node("Split", ["s"], each, axis=1)
    columns = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 1]) for name in each]
    for number, (nodes, outputs) in enumerate(
        [([label], [LABEL]), ([label], [LABEL, score]), ([label, split], [LABEL, *columns])]
    ):
        path = save(tmp_path / f"{number}.onnx", MARK, nodes, outputs, columns=order)
        assert verify(path, MARK, labels=NAMES).matched == COUNT, number
    path = mapped(tmp_path / "maps.onnx", MARK, sorted(NAMES), columns=order)
    assert verify(path, MARK, labels=NAMES).matched == COUNT


def test_the_command_line_reads_names_from_a_file(tmp_path, capsys):
    path = gathered(tmp_path / "m.onnx", NAMED, parts=2)
    NAMED.save(tmp_path / "m.wm")
    (tmp_path / "names.txt").write_text("\ufeff" + "\r\n".join(NAMES) + "\r\n\r\n")
    command = ["verify", str(path), "--watermark", str(tmp_path / "m.wm"), "--labels", str(tmp_path / "names.txt")]
    assert main(command) == 0
    assert "60 of 60" in capsys.readouterr().out


def test_names_that_nobody_knows_are_misses_and_said(tmp_path):
    verdict = verify(gathered(tmp_path / "m.onnx", MARK, parts=2), MARK, labels=[name.upper() for name in NAMES])
    assert (verdict.decision, verdict.matched) == ("not_proven", 0)
    assert "60 of 60 answers hold NaN or Inf or name no class, and count as misses" in verdict.notes


@pytest.mark.parametrize("labels", ["zebra", ["zebra"], ["ape", "ape"], [1, 2]])
def test_labels_are_names_each_once(labels):
    with pytest.raises(ValueError, match="labels must be the names of all classes, in their order, each once"):
        verify("m.onnx", MARK, labels=labels)


def test_labels_are_for_files():
    with pytest.raises(ValueError, match="labels= is for the path of a file; an endpoint has them among its options"):
        open_suspect(lambda rows: rows, labels=NAMES)
