"""The page of presets, and how presets of other packages are found beside it."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import wmengine
from wmengine.marks.catalogue import SCHEMES, find, registered, scheme
from wmengine.parts.responses.source import ResponsePool
from wmengine.parts.sources.activations import ActivationTerm
from wmengine.parts.sources.extracted import Extracted
from wmengine.parts.sources.integers import IntegerWeights
from wmengine.parts.sources.latent import LatentActivations
from wmengine.parts.sources.passports import Passports
from wmengine.parts.sources.weights import PeriodicWeights, Weights
from wmengine.parts.symbols import Bits, ChannelBits, Choices, GivenBits, Labels
from wmengine.parts.training.covert import Covert
from wmengine.parts.training.entangled import Entangled
from wmengine.parts.training.hamming import Hamming
from wmengine.parts.training.link import Link
from wmengine.parts.training.margin import Margin
from wmengine.parts.training.mixed import Mixed
from wmengine.parts.training.offset import Offset
from wmengine.parts.training.own_pass import OwnPass
from wmengine.parts.training.passports import PassportSigns
from wmengine.parts.training.spread import Spread
from wmengine.parts.training.together import Together
from wmengine.parts.training.towards_class import TowardsClass
from wmengine.parts.training.weight_noise import WeightNoise
from wmengine.parts.triggers.abstract import AbstractTriggers
from wmengine.parts.triggers.composites import Composites
from wmengine.parts.triggers.families import Families
from wmengine.parts.triggers.membership import MemberPairs
from wmengine.parts.triggers.one_target import OneTarget
from wmengine.parts.triggers.readings import Anchors, Levels
from wmengine.parts.triggers.tables import TableTriggers
from wmengine.parts.triggers.tokens import TokenTriggers

OF_SAMPLES = ("zhang_content", "zhang_noise", "zhang_unrelated", "exponential_weighting", "multi_view", "blind")
RUN_AGAIN = ("ewe_keyed", "margin", "certified", "class_feature", "mea_defender")
RANKED = ("frontier", "ewe", "ipguard", "conferrable", "known_mistakes", "posthoc", "blackmarks", "dataset_inference")


def test_the_presets_keep_their_papers_defaults() -> None:
    ours = ["sketch", "uchida", "adi", "deepsigns", "adi_tokens"]
    modalities = ["adi_audio", "adi_table", "adi_multilabel", "adi_values", "adi_anchors", "adi_boxes"]
    passports = ["deepipr_v1", "deepipr_v2", "deepipr_v3", "passport_norm"]
    one_weight = ["deepmarks", "stdm", "neuralmark", "greedy_residuals", "riga"]
    rest = ["diction", "tattooed", *one_weight, "emmark", *OF_SAMPLES, *RUN_AGAIN, *RANKED, "response"]
    assert list(SCHEMES) == [*ours, *modalities, *passports, *rest]
    assert [preset.full_name for preset in SCHEMES.values()] == [f"{name}/1" for name in SCHEMES]
    assert scheme("sketch").source == Weights("unit_filters", "sketch", "all")
    assert scheme("sketch").training == Link("hinge", 0.001, 5.0)
    assert scheme("uchida").source == Weights("filter_mean", "gaussian", "widest")
    assert scheme("uchida").training == Link("bce", 0.01)
    assert scheme("sketch").symbols == scheme("uchida").symbols == scheme("deepsigns").symbols == Bits(256)
    assert scheme("adi").source == AbstractTriggers()
    assert scheme("adi").symbols == scheme("adi_tokens").symbols == Labels(100)
    assert scheme("deepsigns").training == ActivationTerm(0.01, 0.01)
    assert scheme("adi_tokens").source == TokenTriggers()
    assert scheme("adi_table").source == TableTriggers(pool=4096)
    assert scheme("adi_multilabel").symbols == Bits(128)
    assert (scheme("adi_values").source, scheme("adi_anchors").source) == (Levels(10), Anchors(16))
    assert scheme("adi_values").symbols == scheme("adi_anchors").symbols == Choices(100)
    assert scheme("adi_values").training == OwnPass(rows=16, strength=0.3)
    assert {scheme(name).training for name in modalities if name != "adi_values"} == {Mixed(), OwnPass(16, 0.1)}
    for name, branch, triggers in zip(
        passports, ("deployed", "shared", "shared", "separate"), (False, False, True, True), strict=True
    ):
        assert (scheme(name).source, scheme(name).symbols) == (Passports(), ChannelBits(256))
        assert scheme(name).training == PassportSigns(0.1, 0.1, branch, triggers)
    assert scheme("deepmarks").source == scheme("uchida").source
    assert scheme("deepmarks").training == Link("mse", 0.1, 1.0)
    assert scheme("stdm").source == PeriodicWeights("filter_mean", "gaussian", "widest", 10)
    assert scheme("stdm").training == Link("stdm", 0.01)
    assert scheme("neuralmark").source == Extracted("filtered", 512)
    assert scheme("neuralmark").training == Link("bce", 0.004)
    assert scheme("greedy_residuals").source == Extracted("largest", 32)
    assert scheme("greedy_residuals").training == Link("hinge", 0.1, 0.1)
    assert scheme("riga").source == Extracted("perceptron", 1024)
    assert scheme("riga").training == Covert(0.05, 0.3)
    assert scheme("diction").source == LatentActivations(groups=16, members=4, hidden=512)
    assert scheme("diction").training == ActivationTerm(0.01, 0.0)
    assert scheme("tattooed").source == Weights("flat", "rademacher", "all")
    assert scheme("tattooed").training == Spread(4.0)
    assert scheme("emmark").source == IntegerWeights(spare=8)
    assert scheme("ewe_keyed").source == scheme("zhang_content").source
    assert scheme("ewe_keyed").training == Entangled(1.0, 3)
    assert (scheme("ewe").source, scheme("ewe").training) == (OneTarget(target=0), scheme("ewe_keyed").training)
    assert scheme("margin").source == scheme("certified").source == AbstractTriggers()
    assert scheme("margin").training == Margin(0.1, 5)
    assert scheme("certified").training == WeightNoise(0.3, 4)
    assert (scheme("class_feature").source, scheme("class_feature").symbols) == (Families(family=20), Labels(64))
    assert scheme("multi_view").training == TowardsClass(0.1)
    assert (scheme("dataset_inference").source, scheme("dataset_inference").symbols) == (MemberPairs(), GivenBits(200))
    assert scheme("blackmarks").training == Hamming(0.5)
    assert scheme("class_feature").training == Together(0.1, 0.1, 0.0)
    assert (scheme("mea_defender").source, scheme("mea_defender").symbols) == (Composites(family=20), Labels(32))
    assert scheme("mea_defender").training == Together(0.1, 0.1, 0.03)
    assert (scheme("response").source, scheme("response").symbols) == (ResponsePool(4096, 6, 48), Bits(1024))
    assert scheme("response").training == Offset(0.5, 0)
    kinds = {name: preset.kind for name, preset in SCHEMES.items()}
    asking = ("adi", "adi_tokens", *modalities, *OF_SAMPLES, *RUN_AGAIN, *RANKED, "response")
    assert kinds == {name: "black-box" if name in asking else "white-box" for name in SCHEMES}
    nulls = {"exponential_weighting": "bound", "multi_view": "bound", **dict.fromkeys(RANKED, "rank")}
    assert {name: preset.null for name, preset in SCHEMES.items() if preset.null != "exact"} == nulls
    assert all(preset.paper for preset in SCHEMES.values())


def test_an_unknown_scheme_or_option_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"there is no scheme 'sketsch'; the schemes are sketch, uchida, adi, deepsigns"
    ):
        scheme("sketsch")
    with pytest.raises(ValueError, match=r"there is no scheme \['adi'\]"):
        scheme(["adi"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'adi' has no option 'bits'; its options are count$"):
        scheme("adi", bits=3)
    for fixed in ("name", "version", "null", "paper"):
        with pytest.raises(ValueError, match=f"no option '{fixed}'"):
            scheme("sketch", **{fixed: "rank"})


@pytest.mark.parametrize(("name", "version"), [("adi", 2), ("adi", "1"), ("blend", 1), (["adi"], 1)])
def test_an_unknown_version_is_answered_with_the_known_ones(name: Any, version: Any) -> None:
    with pytest.raises(ValueError, match=r"of version .*; it has sketch/1, .*, adi_tokens/1, .*emmark/1, .*/1$"):
        find(name, version)


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
        ("deepsigns", "groups", 0),
        ("deepsigns", "members", 1 << 13),
        ("deepsigns", "pull", -1.0),
        ("adi_tokens", "special", -1),
        ("adi_table", "pool", 1),
        ("adi_values", "choices", 1),
        ("adi_anchors", "choices", 257),
        ("adi_anchors", "count", 0),
        ("adi_boxes", "rows", 0),
        ("adi_boxes", "strength", 0.0),
        ("deepipr_v2", "marked", "widest"),
        ("deepipr_v2", "marked", (0, -1)),
        ("deepipr_v2", "branch", "public"),
        ("stdm", "beta", 0),
        ("neuralmark", "extractor", "mlp"),
        ("neuralmark", "width", 1),
        ("neuralmark", "marked", "all"),
        ("riga", "critic", 0.0),
        ("riga", "strength", -1.0),
        ("ewe_keyed", "factor", 0.0),
        ("ewe_keyed", "layers", 0),
        ("ewe", "target", -1),
        ("margin", "weight", -0.1),
        ("margin", "pushes", 0),
        ("certified", "noise", float("inf")),
        ("certified", "draws", 0),
        ("class_feature", "family", 0),
        ("class_feature", "pull", 0),
        ("mea_defender", "weight", 0.0),
        ("mea_defender", "combination", -1.0),
    ],
)
def test_an_option_out_of_range_is_named(name: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be"):
        scheme(name, **{option: value})


def test_parts_that_share_an_option_make_no_preset() -> None:
    @dataclass(frozen=True)
    class Strong(Mixed):
        count: int = 3

    with pytest.raises(ValueError, match="preset 'adi' has two parts with an option 'count'"):
        replace(scheme("adi"), training=Strong())
    with pytest.raises(ValueError, match="null must be one of exact, bound, exchangeable, rank"):
        replace(scheme("adi"), null="true")


# --- presets of other packages ---

BROUGHT = """
from dataclasses import replace

