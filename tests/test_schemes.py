"""Presets: what they promise, what they put under the key, and that one change anywhere changes all that is derived."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wmengine.key import Key, canonical_json, keyed_labels
from wmengine.schemes import (
    SCHEMES,
    BlackBox,
    WhiteBox,
    array_layout,
    black_box_parameters,
    check_parameters,
    derive,
    scheme,
    symbol_chance,
    symbol_count,
    white_box_parameters,
)
from wmengine.stats import binomial_log10_tail

KEY = Key("ACME Vision", bytes(range(32)))
SHAPES = [[16, 1, 3, 3], [32, 16, 3, 3], [10, 128]]


def white_box(name: str = "sketch", **options: Any) -> dict[str, Any]:
    preset = scheme(name, **{"bits": 64, **options})
    assert isinstance(preset, WhiteBox)
    return white_box_parameters(preset, SHAPES, [1, 8, 8], "detector-v3")


def black_box(**options: Any) -> dict[str, Any]:
    preset = scheme("adi", **{"count": 20, **options})
    assert isinstance(preset, BlackBox)
    return black_box_parameters(preset, [1, 8, 8], 10, [[0.0, 1.0]], "detector-v3")


def digests(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


# --- derivation, frozen ---


def test_golden_sketch() -> None:
    arrays = derive(KEY, "sketch", white_box())
    assert arrays["carrier_keys"].tolist() == [6596736008449058908, 7602950870056435778, 852109245879667137]
    assert digests(arrays)["bits"] == "afdc7fe3d4beaf8600beb704e0bddb9ef283f14babb76425dff9461d95403183"


def test_golden_uchida() -> None:
    arrays = derive(KEY, "uchida", white_box("uchida"))
    assert arrays["carrier_keys"].tolist() == [13283544474253245134]
    assert digests(arrays)["bits"] == "886716c5b18b99bad228df9c04a0af2c859b9e1fd5cd9dd1302eaf51aa693914"


def test_golden_adi() -> None:
    arrays = derive(KEY, "adi", black_box())
    assert arrays["labels"].tolist() == [2, 2, 1, 8, 7, 6, 7, 7, 2, 7, 2, 7, 7, 4, 2, 6, 7, 3, 9, 6]
    assert digests(arrays)["triggers"] == "9f3fb7e16cc959941c72ad5257c13c89012c17ac6ae7e5c5ed78abeb4337bf1f"


def test_parameters_are_integers_and_strings_in_this_form() -> None:
    assert white_box("uchida") == {
        "bits": 64,
        "carrier": "filter_mean",
        "projection": "gaussian",
        "carriers": [[32, 16, 3, 3]],
        "carrier_indices": [1],
        "input_shape": [1, 8, 8],
        "name": "detector-v3",
    }
    assert black_box() == {
        "count": 20,
        "triggers": "abstract",
        "labels": "uniform",
        "num_classes": 10,
        "input_shape": [1, 8, 8],
        "value_range": [["0x0.0p+0", "0x1.0000000000000p+0"]],
        "name": "detector-v3",
    }


# --- presets ---


def test_the_presets_keep_their_papers_defaults() -> None:
    assert list(SCHEMES) == ["sketch", "uchida", "adi"]
    sketch, uchida, adi = (scheme(name) for name in SCHEMES)
    assert isinstance(sketch, WhiteBox)
    assert (sketch.carrier, sketch.projection, sketch.bits, sketch.marked) == ("unit_filters", "sketch", 256, "all")
    assert isinstance(uchida, WhiteBox)
    assert (uchida.carrier, uchida.projection, uchida.link) == ("filter_mean", "gaussian", "bce")
    assert (uchida.bits, uchida.strength) == (256, 0.01)
    assert isinstance(adi, BlackBox)
    assert (adi.triggers, adi.labels, adi.count) == ("abstract", "uniform", 100)
    assert all(preset.null == "exact" and preset.paper for preset in SCHEMES.values())


def test_an_unknown_scheme_or_option_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"there is no scheme 'sketsch'; the schemes are sketch, uchida, adi"):
        scheme("sketsch")
    with pytest.raises(ValueError, match=r"'adi' has no option 'bits'; its options are triggers, labels, count"):
        scheme("adi", bits=3)
    for fixed in ("name", "version", "null", "paper"):
        with pytest.raises(ValueError, match=f"no option '{fixed}'"):
            scheme("sketch", **{fixed: "rank"})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("sketch", "bits", 0),
        ("sketch", "bits", 256.0),
        ("sketch", "bits", True),
        ("sketch", "bits", "256"),
        ("sketch", "bits", 1 << 17),
        ("sketch", "carrier", "filters"),
        ("sketch", "projection", None),
        ("sketch", "link", "l2"),
        ("sketch", "marked", "some"),
        ("sketch", "marked", -1),
        ("sketch", "strength", 0.0),
        ("sketch", "strength", float("nan")),
        ("sketch", "margin", "3"),
        ("adi", "count", 0),
        ("adi", "triggers", "photos"),
        ("adi", "labels", ["uniform"]),
    ],
)
def test_an_option_out_of_range_is_named(name: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be"):
        scheme(name, **{option: value})


def test_uchida_marks_the_weight_with_most_values_per_filter_or_the_one_asked_for() -> None:
    assert white_box("uchida")["carrier_indices"] == [1]
    assert white_box("uchida", marked=2)["carriers"] == [[10, 128]]
    twins = white_box_parameters(scheme("uchida"), [[8, 4], [8, 9], [8, 9]], [4], "n")  # type: ignore[arg-type]
    assert twins["carrier_indices"] == [1]
    with pytest.raises(ValueError, match=r"^marked must be from 0 to 2, and it is 3"):
        white_box("uchida", marked=3)


def test_a_network_without_weights_cannot_be_marked() -> None:
    with pytest.raises(ValueError, match="needs at least one weight to mark, and this network has none"):
        white_box_parameters(scheme("sketch"), [], [1, 8, 8], "n")  # type: ignore[arg-type]


def test_what_only_steers_training_is_under_no_commitment() -> None:
    assert white_box(strength=5.0, margin=2.0, link="bce") == white_box()


# --- derivation ---


def variants(name: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters with each field changed, one at a time, to another value that is as good."""
    white = [
        {"bits": 65},
        {"carrier": "flat"},
        {"projection": "rademacher"},
        {"carriers": [[16, 1, 3, 3], [32, 16, 3, 3], [10, 129]]},
        {"carrier_indices": [0, 1, 3]},
    ]
    black = [{"count": 21}, {"num_classes": 11}, {"value_range": [["0x0.0p+0", "0x1.0000000000000p+1"]]}]
    shared = [{"input_shape": [1, 8, 9]}, {"name": "detector-v4"}]
    return [{**parameters, **change} for change in (white if name == "sketch" else black) + shared]


