"""Reading answers, without a file: scores, labels, ranks and maps are told apart by shapes, types and values alone."""

import math

import numpy as np
from exported import CLASSES, LABELS, MARK, mark

from wmengine import verify
from wmengine.suspects.answers import Predicted, choose_readings, highest, of_two_classes, read_all
from wmengine.suspects.class_names import numbers


def read(outputs, num_classes, rows=4):
    (reading,) = choose_readings(outputs, rows, num_classes, "m.onnx")
    return reading.read(outputs, rows)


SCORES = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)


def test_text_sorts_ten_before_two_and_the_labels_beside_the_scores_say_so():
    order = np.array(sorted(range(12), key=str))
    labels = order[SCORES.argmax(1)]
    assert (labels != SCORES.argmax(1)).any()
    np.testing.assert_array_equal(read([("label", labels), ("probabilities", SCORES)], 12), labels)
    np.testing.assert_array_equal(read([("label", SCORES.argmax(1)), ("probabilities", SCORES)], 12), SCORES)


def test_of_two_classes_the_label_counts_where_it_never_names_the_higher_score():
    decision = np.array([1.5, -0.2, 0.4, -2.0], np.float32)
    scores, labels = np.stack([decision, -decision], axis=1), (decision > 0).astype(np.int64)
    np.testing.assert_array_equal(read([("label", labels), ("decision", scores)], 2), labels)
    np.testing.assert_array_equal(read([("label", 1 - labels), ("decision", scores)], 2), scores)


def test_maps_are_put_in_the_order_of_their_numbers():
    keys = sorted(f"class_{number}" for number in range(12))
    rows = [dict(zip(keys, row, strict=True)) for row in SCORES]
    expected = np.stack([[row[f"class_{number}"] for number in range(12)] for row in rows])
    np.testing.assert_array_equal(numbers(rows), expected)
    animals = [{"dog": 0.25, "cat": 0.75}]
    np.testing.assert_array_equal(numbers(animals), [[0.25, 0.75]])
    np.testing.assert_array_equal(numbers(np.array(["class_3", "class_11"], object)), [3, 11])
    assert numbers(np.array(["dog", "cat"], object)) is None
    assert numbers(np.array(["dog1", "cat2"], object)) is None


def test_ranks_and_their_scores_are_told_from_scores():
    order = np.argsort(-SCORES, axis=1)
    values = np.take_along_axis(SCORES, order, axis=1)
    for k in (2, 5, 12):
        outputs = [("v", values[:, :k]), ("i", order[:, :k])]
        np.testing.assert_array_equal(read(outputs, 12), SCORES.argmax(1))
        np.testing.assert_array_equal(read(outputs[::-1], 12), SCORES.argmax(1))
    lost = values[:, :3].copy()
    lost[2, 1] = np.nan
    np.testing.assert_array_equal(read([("v", lost), ("i", order[:, :3])], 12), [*order[:2, 0], -1, order[3, 0]])
    counts = np.array([[7, 1, 1], [0, 2, 2], [3, 3, 3], [0, 0, 9]])
    np.testing.assert_array_equal(read([("counts", counts)], 3), counts)
    on_device = [("v", Predicted(np.array([2, 0, -1, 1], np.int32), 3, np.zeros((4, 3), np.int8))), ("i", order[:, :3])]
    np.testing.assert_array_equal(read(on_device, 12), [order[0, 2], order[1, 0], -1, order[3, 1]])


def test_one_hot_integers_of_two_classes_are_scores():
    np.testing.assert_array_equal(read([("y", np.array([[0, 1], [1, 0], [0, 1], [0, 1]]))], 2).argmax(1), [1, 0, 1, 1])


def test_ones_and_zeros_beside_the_chances_of_two_classes_are_no_ranks():
    chances = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3]], np.float32)
    ones = (chances > 0.5).astype(np.int64)
    for outputs in ([("p", chances), ("y", ones)], [("y", ones), ("p", chances)]):
        readings = choose_readings(outputs, 4, 2, "m.onnx")
        assert read_all(readings, outputs, 4).tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]
    best = np.array([[0, 1], [1, 0], [1, 0], [0, 1]])
    for values in (np.sort(chances, axis=1)[:, ::-1], Predicted(np.zeros(4, np.int32), 2, np.zeros((4, 2), np.int8))):
        assert read([("values", values), ("indices", best)], 2).tolist() == [0, 1, 1, 0]


def test_one_score_tells_two_classes():
    for shape in ((4,), (4, 1)):
        scores = np.array([0.2, 0.7, np.nan, 0.5]).reshape(shape)
        labels, note = of_two_classes(read([("y", scores)], 2))
        assert labels.tolist() == [0, 1, -1, 0]
        assert "above 0.5" in str(note)
        labels, note = of_two_classes(read([("y", 4 * scores - 2)], 2))
        assert labels.tolist() == [0, 1, -1, 0]
        assert "above 0" in str(note)
    verdict = verify(lambda rows: rows.reshape(len(rows), -1)[:, :1] * 0, TWO)
    assert verdict.error is None
    assert any("one score" in str(note) for note in verdict.notes)


TWO = mark("two", classes=2)


def test_two_outputs_of_one_score_are_two_classes_where_they_add_up_to_one():
    chances = np.array([0.1, 0.7, 0.4, 0.9], np.float32)
    np.testing.assert_array_equal(read([("no", chances), ("yes", 1 - chances)], 2), np.stack([chances, 1 - chances], 1))
    logits = np.log(chances / (1 - chances))[:, None]
    np.testing.assert_array_equal(read([("logit", logits), ("probability", chances[:, None])], 2), logits[:, 0])


def test_answers_beyond_the_marks_classes_are_said():
    verdict = verify(lambda rows: 100 + np.arange(len(rows)) % CLASSES, MARK)
    assert (verdict.decision, verdict.matched) == ("not_proven", 0)
    assert "60 of 60 answers name no class of the watermark, which has 10: the suspect counts its classes" in str(
        verdict.notes
    )


def test_a_row_is_no_answer_where_its_highest_score_is_no_number():
    inf, nan = np.inf, np.nan
    rows = np.array([[1, -inf, 2], [nan, 5, 1], [1, inf, 2], [-inf, -inf, -inf], [-inf, 3, -inf]], np.float32)
    assert highest(rows).tolist() == [2, -1, -1, -1, 1]


def test_ties_go_to_the_lowest_class_and_math_is_exact():
    constant = verify(lambda rows: np.zeros((len(rows), CLASSES), np.float32), MARK)
    assert constant.matched == int((LABELS == 0).sum())
    assert math.isfinite(constant.log10_p)
