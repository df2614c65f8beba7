"""Marks of version 1 of every preset, as files: they load, derive and prove themselves for ever (see golden/make.py).

If one of these fails, the code is wrong, not the file.
"""

import shutil
from pathlib import Path

import pytest

from wmengine import Key, Watermark, verify
from wmengine.errors import WatermarkError
from wmengine.presets import PRESETS

FOLDER = Path(__file__).parent / "golden"
KEY_FILE = (
    '{"commitment":"b0521c62167ada294d2db3f0015b62590cdbb5a1decb5e4f7dbc10564c983a06","format":"wmengine/1",'
    '"kind":"key","owner":"ACME Vision","secret":"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"}'
)
COMMITMENTS = {
    "sketch-1": "bfc379c22a5789a2e9d4f62b7caebe67a3d8e2b90f9cbdbd165bd55694f5c00f",
    "uchida-1": "58400dbc3e490af6dc74cc7c601196bf3fef33f4bb2c2cbd5a42d5d8f15f08fa",
    "adi-1": "2fa65e9ac102dda290aabd8da2671e7f77a9058924a671452de9aab3504d79ea",
    "deepsigns-1": "e29b3a5e80ca65bbcbc8fde9fe7ca09e804df48bf614b89db45f1ff2956c63be",
    "adi_tokens-1": "e1b4e65f15e12956b0a2422ce61b5bc32a51ef9bbff11794303bbc63fc8616dd",
    "diction-1": "c0fb922eb63e2d8a565205c1296183c46247b7d37738fdbc3c86f3dfa7cb6f05",
    "tattooed-1": "a6f07fc19303ee8ead718541b8d956a3d1a2015b5b981387f4d11ee71d0e0d8f",
    "emmark-1": "e9699f81c8882ff056b260dd22f9a651dddc8f112dae5f784e31edd07201a941",
}
LOG10_P = {
    "sketch-1": -18.96,
    "uchida-1": -14.15,
    "adi-1": -49.40,
    "deepsigns-1": -18.96,
    "adi_tokens-1": -49.70,
    "diction-1": -18.96,
    "tattooed-1": -18.96,
    "emmark-1": -18.96,
}


@pytest.fixture
def key(tmp_path: Path) -> Key:
    (tmp_path / "golden.key").write_text(KEY_FILE)
    (tmp_path / "golden.key").chmod(0o600)
    return Key.load(tmp_path / "golden.key")


@pytest.fixture(params=COMMITMENTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def file(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "golden.wm"
    shutil.copyfile(FOLDER / f"{name}.wm", path)
    path.chmod(0o600)  # which a repository does not keep
    return path


def test_every_preset_of_the_page_has_its_files() -> None:
    assert {f"{preset.name}-{preset.version}" for preset in PRESETS} <= set(COMMITMENTS)


def test_a_mark_loads_with_its_commitment_and_is_derived_from_its_key(name: str, file: Path, key: Key) -> None:
    mark = Watermark.load(file)
    assert f"{mark.scheme}-{mark.version}" == name
    assert (mark.owner, mark.name, mark.created) == ("ACME Vision", "detector-v3", "2026-01-02")
    assert mark.commitment == COMMITMENTS[name]
    assert mark.message == ("copy 7" if name == "uchida-1" else None)
    assert mark.baseline == ({"matched": 31, "total": 64, "log10_p": "-0.2218"} if name == "sketch-1" else None)
    mark.check_derivation(key)
    with pytest.raises(WatermarkError, match="was not made with this key"):
        mark.check_derivation(Key(key.owner, bytes(32)))


def test_a_network_that_holds_it_is_owned(name: str, file: Path, key: Key) -> None:
    verdict = verify(FOLDER / f"{name}.onnx", file, key=key)
    assert (verdict.decision, verdict.matched) == ("owned", verdict.total)
    assert verdict.log10_p == pytest.approx(LOG10_P[name], abs=0.01)


def test_no_other_network_for_images_holds_it(name: str, file: Path) -> None:
    others = [other for other in COMMITMENTS if other not in (name, "adi_tokens-1")]
    assert "owned" not in [verify(FOLDER / f"{other}.onnx", file).decision for other in others]
