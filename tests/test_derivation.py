"""What a key derives from parameters and material: everything follows from each of them."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from described import KEY, MATERIAL, OF_FAMILIES, PASSPORTS, POOLED, RANKED, derived, parameters_of
from hypothesis import given, settings
from hypothesis import strategies as st

from wmengine.identity.key import Key
from wmengine.marks.catalogue import SCHEMES, scheme
from wmengine.marks.preset import array_digest

CHANGES: dict[str, list[dict[str, Any]]] = {
    "sketch": [
        {"bits": 65},
        {"carrier": "flat"},
        {"projection": "rademacher"},
        {"carriers": [[16, 1, 3, 3], [32, 16, 3, 3], [10, 129]]},
        {"carrier_indices": [0, 1, 3]},
    ],
    "adi": [
        {"count": 21},
        {"num_classes": 11},
        {"value_range": [["0x0.0p+0", "0x1.0000000000000p+1"]]},
        {"class_names": list("abcdefghij")},
        {"class_names": list("bacdefghij")},
    ],
    "deepsigns": [
        {"bits": 72},
        {"groups": 16},
        {"members": 5},
        {"place": 3},
        {"features": 129},
        {"value_range": [["0x0.0p+0", "0x1.0000000000000p+1"]]},
    ],
    "adi_tokens": [
        {"count": 21},
        {"num_classes": 11},
        {"special": 1},
        {"vocabulary": 101},
        {"class_names": list("abcdefghij")},
    ],
}
CHANGES["adi_audio"] = CHANGES["adi_boxes"] = CHANGES["adi"]
CHANGES["adi_table"] = [*CHANGES["adi"][:2], *CHANGES["adi"][3:]]
CHANGES["adi_multilabel"] = [{"bits": 65}, {"num_outputs": 11}, CHANGES["adi"][2]]
CHANGES["adi_values"] = [
    {"count": 21},
    {"choices": 11},
    CHANGES["adi"][2],
    {"targets": [float(end).hex() for end in (1, 3)]},
]
CHANGES["adi_anchors"] = [{"count": 21}, {"choices": 11}, {"dimensions": 11}, CHANGES["adi"][2]]
CHANGES["uchida"] = [{**change} for change in CHANGES["sketch"][:3]] + [
    {"carriers": [[32, 17, 3, 3]]},
    {"carrier_indices": [2]},
]
CHANGES |= {
    name: [{"bits": 63}, {"carriers": [[32, 1, 3, 3], [32, 33, 3, 3]]}, {"carrier_indices": [0, 2]}]
    for name in PASSPORTS
}
CHANGES["deepmarks"] = CHANGES["uchida"]
CHANGES["stdm"] = [{"bits": 65}, {"carrier": "flat"}, *CHANGES["uchida"][2:], {"beta": 9}]
for extracted, other in {"neuralmark": "perceptron", "riga": "filtered", "greedy_residuals": "filtered"}.items():
    CHANGES[extracted] = [
        *({"bits": 66}, {"extractor": other, "width": 130}, {"carriers": [[32, 17, 3, 3]]}, {"carrier_indices": [2]}),
    ]
CHANGES["tattooed"] = [*CHANGES["sketch"][3:], {"bits": 65}, {"carrier": "filter_mean"}, {"projection": "gaussian"}]
CHANGES["emmark"] = [{"bits": 65}, *CHANGES["sketch"][3:]]
CHANGES["emmark"] += [{name: "0000803e" + parameters_of("emmark")[name][8:]} for name in ("values", "steps")]
CHANGES["emmark"] += [{"places": "00000000" + parameters_of("emmark")["places"][8:]}]
for pooled in (*POOLED, "adi_table"):
    first = parameters_of(pooled)
    others = dict(MATERIAL[str(first["material"])], samples=255 - MATERIAL[str(first["material"])]["samples"])
    digests = {name: array_digest(array) for name, array in others.items()}
    MATERIAL[str(digests)] = others
    CHANGES[pooled] = [*CHANGES.get(pooled, CHANGES["adi"]), {"pool": first["pool"] - 1}, {"material": digests}]
for pooled in ("exponential_weighting", "multi_view"):
    CHANGES[pooled] = [*CHANGES[pooled], {"choices": 3}]
for family in OF_FAMILIES:
    CHANGES[family] = [*CHANGES[family], {"family": 19}]
for abstract in ("margin", "certified"):
    CHANGES[abstract] = CHANGES["adi"]
for pooled in RANKED:
    CHANGES[pooled] = [*CHANGES[pooled], {"controls": 3}]
CHANGES["ewe"] = [*CHANGES["ewe"], {"clean": 3}]
for bits in ("blackmarks", "dataset_inference"):
    CHANGES[bits] = [{"bits": parameters_of(bits)["bits"] + 1}, *CHANGES[bits][1:3], *CHANGES[bits][5:]]
first = parameters_of("response")
others = {name: np.roll(array, 1) for name, array in MATERIAL[str(first["material"])].items()}
digests = {name: array_digest(array) for name, array in others.items()}
MATERIAL[str(digests)] = others
CHANGES["response"] = [{"bits": 257}, {"material": digests}, *CHANGES["adi"][1:3], {"pool": 257}, {"raw": 129}]
CHANGES["response"] += [{"dimensions": first["dimensions"] - 1}, {"controls": 3}, {"views": 5}]
CHANGES["diction"] = [*CHANGES["deepsigns"][2:], {"bits": 80}, {"groups": 8}, {"hidden": 513}]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_change_of_any_parameter_or_of_the_key_changes_every_array(name: str) -> None:
    parameters = parameters_of(name)
    inputs = parameters["inputs"]
    shared: list[dict[str, Any]] = [{"name": "detector-v4"}, {"inputs": [{**inputs[0], "name": "x"}, *inputs[1:]]}]
    changed = [{**parameters, **change} for change in CHANGES[name] + shared]
    assert {field for each in changed for field in each if each[field] != parameters[field]} == (
        set(parameters) - {"statistic"}
    )
    found = [derived(name, each) for each in [parameters, *changed]]
    found += [derived(name, parameters, key) for key in (replace(KEY, owner="Acme"), replace(KEY, secret=bytes(32)))]
    answered = {"labels", "bits", "targets", "own_labels", "null_answers"}  # by a network, which may answer all alike
    own = answered if name in RANKED else set()
    for array in found[0].keys() - parameters.get("material", {}).keys() - own:
        held = [each[array].reshape(-1) for each in found if array in each]
        length = min(map(len, held))
        assert len({each[:length].tobytes() for each in held}) == len(held), array


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(SCHEMES)), st.binary(min_size=32, max_size=32), st.sampled_from(["a", "b", "ab"]))
def test_geometry_follows_from_key_and_parameters_and_symbols_from_the_message_too(
    name: str, secret: bytes, message: str
) -> None:
    parameters, key = parameters_of(name), Key("ACME", secret)
    plain, again, addressed = (derived(name, parameters, key, text) for text in (None, None, message))
    symbols = scheme(name).symbols.name
    for array in plain:
        assert np.array_equal(plain[array], again[array])
        assert np.array_equal(plain[array], addressed[array]) == (array != symbols or name in RANKED)


@pytest.mark.parametrize("name", SCHEMES)
def test_arrays_have_the_announced_layout(name: str) -> None:
    parameters, preset = parameters_of(name), scheme(name)
    layout = {array: (str(values.dtype), values.shape) for array, values in derived(name, parameters).items()}
    assert layout == preset.layout(parameters)
    labels = preset.symbols.name == "labels"
    totals = {"blackmarks": 20, "dataset_inference": 12, "response": 256}
    assert preset.total(parameters) == totals.get(name, 20 if labels else 64)
    chances = {"exponential_weighting": 1 / 9, "multi_view": 0.25}
    assert preset.chance(parameters) == chances.get(name, 0.1 if labels else 0.5)


@pytest.mark.parametrize("over", ["keys", "messages"])
@pytest.mark.parametrize(("name", "chance"), [("sketch", 0.5), ("adi", 0.1)])
def test_symbols_are_fair(name: str, chance: float, over: str) -> None:
    """So that P(p <= a) <= a for one fixed suspect, however it answers: here always the first symbol."""
    parameters, preset = parameters_of(name), scheme(name)
    hits = []
    for n in range(2000):
        key = Key("ACME", hashlib.sha256(str(n).encode()).digest()) if over == "keys" else KEY
        subkeys = preset.subkeys(key, parameters, f"copy {n}" if over == "messages" else None)
        hits.append(int((preset.symbols.draw(subkeys.symbols, parameters, {}) == 0).sum()))
    mean, variance = preset.total(parameters) * chance, preset.total(parameters) * chance * (1 - chance)
    assert abs(np.mean(hits) - mean) < 4.5 * np.sqrt(variance / 2000)
    assert 0.85 < np.var(hits) / variance < 1.15
