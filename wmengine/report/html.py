"""HTML reports from Jinja2 templates: everything that is not markup is escaped, and nothing outside the file is
loaded.
"""

from __future__ import annotations

import base64
import os
import tempfile
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

# The browser itself refuses whatever a template might load from elsewhere, or run.
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

DECISIONS = {"owned": "owned", "not_proven": "not proven", "error": "error"}


def render(template: str, **values: Any) -> str:
    """The page of a template in this package, such as "demo.html.j2". A value that the template lacks raises."""
    environment = Environment(
        loader=PackageLoader("wmengine.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["content_policy"] = CONTENT_POLICY
    environment.filters.update(
        decision=DECISIONS.__getitem__, percent=percent, points=points, log10_p=log10_p, level=level
    )
    return environment.get_template(template).render(**values)


def write(path: str | os.PathLike[str], page: str) -> None:
    """Write a page, replacing an older one in one step, so that a reader never sees half of it."""
    target = Path(path)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, suffix=".tmp", delete=False) as file:
        file.write(page)
    os.chmod(file.name, 0o644)
    os.replace(file.name, target)


def data_uri(image: bytes, media_type: str) -> str:
    """An image as a URI that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(image).decode('ascii')}"


def percent(rate: float) -> str:
    """A rate in [0, 1] as a percentage: 0.98667 → "98.7 %"."""
    return f"{100 * rate:.1f} %"


def points(difference: float) -> str:
    """A difference of two rates in percentage points, with its sign: -0.005 → "−0.5"."""
    return _one_decimal(100 * difference, "+")


def log10_p(value: float) -> str:
    """The logarithm of a p-value: -77.06 → "−77.1"."""
    return _one_decimal(value, "")


def level(alpha: float) -> str:
    """The bar for a p-value: 1e-9 → "10⁻⁹", 0.002 → "0.002"."""
    digits, _, exponent = f"{alpha:g}".partition("e")
    if not exponent:
        return digits
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{power}" if digits == "1" else f"{digits} · 10{power}"


def _one_decimal(value: float, sign: str) -> str:
    """One decimal with a true minus sign, and no sign before 0.0."""
    text = f"{value:{sign}.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text
