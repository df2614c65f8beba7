"""What the owner gives and scoring reads is bound into a mark before its symbols; what only ranks never proves."""

import math
from dataclasses import replace
from itertools import pairwise

import described
import numpy as np
import pytest
import torch

from wmengine import Key, Watermark, endpoint, scheme, verify
from wmengine.judging.asking import Terms, Trial
from wmengine.marking.embedder import Embedder
from wmengine.marks.catalogue import SCHEMES, registered
from wmengine.marks.preset import Preset
from wmengine.parts.base import Task
from wmengine.parts.statistics.base import LEVELS, Look
from wmengine.parts.statistics.either import Either
from wmengine.parts.statistics.matches import Matches
from wmengine.parts.statistics.rank import Rank
from wmengine.parts.symbols import Given, Labels, OneOf
from wmengine.parts.training.mixed import Mixed
from wmengine.parts.triggers.samples import SampleTriggers, keyed_picks
from wmengine.suspects.base import InputSpec
from wmengine.testing import check_preset, small_network

URL = "http://127.0.0.1:9/v2/models/other"
KEY = Key("owner", bytes(range(32)))
OWN = Preset("own_samples", 1, SampleTriggers(), Labels(40), Either(), Mixed(), "exact", "a test's own")
RANDOM = np.random.default_rng(5)
SAMPLES = RANDOM.random((120, 1, 8, 8)).astype(np.float32)
TRUTH = RANDOM.integers(0, 10, 120)


def task(samples: np.ndarray = SAMPLES, truth: np.ndarray | None = TRUTH) -> Task:
    inputs = {"x": InputSpec((1, 8, 8), "float32")}
    return Task(inputs, 10, [(0.0, 1.0)], samples={"x": samples}, sample_labels=truth)


def mark_of(task: Task, key: Key = KEY) -> Watermark:
    material = OWN.gather(task)
    return Watermark.create(key, OWN, OWN.describe(task, "detector", material), material=material)


@pytest.mark.slow
def test_a_preset_of_the_owners_samples_keeps_every_promise():
    samples = torch.rand(60, 1, 8, 8), torch.arange(60) % 10
    report = check_preset(replace(OWN, symbols=Labels(30)), samples=samples, steps=100)
    assert report.log10_p < -9


@pytest.mark.parametrize("changed", ["a sample", "what it is"])
def test_other_material_makes_other_triggers_and_other_symbols(changed):
    samples, truth = SAMPLES.copy(), TRUTH.copy()
    if changed == "a sample":
        samples[7] = 1 - samples[7]
    else:
        truth[7] = (truth[7] + 1) % 10
    with registered(OWN):
        first, second = mark_of(task()), mark_of(task(samples, truth))
        assert not np.array_equal(first.symbols, second.symbols)
        assert not np.array_equal(first.arrays["triggers"], second.arrays["triggers"])


def test_triggers_are_samples_of_the_pool_each_once_and_the_key_picks_them():
    with registered(OWN):
        first, other = mark_of(task()), mark_of(task(), Key("owner", bytes(32)))
        pool = {sample.tobytes() for sample in first.arrays["samples"]}
        picked = [trigger.tobytes() for trigger in first.arrays["triggers"]]
        assert set(picked) <= pool
        assert len(set(picked)) == 40
        assert picked != [trigger.tobytes() for trigger in other.arrays["triggers"]]


def test_a_mark_with_another_pool_than_it_was_made_with_is_refused():
    with registered(OWN):
        mark = mark_of(task())
        with pytest.raises(ValueError, match="not the material that the mark was made with"):
            replace(mark, arrays={**mark.arrays, "samples": 255 - mark.arrays["samples"]})
        with pytest.raises(ValueError, match="not the material that the parameters were described with"):
            Watermark.create(KEY, OWN, mark.parameters, material={"samples": mark.arrays["samples"]})
        parameters = {**mark.parameters, "material": {}}
        with pytest.raises(ValueError, match="material must hold digests"):
            OWN.check(parameters)


