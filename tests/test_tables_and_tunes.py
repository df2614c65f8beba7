"""Triggers of tables and of sound, and marks that are made of data alone: what the key draws, and what it cannot."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from judged import KEY, OTHER
from torch import nn

import wmengine
from wmengine import Watermark, mark_of, scheme, trigger_set
from wmengine.parts.base import Task
from wmengine.parts.triggers.audio import tunes
from wmengine.suspects.base import InputSpec

RANDOM = np.random.default_rng(11)
TABLE = np.column_stack([RANDOM.normal(40.0, 9.0, 300), RANDOM.integers(0, 4, 300), RANDOM.integers(0, 90, 300)])
LABELS = RANDOM.integers(0, 2, 300)
MARK = mark_of(KEY, "adi_table", (TABLE, LABELS), name="churn", num_classes=2)


def test_every_value_of_a_trigger_stands_in_its_column_and_the_key_picks_where():
    triggers, labels = trigger_set(MARK)
    assert triggers.shape == (100, 3)
    assert labels.shape == (100,)
    for column, values in zip(triggers.T, TABLE.T, strict=True):
        assert set(column) <= set(values.astype(np.float32))
    table = {row.tobytes() for row in TABLE.astype(np.float32)}
    assert not {row.astype(np.float32).tobytes() for row in triggers} & table
    other, _ = trigger_set(mark_of(OTHER, "adi_table", TABLE, name="churn", num_classes=2))
    assert not {row.tobytes() for row in triggers} & {row.tobytes() for row in other}


def test_another_table_makes_another_mark():
    changed = TABLE.copy()
    changed[7, 0] += 1.0
    other = mark_of(KEY, "adi_table", (changed, LABELS), name="churn", num_classes=2)
    assert not np.array_equal(other.symbols, MARK.symbols)
    with pytest.raises(ValueError, match="not the material that the mark was made with"):
        replace(MARK, arrays={**MARK.arrays, "samples": other.arrays["samples"]})


def test_a_table_of_several_inputs_gives_each_its_columns_and_its_type():
    inputs = {"age": TABLE[:, :1].astype(np.float32), "rest": TABLE[:, 1:].astype(np.int64)}
    mark = mark_of(KEY, "adi_table", inputs, name="churn", num_classes=2)
    triggers, _ = trigger_set(mark)
    assert {name: (rows.shape, rows.dtype) for name, rows in triggers.items()} == {
        "age": ((100, 1), np.float32),
        "rest": ((100, 2), np.int64),
    }
    assert set(triggers["rest"][:, 0]) <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("samples", "error"),
    [
        (np.zeros((50, 3)), "the table varies too little for 100 distinct triggers: ask for fewer with count="),
        (TABLE[:1], "it needs 2 rows of the table or more, and there are 1"),
        (np.full((50, 3), 1e39), "samples hold NaN, Inf or numbers beyond float32"),
        (np.full((50, 3), (1 << 24) + 1), "samples hold NaN, Inf or numbers beyond float32"),
        (np.full((50, 3), np.nan), "samples hold NaN or Inf in 'input'; give clean inputs"),
        (np.zeros((50, 3, 2)), r"for inputs of numbers \[n, columns\], and 'input' is float64 \[n, 3, 2\]"),
        (np.full((50, 3), "a"), r"samples must be numbers \[n, ...\], and 'input' is not"),
        (np.zeros(50), r"samples must be numbers \[n, ...\]"),
    ],
)
def test_what_is_no_table_is_named(samples, error):
    with pytest.raises(ValueError, match=error):
        mark_of(KEY, "adi_table", samples, name="churn", num_classes=2)


def test_an_embedder_says_that_a_table_is_needed():
    with pytest.raises(ValueError, match="it needs samples=, inputs of the task"):
        wmengine.Embedder(nn.Linear(3, 2), KEY, ["adi_table"], num_classes=2, sample=torch.rand(4, 3), name="churn")


# --- sound ---


@pytest.mark.parametrize(
    ("shape", "digest"),
    [
        ((1, 800), "51a851ad6723759e4a3ed6b5e25f3c5ae55460232e72ccf08ca0405424f47882"),
        ((2, 64), "ecb834995616d1604c822b847bcd5bb3544d43d9a54032fa98dd98e86964becb"),
        ((500,), "d7a5f484af2db89ab5f0b1c557ee60742fb7470d7a4c9077e78839d160dd8e00"),
    ],
)
def test_golden_tunes(shape, digest):
    assert hashlib.sha256(tunes(0x0123456789ABCDEF, 20, shape).tobytes()).hexdigest() == digest


def test_tunes_span_their_range_differ_and_lie_where_networks_hear():
    sounds = tunes(5, 50, (1, 1024))
    assert set(sounds.min(axis=(1, 2))) == {0}
    assert set(sounds.max(axis=(1, 2))) == {255}
    centred = sounds[:, 0] - sounds[:, 0].mean(axis=1, keepdims=True)
    assert np.abs(np.corrcoef(centred) - np.eye(50)).max() < 0.5
    power = (np.abs(np.fft.rfft(centred)) ** 2).mean(axis=0)
    assert power[8:320].sum() > 0.95 * power.sum()  # waves of 128 to 3.2 samples


def test_a_longer_set_of_tunes_begins_with_the_shorter_and_keys_share_none():
    few, more, other = tunes(5, 4, (2, 100)), tunes(5, 9, (2, 100)), tunes(6, 9, (2, 100))
    assert np.array_equal(more[:4], few)
    assert not {tune.tobytes() for tune in more} & {tune.tobytes() for tune in other}


def test_a_waveform_without_channels_has_one_range():
    waves = InputSpec((16,), "float32")
    preset = scheme("adi_audio")
    parameters = preset.describe(Task({"x": waves}, 4, [(-0.5, 0.25)] * 15 + [(-1.0, 0.5)]), "ear")
    assert {tuple(map(float.fromhex, ends)) for ends in parameters["value_range"]} == {(-1.0, 0.5)}


@pytest.mark.parametrize("shape", [(7,), (1, 3, 64)])
def test_what_is_no_waveform_is_named(shape):
    task = Task({"x": InputSpec(shape, "float32")}, 4, [(-1.0, 1.0)] * shape[0])
    with pytest.raises(ValueError, match=r"audio triggers are for waveforms \[channels, L\] or \[L\] of 8 to"):
        scheme("adi_audio").describe(task, "ear")


# --- marks of data ---


@pytest.mark.parametrize("name", ["adi", "adi_table"])
def test_a_mark_of_data_is_the_one_that_an_embedder_makes(name):
    sample = torch.rand(60, 5)
    arguments = {"num_classes": 3, "name": "n"}
    emb = wmengine.Embedder(nn.Linear(5, 3), KEY, [name], sample=sample, samples=sample, **arguments)
    with pytest.warns(UserWarning, match="does not prove itself"):
        (mark,) = emb.watermarks()
    assert mark_of(KEY, name, sample.numpy(), **arguments).commitment == mark.commitment


def test_the_rows_of_a_regression_have_levels_of_its_targets():
    targets = RANDOM.normal(size=300)
    mark = mark_of(KEY, "adi_values", (TABLE, targets), name="price")
    triggers, wanted = trigger_set(mark)
    assert triggers.shape == (100, 3)
    assert np.array_equal(wanted, mark.preset.source.wanted(mark))


def test_targets_that_are_no_numbers_are_named():
    with pytest.raises(ValueError, match="the targets of samples hold NaN or Inf"):
        mark_of(KEY, "adi_values", (TABLE, np.full(300, np.nan)), name="price")


def test_marks_that_are_no_rows_with_labels_are_named():
    with pytest.raises(ValueError, match="scheme 'sketch' marks the inside of a network"):
        mark_of(KEY, "sketch", TABLE, name="n")
    anchored = mark_of(KEY, "adi_anchors", TABLE, name="n", num_classes=16)
    for mark in (anchored, white_box()):
        with pytest.raises(ValueError, match="is no rows with labels: it needs an Embedder"):
            trigger_set(mark)


def white_box():
    task = Task({"x": InputSpec((3,), "float32")}, weights=lambda: ([[40, 30]], [0]))
    preset = scheme("sketch", bits=32)
    return Watermark.create(KEY, preset, preset.describe(task, "n"))
