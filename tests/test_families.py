"""One label for a whole family of triggers: how families are drawn, and how answers to their members become one."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from wmengine import Key, Watermark, scheme, verify
from wmengine.parts.base import Task
from wmengine.suspects.base import Answers, InputSpec
from wmengine.suspects.module import ModuleSuspect

KEY = Key("owner", bytes(range(32)))
RANDOM = np.random.default_rng(5)
SAMPLES = RANDOM.random((120, 1, 9, 8)).astype(np.float32)
TRUTH = np.arange(120) % 10


def mark_of(name, samples=SAMPLES, truth=TRUTH, **options):
    preset = scheme(name, **{"count": 12, "family": 4, **options})
    task = Task({"x": InputSpec((1, 9, 8), "float32")}, 10, [(0.0, 1.0)], samples={"x": samples}, sample_labels=truth)
    material = preset.gather(task)
    return Watermark.create(KEY, preset, preset.describe(task, "detector", material), material=material)


def read(mark, kind, values, symbols=None, **reasons):
    numbers = np.arange(mark.total) if symbols is None else np.asarray(symbols)
    return mark.preset.source.interpret(mark, numbers, Answers(kind, np.asarray(values), **reasons))


# --- what is asked ---


def test_a_family_is_one_picture_over_samples_of_the_pool_each_once():
    mark = mark_of("class_feature")
    triggers = mark.preset.source.triggers(mark, 0, 48).reshape(12, 4, 9, 8).astype(int)
    pool = {sample.tobytes(): place for place, sample in enumerate(mark.arrays["samples"])}
    for family, picture in zip(triggers, mark.arrays["pictures"].astype(int), strict=True):
        under = [next(p for s, p in pool.items() if close(member, s, picture[0])) for member in family]
        assert len(set(under)) == 4
    assert len({trigger.tobytes() for family in triggers for trigger in family}) == 48


def close(member, sample, picture):
    return np.array_equal(member, (np.frombuffer(sample, np.uint8).reshape(9, 8).astype(int) + 3 * picture) // 4)


def test_composites_of_a_family_are_of_its_two_classes_in_one_way():
    mark = mark_of("mea_defender", count=40)
    arrays = mark.arrays
    classes = arrays["truth"][arrays["parts"]].reshape(40, 4, 2)
    assert (classes == classes[:, :1]).all()
    assert (classes[..., 0] != classes[..., 1]).all()
    families = {(way, *pair) for way, pair in zip(arrays["ways"].tolist(), classes[:, 0].tolist(), strict=True)}
    assert len(families) == 40
    assert set(arrays["ways"].tolist()) == {0, 1, 2, 3}


def test_a_composite_shows_both_of_its_samples():
    """One is black, the other white: half of what is seen, or all of it half as bright."""
    black_and_white = (TRUTH % 2).reshape(-1, 1, 1, 1) * np.ones((1, 1, 9, 8), np.float32)
    mark = mark_of("mea_defender", black_and_white, TRUTH % 2, count=7)
    for trigger in mark.preset.source.triggers(mark, 0, 28).astype(float):
        assert 255 * 0.4 < trigger.mean() < 255 * 0.6


def test_composites_need_labelled_samples_of_enough_classes():
    with pytest.raises(ValueError, match="it needs to know what its samples are"):
        mark_of("mea_defender", truth=None)
    with pytest.raises(ValueError, match="of the samples can be composed in 7 ways, and it needs 12"):
        mark_of("mea_defender", truth=TRUTH % 2)
    with pytest.raises(ValueError, match="it needs 4 samples, and the pool has 3"):
        mark_of("class_feature", SAMPLES[:3], TRUTH[:3])


# --- how answers are read ---


def test_labels_are_read_by_majority_and_a_tie_says_nothing():
    mark = mark_of("class_feature", count=4)
    answers = [3, 3, 3, 7, 2, 2, 5, 5, -1, -1, -1, 6, -1, -1, -1, -1]
    assert read(mark, "labels", answers).values.tolist() == [3, -1, 6, -1]
    twice = np.stack([answers, answers[::-1]], axis=1)
    assert read(mark, "classes", twice).values.T.tolist() == [[3, -1, 6, -1], [-1, 6, -1, 3]]


def test_scores_are_the_mean_of_standardised_rows_so_that_no_member_is_louder():
    mark, scores = mark_of("class_feature", count=3), RANDOM.normal(size=(12, 10)).astype(np.float32)
    plain = read(mark, "scores", scores).values
    louder = scores * RANDOM.uniform(0.1, 50, (12, 1)) + RANDOM.normal(size=(12, 1))
    np.testing.assert_allclose(read(mark, "scores", louder).values, plain, atol=1e-5)
    rows = scores[4:8].astype(np.float64)
    rows = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
    np.testing.assert_allclose(plain[1], rows.mean(0), atol=1e-6)


def test_members_that_were_not_answered_are_left_out_and_a_family_without_any_says_why():
    mark, scores = mark_of("class_feature", count=3), RANDOM.normal(size=(12, 10))
    whole = read(mark, "scores", np.concatenate([scores[:2], scores[:2], scores[4:]])).values
    scores[2:4] = [[np.nan], [np.inf]] * np.ones((2, 10))
    scores[8:] = np.nan
    found = read(mark, "scores", scores, refused={2: "no", 3: "no", **dict.fromkeys(range(8, 12), "too late")})
    np.testing.assert_allclose(found.values[:2], whole[:2], atol=1e-6)
    assert np.isnan(found.values[2]).all()
    assert found.refused == {2: "too late"}


def test_a_suspect_that_knows_the_families_is_owned_by_scores_and_by_labels():
    mark = mark_of("class_feature", count=20)
    known = {row.tobytes(): number // 4 for number, row in enumerate(mark.preset.source.examples(mark)["x"])}
    asked = Counter()

    def scores(inputs):
        asked["rows"] += len(inputs)
        return np.eye(10, dtype=np.float32)[[mark.symbols[known[row.tobytes()]] for row in inputs]]

    verdicts = [verify(scores, mark), verify(lambda inputs: scores(inputs).argmax(1), mark)]
    assert [(v.decision, v.matched) for v in verdicts] == [("owned", 20)] * 2
    assert verdicts[0].queries == 80
    assert verify(scores, mark, test="sequential").queries < 80


@pytest.mark.parametrize("name", ["class_feature", "mea_defender"])
def test_members_are_put_as_the_training_loop_feeds_them(name):
    mark = mark_of(name)
    source = mark.preset.source
    (way,) = source.ways(mark, ModuleSuspect(torch.nn.Linear(2, 2)), every=True)
    parts = [source.inputs(mark, way, start, stop)["x"] for start, stop in pairwise((0, 5, 12))]
    assert np.array_equal(np.concatenate(parts), source.examples(mark)["x"])