def test_a_mark_of_samples_is_derived_again_from_its_file(tmp_path):
    with registered(OWN):
        mark = mark_of(task())
        mark.save(tmp_path / "own.wm")
        loaded = Watermark.load(tmp_path / "own.wm")
        loaded.check_derivation(KEY)
        assert loaded.commitment == mark.commitment


@pytest.mark.parametrize(
    ("samples", "error", "said"),
    [
        (None, ValueError, "needs samples="),
        (torch.rand(20, 1, 8, 8), ValueError, "it needs 40 samples, and the pool has 20"),
        (torch.rand(60, 1, 9, 9), ValueError, r"samples must be \[n, 1, 8, 8\]"),
        ({"x": torch.rand(60, 1, 8, 8)}, TypeError, "what the sample is"),
        ((torch.rand(60, 1, 8, 8), torch.zeros(59, dtype=torch.int64)), ValueError, "60 class numbers"),
        ((torch.rand(60, 1, 8, 8), torch.full((60,), 10)), ValueError, "from 0 to 9"),
    ],
)
def test_wrong_samples_get_one_clear_error(samples, error, said):
    with registered(OWN), pytest.raises(error, match=said):
        Embedder(
            small_network(), KEY, [OWN], num_classes=10, sample=torch.rand(4, 1, 8, 8), name="n",
            value_range=(0, 1), samples=samples,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("need", "without", "said"),
    [
        ("samples", {"samples": {}}, "needs samples=, inputs of the task"),
        ("labels", {"sample_labels": None}, "needs to know what its samples are"),
        ("targets", {"targets": None}, r"needs samples=\(inputs, targets\)"),
        ("controls", {"controls": ()}, "needs controls=, networks of the task"),
        ("file", {"integers": ()}, "use wmengine.emmark"),
    ],
)
def test_a_scheme_says_which_of_what_it_needs_is_missing(need, without, said):
    presets = [preset for preset in SCHEMES.values() if need in preset.needs]
    assert presets
    for preset in presets:
        lacking = replace(described.OWN.get(preset.name, described.TASK), **without)
        with pytest.raises(ValueError, match=f"'{preset.name}': .*{said}"):
            preset.describe(lacking, "n", preset.gather(lacking))


@pytest.mark.parametrize("name", ["adi", "margin", *described.POOLED])
@pytest.mark.parametrize("inputs", [{"ids": "int64"}, {"picture": "float32", "flag": "float32"}], ids=["tokens", "two"])
def test_other_inputs_are_refused_with_the_schemes_that_take_them(name, inputs):
    """Before any network is asked, which would only say that it fails."""
    given = {each: InputSpec((16,), dtype) for each, dtype in inputs.items()}
    rows = {each: RANDOM.integers(0, 9, (40, 16)).astype(dtype) for each, dtype in inputs.items()}
    other = replace(described.POOL, inputs=given, samples=rows, value_range=[[0, 9]], controls=[Unasked()] * 2)
    other = replace(other, model=Unasked())
    preset = SCHEMES[name]
    with pytest.raises(ValueError, match=f"scheme '{name}': .*'adi_tokens' has some .*'adi_table'"):
        preset.describe(other, "n", preset.gather(other))


def test_bytes_are_to_be_floats():
    bytes_of = replace(described.TASK, inputs={"input": InputSpec((1, 8, 8), "uint8")})
    with pytest.raises(ValueError, match="takes uint8: turn bytes into floats before mix"):
        SCHEMES["adi"].describe(bytes_of, "n")


class Unasked(torch.nn.Module):
    def forward(self, *_, **__):
        raise AssertionError("nobody asks it")


def test_keyed_picks_are_uniform_without_repetition():
    picks = np.stack([keyed_picks(number.to_bytes(32, "little"), 3, 5) for number in range(6000)])
    assert all(len(set(row)) == 3 for row in picks[:100].tolist())
    counts = np.stack([np.bincount(picks[:, place], minlength=5) for place in range(3)])
    assert np.abs(counts - 1200).max() < 5 * math.sqrt(1200)


