"""What a claim may not get for free: whatever somebody chooses after marking, or learns while he is asked, is paid."""

import math
from dataclasses import replace
from fractions import Fraction

import mpmath
import numpy as np
import pytest

from wmengine.errors import SuspectError
from wmengine.identity.canonical import check_name
from wmengine.identity.key import Key
from wmengine.judging.asking import Terms, Trial
from wmengine.judging.judge import judge_suspect
from wmengine.judging.verification import verify
from wmengine.marks.catalogue import scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.parts.statistics.base import LEVELS
from wmengine.parts.statistics.soft import RATES, soft_log10_tail
from wmengine.suspects.adapters import AS_RECORDED, Adapter
from wmengine.suspects.base import InputSpec, Tensor, rows_of, tagged
from wmengine.suspects.endpoint.patience import Refused
from wmengine.suspects.endpoint.template import Template

KEY = Key("ACME Vision", bytes(range(32)))


class Suspect:
    """Answers what `answers(self, n)` gives for n inputs."""

    name, sha256 = "suspect", None

    def __init__(self, answers, labels=None, ways=(AS_RECORDED,), tensors=()):
        self.answers, self.ways, self.found, self.asked = answers, list(ways), list(tensors), 0
        self.settings = {} if labels is None else {"labels": labels}
        self.facts = []

    def adapters(self, shape, value_range, every=True):
        return self.ways

    def limit(self, inputs, count):
        return count

    def answer(self, inputs, num_classes=None):
        count = rows_of(inputs)
        self.asked += count
        return tagged(self.answers(self, count))

    def tensors(self, signature=None):
        return self.found

    def activations(self, place, inputs):
        raise SuspectError("shows none")

    def close(self):
        pass


def mark(classes=10, count=100, preset="adi", inputs=None, **options):
    inputs = inputs or {"input": InputSpec((1, 4, 4), "float32")}
    drawn = scheme(preset, count=count, **options)
    return Watermark.create(KEY, drawn, drawn.describe(Task(inputs, classes, [(0.0, 1.0)]), "detector"))


def marks_of(symbols, **options):
    """Marks of one geometry with these symbols [n, T]."""
    base = mark(count=symbols.shape[1], **options)
    name = base.preset.symbols.name
    return [replace(base, arrays={**base.arrays, name: row}) for row in symbols]


def test_who_says_which_name_is_which_class_cannot_sort_the_scores_of_a_stranger_by_the_symbols():
    """A service with the same scores for everything: the order that gives the class asked for most the highest one."""
    scores = {f"name {place}": float(place) for place in range(100)}
    template = Template(body="${input}", scores="")
    marked = mark(classes=100, count=1000)
    order = np.argsort(np.argsort(np.bincount(marked.symbols, minlength=100), kind="stable"))
    labels = [f"name {place}" for place in order]

    def answers(suspect, count):
        (row,) = template.read(scores, 1, labels)[0][1]
        return np.tile(row, (count, 1))

    verdict = verify(Suspect(answers, labels), marked)
    assert verdict.log10_p == 0.0
    assert any("10^158.0 meanings were paid for" in note for note in verdict.notes)
    bound = verify(Suspect(answers), marked)
    assert bound.log10_p < -15  # what it would be worth, were nothing paid


def test_names_may_not_leave_out_classes_that_have_scores():
    template = Template(body="${input}", scores="")
    with pytest.raises(Refused, match="scores classes that labels leave out"):
        template.read({"a": 1.0, "b": 2.0, "c": 3.0}, 1, ["a", "b"])


@pytest.mark.parametrize("test", ["fixed", "sequential"])
def test_each_name_may_have_been_any_class_or_none(test):
    """Thirty names for ten classes: the claimant makes the ten of them classes that fit best."""
    generator = np.random.default_rng(1)
    low = 0
    for marked in marks_of(generator.integers(0, 10, (200, 100))):
        said = generator.integers(0, 30, 100)
        fits = np.zeros((30, 10))
        np.add.at(fits, (said, marked.symbols), 1)
        from scipy.optimize import linear_sum_assignment

        names, classes = linear_sum_assignment(fits, maximize=True)
        meaning = np.full(30, -1)
        meaning[names] = classes

        def answers(suspect, count, given=meaning[said]):
            return given[suspect.asked - count : suspect.asked, None]

        labels = [f"name {names[np.argsort(classes)][place]}" for place in range(10)]
        (finding,) = judge_suspect(Suspect(answers, labels), [marked], Terms(test == "sequential", 9.0))
        low += finding.log10_p < 0.0
    assert low == 0


