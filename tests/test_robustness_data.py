"""The table and the texts that robustness is measured on, as their authors give them out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.robustness import intents, letters
from benchmarks.robustness.problems import INTENTS, LETTERS


@pytest.mark.parametrize("heading", ["", "Letter," + ",".join(map(str, range(1, 17))) + "\n"])
def test_letters_are_columns_from_0_to_1_and_every_row_is_somebodys(tmp_path: Path, heading: str) -> None:
    random = np.random.default_rng(0)
    values, kinds = random.integers(0, 16, (20_000, 16)), random.integers(0, 26, 20_000)
    lines = [",".join([chr(ord("A") + kind), *map(str, row)]) for kind, row in zip(kinds, values, strict=True)]
    (tmp_path / letters.FILE).write_text(heading + "\n".join(lines) + "\n")
    data = letters.load(tmp_path)
    assert [len(y) for _, y in data] == [8000, 8000, 4000]
    found = (
        (row, kind) for x, y in data for row, kind in zip((x * 15).round().int().tolist(), y.tolist(), strict=True)
    )
    assert {(*row, kind) for row, kind in found} == {
        (*row, kind) for row, kind in zip(values.tolist(), kinds.tolist(), strict=True)
    }
    for build in (LETTERS.build, LETTERS.other):
        assert build(0).eval()(data.test[0][:5]).shape == (5, 26)


def test_intents_are_rows_of_the_owners_most_frequent_words(tmp_path: Path) -> None:
    texts = [[f"turn the light {word}", f"light {word}"] for word in ("on", "off") for _ in range(9)]
    held = {"train": texts[:10], "val": texts[10:], "test": [["Turn it OFF, please", "light off"]], "oos_test": []}
    (tmp_path / intents.FILE).write_text(json.dumps(held))
    data = intents.load(tmp_path)
    assert [len(y) for _, y in data] == [9, 9, 1]
    x, y = data.owner
    assert x.shape == (9, 16)
    assert x.dtype == torch.int64
    assert (x[:, 4:] == 0).all()
    assert len(set(map(tuple, x[:, :3].tolist()))) == 1
    assert len(set(zip(x[:, 3].tolist(), y.tolist(), strict=True))) == 2
    (asked,), (kind,) = data.test
    assert asked[:4].tolist() == [x[0, 0], 1, x[y == kind][0, 3], 1], "what the owner has not is a rare word"
    for build in (INTENTS.build, INTENTS.other):
        assert build(0).eval()(data.test[0]).shape == (1, 150)


@pytest.mark.parametrize("problem", [LETTERS, INTENTS], ids=lambda problem: problem.name)
def test_data_that_are_not_there_are_said(tmp_path: Path, problem) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(ValueError, match=rf"{problem.name} needs --data DIR .*, a folder with "):
            problem.load(folder)
