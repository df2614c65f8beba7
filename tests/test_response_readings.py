"""A mark of `response` read on other probes: on those that are bound as `verify` reads them, elsewhere too."""

import numpy as np
import pytest
from responding import KEY, bent_network, network, served

from benchmarks.robustness import questions
from benchmarks.robustness.readings import READ, READINGS, Reading, candidates, keep, kept, read, table
from wmengine import verify

pytestmark = pytest.mark.usefixtures("one_thread")

OTHERS = np.random.default_rng(8).integers(0, 256, (1500, 1, 8, 8), np.uint8)


def test_on_the_bound_probes_it_says_what_a_verdict_says():
    mark = served().watermark()
    probes = mark.arrays["probes"]
    (found,) = read(mark, probes, [Reading(count=len(probes), controls="b")], [network()], {"served": served()})
    assert found["scores"] == pytest.approx(verify(served(), mark, key=KEY).log10_p, abs=1e-6)


def test_probes_that_the_mark_does_not_hold_read_it_too_and_read_nothing_in_a_stranger():
    mark = served().watermark()
    suspects = {"marked": bent_network(mark), "stranger": network(9)}
    marked, stranger = read(mark, OTHERS, [Reading(count=1500, controls="b")], [network()], suspects)
    assert max(marked["scores"], marked["labels"]) < -9.0
    assert min(stranger["scores"], stranger["labels"]) > -3.0
    with pytest.raises(ValueError, match="not the base of this mark"):
        read(mark, OTHERS, [Reading(controls="b")], [network(9)], suspects)


def test_more_views_and_controls_are_the_same_probes_asked_and_explained_again():
    mark, readings = (
        served().watermark(),
        [Reading(count=1500, views=views, controls=c) for views, c in ((2, "b"), (1, "bs"))],
    )
    found = read(mark, OTHERS, readings, [network(), network(9)], {"marked": bent_network(mark)})
    assert [(each["views"], each["controls"]) for each in found] == [(2, "b"), (1, "bs")]
    assert all(each["scores"] < -9.0 for each in found)


def test_pools_hold_natural_probes_mixtures_or_both_the_undecided_first():
    mark = served().watermark()
    pools = {name: candidates(mark, name, OTHERS, network()) for name in ("natural", "undecided", "mixtures", "both")}
    assert {name: len(pool) for name, pool in pools.items()} == {
        "natural": 1500,
        "undecided": 1500,
        "mixtures": 3000,
        "both": 4500,
    }
    assert (pools["natural"] == OTHERS).all()
    assert sorted(map(bytes, pools["undecided"])) == sorted(map(bytes, OTHERS))


def test_the_table_has_a_row_for_each_reading_and_every_seed_in_it():
    first = READINGS[0]
    rows = [{"seed": seed, "network": "untouched", **vars(first), "scores": -seed, "labels": 0.0} for seed in (1, 2)]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(READINGS)
    assert (
        "| natural | 4,096 | 1 | base, student, student of another architecture | -1.0 / 0.0, -2.0 / 0.0 |" in lines[2]
    )


def test_the_table_of_questions_has_a_row_for_each_network_and_every_seed_in_it():
    rows = [
        {"seed": seed, "network": "untouched", "pool": 6144, "decision": said, "queries": 768 * seed, "log10_p": -seed}
        for seed, said in ((1, "owned"), (2, "not_proven"), (3, "owned"))
    ]
    lines = questions.table(rows).splitlines()
    assert lines[2] == "| untouched | owned, not proven, owned | 768, 1,536, 2,304 | -1.0, -2.0, -3.0 |"
    assert "| untouched | owned | 768, 2,304 |" in questions.table(rows[::2])
    assert len(lines) == 2 + len(READ)


def test_a_seed_that_is_measured_anew_takes_its_own_rows_place_alone(tmp_path):
    file = tmp_path / "rows.parquet"
    assert kept(file) == []
    keep(file, [{"seed": seed, "found": "before"} for seed in (1, 2, 2)])
    keep(file, [{"seed": seed, "found": "anew"} for seed in (3, 2)])
    assert [(row["seed"], row["found"]) for row in kept(file)] == [(1, "before"), (2, "anew"), (3, "anew")]
