"""Checks of a mark's parameters: what people give becomes canonical, what files hold has to be so already."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_BITS = 1 << 16
MAX_TRIGGERS = 1 << 20
MAX_CLASSES = 1 << 31
MAX_DIMENSION = 1 << 40
DTYPES = (
    *("bfloat16", "float16", "float32", "float64", "bool"),
    *("uint8", "int8", "int16", "int32", "int64"),
)


def one_of(what: str, value: object, known: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, and it is {value!r}")
    return value


def integer(what: str, value: Any, least: int, most: int) -> int:
    """An int of any kind, as an int."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{what} must be an integer, and it is {value!r}") from None
    if not least <= number <= most:
        raise ValueError(f"{what} must be from {least} to {most}, and it is {number}")
    return number


def positive(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{what} must be a positive number, and it is {value!r}")
    return float(value)


def shape(what: str, sizes: Sequence[Any], least: int) -> list[int]:
    """A shape of at least so many axes, as a list."""
    dimensions = [integer(f"{what}[{axis}]", size, 1, MAX_DIMENSION) for axis, size in enumerate(sizes)]
    if len(dimensions) < least:
        raise ValueError(f"{what} must have at least {least} axes, and it is {dimensions}")
    return dimensions


def canonical_integer(what: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int:
        raise ValueError(f"{what} must be an integer, and it is {value!r}")
    return integer(what, value, least, most)


def canonical_shape(what: str, sizes: Any, least: int) -> list[int]:
    if type(sizes) is not list or any(type(size) is not int for size in sizes):
        raise ValueError(f"{what} must be a list of integers, and it is {sizes!r}")
    return shape(what, sizes, least)


def check_inputs(inputs: Any) -> None:
    """A model's inputs as parameters hold them: a list, as their order is part of the mark."""
    if type(inputs) is not list or not inputs:
        raise ValueError("inputs must list the model's inputs, at least one")
    for place, given in enumerate(inputs):
        if type(given) is not dict or set(given) != {"name", "dtype", "shape"}:
            raise ValueError(f"inputs[{place}] must hold a name, a dtype and a shape")
        if type(given["name"]) is not str:
            raise ValueError(f"inputs[{place}] must have a str as its name")
        one_of(f"inputs[{place}]'s dtype", given["dtype"], DTYPES)
        canonical_shape(f"inputs[{place}]'s shape", given["shape"], least=0)
    if len({given["name"] for given in inputs}) != len(inputs):
        raise ValueError("inputs must all have names of their own")


def check_digests(what: str, digests: Any, known: Sequence[str]) -> None:
    """SHA-256 in hexadecimal by name, at least one, all of known names."""
    if type(digests) is not dict or not digests or not set(digests) <= set(known):
        raise ValueError(f"{what} must hold digests of some of {', '.join(known)}")
    for name, digest in digests.items():
        if not isinstance(digest, str) or len(digest) != 64 or bytes.fromhex(digest).hex() != digest:
            raise ValueError(f"{what}[{name!r}] must be 64 hex digits")


def float32_hex(what: str, value: Any) -> str:
    """A number as the float.hex of its float32; zero has no sign."""
    try:
        if isinstance(value, str):
            raise TypeError
        with np.errstate(over="ignore"):
            number = float(np.float32(float(value)))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{what} must hold numbers, and {value!r} is not one") from None
    if not math.isfinite(number):
        raise ValueError(f"{what} must be finite in float32, and it holds {value!r}")
    return (number + 0.0).hex()


def canonical_float32_hex(what: str, text: object) -> float:
    try:
        if isinstance(text, str) and float32_hex(what, float.fromhex(text)) == text:
            return float.fromhex(text)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{what} must hold finite float32 numbers written with float.hex, and it holds {text!r}")
