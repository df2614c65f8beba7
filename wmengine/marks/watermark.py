"""What is registered and later checked: one mark's parameters, symbols and commitment, kept in one safetensors file.

A `.wm` file is a secret (who can verify a symmetric mark can also forge or remove it), but it is made of this mark's
own subkeys only: a leaked one exposes no other. What may be shown to others is its commitment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as serialize

from wmengine.errors import WatermarkError
from wmengine.identity.canonical import canonical_digest, canonical_json, check_name, read_json
from wmengine.identity.key import Key
from wmengine.identity.sealing import FORMAT, is_sealed, read_file, seal, unseal, write_file
from wmengine.identity.subkeys import Subkeys
from wmengine.marks import pools
from wmengine.marks.catalogue import find
from wmengine.marks.preset import Preset, array_digest

_COMMITMENT_PREFIX = b"wmengine/1/watermark-commitment\0"
_SAFETENSORS_TYPES = {"uint8": "U8", "uint64": "U64", "int64": "I64", "int32": "I32", "float32": "F32"}
_REQUIRED = {
    *("arrays", "commitment", "created", "digest", "format", "kind"),
    *("owner", "parameters", "record", "salt", "scheme", "version"),
}
_OPTIONAL = {"baseline", "message", "names"}
_MAXIMUM_NAME = 1000  # characters
_BASELINE = {"matched": int, "total": int, "log10_p": str}
# The arrays of marks that were read: what those of all customers of a model share is in memory once.
_held: WeakValueDictionary[tuple[str, str, tuple[int, ...]], NDArray[Any]] = WeakValueDictionary()
_LOG10_P = re.compile(r"-?[0-9]{1,9}\.[0-9]{4}")


@dataclass(frozen=True, eq=False, repr=False)
class Watermark:
    """One mark. `Watermark.create` derives it from a key, `load` reads it from a file; both validate every field.

    arrays: what the preset derives (read-only). message: who a copy is for, None where there is no such thing. salt: 64
    hex digits that blind the commitment. names: what the modules of its carriers were called, where it was made for a
    torch module, by which they are looked for in checkpoints. created: ISO date (UTC); baseline: what the mark scored
    on the model before it was embedded: both are the key holder's word, and `record`, which only the key makes, shows
    that it was his.
    """

    scheme: str
    version: int
    owner: str
    parameters: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    salt: str
    created: str
    record: str
    message: str | None = None
    baseline: dict[str, Any] | None = None
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        preset = find(self.scheme, self.version)
        for what, name in {"owner": self.owner, "message": self.message}.items():
            if (what == "owner" or name is not None) and check_name(what, name) != name:
                raise ValueError(f"the {what} {name!r} is not in NFC")
        preset.check(self.parameters)
        for what, digits in {"salt": self.salt, "record": self.record}.items():
            if not isinstance(digits, str) or len(digits) != 64 or bytes.fromhex(digits).hex() != digits:
                raise ValueError(f"{what} must be 64 hex digits")
        if not isinstance(self.created, str) or date.fromisoformat(self.created).isoformat() != self.created:
            raise ValueError(f"created must be an ISO date, and it is {self.created!r}")
        if date.fromisoformat(self.created) > _today() + timedelta(days=1):  # a day for clocks that go wrong
            raise ValueError(f"created is {self.created}, which is still to come")
        if self.baseline is not None:
            _check_baseline(self.baseline, preset.total(self.parameters))
        if self.names is not None:
            _check_names(self.names, self.parameters)
            object.__setattr__(self, "names", tuple(self.names))
        # Own copies: a caller's later change must not reach a mark that was checked.
        object.__setattr__(self, "parameters", json.loads(canonical_json(self.parameters)))
        if self.baseline is not None:
            object.__setattr__(self, "baseline", json.loads(canonical_json(self.baseline)))
        object.__setattr__(self, "arrays", _checked_arrays(preset, self.parameters, self.arrays))

    @classmethod
    def create(
        cls,
        key: Key,
        preset: Preset,
        parameters: Mapping[str, Any],
        *,
        message: str | None = None,
        baseline: dict[str, Any] | None = None,
        created: str | None = None,
        material: Mapping[str, NDArray[Any]] | None = None,
        names: Sequence[str] | None = None,
    ) -> Watermark:
        """The mark that this key makes with these parameters (of `Preset.describe`), material and message.

        created: today unless told, as an ISO date. material: what `Preset.gather` gave for these parameters.
        """
        message = None if message is None else check_name("message", message)
        subkeys = preset.subkeys(key, parameters, message)
        created = created or _today().isoformat()
        arrays = preset.derive(key, dict(parameters), message, material)
        if baseline is not None:
            _check_baseline(baseline, preset.total(dict(parameters)))
        return cls(
            scheme=preset.name,
            version=preset.version,
            owner=key.owner,
            parameters=dict(parameters),
            arrays=arrays,
            salt=subkeys.salt.hex(),
            created=created,
            record=subkeys.record(_recorded(created, baseline)),
            message=message,
            baseline=baseline,
            names=names,
        )

    @cached_property
    def preset(self) -> Preset:
        """What it is made of."""
        return find(self.scheme, self.version)

    @property
    def name(self) -> str:
        """The name of the model that the mark is for; it enters the derivation."""
        return str(self.parameters["name"])

    @property
    def kind(self) -> str:
        """ "white-box" (in the network's inside) or "black-box" (in its answers)."""
        return self.preset.kind

    @property
    def total(self) -> int:
        """The number of symbols it can test: T bits or N labels."""
        return self.preset.total(self.parameters)

    @property
    def symbols(self) -> NDArray[Any]:
        """The expected symbols [total]."""
        return self.arrays[self.preset.symbols.name]

    @cached_property
    def commitment(self) -> str:
        """64 hex digits, safe to publish, that bind owner, scheme, version, parameters, message and every array.

        SHA-256 of a prefix, their canonical JSON, and the salt, which only the key's holder can give. It dates this
        mark; a key's commitment dates none.
        """
        statement = {
            "arrays": self._digests,
            "format": FORMAT,
            "owner": self.owner,
            "parameters": self.parameters,
            "scheme": self.scheme,
            "total": self.total,
            "version": self.version,
        }
        if self.message is not None:
            statement["message"] = self.message
        if self.names is not None:
            statement["names"] = list(self.names)
        return hashlib.sha256(_COMMITMENT_PREFIX + canonical_json(statement) + bytes.fromhex(self.salt)).hexdigest()

    @cached_property
    def geometry(self) -> str:
        """64 hex digits, equal for marks that one observation of a suspect serves: all but the symbols are the same."""
        arrays = {name: digest for name, digest in self._digests.items() if name != self.preset.symbols.name}
        names = {} if self.names is None else {"names": list(self.names)}
        return canonical_digest(
            {"arrays": arrays, "parameters": self.parameters, "scheme": self.scheme, "version": self.version} | names
        )

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {name: array_digest(array) for name, array in self.arrays.items()}

    def __repr__(self) -> str:
        return f"Watermark(name={self.name!r}, scheme={self.scheme!r}, owner={self.owner!r}, total={self.total})"

    def with_baseline(self, key: Key, baseline: dict[str, Any]) -> Watermark:
        """The same mark with what it scored before it was embedded. Raises WatermarkError for another key."""
        subkeys = self._subkeys(key)
        _check_baseline(baseline, self.total)
        return replace(self, baseline=baseline, record=subkeys.record(_recorded(self.created, baseline)))

    def with_message(self, key: Key, message: str) -> Watermark:
        """The mark of another copy, dated today, without drawing again what all copies share. Raises WatermarkError for
        another key."""
        self._subkeys(key)
        message, created = check_name("message", message), _today().isoformat()
        subkeys, symbols = self.preset.subkeys(key, self.parameters, message), self.preset.symbols
        return replace(
            self,
            arrays={**self.arrays, symbols.name: symbols.draw(subkeys.symbols, self.parameters, self.arrays)},
            salt=subkeys.salt.hex(),
            created=created,
            record=subkeys.record(_recorded(created, None)),
            message=message,
            baseline=None,
        )

    def _subkeys(self, key: Key) -> Subkeys:
        """Those of this mark. Raises WatermarkError unless this key made it."""
        if key.owner != self.owner:
            raise WatermarkError(
                f"the watermark of {self.name!r} belongs to {self.owner!r} and the key to {key.owner!r}; "
                "give the key that it was made with"
            )
        subkeys = self.preset.subkeys(key, self.parameters, self.message)
        if subkeys.salt.hex() != self.salt:
            raise WatermarkError(
                f"the watermark of {self.name!r} was not made with this key of {key.owner!r}; "
                "give the key that it was made with"
            )
        return subkeys

    def check_derivation(self, key: Key) -> None:
        """Raises WatermarkError, saying what differs, unless this key makes this very mark and wrote its record."""
        self._subkeys(key)
        derived = Watermark.create(
            key,
            self.preset,
            self.parameters,
            message=self.message,
            baseline=self.baseline,
            created=self.created,
            material={name: self.arrays[name] for name in self.parameters.get("material", {})},
        )
        for name, array in derived.arrays.items():
            if not np.array_equal(array, self.arrays[name]):
                raise WatermarkError(
                    f"the {name} of the watermark of {self.name!r} are not those that its key derives; "
                    "make the watermark again"
                )
        if derived.record != self.record:
            raise WatermarkError(
                f"the date or the baseline of the watermark of {self.name!r} was changed by somebody without its key; "
                "take it from a backup"
            )

    def save(self, path: str | os.PathLike[str], passphrase: str | None = None, *, overwrite: bool = False) -> None:
        """Writes a `.wm` file with mode 0600, sealed when a passphrase is given. Material of more than 72 MiB goes into
        a `.pool` file beside it, in the same way.

        Raises WatermarkError where the `.wm` exists, unless it is to be overwritten.
        """
        content: dict[str, Any] = {
            "arrays": self._digests,
            "commitment": self.commitment,
            "created": self.created,
            "format": FORMAT,
            "kind": "watermark",
            "owner": self.owner,
            "parameters": self.parameters,
            "record": self.record,
            "salt": self.salt,
            "scheme": self.scheme,
            "version": self.version,
        }
        for name in _OPTIONAL:
            if (value := getattr(self, name)) is not None:
                content[name] = list(value) if name == "names" else value
        document = canonical_json({**content, "digest": canonical_digest(content)}).decode("ascii")
        digests = self.parameters.get("material", {})
        material = {name: self.arrays[name] for name in digests}
        large = sum(array.nbytes for array in material.values()) > pools.MOST_INSIDE
        if large:
            if not overwrite and os.path.lexists(path):  # before its pool is written
                raise WatermarkError(f"{os.fspath(path)} exists already and is not overwritten; choose another name")
            pools.write_pool(path, material, digests, "" if passphrase is None else self.salt)
        inside = {name: array for name, array in self.arrays.items() if not (large and name in digests)}
        data = serialize(inside, metadata={"wmengine": document})
        write_file(path, data if passphrase is None else seal(data, passphrase), WatermarkError, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], passphrase: str | None = None) -> Watermark:
        """Reads a `.wm` file, and the `.pool` file beside it where it has one. Raises WatermarkError: missing, readable
        by others, damaged, wrong passphrase, of another version."""
        name = os.fspath(path)
        data, sealed = read_file(path, "watermark file", WatermarkError, private=True), False
        if is_sealed(data):
            if passphrase is None:
                raise WatermarkError(f"{name} is sealed; give its passphrase")
            try:
                data, sealed = unseal(data, passphrase), True
            except ValueError as cause:
                raise WatermarkError(f"{name} {cause}") from None
        document = _document(name, data)

        def pool(material: Mapping[str, str]) -> bytes:
            return pools.read_pool(path, material, document["salt"] if sealed else "")

        try:
            mark = cls(
                scheme=document["scheme"],
                version=document["version"],
                owner=document["owner"],
                parameters=document["parameters"],
                arrays=_read_arrays(data, document, pool),
                salt=document["salt"],
                created=document["created"],
                record=document["record"],
                message=document.get("message"),
                baseline=document.get("baseline"),
                names=document.get("names"),
            )
        except pools.PoolError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError, RecursionError) as cause:
            what = f"it lacks {cause}" if isinstance(cause, KeyError) else cause
            raise WatermarkError(f"{name} cannot be used ({what}); take it from a backup or make it again") from None
        if mark.commitment != document["commitment"]:
            raise WatermarkError(f"{name} does not match its own commitment; take it from a backup or make it again")
        return mark


