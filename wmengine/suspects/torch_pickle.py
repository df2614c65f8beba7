"""The tensors that a torch checkpoint names, read from its pickle without running any of it.

A pickle is a program for a stack machine that may call anything. Here its opcodes are followed by a machine that can
call nothing: what a class or a function would have made is an inert record, and only the three calls that torch writes
for tensors are understood. So it does not matter what else a file wants to have run.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import Any, NamedTuple

# Of a hundred thousand tensors; and what no name is longer than.
MAXIMUM_STEPS, MAXIMUM_PATH = 4_000_000, 1000
# Of modules that were pickled whole: no part of a tensor's name.
_INSIDE_MODULES = ("_parameters", "_buffers", "_modules")


class Named(NamedTuple):
    """A class or a function that the pickle names: "torch FloatStorage"."""

    name: str


class Storage(NamedTuple):
    """Numbers in a file of the archive: what kind of storage ("FloatStorage"), and the file's name."""

    kind: str
    key: str


class StoredTensor(NamedTuple):
    """A view into a storage, in numbers from its beginning."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Made:
    """What some call would have made, with the state that it was given."""

    state: Any = None


def tensors_of(data: bytes) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor in a pickle once, by the path of keys that leads to it, in the order in which it was written.

    What torch has not written may raise a ValueError, an IndexError, a KeyError, a TypeError or an AttributeError.
    """
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", _run(data))]
    while left:
        path, value = left.pop()
        if isinstance(value, StoredTensor):
            yield path, value
            continue
        if id(value) in seen:  # a kilobyte can nest each list in the next one twice, a hundred times over
            continue
        seen.add(id(value))
        if len(path) > MAXIMUM_PATH:
            raise ValueError("it nests deeper than any network")
        if isinstance(value, _Made):
            left.append((path, value.state))
        elif isinstance(value, dict):
            for key, inner in reversed(value.items()):
                left.append((path if key in _INSIDE_MODULES else f"{path}.{key}" if path else str(key), inner))
        elif isinstance(value, list | tuple):
            left += [(f"{path}.{place}" if path else str(place), inner) for place, inner in enumerate(value)][::-1]


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    argument: Any
    for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if step == MAXIMUM_STEPS:
            raise ValueError(f"it takes more than {MAXIMUM_STEPS} steps")
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(above_mark()))
        elif name in ("LIST", "FROZENSET"):
            stack.append(above_mark())
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            added = [stack.pop()] if name == "APPEND" else above_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(added)
        elif name in ("DICT", "SETITEM", "SETITEMS"):
            pairs = [stack.pop(-2), stack.pop()] if name == "SETITEM" else above_mark()
            if name == "DICT":
                stack.append({})
            if isinstance(stack[-1], dict):
                named = zip(pairs[::2], pairs[1::2], strict=True)
                stack[-1].update((key, value) for key, value in named if isinstance(key, str | int | float))
        elif name == "GLOBAL":
            stack.append(Named(argument))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [Named(f"{stack[-2]} {stack[-1]}")]
        elif name == "BINPERSID":
            stack[-1] = _storage(stack[-1])
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [_called(stack[-2], stack[-1])]
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Made):
                stack[-1].state = state
        elif opcode.arg is not None and opcode.stack_before == []:  # a number or a text
            stack.append(argument)
        else:
            raise ValueError(f"torch writes no {name}")
    raise ValueError("it does not end")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _storage(described: Any) -> Any:
    """What stands for ("storage", class of the storage, key of its file, device, how many numbers)."""
    kind, key = described[1], described[2]
    return Storage(kind.name.split(" ")[-1], key) if isinstance(kind, Named) and isinstance(key, str) else _Made()


def _called(function: Any, arguments: Any) -> Any:
    name = function.name if isinstance(function, Named) else ""
    if name == "collections OrderedDict" and not arguments:
        return {}
    if name == "torch._utils _rebuild_parameter":
        return arguments[0]
    if name == "torch._utils _rebuild_tensor_v2" and isinstance(arguments[0], Storage):
        storage, offset, shape, strides = arguments[:4]
        if all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
            return StoredTensor(storage, offset, shape, strides)
    return _Made()
