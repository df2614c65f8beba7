"""A key: what it derives is frozen, its file is private and whole, and each way to spoil it has one clear error."""

import copy
import hashlib
import json
import os
import pickle
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmengine.errors import KeyFileError
from wmengine.identity import sealing
from wmengine.identity.canonical import canonical_json
from wmengine.identity.key import Key
from wmengine.identity.subkeys import Subkeys, hkdf_sha256, keyed_bits, keyed_labels, philox_key

KEY = Key("ACME Vision", bytes(range(32)))
SUBKEYS = Subkeys(KEY, "sketch/1", {"bits": 256, "name": "detector-v3"})
PROJECTION = bytes.fromhex("5f8ab129217cee940d23b797dd9f42b34fec21a82da8e87c20becdc68a7a3455")
RECORD = "3c0a3b141c17db6db66f1945310f2a72b13c9eb7e8d5e47d4ab176b61a1ef5c0"
SUBKEY = bytes.fromhex("8ae3ba68b625e76efc63f5b69428864006aee25b4b88db8f70d8fc98fa4363c6")


# --- derivation, frozen: a mark embedded today must verify in ten years ---


def test_golden_commitment_and_subkeys() -> None:
    assert KEY.commitment == "b0521c62167ada294d2db3f0015b62590cdbb5a1decb5e4f7dbc10564c983a06"
    assert SUBKEYS.identity == "c8e12bb39bdcc2e7d322682d40180ae21e3720b12afdcaea53fc019ee0677ed0"
    assert SUBKEYS.geometry("projection", "7") == PROJECTION
    assert SUBKEYS.symbols.hex() == "7777dc413298ac3483de908dc4fa829f2a62d3d5d76b9197ae4b75363701ae89"
    assert SUBKEYS.salt.hex() == "335bfc388b57756cadce0a4e29ed0929a7085464cb04f16158a644ab95c7128c"
    assert SUBKEYS.record({"created": "2026-01-02"}) == RECORD
    addressed = replace(SUBKEYS, message="to A")
    assert addressed.symbols.hex() == "178500600134273295c9a025c86e536e1b6a664bf966234ff0057e644433e4f1"
    assert addressed.salt.hex() == "71e3d9ff165acdfa425e26aced4a41ff8e89e2e00ce015f200d030c10c095360"


def test_golden_generator_key_bits_and_labels() -> None:
    assert philox_key(SUBKEY) == 7991397529163588490
    assert keyed_bits(SUBKEY, 20).tolist() == [1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0]
    assert keyed_labels(SUBKEY, 12, 10).tolist() == [7, 1, 7, 2, 5, 5, 7, 3, 5, 2, 2, 8]
    assert keyed_labels(SUBKEY, 6, 1000).tolist() == [747, 961, 227, 702, 25, 685]


