"""Modules and functions that do what they should not: there is a verdict, never an error of ours; and named inputs."""

import warnings

import numpy as np
import pytest
import torch
from judged import KEY, Stub, black_box, by_heart, images, one_hot, white_box
from torch import nn

from wmengine.judging.asking import TESTS
from wmengine.judging.verification import verify
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.suspects import open_suspect
from wmengine.suspects.base import Answers, InputSpec, Tensor

SHAPE, CLASSES, COUNT = (1, 4, 4), 10, 60
MARK = black_box(SHAPE, CLASSES, COUNT)
RIGHT = by_heart(MARK, one_hot(MARK.symbols))


class StrangeError(Exception):
    """Its own words are an error too."""

    def __str__(self):
        raise RuntimeError("no words")


def in_place(rows):
    found = RIGHT(rows.copy())
    rows[...] = 0.0
    return found


def log_softmax(rows):
    with np.errstate(divide="ignore"):
        return np.log(RIGHT(rows))


def raises(error):
    def answer(rows):
        raise error

    return answer


OWNED = {
    "it writes into its inputs": in_place,
    "its scores are logarithms of 0 and 1": log_softmax,
    "its scores are huge": lambda rows: RIGHT(rows).astype(np.float64) * 1e300,
    "a list of lists": lambda rows: RIGHT(rows).tolist(),
    "float16": lambda rows: RIGHT(rows).astype(np.float16),
    "booleans": lambda rows: RIGHT(rows) > 0,
    "labels of 64 bits without sign": lambda rows: RIGHT(rows).argmax(axis=1).astype(np.uint64),
}
NOT_PROVEN = {
    "NaN": lambda rows: np.full((len(rows), CLASSES), np.nan),
    "+Inf": lambda rows: np.full((len(rows), CLASSES), np.inf),
    "-Inf": lambda rows: np.full((len(rows), CLASSES), -np.inf),
    "some +Inf": lambda rows: np.where(RIGHT(rows) > 0, np.inf, 0.0),
    "equal scores": lambda rows: np.ones((len(rows), CLASSES)),
    "labels out of range": lambda rows: np.full(len(rows), 1 << 40),
    "negative labels": lambda rows: np.full(len(rows), -7),
}
ERRORS = {
    "no classes": (lambda rows: np.zeros((len(rows), 0)), "0 classes"),
    "another number of classes": (lambda rows: np.zeros((len(rows), 7)), "7 classes and the watermark has 10"),
    "too few rows": (lambda rows: RIGHT(rows)[:-1], "no scores [32, C]"),
    "too many rows": (lambda rows: np.repeat(RIGHT(rows), 2, axis=0), "no scores [32, C]"),
    "labels that are no numbers": (lambda rows: np.full(len(rows), np.nan), "no scores [32, C]"),
    "nothing": (lambda rows: None, "no scores"),
    "no outputs": (lambda rows: (), "none"),
    "text": (lambda rows: "cat", "no scores"),
    "ragged": (lambda rows: [[1], [2, 3]], "no scores"),
    "objects": (lambda rows: np.array([object()] * len(rows)), "no scores"),
    "complex": (lambda rows: RIGHT(rows).astype(complex), "no scores"),
    "a generator": (lambda rows: (row for row in rows), "no scores"),
    "it raises": (raises(ValueError("first\nsecond")), "first second"),
    "it raises what has no words": (raises(StrangeError()), "StrangeError"),
    "it runs out of memory": (raises(MemoryError()), "MemoryError"),
    "it recurses": (raises(RecursionError("too deep")), "too deep"),
    "it stops iterating": (raises(StopIteration()), "StopIteration"),
    "it takes nothing": (lambda: None, "takes 0 positional arguments"),
}


