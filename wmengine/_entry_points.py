"""What other packages bring: objects named by entry points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

Kind = TypeVar("Kind")


def brought(group: str, kind: type[Kind], what: str) -> Iterator[Kind]:
    """Every object of this kind that an entry point of this group names, alone or in a sequence.

    Raises ImportError, naming the package, for one that cannot be loaded or names something else.
    """
    from importlib.metadata import entry_points

    for point in entry_points(group=group):
        package = point.dist.name if point.dist else point.value
        try:
            loaded = point.load()
            found = [loaded] if isinstance(loaded, kind) else list(loaded)
        except Exception as error:  # whatever the package's own code raises
            raise ImportError(f"the {what} of {package} cannot be loaded ({error}); mend or uninstall it") from error
        if not all(isinstance(each, kind) for each in found):
            raise ImportError(f"the entry point {point.name!r} of {package} names no {what}; mend or uninstall it")
        yield from found