@pytest.mark.parametrize("name", ["sketch", "adi"])
def test_a_change_of_any_parameter_or_of_the_key_changes_every_array(name: str) -> None:
    parameters = white_box() if name == "sketch" else black_box()
    assert {
        field for changed in variants(name, parameters) for field in changed if changed[field] != parameters[field]
    } == (set(parameters) - {"triggers", "labels"})
    derived = [derive(KEY, name, changed) for changed in [parameters, *variants(name, parameters)]]
    derived += [
        derive(other, name, parameters) for other in (replace(KEY, owner="Acme"), replace(KEY, secret=bytes(32)))
    ]
    for array in derived[0]:
        prefixes = [arrays[array].reshape(-1)[: 3 if array == "carrier_keys" else 18].tobytes() for arrays in derived]
        assert len(set(prefixes)) == len(derived), array


@pytest.mark.parametrize("name", ["sketch", "uchida", "adi"])
def test_arrays_have_the_announced_layout_and_are_derived_the_same_twice(name: str) -> None:
    parameters = black_box() if name == "adi" else white_box(name)
    first, second = derive(KEY, name, parameters), derive(KEY, name, parameters)
    assert {array: (str(values.dtype), values.shape) for array, values in first.items()} == array_layout(
        name, parameters
    )
    assert digests(first) == digests(second)
    assert symbol_count(name, parameters) == (20 if name == "adi" else 64)
    assert symbol_chance(name, parameters) == (0.1 if name == "adi" else 0.5)


def test_the_bits_are_a_fair_coin_and_the_labels_a_fair_die_over_keys() -> None:
    """Over fresh keys P(p <= a) <= a for one fixed suspect, however it answers: here always 3, and all bits 1."""
    hits, bits = [], []
    for seed in range(2000):
        key = Key("ACME", hashlib.sha256(str(seed).encode()).digest())
        hits.append(int((keyed_labels(key.subkey("labels", "adi/1", {}), 100, 10) == 3).sum()))
        bits.append(int(derive(key, "sketch", white_box())["bits"].sum()))
    for counts, n, p in ((hits, 100, 0.1), (bits, 64, 0.5)):
        p_values = np.array([10 ** binomial_log10_tail(k, n, p) for k in counts])
        for a in np.unique(p_values):
            assert (p_values <= a).mean() <= a + 4.5 * np.sqrt(a * (1 - a) / 2000) + 4 / 2000
        assert p_values.min() > 1e-5