from wmengine.presets import PRESETS

SKETCH = PRESETS[0]
wide = replace(SKETCH, name="wide_sketch", version=3)
pair = [wide, replace(wide, version=2, null="rank")]
twin = replace(SKETCH, null="rank")
broken = 7
"""


@dataclass
class Packages:
    """A folder on sys.path with a distribution that brings presets."""

    folder: Path

    def bring(self, name: str) -> None:
        (self.folder / "brought.py").write_text(BROUGHT)
        about = self.folder / "brought-1.0.dist-info"
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[wmengine.presets]\nthem = {name}\n")

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.folder), str(Path(wmengine.__file__).parents[1])])
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.fixture
def packages(tmp_path: Path) -> Packages:
    return Packages(tmp_path)


USE = """
import torch, wmengine
from wmengine.testing import small_network

torch.manual_seed(0)
torch.set_num_threads(1)
model, sample, key = small_network(), torch.rand(8, 1, 8, 8), wmengine.Key("ACME", bytes(32))
embedder = wmengine.Embedder(
    model, key, [wmengine.scheme("wide_sketch", bits=64)], sample=sample, num_classes=10, name="n", value_range=(0, 1)
)
optimizer = torch.optim.Adam(model.parameters(), 2e-3)
for _ in range(60):
    optimizer.zero_grad()
    embedder.loss(model(sample), torch.zeros(8, dtype=torch.int64)).backward()
    optimizer.step()