@pytest.mark.parametrize(
    ("secret", "salt", "info", "expected"),
    [
        pytest.param(
            bytes([0x0B] * 22),
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
            id="A.1",
        ),
        pytest.param(
            bytes(range(0x50)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
            id="A.2",
        ),
        pytest.param(
            bytes([0x0B] * 22),
            b"",
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
            id="A.3",
        ),
    ],
)
def test_hkdf_agrees_with_rfc_5869(secret: bytes, salt: bytes, info: bytes, expected: str) -> None:
    assert hkdf_sha256(secret, info, len(expected) // 2, salt).hex() == expected


@pytest.mark.parametrize("length", [0, -1, 8161])
def test_hkdf_refuses_a_length_beyond_the_rfc(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 8160"):
        hkdf_sha256(b"secret", b"", length)


def families(subkeys: Subkeys) -> dict[str, object]:
    return {
        "geometry": subkeys.geometry("projection", "7"),
        "symbols": subkeys.symbols,
        "salt": subkeys.salt,
        "record": subkeys.record({}),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "sketch/2"},
        {"parameters": {"bits": 256, "name": "b"}},
        {"parameters": {"bits": 257, "name": "detector-v3"}},
        {"key": Key("ACME vision", KEY.secret)},
        {"key": Key(KEY.owner, bytes(32))},
    ],
)
def test_every_family_follows_from_key_preset_and_parameters(change: dict[str, object]) -> None:
    before, after = families(SUBKEYS), families(replace(SUBKEYS, **change))
    assert [name for name in before if before[name] == after[name]] == []


def test_only_geometry_is_the_same_for_every_message() -> None:
    messages = [families(replace(SUBKEYS, message=message)) for message in (None, "a", "b")]
    assert len({found["geometry"] for found in messages}) == 1
    for family in ("symbols", "salt", "record"):
        assert len({found[family] for found in messages}) == 3, family


def test_subkeys_of_other_purposes_and_places_differ() -> None:
    assert len({SUBKEYS.geometry(*each) for each in (("a", "b"), ("a", "c"), ("b", "b"), ("ab", ""), ("", "ab"))}) == 5


def test_the_order_in_which_parameters_were_written_does_not_matter() -> None:
    turned = dict(reversed(SUBKEYS.parameters.items()))
    assert replace(SUBKEYS, parameters=turned).symbols == SUBKEYS.symbols


@pytest.mark.parametrize(
    ("value", "spelling"),
    [
        ({"b": [1, -2], "a": {"z": "ä", "": "\n"}}, b'{"a":{"":"\\n","z":"\\u00e4"},"b":[1,-2]}'),
        ([], b"[]"),
        (2**70, b"1180591620717411303424"),
    ],
)
def test_canonical_json_has_one_spelling(value: object, spelling: bytes) -> None:
    assert canonical_json(value) == spelling


@pytest.mark.parametrize("wrong", [1.0, True, None, (1,), np.int64(1), b"x", {1: 2}])
def test_canonical_json_names_the_place_of_what_has_no_one_spelling(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"value\['a'\]\[1\] "):
        canonical_json({"a": [0, wrong]})


@given(st.binary(min_size=32, max_size=32), st.integers(0, 70))
def test_bits_are_shake_256_read_from_the_lowest_bit_up(subkey: bytes, count: int) -> None:
    stream = int.from_bytes(hashlib.shake_256(subkey).digest(9), "little")
    assert keyed_bits(subkey, count).tolist() == [stream >> index & 1 for index in range(count)]


@given(
    st.binary(min_size=32, max_size=32),
    st.integers(0, 40),
    st.sampled_from([2, 3, 10, 3 << 30, (1 << 31) + 1, 1 << 32]),
)
def test_labels_skip_the_words_that_would_favour_low_labels(subkey: bytes, count: int, classes: int) -> None:
    stream = hashlib.shake_256(subkey).digest(4000)
    words = [int.from_bytes(stream[start : start + 4], "little") for start in range(0, 4000, 4)]
    kept = [word % classes for word in words if word < 2**32 // classes * classes]
    labels = keyed_labels(subkey, count, classes)
    assert labels.dtype == np.int64
    assert labels.tolist() == kept[:count]


def test_more_labels_begin_with_the_fewer() -> None:
    # With just over half of 2^32 classes half of all words are skipped, and several digests are needed.
    many = keyed_labels(SUBKEY, 5000, (1 << 31) + 1)
    assert np.array_equal(many[:10], keyed_labels(SUBKEY, 10, (1 << 31) + 1))


def test_labels_are_uniform_over_the_classes() -> None:
    counts = np.bincount(keyed_labels(SUBKEY, 70_000, 7), minlength=7)
    chi_square = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi_square < 22.5  # 0.1 % point of 6 degrees of freedom


@pytest.mark.parametrize("classes", [-1, 0, 1, 2**32 + 1])
def test_labels_need_at_least_two_classes(classes: int) -> None:
    with pytest.raises(ValueError, match=r"2 to 2\^32 classes"):
        keyed_labels(SUBKEY, 1, classes)


def test_symbols_refuse_a_negative_count_and_a_short_subkey() -> None:
    with pytest.raises(ValueError, match="count"):
        keyed_bits(SUBKEY, -1)
    with pytest.raises(ValueError, match="32 bytes"):
        keyed_labels(SUBKEY[:31], 1, 10)


# --- the key itself ---


def test_two_generated_keys_differ_in_all_they_derive() -> None:
    first, second = Key.generate(owner="ACME Vision"), Key.generate(owner="ACME Vision")
    assert first.secret != second.secret
    assert first.commitment != second.commitment
    assert first != second


def test_the_secret_shows_in_no_repr_and_no_pickle() -> None:
    assert repr(KEY) == "Key(owner='ACME Vision')"
    assert KEY.secret.hex() not in f"{KEY} {KEY!r}"
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(KEY)
    assert copy.deepcopy({"key": KEY})["key"] is KEY


@pytest.mark.parametrize("secret", [b"", bytes(31), "00" * 32])
def test_a_secret_is_32_bytes(secret: object) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Key("ACME", secret)  # type: ignore[arg-type]


# --- its file ---


@pytest.mark.parametrize("passphrase", [None, "correct horse", "påss wörd"])
def test_a_key_survives_its_file(tmp_path: Path, passphrase: str | None) -> None:
    key = Key.generate(owner="Überwachung GmbH")
    key.save(tmp_path / "a.key", passphrase)
    assert Key.load(str(tmp_path / "a.key"), passphrase) == key
    assert (key.secret.hex().encode() in (tmp_path / "a.key").read_bytes()) == (passphrase is None)


def test_a_passphrase_typed_on_another_system_still_opens(tmp_path: Path) -> None:
    KEY.save(tmp_path / "a.key", "caf\u00e9")
    assert Key.load(tmp_path / "a.key", "cafe\u0301") == KEY


def test_a_key_file_is_private_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    link = os.link

    def watching_link(draft: Path, target: Path) -> None:
        modes.append(stat.S_IMODE(os.stat(draft).st_mode))
        link(draft, target)

    opened = []
    monkeypatch.setattr(sealing.os, "link", watching_link)
    open_ = os.open
    monkeypatch.setattr(sealing.os, "open", lambda *arguments: opened.append(arguments[2:]) or open_(*arguments))
    old = os.umask(0)
    try:
        KEY.save(tmp_path / "a.key")
    finally:
        os.umask(old)
    assert opened == [(0o600,)]
    assert modes == [0o600]
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["a.key"]


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    KEY.save(tmp_path / "a.key")
    before = (tmp_path / "a.key").read_bytes()
    with pytest.raises(KeyFileError, match=r"a\.key exists already .*choose another name"):
        Key.generate(owner="ACME").save(tmp_path / "a.key")
    assert (tmp_path / "a.key").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.key"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealing.os, "fsync", full)
    with pytest.raises(KeyFileError, match=r"a\.key cannot be written \(No space left on device\)"):
        KEY.save(tmp_path / "a.key")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"absent/a\.key cannot be written .* choose a folder that exists"):
        KEY.save(tmp_path / "absent" / "a.key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o620])
def test_a_key_that_others_can_reach_is_refused_with_the_mend(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.key"
    KEY.save(path)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"chmod 600 {path}$"):
        Key.load(path)
    path.chmod(0o600)
    assert Key.load(path) == KEY


def test_a_sealed_key_needs_its_passphrase(tmp_path: Path) -> None:
    KEY.save(tmp_path / "a.key", "correct horse")
    with pytest.raises(KeyFileError, match=r"a\.key is sealed; give its passphrase"):
        Key.load(tmp_path / "a.key")
    with pytest.raises(KeyFileError, match=r"a\.key does not open with this passphrase; give the one"):
        Key.load(tmp_path / "a.key", "battery staple")


def test_what_is_no_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"absent\.key does not exist; give the path of a key file"):
        Key.load(tmp_path / "absent.key")
    with pytest.raises(KeyFileError, match="is not a file; give the path of a key file"):
        Key.load(tmp_path)
    os.mkfifo(tmp_path / "pipe.key")
    with pytest.raises(KeyFileError, match=r"pipe\.key is not a file"):
        Key.load(tmp_path / "pipe.key")
    with pytest.raises(KeyFileError, match="cannot be read"):
        Key.load("a\0b.key")


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"PK\3\4", b"[]", b"{}", b"7", b"null", b"{", b"\xff\xfe", b"[" * 60_000]
)
def test_what_is_no_key_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(KeyFileError, match=r"a\.key is not a key file; give one made by wmengine keygen"):
        Key.load(_write(tmp_path / "a.key", content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "wmengine/2"}, r"has format 'wmengine/2' and this wmengine reads 'wmengine/1'; use the one"),
        ({"kind": "watermark"}, r"holds a 'watermark', not a key; give one"),
        ({"colour": "red"}, r"has an unknown field 'colour'; use the wmengine that made it"),
        ({"owner": ""}, r"is damaged \(its owner or secret is not whole\); take it from a backup"),
        ({"owner": "Mallory"}, r"is damaged \(its secret does not match its commitment\)"),
        ({"secret": "00" * 31}, r"is damaged \(its owner or secret is not whole\)"),
        ({"secret": "00" * 32}, r"is damaged \(its secret does not match its commitment\)"),
        ({"secret": 7}, r"is damaged \(its owner or secret is not whole\)"),
        ({"commitment": None}, r"is damaged \(its secret does not match its commitment\)"),
    ],
)
def test_a_changed_field_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    KEY.save(tmp_path / "a.key")
    document = json.loads((tmp_path / "a.key").read_bytes())
    with pytest.raises(KeyFileError, match=r"b\.key " + message):
        Key.load(_write(tmp_path / "b.key", json.dumps({**document, **change}).encode()))


