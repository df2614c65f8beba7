"""Finding presets: ours and those that other packages bring through the entry point "wmengine.presets"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from wmengine._entry_points import brought
from wmengine.marks.preset import Preset
from wmengine.presets import PRESETS

ENTRY_POINT = "wmengine.presets"


class _Schemes(Mapping[str, Preset]):
    """Every preset by name, in its newest version."""

    def __getitem__(self, name: str) -> Preset:
        return _newest()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_newest())

    def __len__(self) -> int:
        return len(_newest())


SCHEMES: Mapping[str, Preset] = _Schemes()


def scheme(name: str, /, **options: Any) -> Preset:
    """The preset of that name, with some of its options replaced: `scheme("sketch", bits=64)`.

    Raises ValueError for a name or an option that does not exist (listing those that do) and for a value out of range.
    """
    preset = SCHEMES.get(name) if isinstance(name, str) else None
    if preset is None:
        raise ValueError(f"there is no scheme {name!r}; the schemes are {', '.join(SCHEMES)}")
    return preset.with_options(**options)


def find(name: str, version: int) -> Preset:
    """The preset of this name and version: marks of old versions verify for ever. Raises ValueError where none is."""
    for presets in (PRESETS, _every().values()):  # looking for other packages' takes longer than a verdict may
        for preset in presets:
            if (preset.name, preset.version) == (name, version):
                return preset
    known = ", ".join(preset.full_name for preset in _every().values())
    raise ValueError(f"this wmengine has no scheme {name!r} of version {version!r}; it has {known}")


@contextmanager
def registered(preset: Preset) -> Iterator[None]:
    """While this lasts the preset is found like those of the page: for trying one before it is brought by a package.

    Raises ValueError where another one has its name and version.
    """
    place = preset.name, preset.version
    known = _every().get(place)
    if known is not None:
        # Options steer what a new mark is like; what a mark is stands in its parameters.
        if known.options.keys() != preset.options.keys() or known.with_options(**preset.options) != preset:
            raise ValueError(f"another preset is called {preset.full_name}: give this one a name or version of its own")
        yield
        return
    _every()[place] = preset
    _newest.cache_clear()
    try:
        yield
    finally:
        del _every()[place]
        _newest.cache_clear()


@cache
def _every() -> dict[tuple[str, int], Preset]:
    found: dict[tuple[str, int], Preset] = {}
    for preset in (*PRESETS, *brought(ENTRY_POINT, Preset, "presets")):
        if (preset.name, preset.version) in found:
            raise ValueError(
                f"two presets are called {preset.full_name}; uninstall one of the packages that bring them"
            )
        found[preset.name, preset.version] = preset
    return found


@cache
def _newest() -> dict[str, Preset]:
    found: dict[str, Preset] = {}
    for (name, version), preset in _every().items():
        if name not in found or version > found[name].version:
            found[name] = preset
    return found