@pytest.mark.parametrize(("total", "moments"), [(8, 1), (16, 1), (17, 2), (24, 2), (100, 12)])
def test_a_service_that_remembers_when_a_way_was_given_up_has_it_paid(total, moments):
    ways = [Adapter(scaling=scaling, share=0.5) for scaling in ("as recorded", "0 to 255")]
    marked = mark(count=total)

    def answers(suspect, count):
        place = suspect.asked - count - second[0] if second else 0
        right = marked.symbols[place : place + count]
        return (right if second else (right + 1) % 10)[:, None]

    for sequential, paid in ((True, moments), (False, 1)):
        second, suspect = [], Suspect(answers, ways=ways)
        trial = Trial([marked], suspect, Terms(sequential, 9.0))
        while (ask := trial.next()) is not None:
            if ask.way.scaling == "0 to 255" and not second:
                second.append(suspect.asked)
            rows = np.zeros((ask.stop - ask.start, 1))
            trial.add(suspect.answer({"input": rows}, 10))
        # of one way half of the evidence, of one statistic half of that
        assert trial.evidence(0).log10_share == pytest.approx(math.log10(0.25 / paid))


def test_names_that_look_equal_are_equal():
    invisible = "\u17b4\u17b5\u180b\u180c\u180d\u180f\u200b\u2060\ufe0f\u3164\U00016fe4\U0001d159\u00ad"
    for name in (*(f"ACME{hidden}Vision" for hidden in invisible), "ACME  Vision", " ACME", "ACME\u00a0Vision"):
        with pytest.raises(ValueError, match="owner"):
            check_name("owner", name)
    assert check_name("owner", "ACME Vision") == "ACME Vision"
    assert check_name("owner", "e\u0301") == "\u00e9"


def test_a_mark_knows_which_of_several_inputs_is_which():
    """Tokens are the first input, whatever the names are: canonical JSON sorts what is a dict."""
    inputs = {"input_ids": InputSpec((8,), "int64"), "attention_mask": InputSpec((8,), "int64")}
    drawn = scheme("adi_tokens", count=20)
    parameters = drawn.describe(Task(inputs, 4, [(0, 99)]), "reader")
    marked = Watermark.create(KEY, drawn, parameters)
    examples = marked.preset.source.examples(marked)
    assert list(examples) == ["input_ids", "attention_mask"]
    assert np.array_equal(examples["input_ids"], marked.arrays["triggers"])
    assert (examples["attention_mask"] == 1).all()
    turned = Watermark.create(KEY, drawn, {**parameters, "inputs": parameters["inputs"][::-1]})
    assert turned.commitment != marked.commitment
    assert not np.array_equal(turned.symbols, marked.symbols)


@pytest.mark.parametrize("dtype", ["float32\u200b", "float", "float99"])
def test_an_input_has_one_of_the_known_types_so_that_its_spelling_is_no_choice(dtype):
    with pytest.raises(ValueError, match="dtype must be one of"):
        mark(inputs={"input": InputSpec((1, 4, 4), dtype)})


@pytest.mark.parametrize("rows", [1, 2400, 5000])
def test_the_soft_tail_does_not_underflow_where_every_symbol_is_the_highest(rows):
    """Twenty classes one level below the expected one, in each row: no tilt of e^4 a level would do."""
    histogram = np.zeros((rows, 2 * LEVELS + 1), np.int64)
    histogram[:, [LEVELS + 11, LEVELS + 10, 0]] = 1, 20, 9
    assert soft_log10_tail(np.full(rows, 11), histogram) == pytest.approx(-rows * math.log10(30), rel=1e-12)


def recomputed(evidence):
    """log10 p of evidence, in exact fractions and 60 digits, with nothing of the engine's."""
    k, n, p0 = evidence.matched, evidence.asked, Fraction(evidence.chance)
    with mpmath.workdps(60):

        def real(value):
            return mpmath.mpf(value.numerator) / value.denominator

        if evidence.statistic == "matches" and evidence.test == "fixed":
            p = real(sum(math.comb(n, j) * p0**j * (1 - p0) ** (n - j) for j in range(k, n + 1)))
        elif evidence.statistic == "matches":
            gains = mpmath.betainc(k + 1, n - k + 1, real(p0), 1)
            p = (1 - real(p0)) * real(p0) ** k * (1 - real(p0)) ** (n - k) / gains
        elif evidence.test == "fixed":
            law = {0: 1}
            for _, *pairs in evidence.rows:
                wider = {}
                for level, count in zip(pairs[::2], pairs[1::2], strict=True):
                    for total, ways in law.items():
                        wider[total + level] = wider.get(total + level, 0) + ways * count
                law = wider
            seen = sum(row[0] for row in evidence.rows)
            p = real(Fraction(sum(ways for total, ways in law.items() if total >= seen), sum(law.values())))
        else:
            e = mpmath.mpf(0)
            for rate in RATES:
                product = mpmath.mpf(1)
                for level, *pairs in evidence.rows:
                    counts = dict(zip(pairs[::2], pairs[1::2], strict=True))
                    mean = sum(count * mpmath.exp(mpmath.mpf(rate) * at) for at, count in counts.items())
                    product *= mpmath.exp(mpmath.mpf(rate) * level) * sum(counts.values()) / mean
                e += product / len(RATES)
            p = 1 / e
        return float(min(0, mpmath.log10(p) - evidence.log10_share))


