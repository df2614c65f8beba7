"""The parameters of a mark: what a task gives, in which form, and what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from described import IMAGES, KEY, NORMALISED, TASK, TEXT, derived, parameters_of
from hypothesis import given
from hypothesis import strategies as st

from wmengine.identity.canonical import canonical_json
from wmengine.marks.catalogue import SCHEMES, scheme
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Task
from wmengine.suspects.base import InputSpec


def test_parameters_are_integers_and_strings_in_this_form() -> None:
    shared = {"name": "detector-v3", "statistic": "soft/1 or matches/1"}
    images = {**shared, "inputs": [{"name": "input", "dtype": "float32", "shape": [1, 8, 8]}]}
    unit_range = [["0x0.0p+0", "0x1.0000000000000p+0"]]
    assert parameters_of("uchida") == {
        **images,
        "bits": 64,
        "carrier": "filter_mean",
        "projection": "gaussian",
        "carriers": [[32, 16, 3, 3]],
        "carrier_indices": [1],
    }
    assert parameters_of("stdm") == {**parameters_of("uchida"), "beta": 10}
    assert parameters_of("neuralmark") == {
        **images,
        "bits": 64,
        "extractor": "filtered",
        "width": 128,
        "carriers": [[32, 16, 3, 3]],
        "carrier_indices": [1],
    }
    assert parameters_of("adi") == {
        **images,
        "count": 20,
        "num_classes": 10,
        "class_names": [],
        "value_range": unit_range,
    }
    assert parameters_of("deepsigns") == {
        **images,
        "bits": 64,
        "groups": 8,
        "members": 4,
        "place": 2,
        "features": 128,
        "value_range": unit_range,
    }
    text = [{"name": "tokens", "dtype": "int64", "shape": [16]}, {"name": "mask", "dtype": "int64", "shape": [16]}]
    assert parameters_of("adi_tokens") == {
        **shared,
        "inputs": text,
        "count": 20,
        "num_classes": 10,
        "class_names": [],
        "special": 0,
        "vocabulary": 100,
    }


# --- what a task gives ---


def test_uchida_marks_the_weight_with_most_values_per_filter_or_the_one_asked_for() -> None:
    assert parameters_of("uchida")["carrier_indices"] == [1]
    assert parameters_of("uchida", marked=2)["carriers"] == [[10, 128]]
    twins = Task(IMAGES, weights=lambda: ([[8, 4], [8, 9], [8, 9]], [0, 1, 2]))
    assert parameters_of("uchida", twins)["carrier_indices"] == [1]
    frozen = Task(IMAGES, weights=lambda: ([[8, 4], [8, 9], [8, 9]], [0, 2]))
    assert parameters_of("uchida", frozen)["carrier_indices"] == [2]
    assert parameters_of("sketch", frozen)["carrier_indices"] == [0, 2]
    with pytest.raises(ValueError, match=r"'uchida': marked must be from 0 to 2, and it is 3"):
        parameters_of("uchida", marked=3)
    with pytest.raises(ValueError, match="it is to mark weight 1, which is not trained"):
        parameters_of("uchida", frozen, marked=1)


@pytest.mark.parametrize("name", ["sketch", "uchida"])
def test_a_network_that_trains_no_weights_cannot_be_marked(name: str) -> None:
    for shapes in ([], [[8, 4]]):
        task = Task(IMAGES, weights=lambda shapes=shapes: (shapes, []))
        with pytest.raises(
            ValueError, match=f"scheme '{name}': it marks the weights of .*, and this network trains none"
        ):
            parameters_of(name, task)


def test_activations_are_those_before_a_last_linear_layer_wide_enough() -> None:
    for shapes in ([], [[8, 3, 3, 3]]):
        with pytest.raises(
            ValueError, match="marks what goes into a linear layer at the network's end, and there is no"
        ):
            parameters_of("deepsigns", Task(IMAGES, 10, [[0, 1]], weights=lambda shapes=shapes: (shapes, [])))
    for options in ({"bits": 63}, {"bits": 2048}, {"groups": 65}):
        with pytest.raises(ValueError, match="groups of 128 activations cannot hold"):
            parameters_of("deepsigns", **options)


def test_passports_lie_behind_trained_weights_that_a_normalisation_follows() -> None:
    assert parameters_of("deepipr_v2")["bits"] == 64
    assert parameters_of("deepipr_v2", bits=40)["bits"] == 40
    wide = replace(NORMALISED, weights=lambda: ([[512, 4], [64, 512]], [0, 1]))
    assert parameters_of("deepipr_v2", wide)["bits"] == 256
    assert parameters_of("deepipr_v2", bits=32, marked=(1,))["carriers"] == [[32, 32, 3, 3]]
    with pytest.raises(ValueError, match="'deepipr_v2': it marks weights with a normalisation right behind them"):
        parameters_of("deepipr_v2", TASK)
    with pytest.raises(ValueError, match="it is to mark weight 2, which is not trained or no normalisation is behind"):
        parameters_of("deepipr_v2", marked=(1, 2))


def test_what_only_steers_training_is_under_no_commitment() -> None:
    assert parameters_of("deepipr_v2", strength=5.0, branch="separate") == parameters_of("deepipr_v2")
    assert parameters_of("sketch", strength=5.0, margin=2.0, link="bce") == parameters_of("sketch")
    assert parameters_of("deepsigns", strength=5.0, pull=2.0) == parameters_of("deepsigns")


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (None, r"one \[lo, hi\] for each of the 1 channels"),
        ([], r"one \[lo, hi\] for each of the 1 channels"),
        ([[0.0, 1.0], [0.0, 1.0]], r"one \[lo, hi\] for each of the 1 channels"),
        ([[1.0, 0.0]], "lo must not exceed hi"),
        ([[0.0, float("inf")]], "must be finite"),
        ([[0.0, 1e39]], "must be finite"),
        ([[float("nan"), 1.0]], "must be finite"),
        ([[0.0]], r"value_range\[0\] must be \[lo, hi\]"),
        ([["0", 1.0]], "must hold numbers"),
        ([[None, 1.0]], "must hold numbers"),
    ],
)
@pytest.mark.parametrize("name", ["adi", "deepsigns"])
def test_a_value_range_is_finite_and_ordered_per_channel(name: str, ranges: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"scheme '{name}': .*{message}"):
        parameters_of(name, replace(TASK, value_range=ranges))


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        ("float32", 1.0, 1.0),
        ("float32", 0.0, 0.0),
        ("float32", 1.0, 1.001),
        ("float32", -1000.0, -999.0),
        ("float32", 0.0, 1e-38),
        ("float16", 0.0, 1e-6),
    ],
)
def test_a_range_too_narrow_for_triggers_to_differ_is_refused(dtype: str, low: float, high: float) -> None:
    task = Task({"input": InputSpec((1, 8, 8), dtype)}, 10, [[low, high]])
    with pytest.raises(ValueError, match="so narrow in every channel that all triggers would be equal to a network"):
        parameters_of("adi", task)


def test_a_range_beyond_the_input_s_type_is_refused() -> None:
    images = {"input": InputSpec((1, 8, 8), "float16")}
    with pytest.raises(ValueError, match=r"value_range\[0\] is \[0.0, 70000.0\], and float16 ends before"):
        parameters_of("adi", Task(images, 10, [[0.0, 70000.0]]))


def test_triggers_that_differ_only_where_nothing_varies_are_refused() -> None:
    """One feature of 64 varies: its 256 values are too few for 300 triggers, and many of 100 would be alike."""
    task = Task({"input": InputSpec((64,), "float32")}, 10, [[0.0, 1.0]] + [[3.0, 3.0]] * 63)
    parameters = parameters_of("adi", task, count=300)
    with pytest.raises(ValueError, match="only 1 channels vary, too few for 300 triggers that a network tells apart"):
        derived("adi", parameters)
    half = Task(task.inputs, 10, [[0.0, 1.0]] * 32 + [[3.0, 3.0]] * 32)
    assert len(derived("adi", parameters_of("adi", half, count=300))["labels"]) == 300


def test_a_value_range_is_written_as_exact_float32() -> None:
    task = Task({"input": InputSpec((2,), "float32")}, 3, [[-0.0, 0.1], [5.0, 5.0]])
    assert parameters_of("adi", task)["value_range"][0] == ["0x0.0p+0", float(np.float32(0.1)).hex()]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_classes": None}, "it needs num_classes, the width of the model's logits"),
        ({"num_classes": 1}, "num_classes must be from 2"),
        ({"num_classes": 10.0}, "num_classes must be an integer"),
        ({"inputs": {"x": InputSpec((), "float32")}}, "shape must have at least 1 axes"),
        ({"inputs": {"x": InputSpec((1, 0, 8), "float32")}}, r"shape\[1\] must be from 1"),
        ({"inputs": {"x": InputSpec((1, 8), "int64")}}, "are for floating inputs, and this model takes int64"),
        ({"inputs": {**IMAGES, "y": InputSpec((1,), "float32")}}, "of one input, and this one takes input, y"),
        ({"class_names": ["a"]}, "class_names must be none, or one name for each of the 10 classes"),
        (
            {"class_names": ["a"] * 10},
            "class_names must be none, or one name for each of the 10 classes, all different",
        ),
    ],
)
def test_a_task_that_does_not_fit_a_mark_of_pictures_is_said_to(change: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=f"scheme 'adi': .*{error}"):
        parameters_of("adi", replace(TASK, **change))


@pytest.mark.parametrize(
    ("task", "error"),
    [
        (Task(TEXT, 10, None), r"it needs value_range=\(0, vocabulary - 1\)"),
        (Task(IMAGES, 10, [[0, 99]]), r"are for integers \[n, L\], and this model takes float32"),
        (
            Task({"x": InputSpec((16, 2), "int64")}, 10, [[0, 99]]),
            r"are for integers \[n, L\], and this model takes int",
        ),
        (Task({**TEXT, "z": InputSpec((8,), "int64")}, 10, [[0, 99]]), "must have the tokens' shape .* 'z' is int64"),
        (Task({**TEXT, "z": InputSpec((16,), "complex64")}, 10, [[0, 99]]), "must .* be integers, bool or float"),
        (Task({"x": InputSpec((16,), "uint8")}, 10, [[0, 256]]), "vocabulary must be from 2 to 256, and it is 257"),
        (Task({"x": InputSpec((16,), "int64")}, 10, [[0, 0]]), "vocabulary must be from 2"),
        (Task(TEXT, 10, [[0, 1]]), "its tokens are the first of several inputs, and 'tokens' holds a mask"),
    ],
)
def test_a_task_that_does_not_fit_a_mark_of_tokens_is_said_to(task: Task, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parameters_of("adi_tokens", task)


def test_tokens_are_none_of_the_special_ones_and_sequences_differ() -> None:
    triggers = derived("adi_tokens", parameters_of("adi_tokens", special=90))["triggers"]
    assert set(np.unique(triggers)) == set(range(90, 100))
    assert len(np.unique(triggers, axis=0)) == 20
    short = Task({"tokens": InputSpec((1,), "int64")}, 10, [[0, 3]])
    with pytest.raises(ValueError, match=r"sequences of shape \(1,\) are too few for 20 distinct triggers"):
        derived("adi_tokens", parameters_of("adi_tokens", short))


@pytest.mark.parametrize("names", [("input_ids", "attention_mask"), ("a", "b"), ("b", "a")])
def test_the_first_input_holds_the_tokens_whatever_the_inputs_are_called(names: tuple[str, str]) -> None:
    """Also after a mark was spelled as JSON, which sorts by name."""
    task = Task({name: InputSpec((16,), "int64") for name in names}, 10, [[0, 99]])
    preset = scheme("adi_tokens", count=20)
    mark = Watermark.create(KEY, preset, preset.describe(task, "n"))
    inputs = preset.source.examples(mark)
    assert list(inputs) == list(names)
    assert np.array_equal(inputs[names[0]], mark.arrays["triggers"])
    assert (inputs[names[1]] == 1).all()


# --- parameters are checked ---


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sketch", {"colour": 1}, "hold an unknown field 'colour'"),
        ("sketch", {"bits": 64.0}, "bits must be an integer"),
        ("sketch", {"bits": True}, "bits must be an integer"),
        ("sketch", {"bits": 10**9}, "bits must be from 1"),
        ("sketch", {"carriers": []}, "lists of the same length"),
        ("sketch", {"carriers": [[16, 1, 3, 3]]}, "lists of the same length"),
        ("sketch", {"carriers": [[16], [32, 1], [10, 1]]}, r"carriers\[0\] must have at least 2 axes"),
        ("sketch", {"carriers": [(16, 1), [32, 1], [10, 1]]}, r"carriers\[0\] must be a list of integers"),
        ("sketch", {"carrier_indices": [0, 2, 1]}, "carrier_indices must increase"),
        ("sketch", {"carrier_indices": [0, 1, "2"]}, r"carrier_indices\[2\] must be an integer"),
        ("sketch", {"carrier": ["flat"]}, "carrier must be one of"),
        ("sketch", {"projection": "fourier"}, "projection must be one of sketch, rademacher, gaussian"),
        ("sketch", {"statistic": "matches/1"}, "its statistic is 'matches/1', and 'soft/1 or matches/1' here"),
        ("sketch", {"name": "Cafe\u0301"}, "is not in NFC"),
        ("sketch", {"inputs": {}}, "inputs must list the model's inputs, at least one"),
        ("sketch", {"inputs": []}, "inputs must list the model's inputs, at least one"),
        ("sketch", {"inputs": [{"name": "x", "shape": [1]}]}, r"inputs\[0\] must hold a name, a dtype and a shape"),
        ("sketch", {"inputs": [{"name": 1, "dtype": "float32", "shape": [1]}]}, r"inputs\[0\] must have a str"),
        ("sketch", {"inputs": [{"name": "x", "dtype": "float32", "shape": (1,)}]}, "must be a list of integers"),
        (
            "sketch",
            {"inputs": [{"name": "x", "dtype": "float32", "shape": []}] * 2},
            "must all have names of their own",
        ),
        ("adi", {"class_names": ["Cafe\u0301", *"bcdefghij"]}, "class_names must be in NFC"),
        ("adi", {"class_names": "abcdefghij"}, "class_names must be none"),
        ("adi", {"value_range": [["0x0p+0", "0x1p+0"]]}, "written with float.hex"),
        ("stdm", {"carrier": "unit_filters"}, "carrier must be one of flat, filter_mean"),
        ("stdm", {"beta": 10.0}, "beta must be an integer"),
        ("riga", {"extractor": "trained"}, "extractor must be one of perceptron, filtered, largest"),
        ("riga", {"width": 63}, "width must be at least the number of bits, 64"),
        ("riga", {"carriers": [[8, 8], [128, 64]], "carrier_indices": [0, 1]}, "it marks one weight"),
        ("deepsigns", {"groups": 7}, "7 groups of 128 activations cannot hold 64 bits"),
        ("deepsigns", {"features": 7}, "8 groups of 7 activations cannot hold 64 bits"),
        ("adi_tokens", {"special": 99}, "vocabulary must be from 101"),
        ("deepipr_v2", {"bits": 65}, "64 channels cannot hold 65 bits: ask for fewer with bits="),
        ("deepipr_v2", {"carriers": [[32], [32, 1]]}, r"carriers\[0\] must have at least 2 axes"),
    ],
)
def test_parameters_that_are_not_canonical_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        derived(name, {**parameters_of(name), **change})


@pytest.mark.parametrize("name", SCHEMES)
def test_no_parameter_may_be_missing(name: str) -> None:
    parameters = parameters_of(name)
    for field in parameters:
        with pytest.raises(ValueError, match=f"the parameters of '{name}' lack '{field}'"):
            scheme(name).check({other: value for other, value in parameters.items() if other != field})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)


@given(st.sampled_from(list(SCHEMES)), st.data(), VALUES)
def test_what_passes_the_check_is_canonical(name: str, data: st.DataObject, value: Any) -> None:
    parameters = parameters_of(name)
    field = data.draw(st.sampled_from(list(parameters)))
    parameters[field] = value
    try:
        scheme(name).check(parameters)
    except ValueError:
        return
    except TypeError:
        assert field in ("name", "class_names")  # names have wrong types of their own
        return
    canonical_json(parameters)
