"""What is registered and later checked: one mark's parameters, symbols and commitment, kept in one safetensors file.

A `.wm` file is a secret (who can verify a symmetric mark can also forge or remove it), but it is made of this mark's
own subkeys only: a leaked one exposes no other. What may be shown to others is its commitment.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as serialize

from wmengine.errors import WatermarkError
from wmengine.key import Key, canonical_json, check_name
from wmengine.schemes import SCHEMES, array_layout, check_parameters, derive, scheme, subkey, symbol_count
from wmengine.sealing import FORMAT, is_sealed, read_file, seal, unseal, write_file

_COMMITMENT_PREFIX = b"wmengine/1/watermark-commitment\0"
_SAFETENSORS_TYPES = {"uint8": "U8", "uint64": "U64", "int64": "I64"}
_REQUIRED = {  # and perhaps "control"
    *("arrays", "commitment", "created", "digest", "format", "kind"),
    *("owner", "parameters", "salt", "scheme", "version"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Watermark:
    """One mark. `Watermark.create` derives it from a key, `load` reads it from a file; both validate every field.

    arrays: what `schemes.derive` gives (read-only). salt: 64 hex digits that blind the commitment. control: what the
    mark scored on the unmarked model, in integers and strings. created: ISO date (UTC), its owner's word.
    """

    scheme: str
    version: int
    owner: str
    parameters: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    salt: str
    created: str
    control: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        preset = scheme(self.scheme)
        if self.version != preset.version:
            raise ValueError(
                f"version {self.version!r} of scheme {self.scheme!r} is not this wmengine's {preset.version}"
            )
        check_name("owner", self.owner)
        check_parameters(self.scheme, self.parameters)
        if not isinstance(self.salt, str) or len(self.salt) != 64 or bytes.fromhex(self.salt).hex() != self.salt:
            raise ValueError("salt must be 64 hex digits")
        if not isinstance(self.created, str) or date.fromisoformat(self.created).isoformat() != self.created:
            raise ValueError(f"created must be an ISO date, and it is {self.created!r}")
        if self.control is not None and type(self.control) is not dict:
            raise TypeError(f"control must be a dict or None, and it is {type(self.control).__name__}")
        # Own copies: a caller's later change must not reach a mark that was checked.
        object.__setattr__(self, "parameters", json.loads(canonical_json(self.parameters)))
        if self.control is not None:
            object.__setattr__(self, "control", json.loads(canonical_json(self.control)))
        object.__setattr__(self, "arrays", _checked_arrays(self.scheme, self.parameters, self.arrays))

    @classmethod
    def create(
        cls, key: Key, scheme_name: str, parameters: Mapping[str, Any], control: dict[str, Any] | None = None
    ) -> Watermark:
        """The mark that this key makes with these parameters (of `white_box_parameters` or `black_box_parameters`)."""
        arrays = derive(key, scheme_name, parameters)
        return cls(
            scheme=scheme_name,
            version=SCHEMES[scheme_name].version,
            owner=key.owner,
            parameters=dict(parameters),
            arrays=arrays,
            salt=subkey(key, "commitment", scheme_name, parameters).hex(),
            created=datetime.now(UTC).date().isoformat(),
            control=control,
        )

    @property
    def name(self) -> str:
        """The name of the model that the mark is for; it enters the derivation."""
        return str(self.parameters["name"])

    @property
    def kind(self) -> str:
        """ "white-box" (bits in the weights) or "black-box" (labels of triggers)."""
        return SCHEMES[self.scheme].kind

    @property
    def total(self) -> int:
        """The number of symbols it can test: T bits or N labels."""
        return symbol_count(self.scheme, self.parameters)

    @property
    def commitment(self) -> str:
        """64 hex digits, safe to publish, that bind owner, scheme, version, parameters, total and scoring rule.

        SHA-256 of a prefix, their canonical JSON, and the salt, which only the key's holder can give.
        """
        statement = {
            "format": FORMAT,
            "owner": self.owner,
            "parameters": self.parameters,
            "scheme": self.scheme,
            "scoring": SCHEMES[self.scheme].scoring,
            "total": self.total,
            "version": self.version,
        }
        return hashlib.sha256(_COMMITMENT_PREFIX + canonical_json(statement) + bytes.fromhex(self.salt)).hexdigest()

    def __repr__(self) -> str:
        return f"Watermark(name={self.name!r}, scheme={self.scheme!r}, owner={self.owner!r}, total={self.total})"

    def check_derivation(self, key: Key) -> None:
        """Raises WatermarkError, saying what differs, unless this key makes this very mark."""
        if key.owner != self.owner:
            raise WatermarkError(
                f"the watermark of {self.name!r} belongs to {self.owner!r} and the key to {key.owner!r}; "
                "give the key that it was made with"
            )
        derived = Watermark.create(key, self.scheme, self.parameters)
        if derived.salt != self.salt:
            raise WatermarkError(
                f"the watermark of {self.name!r} was not made with this key of {key.owner!r}; "
                "give the key that it was made with"
            )
        for name, array in derived.arrays.items():
            if not np.array_equal(array, self.arrays[name]):
                raise WatermarkError(
                    f"the {name} of the watermark of {self.name!r} are not those that its key derives; "
                    "make the watermark again"
                )

    def save(self, path: str | os.PathLike[str], passphrase: str | None = None) -> None:
        """Writes a `.wm` file with mode 0600, in place of one that is there, and sealed when a passphrase is given."""
        content = {
            "arrays": {name: _array_digest(array) for name, array in self.arrays.items()},
            "commitment": self.commitment,
            "created": self.created,
            "format": FORMAT,
            "kind": "watermark",
            "owner": self.owner,
            "parameters": self.parameters,
            "salt": self.salt,
            "scheme": self.scheme,
            "version": self.version,
        }
        if self.control is not None:
            content["control"] = self.control
        document = canonical_json({**content, "digest": _digest(content)}).decode("ascii")
        data = serialize(self.arrays, metadata={"wmengine": document})
        write_file(path, data if passphrase is None else seal(data, passphrase), WatermarkError, overwrite=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], passphrase: str | None = None) -> Watermark:
        """Reads a `.wm` file. Raises WatermarkError: missing, damaged, wrong passphrase, of another version."""
        name = os.fspath(path)
        data = read_file(path, "watermark file", WatermarkError)
        if is_sealed(data):
            if passphrase is None:
                raise WatermarkError(f"{name} is sealed; give its passphrase")
            try:
                data = unseal(data, passphrase)
            except ValueError as cause:
                raise WatermarkError(f"{name} {cause}") from None
        document = _document(name, data)
        try:
            mark = cls(
                scheme=document["scheme"],
                version=document["version"],
                owner=document["owner"],
                parameters=document["parameters"],
                arrays=_read_arrays(data, document),
                salt=document["salt"],
                created=document["created"],
                control=document.get("control"),
            )
        except (KeyError, TypeError, ValueError, SafetensorError, RecursionError) as cause:
            what = f"it lacks {cause}" if isinstance(cause, KeyError) else cause
            raise WatermarkError(f"{name} cannot be used ({what}); take it from a backup or make it again") from None
        if mark.commitment != document["commitment"]:
            raise WatermarkError(f"{name} does not match its own commitment; take it from a backup or make it again")
        return mark


def _document(name: str, data: bytes) -> dict[str, Any]:
    """The metadata of a `.wm` file once its format, kind, spelling, fields and digest are found right."""
    text = _metadata(data)
    if text is None:
        raise WatermarkError(f"{name} is not a watermark file; give a .wm file that wmengine wrote")
    try:
        document: dict[str, Any] = dict(json.loads(text))
    except (TypeError, ValueError, RecursionError):
        raise WatermarkError(f"{name} is damaged (its metadata is not JSON); take it from a backup") from None
    if document.get("format") != FORMAT:
        raise WatermarkError(
            f"{name} has format {document.get('format')!r} and this wmengine reads {FORMAT!r}; use the one that made it"
        )
    if document.get("kind") != "watermark":
        raise WatermarkError(f"{name} holds a {document.get('kind')!r}, not a watermark; give a .wm file")
    unknown, missing = sorted(document.keys() - _REQUIRED - {"control"}), sorted(_REQUIRED - document.keys())
    if unknown:
        raise WatermarkError(f"{name} has an unknown field {unknown[0]!r}; use the wmengine that made it")
    if missing:
        raise WatermarkError(f"{name} is damaged (it lacks the field {missing[0]!r}); take it from a backup")
    content = {field: value for field, value in document.items() if field != "digest"}
    try:
        # Only the one canonical spelling counts, so no byte can change without being noticed.
        intact = canonical_json(document).decode("ascii") == text and _digest(content) == document["digest"]
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
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get("wmengine") if isinstance(metadata, dict) else None
    return text if isinstance(text, str) else None


def _read_arrays(data: bytes, document: dict[str, Any]) -> dict[str, NDArray[Any]]:
    scheme_name, parameters = document["scheme"], document["parameters"]
    scheme(scheme_name)
    check_parameters(scheme_name, parameters)
    layout = array_layout(scheme_name, parameters)
    stored = dict(deserialize(data))  # type: ignore[no-untyped-call]
    if set(stored) != set(layout) or not isinstance(document["arrays"], dict) or set(document["arrays"]) != set(layout):
        raise ValueError(f"its arrays must be {', '.join(layout)}")
    arrays = {}
    for name, (dtype, shape) in layout.items():
        tensor = stored[name]
        if tensor["dtype"] != _SAFETENSORS_TYPES[dtype] or tuple(tensor["shape"]) != shape:
            raise ValueError(f"its array {name!r} must be {dtype}{list(shape)}")
        little_endian = np.frombuffer(tensor["data"], dtype=np.dtype(dtype).newbyteorder("<"))
        arrays[name] = little_endian.reshape(shape).astype(dtype)
        if _array_digest(arrays[name]) != document["arrays"][name]:
            raise ValueError(f"its array {name!r} does not match its digest")
    return arrays


def _checked_arrays(
    scheme_name: str, parameters: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    layout = array_layout(scheme_name, parameters)
    if set(arrays) != set(layout):
        raise ValueError(
            f"a mark of scheme {scheme_name!r} has the arrays {', '.join(layout)}, not {', '.join(arrays)}"
        )
    checked = {}
    for name, (dtype, shape) in layout.items():
        array = arrays[name]
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            raise ValueError(f"the array {name!r} must be {dtype}{list(shape)}, not {array.dtype}{list(array.shape)}")
        checked[name] = np.array(array, dtype=dtype, order="C")
        checked[name].flags.writeable = False
    if "bits" in checked and checked["bits"].max() > 1:
        raise ValueError("the array 'bits' must hold 0 and 1 only")
    if "labels" in checked and not 0 <= checked["labels"].min() <= checked["labels"].max() < parameters["num_classes"]:
        raise ValueError(f"the array 'labels' must hold classes from 0 to {parameters['num_classes'] - 1} only")
    return checked


def _array_digest(array: NDArray[Any]) -> str:
    """SHA-256 of the array's bytes, little endian; its type and shape follow from the parameters."""
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()