def test_rank_is_a_p_value_under_exchangeable_null_models():
    random = np.random.default_rng(1)
    p = []
    for _ in range(4000):
        matched = random.binomial(50, 0.3, size=20)
        test = Rank().begin_among(matched[1:].tolist(), 50)
        test.add(Look(int(matched[0]), np.zeros(50, int), np.zeros((50, 2 * LEVELS + 1), int)))
        p.append(10**test.log10_p)
    for level in (0.05, 0.1, 0.3):
        assert np.mean(np.array(p) <= level + 1e-12) <= level + 4 * math.sqrt(level / 4000)


def test_rank_falls_with_matches_and_never_below_one_among_all():
    found = []
    for matched in (0, 10, 20, 50):
        test = Rank().begin_among([5, 15, 15, 30], 50)
        test.add(Look(matched, np.zeros(50, int), np.zeros((50, 2 * LEVELS + 1), int)))
        found.append(10**test.log10_p)
    assert found == pytest.approx([1.0, 4 / 5, 2 / 5, 1 / 5])
    assert all(later < earlier for earlier, later in pairwise(found))


def plausible(choices: np.ndarray) -> Watermark:
    """A mark whose claimant wrote the candidates of each sample himself."""
    preset = scheme("multi_view", count=20, choices=4)
    material = {**preset.gather(replace(task(), controls=[small_network()])), "plausible": choices}
    return Watermark.create(KEY, preset, preset.describe(task(), "detector", material), material=material)


@pytest.mark.parametrize(
    "choices",
    [[3, 3, 3, 3], [0, 1, 2, 10], [-1, 0, 1, 2], [5, 1, 2, 5]],
)
def test_candidates_that_are_not_different_classes_make_no_mark(choices):
    with pytest.raises(ValueError, match="candidates of a label must be different classes"):
        plausible(np.tile(choices, (120, 1)))


def test_a_sample_of_no_class_has_no_wrong_ones():
    preset = scheme("exponential_weighting", count=20)
    material = {**preset.gather(task()), "truth": np.full(120, 2**63 - 9)}
    with pytest.raises(ValueError, match="must be classes from 0 to 9"):
        Watermark.create(KEY, preset, preset.describe(task(), "detector", material), material=material)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"statistic": Rank()}, "its null is 'rank'"),
        ({"symbols": Given(10), "statistic": Matches()}, "symbols for the nulls rank only"),
        ({"symbols": OneOf(10), "statistic": Matches()}, "symbols for the nulls bound, rank only"),
        ({"symbols": OneOf(10), "null": "bound"}, "only matches, or a rank"),
    ],
)
def test_a_preset_that_claims_more_than_its_symbols_allow_is_none(parts, said):
    with pytest.raises(ValueError, match=said):
        replace(OWN, **parts)


def test_an_order_of_names_given_at_verification_moves_nothing_that_a_source_reads():
    preset = scheme("adi_multilabel", bits=20)
    mark = Watermark.create(KEY, preset, preset.describe(task(), "detector"))
    asked = endpoint(URL, labels=[f"n{number}" for number in range(10)])
    error = Trial([mark], asked, Terms(sequential=False, log10_bar=9.0)).error
    assert "leave labels= out" in str(error)


def test_in_a_dispute_nothing_is_sent_beside_the_triggers():
    preset = scheme("adi", count=20)
    mark = Watermark.create(KEY, preset, preset.describe(task(), "detector"))
    with pytest.raises(ValueError, match="takes no inputs="):
        verify("suspect.onnx", mark, key=KEY, adversarial=True, inputs={"flag": 1.0})
    asked = endpoint(URL, request={"body": {"shots": [1, 2], "x": "${inputs}"}, "scores": "/y"})
    with pytest.raises(ValueError, match="takes no request="):
        verify(asked, mark, key=KEY, adversarial=True)