def judged(suspect, mark=MARK, test="fixed"):
    """The verdict; what a suspect does to NumPy's warnings is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = verify(suspect, mark, test=test)
    assert "\n" not in (verdict.error or "")
    verdict.to_json()
    return verdict


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("what", OWNED)
def test_a_copy_that_answers_strangely_is_still_one(what, test):
    verdict = judged(OWNED[what], test=test)
    assert (verdict.decision, verdict.error) == ("owned", None)
    assert verdict.matched == verdict.queries


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("what", NOT_PROVEN)
def test_answers_that_say_nothing_prove_nothing(what, test):
    verdict = judged(NOT_PROVEN[what], test=test)
    assert (verdict.decision, verdict.error) == ("not_proven", None)
    assert verdict.log10_p > -2  # class 0, the first of equals, may match by chance


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("what", ERRORS)
def test_what_cannot_be_read_is_the_suspects_error_in_one_sentence(what, test):
    suspect, said = ERRORS[what]
    verdict = judged(suspect, test=test)
    assert (verdict.decision, verdict.matched, verdict.log10_p) == ("error", 0, 0.0)
    assert said.replace("32", "16") in verdict.error or said in verdict.error


def test_another_number_of_classes_from_one_batch_to_the_next_is_an_error():
    widths = iter((10, 11, 12))
    verdict = judged(lambda rows: np.zeros((len(rows), next(widths))))
    assert "changes the shape of its answers from one batch to the next" in verdict.error


@pytest.mark.parametrize(
    "answer",
    [
        lambda inputs: Answers("scores", np.zeros((3, CLASSES))),
        lambda inputs: Answers("scores", np.zeros(COUNT)),
        lambda inputs: Answers("scores", np.float64(1.0)),
        lambda inputs: Answers("labels", None),
        lambda inputs: [1, 2, 3],
        raises(StrangeError()),
    ],
)
def test_a_suspect_of_another_package_that_breaks_its_contract_is_an_error_too(answer):
    suspect = Stub()
    suspect.answer = lambda inputs, num_classes=None: answer(inputs)
    assert judged(suspect).decision == "error"


def test_a_suspect_that_fails_while_it_is_opened_up_is_an_error():
    for name in ("adapters", "limit", "tensors"):
        suspect = Stub(RIGHT, weights=[Tensor(np.ones((8, 4, 3, 3), np.float32), "w")])
        setattr(suspect, name, raises_any)
        mark = MARK if name != "tensors" else white_box([(8, 4, 3, 3)])
        verdict = judged(suspect, mark)
        assert (verdict.decision, "stub cannot be judged (it broke)" in verdict.error) == ("error", True)


def raises_any(*given):
    raise RuntimeError("it broke")


@pytest.mark.parametrize("values", [np.nan, np.inf, -np.inf, 0.0, 1e38])
def test_weights_that_are_no_numbers_match_nothing(values):
    shape = (8, 4, 3, 3)
    for preset in ("sketch", "uchida"):
        mark = white_box([shape], preset=preset)
        verdict = judged(Stub(weights=[Tensor(np.full(shape, values, np.float32), "w")]), mark)
        assert (verdict.decision, verdict.error) == ("not_proven", None)


def test_a_module_that_writes_into_its_inputs_is_asked_for_the_same_again():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []
            self.layer = nn.Linear(16, CLASSES)

        def forward(self, x):
            self.seen.append(x.clone())
            x.zero_()
            return self.layer(x.flatten(1))

    module = InPlace()
    for _ in range(2):
        judged(module)
    half = len(module.seen) // 2
    assert all(torch.equal(*pair) for pair in zip(module.seen[:half], module.seen[half:], strict=True))
    assert torch.equal(torch.cat(module.seen[:2]), torch.from_numpy(images(MARK)))


def test_activations_are_read_from_inputs_that_a_suspect_cannot_spoil():
    """The questions are kept for the next suspect."""
    shapes = [[8, 16], [10, 8]]
    preset = scheme("deepsigns", bits=8, groups=4)
    task = Task({"x": InputSpec(SHAPE, "float32")}, None, [[0.0, 1.0]], weights=lambda: (shapes, [0, 1]))
    mark = Watermark.create(KEY, preset, preset.describe(task, "detector"))

    class InPlace(nn.Module):
        def __init__(self, spoils):
            super().__init__()
            self.first, self.second, self.spoils = nn.Linear(16, 8), nn.Linear(8, 10), spoils

        def forward(self, x):
            y = self.second(self.first(x.flatten(1)))
            if self.spoils:
                x.zero_()
            return y

    plain, spoils = InPlace(False), InPlace(True)
    spoils.load_state_dict(plain.state_dict())
    before = judged(plain, mark)
    assert judged(spoils, mark).matched == before.matched == judged(plain, mark).matched
    assert (before.decision, before.error, before.total) == ("not_proven", None, 8)
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 10))
    verdict = judged(narrow, mark)
    assert (verdict.decision, verdict.total) == ("not_proven", 0)
    assert any("nothing to read" in note for note in verdict.notes)


# --- named inputs -----------------------------------------------------------------------------------------------------

LENGTH, VOCABULARY = 6, 50
INPUTS = {"input_ids": InputSpec((LENGTH,), "int64"), "attention_mask": InputSpec((LENGTH,), "int64")}


@pytest.fixture(scope="module")
def text():
    """A mark in the answers of a model of texts, of two inputs."""
    preset = scheme("adi_tokens", count=COUNT)
    task = Task(INPUTS, CLASSES, [[0, VOCABULARY - 1]])
    return Watermark.create(KEY, preset, preset.describe(task, "reader"))


@pytest.fixture(scope="module")
def learned(text):
    return {row.tobytes(): label for row, label in zip(text.arrays["triggers"], text.symbols, strict=True)}


def test_a_function_gets_several_inputs_by_name(text, learned):
    def answer(inputs):
        assert list(inputs) == ["input_ids", "attention_mask"]
        assert [(rows.dtype, rows.shape[1:]) for rows in inputs.values()] == [(np.int64, (LENGTH,))] * 2
        assert (inputs["attention_mask"] == 1).all()
        found = np.array([learned[row.tobytes()] for row in inputs["input_ids"]])
        inputs["input_ids"][...] = 0
        inputs.clear()
        return found

    verdict = judged(answer, text)
    assert (verdict.decision, verdict.matched) == ("owned", COUNT)


class Reader(nn.Module):
    """Knows the triggers by heart; its sums show which input was which."""

    def __init__(self, learned):
        super().__init__()
        self.learned = learned

    def read(self, ids, mask):
        assert (mask == 1).all()
        return torch.tensor([self.learned[row.numpy().tobytes()] for row in ids])


class ByName(Reader):
    def forward(self, attention_mask, input_ids):
        return self.read(input_ids, attention_mask)


class ByPlace(Reader):
    def forward(self, ids, mask):
        return self.read(ids, mask)


class ByKeyword(Reader):
    def forward(self, **inputs):
        return self.read(inputs["input_ids"], inputs["attention_mask"])


class One(Reader):
    def forward(self, input_ids):
        return self.read(input_ids, torch.ones(1))


class Three(Reader):
    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.read(input_ids, attention_mask)


@pytest.mark.parametrize("kind", [ByName, ByPlace, ByKeyword])
def test_a_module_gets_several_inputs_by_its_names_or_else_in_order(text, learned, kind):
    verdict = judged(kind(learned), text)
    assert (verdict.decision, verdict.matched) == ("owned", COUNT)


@pytest.mark.parametrize("kind", [One, Three])
def test_too_few_or_too_many_inputs_are_the_suspects_error(text, learned, kind):
    verdict = judged(kind(learned), text)
    assert verdict.decision == "error"
    assert "argument" in verdict.error


def test_a_function_of_one_input_does_not_read_a_dict(text):
    verdict = judged(lambda rows: rows @ np.ones((LENGTH, CLASSES)), text)
    assert verdict.decision == "error"
    picture = verify(ByPlace({}), MARK)
    assert picture.decision == "error"
    assert "mask" in picture.error


def test_a_suspect_that_is_open_already_serves_many_marks(text, learned):
    """And the facts of one verdict do not reach the next."""
    suspect = open_suspect(ByName(learned))
    first, second = (verify(suspect, text) for _ in range(2))
    assert (first.facts, first.log10_p) == (second.facts, second.log10_p)
    assert verify(suspect, MARK).decision == "error"
    assert verify(suspect, text).facts == first.facts
