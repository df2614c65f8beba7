"""The robustness table is rows: what they came to, which lines there are, and pages made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_task import STRANGER, UNTOUCHED, WORSE, WORSE_TWICE, Counted, a_row, every

from benchmarks import results
from benchmarks.robustness import cells, command, grid, rules, tables
from benchmarks.robustness.grid import LINES, TWIN_LINE, Cell, Line
from benchmarks.robustness.problems import DIGITS, PROBLEMS
from wmengine.attacks import ATTACKS
from wmengine.cli import main


def test_a_mark_is_proven_or_removed_or_the_attack_failed_anyway() -> None:
    cell = Cell(DIGITS, "adi", 1, UNTOUCHED)
    assert rules.outcome(a_row(cell, log10_p=-9.01, loss=40.0)) == "proven"
    assert rules.outcome(a_row(cell, log10_p=-9.0, loss=5.01)) == "failed anyway"
    assert rules.outcome(a_row(cell, log10_p=-9.0, loss=5.0)) == "removed"
    with pytest.raises(ValueError, match="no mark"):
        rules.outcome(a_row(cell, log10_p=None))


def test_soks_rule_fits_a_normal_law_to_models_without_the_mark() -> None:
    cell = Cell(DIGITS, "adi", 1, UNTOUCHED)
    nulls = [a_row(cell, matched=matched) for matched in (8, 10, 12)]
    threshold = rules.sok_threshold(nulls)
    assert threshold == pytest.approx(0.10 + 1.6449 * 0.02, abs=1e-5)
    assert rules.sok_threshold(nulls[:1]) is None
    assert rules.sok_success(a_row(cell, matched=13, loss=4.9), threshold)
    assert not rules.sok_success(a_row(cell, matched=14, loss=4.9), threshold), "the mark is still there"
    assert not rules.sok_success(a_row(cell, matched=13, loss=5.0), threshold), "the copy is worth nothing"
    assert rules.share(a_row(cell, matched=0, total=0)) == 0.0, "nothing to read the mark from"


def a_table(counted: Counted, **changes: Any) -> list[list[str]]:
    problem = counted.problem(presets=("adi", "sketch"))
    found = {}
    for seed, p in zip((1, 2, 3), (-30.0, -7.25, -8.0), strict=True):
        cell = Cell(problem, "adi", seed, WORSE)
        found[cell.key] = a_row(cell, **{"log10_p": p, **changes})
        for line in (STRANGER, Line("stranger 2", base="stranger 2")):
            null = Cell(problem, "adi", seed, line)
            found[null.key] = a_row(null, matched=10 + seed, log10_p=-0.25 * seed)
    missing = Cell(problem, "sketch", 3, WORSE)
    found[missing.key] = a_row(missing, log10_p=0.0)
    lines = (UNTOUCHED, WORSE, STRANGER, Line("stranger 2", base="stranger 2"))
    text = tables.table(problem, problem.presets, found, lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_table_shows_every_seed_the_worst_marked_and_what_is_missing(counted: Counted) -> None:
    head, _, untouched, worse, strangers = a_table(counted)
    assert head == ["attack", "adi", "sketch"]
    assert untouched == ["untouched", "not run", "not run"]
    assert worse[1] == "-30.0 **-7.2** -8.0 ✗<br>loss 0.5, SoK 3/3"
    assert worse[2] == "not run not run **0.0** ✗<br>loss 0.5, SoK not run"
    assert strangers == ["models without the mark", "least of 6: -0.8", "not run"]


def test_the_heading_names_every_commit_and_version_that_its_rows_come_from() -> None:
    rows = [
        a_row(Cell(DIGITS, "adi", 1, LINES[0]), network_commit="older00"),
        a_row(Cell(DIGITS, "adi", 2, LINES[0]), commit="newer00", versions='{"torch": "2.14.0"}', date="2030-02-01"),
    ]
    said = tables.heading(DIGITS, {row.key: row for row in rows})
    assert "torch 2.13.0 and 2.14.0; commit abc1234, newer00, older00." in said


def test_a_step_with_a_mark_is_shown_over_a_plain_one_where_it_was_measured() -> None:
    measured = {"what": results.step_name("adi"), "peers": [{"ratio": {"median": 0.8}}]}
    on_cpu = {"environment": {"slug": "cpu"}, "rows": [{**measured, "what": "another"}, measured]}
    steps = tables.steps_over_plain([on_cpu], ("adi", "sketch"))
    assert steps == {"adi": 1.25}
    assert tables.steps_over_plain([{**on_cpu, "environment": {"slug": "some-gpu"}}], ("adi",)) == {}
    row = a_row(Cell(DIGITS, "adi", 1, LINES[0]))
    shown = {
        line.split("|")[1].strip(): line for line in tables.heading(DIGITS, {row.key: row}, steps).splitlines()[2:]
    }
    assert shown["network"].endswith("| step over plain |")
    assert shown["adi"].endswith("| 1.25 |")
    assert shown["sketch"].endswith("| not run |")
    assert shown["without a mark"].endswith("|  |")
    assert "step over plain" not in tables.heading(DIGITS, {row.key: row})


def test_a_cell_whose_copies_are_worth_nothing_is_set_apart(counted: Counted) -> None:
    assert a_table(counted, loss=5.01)[3][1] == "-30.0 **-7.2** -8.0 †<br>loss 5.0, SoK 3/3"
    assert a_table(counted, loss=4.99)[3][1] == "-30.0 **-7.2** -8.0 ✗<br>loss 5.0, SoK 3/3"


def test_the_table_of_statistics_reads_answers_as_scores_and_as_labels(counted: Counted) -> None:
    problem = counted.problem()
    rows = [a_row(Cell(problem, "adi", seed, UNTOUCHED)) for seed in (1, 2, 3)]
    text = tables.statistics_table({row.key: row for row in rows}, problem, [UNTOUCHED, WORSE])
    lines = text.splitlines()
    assert "| untouched | sketch, weights | not run | not run | not run | not run |" in lines
    scores = "-30.3 -30.3 -30.3 | -29.0 -29.0 -29.0 | -30.0 -30.0 -30.0"
    assert f"| untouched | adi, scores | 60 60 60 of 100 | {scores} |" in lines
    assert f"| untouched | adi, labels | 60 60 60 of 100 | {scores.replace('29', '28')} |" in lines
    assert not any("worse" in line for line in lines)


def test_the_picture_is_1200_pixels_wide_and_holds_what_it_was_drawn_from(counted: Counted, tmp_path: Path) -> None:
    problem = counted.problem()
    row = a_row(Cell(problem, "adi", 1, WORSE), loss=9.0)
    (tmp_path / "picture.png").write_bytes(tables.picture(problem, problem.presets, {row.key: row}, [UNTOUCHED, WORSE]))
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width == 1200
        assert picture.info["Source"] == tables.source_of({row.key: row})


def test_published_pages_and_pictures_are_those_of_the_rows() -> None:
    found = {name: cells.read(tables.OUT, name) for name in PROBLEMS}
    for name, text in tables.published(found).items():
        assert f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->" in tables.PAGES[name].read_text(encoding="utf-8")
    for name, problem in PROBLEMS.items():
        for group in tables.groups_of(problem):
            picture = tables.picture_of(problem, group)
            assert picture.exists() == bool(found[name])
            if found[name]:
                with Image.open(picture) as drawn:
                    assert drawn.info["Source"] == tables.source_of(found[name])


def test_a_preset_has_the_lines_that_are_planned_for_it_and_a_line_that_nobody_has_is_not_shown(
    counted: Counted,
) -> None:
    problem = counted.problem(presets=("adi", "sketch"), planned={"sketch": ("untouched",), "adi": ("unt*", "worse")})
    cells_of_seed = [cell for cell in every(problem, seeds=(1,)) if cell.preset != "none"]
    assert [(cell.preset, cell.line.label) for cell in cells_of_seed] == [
        ("adi", "untouched"),
        ("adi", "worse"),
        ("sketch", "untouched"),
    ]
    rows = tables.table(problem, problem.presets, {}, (UNTOUCHED, WORSE, WORSE_TWICE)).splitlines()[2:]
    assert rows == ["| untouched | not run | not run |", "| worse | not run |  |"]


def test_many_presets_have_a_table_for_each_place_where_a_mark_may_lie(counted: Counted) -> None:
    assert tables.groups_of(counted.problem(presets=("adi", "sketch"))) == {"": ("adi", "sketch")}
    groups = tables.groups_of(DIGITS)
    assert set(groups) == {"white-box", "black-box"}
    assert sorted(preset for presets in groups.values() for preset in presets) == sorted(DIGITS.presets)


def test_every_line_is_of_an_attack_and_of_options_that_there_are() -> None:
    asked = command.wanted()
    assert {step.attack for line in LINES for step in line.steps} <= ATTACKS.keys()
    keys = [cell.key for every in asked.values() for cell in every]
    assert len(set(keys)) == len(keys), "two lines measure the same"
    labels = [line.label for line in (*LINES, TWIN_LINE)]
    assert len(set(labels)) == len(LINES)
    assert not any("," in label for label in labels), "--attacks separates its names by commas"


def test_lines_are_chosen_by_label_or_by_a_pattern() -> None:
    assert [line.label for line in grid.chosen(["ftal", "noise 1*"])] == ["ftal", "noise 1/700", "noise 1"]
    assert grid.chosen(None) == [*LINES, *grid.SERVED_LINES]
    with pytest.raises(ValueError, match=r"'prune\*' is all that begin so"):
        grid.chosen(["prune"])


def test_the_command_lists_cells_and_names_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = a_row(Cell(DIGITS, "adi", 2, LINES[0]))
    cells.write(tmp_path, row)
    arguments = ["bench", "robustness", "--problem", "digits", "--presets", "adi", "--out", str(tmp_path)]
    assert main([*arguments, "--attacks", "untouched", "--list"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["digits:", "6", "cells,", "5", "missing"],
        ["none", "untouched", "(1)", "(2)", "(3)"],
        ["adi", "untouched", "(1)", "2", "(3)"],
    ]
    for wrong, said in {
        ("--problem", "mnist"): "no problem 'mnist'",
        ("--presets", "none"): "no preset 'none'",
        ("--attacks", "magic"): "no line 'magic'",
        ("--seeds", "1,x"): "whole numbers",
        ("--seeds", "1001"): "under 1000",
        ("--problem", "cifar10", "--data", str(tmp_path)): "has none of them",
    }.items():
        assert main(["bench", "robustness", "--out", str(tmp_path), *wrong]) == 2
        assert said in capsys.readouterr().err


def test_the_law_grows_with_strength_bits_and_features_to_a_ceiling() -> None:
    own = {"strength": 0.5, "bits": 1024, "features": 48}
    assert tables.by_law(-20.0, own, own, 10) == pytest.approx(-20.0)
    weaker = [{**own, **each} for each in ({"strength": 0.35}, {"bits": 256}, {"features": 16})]
    assert all(-20.0 < tables.by_law(-20.0, own, each, 10) < -5.0 for each in weaker)
    ceiling = -1.0 / (4.6 * (1 / 1024 + 1 / (48 * 9)))
    assert tables.by_law(-90.0, own, weaker[0], 10) == pytest.approx(ceiling)
