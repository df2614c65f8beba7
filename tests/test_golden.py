"""Marks of version 1 of every preset, as files: they load, derive and prove themselves for ever (see golden/make.py).

If one of these fails, the code is wrong, not the file.
"""

import shutil
from pathlib import Path

import pytest

from wmengine import Key, Watermark, scan, verify
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
    "adi_audio-1": "9828e42ad96fa5a68ba581ed402a3d8fb06f2e5463857df53c2040a2bc2afbfd",
    "adi_table-1": "c021951f1b08a61f71176c9a9eb849f24bf580c2fb6319a7f08a417eb717d686",
    "adi_multilabel-1": "01ff3d431c2adf9980b27e28a26e8c45fb655e0989a7c91ff9dfc1efb4646b05",
    "adi_values-1": "513a9956e8f86669e8ea794e30ced62821911eab7b3570688775e83752863277",
    "adi_anchors-1": "40bdfc6d382df44f445530ebf4fae9edae92fda64c4586ab808ce984bdb40932",
    "adi_boxes-1": "11da44a8b1053b06abedac672a67f280e780004df6a168cd737825e8bd783599",
    "deepipr_v1-1": "dffc7a5aedea4cd56036f82f275c61e8faf1b680ecb94d04823deed50c0b715f",
    "deepipr_v2-1": "a15d350216912d818deb9b22796ab35f317fca5780b538350880cb567e9f5715",
    "deepipr_v3-1": "75ed2bd18fad58f2a1bfec6922907718ce20eb5d252fecc30afc7013ef337a5d",
    "passport_norm-1": "245cc929d0e4ebb89098d5aa1c0bcdc8fbc76e5a7f1a48c8c2ceb2eb904068ff",
    "tattooed-1": "a6f07fc19303ee8ead718541b8d956a3d1a2015b5b981387f4d11ee71d0e0d8f",
    "deepmarks-1": "340246badafc91411b08472f933b108cebfaa72dc5a4c980cc08d9199587ce4e",
    "stdm-1": "3e419c60f57c12491193500c3bd28aaa9fccf010256571249aa00d45975a35d8",
    "neuralmark-1": "fa310edf1791bab5cce20c6c9e5079a7f4c60521e231cc9b1e9ed3004fb5a8ff",
    "greedy_residuals-1": "3a80b5c14b59c2c4af0543033d66f9bdc0d1bf9df3708603a8caa015d562a702",
    "riga-1": "03019d4d85e58019b609eacef18c2e4d7788aff179a6afcf579e169a558574e5",
    "diction-1": "c0fb922eb63e2d8a565205c1296183c46247b7d37738fdbc3c86f3dfa7cb6f05",
    "emmark-1": "e9699f81c8882ff056b260dd22f9a651dddc8f112dae5f784e31edd07201a941",
    "zhang_content-1": "c3fe2e774a73f69728b36db720b55a6ccdb9096ec52d9fcb5569ef51b1c96053",
    "zhang_noise-1": "24ecaf30948d2d8e7fcadb459a6dbf81bd43753d2b02805d7a20783ba8261119",
    "zhang_unrelated-1": "49a3d7f8dd6cde7571415f9e264a823dec13d801e2e8a992fb5eaf5d307d4047",
    "exponential_weighting-1": "9aa6364cbcf5c6ea23d99d1edcf2075fcc69bd6839d1bda3aad36e3df475fabc",
    "multi_view-1": "e1740c8d4c0024a23c6e3f0538acda81e83153b91945eb64edb86aaeef703fe8",
    "blind-1": "adfeffcf6e840aacfcf497d37593f849540e2801dd4334f7f8665e22d3482c57",
    "ewe_keyed-1": "075de69eec6e96bd24f7c32b29c00605ce0c7025e114c85f32451cfd909fc6c4",
    "ewe-1": "deb7804b5b0044a18816f21c8b361bfdee03e0c251d50310c09d7b0ffe53be00",
    "margin-1": "08466078681731fc4618d6d980e244eb84d2adc7c47199ee0b2bb62601e1405b",
    "certified-1": "3436d8e541ca5718aa126d7dbeb7b63e34dab10883bcb4708048d47be169a262",
    "class_feature-1": "b8ec55f6fe28e07eb7e02090ba983bfa6bb39bcccd8d3c2defe8bdcdbc2773a7",
    "mea_defender-1": "7628027a98e684b26776d8d27aa75864640b36741963d5ce3e96368a91134c72",
    "frontier-1": "2badd7bc64cfc3ac72c237e51e58023934772fbfcba90d2fe39acc915a40627e",
    "ipguard-1": "907b1f73106c4658dacb2b2e55babdf5573bdb0d376c72053cdace791ebec3d5",
    "conferrable-1": "4b5f6fe987e613c9d018bfb58a5b7ad58755005662d9e744e737cb14e12a2447",
    "known_mistakes-1": "252c43a90c5e08ac143fd6f74bd31d4d801a2f56301da488a9a91c944a9fc8e2",
    "posthoc-1": "562471372270bda6b8a4c379e75eb79e61d3861445633fbfc9c141a753e76c53",
    "blackmarks-1": "0c22761ab986d4463ba25cc11a86690fb5a76c66d4e64889a37efad1c95df06a",
    "dataset_inference-1": "165989433c23a2d5880a63383d0e434e8d0392b3e2f2adfa3a93f42d32210051",
    "response-1": "bd7c1e159b8a5093f3a15c0947861e9bd076316641520cd62e937c4421d79015",
}
LOG10_P = {
    "sketch-1": -18.96,
    "uchida-1": -14.15,
    "adi-1": -49.40,
    "deepsigns-1": -18.96,
    "adi_tokens-1": -49.70,
    "adi_audio-1": -49.40,
    "adi_table-1": -49.70,
    "adi_multilabel-1": -14.45,
    "adi_values-1": -49.40,
    "adi_anchors-1": -59.60,
    "adi_boxes-1": -49.40,
    "diction-1": -18.96,
    "tattooed-1": -18.96,
    "emmark-1": -18.96,
}
LOG10_P |= dict.fromkeys(("deepipr_v1-1", "deepipr_v2-1", "deepipr_v3-1", "passport_norm-1"), -18.96)
LOG10_P |= {
    "deepmarks-1": -14.15,
    "stdm-1": -14.15,
    "neuralmark-1": -9.33,
    "greedy_residuals-1": -18.96,
    "riga-1": -14.15,
    "zhang_content-1": -49.4,
    "zhang_noise-1": -49.4,
    "zhang_unrelated-1": -49.4,
    "exponential_weighting-1": -47.41,
    "multi_view-1": -29.8,
    "blind-1": -49.4,
    "frontier-1": -0.3,
    "ewe-1": -0.3,
    "ipguard-1": -0.3,
    "conferrable-1": -0.18,
    "known_mistakes-1": 0.0,
    "posthoc-1": 0.0,
    "blackmarks-1": -0.3,
    "dataset_inference-1": -0.3,
    "response-1": -27.05,
}
LOG10_P |= dict.fromkeys(("ewe_keyed-1", "margin-1", "certified-1"), -49.40)
LOG10_P |= dict.fromkeys(("class_feature-1", "mea_defender-1"), -24.40)


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
    ranks = verdict.null == "rank"  # among three networks here, at most
    matched = 199 if name == "response-1" else verdict.total  # all bits are read from all answers, none by itself
    assert (verdict.decision, verdict.matched) == ("not_proven" if ranks else "owned", matched)
    assert verdict.log10_p == pytest.approx(LOG10_P[name], abs=0.01)


def test_no_network_holds_the_mark_of_another(tmp_path: Path) -> None:
    marks = []
    for name in COMMITMENTS:
        shutil.copyfile(FOLDER / f"{name}.wm", tmp_path / f"{name}.wm")
        (tmp_path / f"{name}.wm").chmod(0o600)
        marks.append(Watermark.load(tmp_path / f"{name}.wm"))
    rows = scan([FOLDER / f"{name}.onnx" for name in COMMITMENTS], marks, test="fixed").to_pylist()
    assert len(rows) == len(COMMITMENTS) ** 2
    for row in rows:
        if row["commitment"] != COMMITMENTS[Path(row["suspect"]).stem]:
            assert row["decision"] != "owned", row
            assert row["decision"] == "other_task" or row["log10_p"] > -9.0, row