(mark,) = embedder.watermarks()
mark.save("MARK")
verdict = wmengine.verify(model.eval(), "MARK", key=key)
print(*wmengine.SCHEMES, mark.version, verdict.scheme, verdict.owned)
"""


@pytest.mark.slow
def test_a_preset_of_another_package_is_listed_embedded_and_verified(packages: Packages) -> None:
    packages.bring("brought:pair")
    done = packages.run(USE.replace("MARK", str(packages.folder / "mark.wm")))
    assert done.stdout.split() == [*SCHEMES, "wide_sketch", "3", "wide_sketch", "True"], done.stderr
    packages.bring("brought:wide")
    assert packages.run("import wmengine; print(*wmengine.SCHEMES)").stdout.split() == [*SCHEMES, "wide_sketch"]


def test_a_mark_of_a_preset_that_is_not_there_names_those_that_are(packages: Packages) -> None:
    packages.bring("brought:pair")
    code = "from wmengine.marks.catalogue import find; print(find('wide_sketch', 2).null); find('wide_sketch', 1)"
    done = packages.run(code)
    assert done.stdout.strip() == "rank"
    assert "no scheme 'wide_sketch' of version 1; it has sketch/1" in done.stderr
    assert done.stderr.strip().endswith("/1, wide_sketch/3, wide_sketch/2")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("brought:twin", "ValueError: two presets are called sketch/1; uninstall one of the packages that bring them"),
        ("brought:broken", "ImportError: the presets of brought cannot be loaded ('int' object is not iterable); mend"),
        ("brought:absent", "ImportError: the presets of brought cannot be loaded (module 'brought' has no attribute"),
        ("brought:__name__", "ImportError: the entry point 'them' of brought names no presets; mend or uninstall it"),
    ],
)
def test_a_package_that_brings_no_good_preset_is_named(packages: Packages, name: str, error: str) -> None:
    packages.bring(name)
    assert error in packages.run("import wmengine; list(wmengine.SCHEMES)").stderr


def test_a_preset_is_found_while_it_is_registered() -> None:
    other = replace(scheme("adi"), name="other", version=2)
    with registered(other):
        assert scheme("other") == find("other", 2) == other
        assert list(SCHEMES)[-1] == "other"
    assert "other" not in SCHEMES
    newer = replace(scheme("adi"), version=2)
    with registered(newer):
        assert scheme("adi") == newer
        assert find("adi", 1) == replace(newer, version=1)
    with registered(scheme("adi", count=7)):  # other options are no other preset
        assert scheme("adi").options == {"count": 100}
    with (
        pytest.raises(ValueError, match="another preset is called adi/1: give this one a name or version of its own"),
        registered(replace(scheme("adi"), null="rank")),
    ):
        pass
    assert find("adi", 1) == scheme("adi")