def test_an_empty_passphrase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty passphrase"):
        KEY.save(tmp_path / "a.key", "")
    with pytest.raises(TypeError, match="a passphrase is a str"):
        KEY.save(tmp_path / "a.key", b"secret")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="surrogate"):
        KEY.save(tmp_path / "a.key", "\ud800")
    assert os.listdir(tmp_path) == []


# --- sealing ---

SEALED = sealing.seal(b"payload " * 10, "correct horse")


def test_sealing_twice_gives_two_envelopes_of_one_payload() -> None:
    again = sealing.seal(b"payload " * 10, "correct horse")
    assert again != SEALED
    assert sealing.unseal(SEALED, "correct horse") == sealing.unseal(again, "correct horse") == b"payload " * 10


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_byte_of_an_envelope_can_change(data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(SEALED) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != SEALED[position]))
    with pytest.raises(ValueError, match=r"is not sealed|is damaged|has format|does not open"):
        sealing.unseal(SEALED[:position] + bytes([byte]) + SEALED[position + 1 :], "correct horse")


@pytest.mark.parametrize(
    "change", [{"n": 1 << 40}, {"n": "32768"}, {"r": 1 << 20}, {"kdf": "md5"}, {"salt": ""}, {"x": 1}]
)
def test_an_envelope_cannot_ask_for_other_costs_than_the_format_s(change: dict[str, object]) -> None:
    envelope = json.dumps({**json.loads(SEALED), **change}).encode()
    with pytest.raises(ValueError, match="is damaged"):
        sealing.unseal(envelope, "correct horse")


def test_an_envelope_of_a_later_version_says_so() -> None:
    envelope = json.dumps({**json.loads(SEALED), "format": "wmengine/2"}).encode()
    assert sealing.is_sealed(envelope)
    with pytest.raises(ValueError, match="has format 'wmengine/2' and this wmengine reads 'wmengine/1'"):
        sealing.unseal(envelope, "correct horse")


def test_keys_are_used_without_importing_cryptography() -> None:
    code = "import sys, wmengine.identity.key; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