def _today() -> date:
    return datetime.now(UTC).date()


def _recorded(created: str, baseline: dict[str, Any] | None) -> dict[str, Any]:
    return {"created": created} if baseline is None else {"baseline": baseline, "created": created}


def _check_baseline(baseline: Any, total: int) -> None:
    if type(baseline) is not dict or set(baseline) != set(_BASELINE):
        raise ValueError(f"baseline must hold {', '.join(_BASELINE)}")
    for name, kind in _BASELINE.items():
        if type(baseline[name]) is not kind:
            raise ValueError(f"baseline's {name} must be {kind.__name__}, and it is {baseline[name]!r}")
    if not 0 <= baseline["matched"] <= baseline["total"] <= total:
        raise ValueError(f"baseline must be matches of at most {total} symbols, and it is {baseline}")
    if not _LOG10_P.fullmatch(baseline["log10_p"]) or float(baseline["log10_p"]) > 0.0:
        raise ValueError(f"baseline's log10_p must be at most 0, with four decimals, not {baseline['log10_p'][:40]!r}")


def _check_names(names: Any, parameters: Mapping[str, Any]) -> None:
    if not isinstance(names, list | tuple) or not names or len(names) != len(parameters.get("carriers", ())):
        raise ValueError("names must be one for each carrier")
    if not all(isinstance(name, str) and len(name) <= _MAXIMUM_NAME for name in names):
        raise ValueError(f"names must be texts of at most {_MAXIMUM_NAME} characters")


