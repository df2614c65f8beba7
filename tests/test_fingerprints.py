"""Fingerprints rank a suspect among networks made without the owner's, and never prove anything."""

import copy
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import wmengine
from wmengine import Key, Watermark, fingerprint, scheme, verify
from wmengine.demo import build_network, load_digits, train
from wmengine.marks.catalogue import registered
from wmengine.suspects.answers import ABSTAINED
from wmengine.suspects.base import Answers
from wmengine.testing import small_network

KEY = Key("owner", bytes(range(32)))
FINGERPRINTS = ("ipguard", "conferrable", "known_mistakes", "posthoc")


@pytest.fixture(scope="module")
def trained():
    """The owner's network, networks made apart, and a copy that learned on; of digits."""
    data = load_digits()
    own = train(build_network(0), data.owner, 6, seed=0)
    apart = [train(build_network(seed), data.thief, 4, seed=seed) for seed in range(1, 9)]
    return data, own, apart, train(copy.deepcopy(own), data.thief, 2, seed=9)


@pytest.mark.slow
@pytest.mark.parametrize("name", FINGERPRINTS)
def test_a_network_ranks_before_those_made_apart_and_stays_as_it_is(trained, name):
    data, own, apart, learned_on = trained
    before = {key: value.clone() for key, value in own.state_dict().items()}
    options = {"conferrable": {"count": 20, "distilling": 30}, "known_mistakes": {"count": 3}}.get(name, {})
    mark = fingerprint(
        own,
        KEY,
        scheme(name, **{"count": 40, **options}),
        samples=data.test if name == "known_mistakes" else tuple(rows[:200] for rows in data.owner),
        controls=apart[:6],
        num_classes=10,
        name="detector",
        value_range=(0, 1),
    )
    assert all(torch.equal(before[key], value) for key, value in own.state_dict().items())
    verdicts = [verify(each, mark, key=KEY) for each in (own, learned_on, *apart[6:])]
    assert [verdict.decision for verdict in verdicts] == ["not_proven"] * 4
    assert all("only ranks" in str(verdict.notes) for verdict in verdicts)
    m = mark.parameters["controls"]
    assert m == (3 if name == "conferrable" else 6)
    p = [10**verdict.log10_p for verdict in verdicts]
    assert min(p) >= 1 / (m + 1) - 1e-12
    assert p[0] <= min(p[1:]) + 1e-12
    null = (mark.arrays["null_answers"] == mark.symbols).sum(axis=1)
    assert p[0] == pytest.approx((1 + (null >= verdicts[0].matched).sum()) / (m + 1))


@pytest.mark.slow
def test_a_network_and_its_copy_are_surer_of_what_the_network_was_trained_on():
    data = load_digits()
    private = tuple(rows[:250] for rows in data.owner)
    own = train(build_network(0), private, 40, seed=0)
    apart = [train(build_network(seed), data.thief, 6, seed=seed) for seed in range(1, 9)]
    samples = tuple(torch.cat([ours, public[:250]]) for ours, public in zip(private, data.test, strict=True))
    mark = fingerprint(
        own, KEY, scheme("dataset_inference", bits=150), samples=samples, controls=apart[:6], num_classes=10,
        name="detector", value_range=(0, 1),
    )  # fmt: skip
    copied = train(copy.deepcopy(own), data.thief, 2, seed=9)
    found = [verify(each, mark, key=KEY) for each in (own, copied, *apart[6:])]
    assert {verdict.decision for verdict in found} == {"not_proven"}
    assert [round(10**verdict.log10_p * 7) for verdict in found[:2]] == [1, 1], "first among six"
    assert max(verdict.matched for verdict in found[2:]) < found[1].matched < found[0].matched


def test_of_two_samples_the_surer_is_read_and_of_labels_the_only_right_one():
    samples = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(40) % 10
    mark = fingerprint(
        small_network(), KEY, scheme("dataset_inference", bits=3), samples=samples, controls=[small_network(1)],
        num_classes=10, name="n", value_range=(0, 1),
    )  # fmt: skip
    (first, second, third), read = mark.arrays["classes"].reshape(3, 2), mark.preset.source.interpret
    rows = np.arange(3)
    scores = np.zeros((3, 2, 10), np.float32)
    scores[rows, 0, mark.arrays["classes"][::2]], scores[rows, 1, mark.arrays["classes"][1::2]] = (1, 2, 3), (3, 2, 1)
    margins = read(mark, rows, Answers("scores", scores.reshape(6, 10))).values
    assert margins.tolist() == [[1, 3], [2, 2], [3, 1]]
    labels = np.array([first[0], (first[1] + 1) % 10, *second, -1, third[1]])
    found = read(mark, rows, Answers("labels", labels, refused={4: "gone", 2: "late", 3: "late"}))
    assert found.values.tolist() == [0, ABSTAINED, ABSTAINED]
    assert found.refused == {1: "late"}, "half a pair says nothing"
    assert np.isnan(read(mark, rows[:1], Answers("scores", np.full((2, 10), np.nan))).values).all()