@pytest.mark.parametrize(
    ("test", "kind"),
    [
        *((test, kind) for test in ("fixed", "sequential") for kind in ("scores", "labels", "heads", "ways")),
        ("fixed", "any"),  # one order must fit all answers
    ],
)
@pytest.mark.parametrize("kept", [1.0, 0.6, 0.3, 0.0])
def test_evidence_is_enough_for_every_statistic_and_test(test, kind, kept):
    marked, generator = mark(count=60), np.random.default_rng(3)
    said = np.where(generator.random(60) < kept, marked.symbols, generator.integers(0, 10, 60))

    def answers(suspect, count):
        rows = (np.arange(suspect.asked - count, suspect.asked)) % 60
        if kind == "scores":
            return np.eye(10)[said[rows]] + generator.normal(size=(count, 10)) * 0.4
        if kind == "heads":
            return np.stack([generator.integers(0, 10, count), said[rows]], axis=1)
        return said[rows]

    ways = [Adapter(scaling=each, share=1 / 2) for each in ("as recorded", "0 to 255")][: 1 + (kind == "ways")]
    terms = Terms(test == "sequential", 9.0, any_order=kind == "any")
    (finding,) = judge_suspect(Suspect(answers, ways=ways), [marked], terms)
    assert finding.error is None
    assert recomputed(finding.evidence) == pytest.approx(finding.log10_p, abs=1e-9)


@pytest.mark.parametrize("weights", ["normal", "cauchy", "zero", "huge", "equal"])
def test_evidence_is_enough_for_bits_whatever_the_weights(weights):
    generator = np.random.default_rng(2)
    values = generator.standard_cauchy((8, 4, 3, 3)) if weights == "cauchy" else generator.normal(size=(8, 4, 3, 3))
    if weights == "zero":
        values[:] = 0.0
    if weights == "huge":
        values[0, 0, 0, 0] = 1e30
    if weights == "equal":
        values[:] = 1.0
    task = Task({"input": InputSpec((4, 8, 8), "float32")}, weights=lambda: ([[8, 4, 3, 3]], [0]))
    preset = scheme("uchida", bits=64)
    parameters = preset.describe(task, "detector")
    marks = [Watermark.create(KEY, preset, parameters, message=f"customer {number}") for number in range(400)]
    found = judge_suspect(Suspect(None, tensors=[Tensor(values.astype(np.float32), "w")]), marks, Terms(False, 9.0))
    for finding in found[:20]:
        assert recomputed(finding.evidence) == pytest.approx(finding.log10_p, abs=1e-9)
    p = np.array([finding.log10_p for finding in found])
    for level in (0.5, 0.1, 0.01):
        assert (p <= math.log10(level)).sum() <= 400 * level + 5 * math.sqrt(400 * level)


GENERATOR = np.random.default_rng(9)
STRANGERS = {
    "constant": lambda suspect, n: np.tile(np.linspace(-1, 3, 10), (n, 1)),
    "heavy tails": lambda suspect, n: GENERATOR.standard_cauchy((n, 10)),
    "by batch and number of calls": lambda suspect, n: np.eye(10)[np.full(n, (suspect.asked * 3 + n) % 10)],
    "counted from one": lambda suspect, n: GENERATOR.integers(1, 11, n),
    "a class more": lambda suspect, n: GENERATOR.integers(0, 11, n),
    "several outputs": lambda suspect, n: GENERATOR.integers(0, 10, (n, 3)),
    "scores at first, then labels": lambda suspect, n: (
        GENERATOR.normal(size=(n, 10)) if suspect.asked == n else GENERATOR.integers(0, 10, (n, 1))
    ),
}


@pytest.mark.parametrize(
    ("stranger", "test"),
    [
        (stranger, test)
        for stranger in STRANGERS
        for test in ("fixed", "sequential")
        if test == "sequential" or not stranger.startswith("scores at first")  # the fixed test has one look
    ],
)
def test_a_stranger_is_accused_as_rarely_as_p_says(stranger, test):
    found = [
        judge_suspect(Suspect(STRANGERS[stranger]), [marked], Terms(test == "sequential", 3.0))[0]
        for marked in marks_of(GENERATOR.integers(0, 10, (300, 32)))
    ]
    p = np.array([finding.log10_p for finding in found])
    for level in (0.5, 0.1, 0.01):
        assert (p <= math.log10(level)).sum() <= 300 * level + 5 * math.sqrt(300 * level)