def _document(name: str, data: bytes) -> dict[str, Any]:
    """The metadata of a `.wm` file once its format, kind, spelling, fields and digest are found right."""
    text = _metadata(data)
    if text is None:
        raise WatermarkError(f"{name} is not a watermark file; give a .wm file that wmengine wrote")
    try:
        document: dict[str, Any] = dict(read_json(text))
    except (TypeError, ValueError, RecursionError):
        raise WatermarkError(f"{name} is damaged (its metadata is not JSON); take it from a backup") from None
    if document.get("format") != FORMAT:
        raise WatermarkError(
            f"{name} has format {document.get('format')!r} and this wmengine reads {FORMAT!r}; use the one that made it"
        )
    if document.get("kind") != "watermark":
        raise WatermarkError(f"{name} holds a {document.get('kind')!r}, not a watermark; give a .wm file")
    unknown, missing = sorted(document.keys() - _REQUIRED - _OPTIONAL), sorted(_REQUIRED - document.keys())
    if unknown:
        raise WatermarkError(f"{name} has an unknown field {unknown[0]!r}; use the wmengine that made it")
    if missing:
        raise WatermarkError(f"{name} is damaged (it lacks the field {missing[0]!r}); take it from a backup")
    content = {field: value for field, value in document.items() if field != "digest"}
    try:
        # Only the one canonical spelling counts, so no byte can change without being noticed.
        intact = canonical_json(document).decode("ascii") == text and canonical_digest(content) == document["digest"]
    except (TypeError, ValueError, RecursionError):
        intact = False
    if not intact:
        raise WatermarkError(f"{name} is damaged (its metadata does not match its digest); take it from a backup")
    return document