def test_halves_of_the_samples_must_share_a_class():
    samples = torch.rand(40, 1, 8, 8), torch.arange(40) // 20
    with pytest.raises(ValueError, match=r"'dataset_inference': the first half .* no class in common"):
        fingerprint(
            small_network(), KEY, "dataset_inference", samples=samples, controls=[small_network(1)], num_classes=10,
            name="n", value_range=(0, 1),
        )  # fmt: skip


@pytest.mark.slow
def test_frontier_points_are_learned_and_then_rank_first(trained):
    data, own, apart, _ = trained
    model = copy.deepcopy(own)
    embedder = wmengine.Embedder(
        model,
        KEY,
        [scheme("frontier", count=30, push=0.2)],
        num_classes=10,
        sample=data.owner[0][:8],
        name="detector",
        value_range=(0, 1),
        samples=data.owner,
        controls=apart[:6],
    )
    assert verify(model, embedder.watermarks()[0]).matched < 25  # half of them are wrong before
    train(model, data.owner, 8, seed=3, embedder=embedder)
    verdict = verify(model, embedder.watermarks()[0])
    assert (verdict.decision, verdict.log10_p) == ("not_proven", pytest.approx(-math.log10(7)))


@pytest.mark.parametrize("name", [*FINGERPRINTS, "frontier"])
def test_without_controls_there_is_nothing_to_rank_among(name):
    with pytest.raises(ValueError, match="needs controls=, networks of the task made without this one"):
        fingerprint(
            small_network(), KEY, name, samples=torch.rand(200, 1, 8, 8), controls=[], num_classes=10, name="n",
            value_range=(0, 1),
        )  # fmt: skip


class Maps(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = small_network()

    def forward(self, x):
        return {"maps": self.inner(x)[:, :, None]}


def test_a_model_that_does_not_answer_with_logits_is_said_to_be_so():
    with pytest.raises(ValueError, match=r"answers logits \[n, C\], and this one answers \[[0-9]+, 10, 1\]"):
        fingerprint(
            Maps(), KEY, "posthoc", samples=torch.rand(200, 1, 8, 8), controls=[small_network(1)], num_classes=10,
            name="n", value_range=(0, 1),
        )  # fmt: skip


def test_nobody_is_told_to_train_longer_for_what_only_ranks(recwarn):
    samples = torch.from_numpy(np.random.default_rng(0).random((60, 1, 8, 8), np.float32))
    mark = fingerprint(
        small_network(), KEY, scheme("posthoc", count=20), samples=samples, controls=[small_network(1)],
        num_classes=10, name="n", value_range=(0, 1),
    )  # fmt: skip
    assert not [each for each in recwarn if "prove itself" in str(each.message)]
    assert mark.preset.null == "rank"


def test_a_rank_is_no_evidence_that_a_scan_shares_out_among_its_rows(tmp_path):
    golden = Path(__file__).parent / "golden"
    shutil.copyfile(golden / "sketch-1.wm", tmp_path / "sketch.wm")
    (tmp_path / "sketch.wm").chmod(0o600)
    proves = Watermark.load(tmp_path / "sketch.wm")
    with registered(replace(proves.preset, name="ranks", null="rank")):
        ranks = replace(proves, scheme="ranks")
        table = wmengine.scan(golden / "sketch-1.onnx", [proves, ranks], out=tmp_path / "rows.parquet", jobs=1)
    rows = {row["scheme"]: row for row in table.to_pylist()}
    assert rows["ranks"]["log10_p"] == rows["sketch"]["log10_p"] < -15
    assert (rows["ranks"]["decision"], rows["ranks"]["q_value"]) == ("not_proven", 1.0)
    assert rows["sketch"]["q_value"] == pytest.approx(2 * 10 ** -rows["sketch"]["log10_e"])