# --- parameters are checked ---


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([], r"one \[lo, hi\] for each of the 1 channels"),
        ([[0.0, 1.0], [0.0, 1.0]], r"one \[lo, hi\] for each of the 1 channels"),
        ([[1.0, 0.0]], "lo must not exceed hi"),
        ([[1.0, 1.0]], "a single point in every channel"),
        ([[0.0, float("inf")]], "must be finite"),
        ([[0.0, 1e39]], "must be finite"),
        ([[float("nan"), 1.0]], "must be finite"),
        ([[0.0]], r"value_range\[0\] must be \[lo, hi\]"),
        ([["0", 1.0]], "must hold numbers"),
        ([[None, 1.0]], "must hold numbers"),
    ],
)
def test_a_value_range_is_finite_and_ordered_per_channel(ranges: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        black_box_parameters(scheme("adi"), [1, 8, 8], 10, ranges, "n")  # type: ignore[arg-type]


def test_a_value_range_is_written_as_exact_float32() -> None:
    parameters = black_box_parameters(scheme("adi"), [2], 3, [[-0.0, 0.1], [5.0, 5.0]], "n")  # type: ignore[arg-type]
    assert parameters["value_range"][0] == ["0x0.0p+0", float(np.float32(0.1)).hex()]


@pytest.mark.parametrize(
    ("classes", "shape", "name", "error"),
    [
        (1, [1, 8, 8], "n", "num_classes must be from 2"),
        (10.0, [1, 8, 8], "n", "num_classes must be an integer"),
        (10, [], "n", "input_shape must have at least 1 axes"),
        (10, [1, 0, 8], "n", r"input_shape\[1\] must be from 1"),
        (10, [1, 8.0, 8], "n", r"input_shape\[1\] must be an integer"),
        (10, [1, 8, 8], " ", "name must be printable"),
    ],
)
def test_wrong_arguments_of_a_black_box_mark_are_named(classes: Any, shape: Any, name: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        black_box_parameters(scheme("adi"), shape, classes, [[0.0, 1.0]], name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "hold an unknown field 'colour'"),
        ({"bits": 64.0}, "bits must be an integer"),
        ({"bits": True}, "bits must be an integer"),
        ({"bits": 10**9}, "bits must be from 1"),
        ({"carriers": []}, "lists of the same length"),
        ({"carriers": [[16, 1, 3, 3]]}, "lists of the same length"),
        ({"carriers": [[16], [32, 1], [10, 1]]}, r"carriers\[0\] must have at least 2 axes"),
        ({"carriers": [(16, 1), [32, 1], [10, 1]]}, r"carriers\[0\] must be a list of integers"),
        ({"carrier_indices": [0, 2, 1]}, "carrier_indices must increase"),
        ({"carrier_indices": [0, 1, "2"]}, r"carrier_indices\[2\] must be an integer"),
        ({"carrier": ["flat"]}, "carrier must be one of"),
        ({"projection": "fourier"}, "projection must be one of sketch, rademacher, gaussian"),
    ],
)
def test_parameters_that_are_not_canonical_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        derive(KEY, "sketch", {**white_box(), **change})


@pytest.mark.parametrize("name", ["sketch", "adi"])
def test_no_parameter_may_be_missing(name: str) -> None:
    parameters = white_box() if name == "sketch" else black_box()
    for field in parameters:
        with pytest.raises(ValueError, match=f"the parameters of '{name}' lack '{field}'"):
            check_parameters(name, {other: value for other, value in parameters.items() if other != field})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)


@given(st.sampled_from(["sketch", "adi"]), st.integers(0, 6), VALUES)
def test_what_passes_the_check_is_canonical(name: str, index: int, value: Any) -> None:
    parameters = white_box() if name == "sketch" else black_box()
    parameters[list(parameters)[index]] = value
    try:
        check_parameters(name, parameters)
    except ValueError:
        return
    except TypeError:
        assert list(parameters)[index] == "name"  # the one field with a wrong type of its own
        return
    canonical_json(parameters)