def _metadata(data: bytes) -> str | None:
    """The engine's entry in a safetensors header: 8 bytes of length, little endian, and so many bytes of JSON."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        return None
    try:
        header = read_json(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get("wmengine") if isinstance(metadata, dict) else None
    return text if isinstance(text, str) else None


def _read_arrays(
    data: bytes, document: dict[str, Any], pool: Callable[[Mapping[str, str]], bytes]
) -> dict[str, NDArray[Any]]:
    preset, parameters = find(document["scheme"], document["version"]), document["parameters"]
    preset.check(parameters)
    layout = preset.layout(parameters)
    stored = _tensors_of(data)
    material = parameters.get("material", {})
    if material and set(layout) - set(stored) == set(material):
        stored |= _tensors_of(pool(material))
    if set(stored) != set(layout) or not isinstance(document["arrays"], dict) or set(document["arrays"]) != set(layout):
        raise ValueError(f"its arrays must be {', '.join(layout)}")
    arrays = {}
    for name, (dtype, shape) in layout.items():
        tensor = stored[name]
        if tensor["dtype"] != _SAFETENSORS_TYPES[dtype] or tuple(tensor["shape"]) != shape:
            raise ValueError(f"its array {name!r} must be {dtype}{list(shape)}")
        little_endian = np.frombuffer(tensor["data"], dtype=np.dtype(dtype).newbyteorder("<"))
        array = little_endian.reshape(shape).astype(dtype, copy=False)
        digest = array_digest(array)
        if digest != document["arrays"][name]:
            raise ValueError(f"its array {name!r} does not match its digest")
        array.flags.writeable = False
        arrays[name] = _held.setdefault((digest, dtype, shape), array)
    return arrays


def _tensors_of(data: bytes) -> dict[str, dict[str, Any]]:
    return dict(deserialize(data))  # type: ignore[no-untyped-call]


def _checked_arrays(
    preset: Preset, parameters: dict[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    layout = preset.layout(parameters)
    if set(arrays) != set(layout):
        raise ValueError(
            f"a mark of scheme {preset.name!r} has the arrays {', '.join(layout)}, not {', '.join(arrays)}"
        )
    checked = {}
    for name, (dtype, shape) in layout.items():
        array = arrays[name]
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            raise ValueError(f"the array {name!r} must be {dtype}{list(shape)}, not {array.dtype}{list(array.shape)}")
        held = not array.flags.writeable and array.flags.c_contiguous  # by another mark, or as it was read
        checked[name] = array if held else np.array(array, dtype=dtype, order="C")
        checked[name].flags.writeable = False
    symbols, classes = checked[preset.symbols.name], preset.symbols.classes(parameters)
    if not 0 <= symbols.min() <= symbols.max() < classes:
        raise ValueError(f"the array {preset.symbols.name!r} must hold 0 to {classes - 1} only")
    for name, digest in parameters.get("material", {}).items():
        if array_digest(checked[name]) != digest:
            raise ValueError(f"the array {name!r} is not the material that the mark was made with")
    return checked
