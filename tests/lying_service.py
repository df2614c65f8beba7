"""A worker that a hostile model has taken over: the service of the sandbox, but for what `LIES` names.

The lie stands in the model's text, `<lie: NAME>`: the worker behaves until it is asked what it lies about.
"""

import ctypes
import json
import os
import re
import signal
import socket
import time
import types

import numpy as np

from wmengine.sandbox import wire
from wmengine.suspects import engine_wire
from wmengine.suspects.engine_wire import FIND, LIST, LOAD, OPEN, READ, RUN, preload, prepare

__all__ = ["LIES", "preload", "prepare", "serve"]

WEIGHT = np.ones((400, 16), np.float32)
LATER = "let go of the model"
WORDS = []  # of the questions so far: every answer that is to be believed repeats the last


def _header(**fields):
    return _arrays(**fields)


def _opened(inputs):
    return _header(inputs=inputs, class_names=[])


def _arrays(*arrays, **fields):
    return lambda connection: wire.send(connection, {"word": WORDS[-1], **fields}, arrays)


def _found(ranks=(2,), sizes=WEIGHT.shape, names=b"w", **fields):
    """What is said of the weights that there are: by default one, that of the mark."""
    arrays = np.array(ranks, np.uint8), np.array(sizes, np.int64), np.frombuffer(names, np.uint8)
    return _arrays(*arrays, **{"facts": [], **fields})


def _text(text, body=b""):
    return lambda connection: connection.sendall(wire._LENGTHS.pack(len(text), len(body)) + text + body)


def _answer_then(then, header, *arrays):
    def lie(connection):
        wire.send(connection, {"word": WORDS[-1], **header}, arrays)
        then(connection)

    return lie


def _drip(connection):
    while True:
        connection.send(b"\0")
        time.sleep(0.01)


def _stop(connection):
    signal.raise_signal(signal.SIGSTOP)


def _sleep(connection):
    time.sleep(1e6)


def _die(connection):
    os._exit(7)


def _flood(connection):
    while True:
        connection.sendall(wire._LENGTHS.pack(2, 0) + b"{}")


SCORES = np.zeros((16, 10), np.float32)
ONE = {"outputs": ["y"], "classes": [None]}  # output, of scores
INPUTS = {"inputs": [["x", "tensor(float)", [None, 1, 4, 4], False]]}
OPENED = {**INPUTS, "class_names": []}
# lie → what it is an answer to, what is done instead, what the rows' errors say (None: there is none; "": whatever).
LIES = {
    "no locations": (LIST, _header(), "no answer that can be read"),
    "locations are a number": (LIST, _header(locations=7), "no answer that can be read"),
    "location that is no path": (LIST, _header(locations=["\ud800"]), "no answer that can be read"),
    "location of another": (LIST, _header(locations=["../../outside/secret.bin"]), "not inside the model's directory"),
    "location that it does not name": (LIST, _header(locations=["~honest.onnx"]), "names other external files than"),
    "location that is a list": (LIST, _header(locations=[["w.bin"]]), "missing"),
    "no inputs": (OPEN, _header(), "no answer that can be read"),
    "inputs are a number": (OPEN, _opened([3]), "no answer that can be read"),
    "input without a shape": (
        OPEN,
        _opened([["x", "tensor(float)", None, False]]),
        "no answer that can be read",
    ),
    "sizes without end": (
        OPEN,
        _opened([["x", "tensor(float)", [float("inf")], 0]]),
        "no answer that can be read",
    ),
    "sizes below zero": (
        OPEN,
        _opened([["x", "tensor(float)", [-5, -1, -4, -4], 0]]),
        "no answer that can be read",
    ),
    "a batch of nothing": (
        OPEN,
        _opened([["x", "tensor(float)", [0, 1, 4, 4], 0]]),
        "no answer that can be read",
    ),
    "sizes of a thousand digits": (OPEN, _opened([["x", "tensor(float)", [10**1000] * 4, 0]]), "takes inputs"),
    "ten thousand axes": (OPEN, _opened([["x", "tensor(float)", [1] * 10**4, 0]]), "takes inputs"),
    "type that is no type": (OPEN, _opened([["x", {"a": 1}, [None, 1, 4, 4], 0]]), "takes {'a': 1}"),
    "class names are a number": (OPEN, _header(**INPUTS, class_names=7), "no answer that can be read"),
    "no outputs": (RUN, _header(), "no answer that can be read"),
    "outputs without arrays": (RUN, _header(**ONE), "no answer that can be read"),
    "arrays without outputs": (RUN, _arrays(SCORES, outputs=[], classes=[]), "no answer that can be read"),
    "outputs without end": (
        RUN,
        _arrays(*[np.argsort(SCORES, axis=1)] * 10_000, outputs=["y"] * 10_000, classes=[None] * 10_000),
        "no answer that can be read",
    ),
    "answers of text": (RUN, _header(outputs="scores", classes=[None] * 6), "no answer that can be read"),
    "one answer too many": (RUN, _arrays(np.zeros((17, 10), np.float32), **ONE), "answers"),
    "an answer without axes": (RUN, _arrays(np.float32(3), **ONE), "answers"),
    "an answer of yes and no": (RUN, _arrays(SCORES > 0, **ONE), None),
    "error that steers a terminal": (RUN, _header(error="\x1b[2J\r\n\ud800 owned"), r"\\x1b\[2J"),
    "error that is no text": (RUN, _header(error=[1, {"a": None}]), r"\[1, {'a': None}\]"),
    "error without end": (RUN, _header(error="e" * 10**6), ": e+…$"),
    "no numbers": (RUN, _arrays(SCORES * np.nan, **ONE), None),
    "no weights": (FIND, _header(), "no answer that can be read"),
    "weights without axes": (FIND, _found(ranks=(0,), sizes=()), "no answer that can be read"),
    "weights without names": (FIND, _found(ranks=(2, 2), sizes=(400, 16) * 2), "no answer that can be read"),
    "weights with names in no text": (FIND, _found(names=b"\xff"), "no answer that can be read"),
    "weights of nothing": (FIND, _found(sizes=(0, 16)), "no answer that can be read"),
    "weights in one axis too many": (FIND, _found(sizes=(400, 16, 3)), "no answer that can be read"),
    "weights of other shapes": (FIND, _found(sizes=(1 << 62, 1 << 62)), None),
    "shapes in numbers of another kind": (
        FIND,
        _arrays(np.ones(1), np.ones(2), np.ones(1), facts=[]),
        "no answer that can be read",
    ),
    "a weight in double": (READ, _arrays(WEIGHT.astype(float)), "no answer that can be read"),
    "a weight of another shape": (READ, _arrays(WEIGHT.T), "no answer that can be read"),
    "no weight": (READ, _header(), "no answer that can be read"),
    "a weight that is no numbers": (READ, _arrays(WEIGHT * np.nan), None),
    "normalisations of other filters": (READ, _arrays(WEIGHT, WEIGHT[0, :3]), "no answer that can be read"),
    "facts are a number": (FIND, _found(facts=5), "no answer that can be read"),
    "a fact of judging": (FIND, _found(facts=[["not_derived", {}]]), "no answer that can be read"),
    "a fact without its values": (FIND, _found(facts=[["unread", {}]]), "no answer that can be read"),
    "a fact that steers a terminal": (
        FIND,
        _found(sizes=(3, 3), facts=[["unread", {"count": "\x1b]0;x\x07" * 999}]]),
        None,
    ),
    "a fact of many values": (
        FIND,
        _found(sizes=(3, 3), facts=[["unread", {"count": 10**4000} | {f"v{number}": 0 for number in range(10_000)}]]),
        None,
    ),
    "scores that stayed in no place": (
        RUN,
        _arrays(np.zeros(16, np.int32), outputs=["y"], classes=[10]),
        "no answer that can be read",
    ),
    "levels beyond every level": (
        RUN,
        _arrays(np.zeros(16, np.int32), np.full((16, 10), 100, np.int8), outputs=["y"], classes=[10]),
        "no answer that can be read",
    ),
    "an empty answer": (LOAD, _text(b""), "an answer that cannot be read"),
    "an answer that is a list": (LOAD, _text(b"[]"), "an answer that cannot be read"),
    "an answer nested without end": (LOAD, _text(b"[" * 10**5), "an answer that cannot be read"),
    "an axis without end": (LOAD, _text(b'{"arrays": [["float32", [1e999]]]}'), "an answer that cannot be read"),
    "nothing by too much": (
        LOAD,
        _text(json.dumps({"arrays": [["float32", [0, 1 << 62, 1 << 62]]]}).encode()),
        "an answer that cannot be read",
    ),
    "answers to what it was not asked": (LOAD, _arrays(SCORES[:3], **OPENED, **ONE), "answers 16 inputs"),
    "no answers to what it was asked at once": (LOAD, _header(**OPENED, **ONE), "no answer that can be read"),
    "garbage": (LOAD, lambda connection: connection.sendall(b"\xff" * 4096), "at most"),
    "half an answer": (LOAD, _answer_then(_sleep, {"arrays": []}), "took longer"),
    "one byte after the other": (LOAD, _drip, "took longer|at most|cannot be read"),
    "stop": (LOAD, _stop, "took longer"),
    "crash": (LOAD, lambda connection: ctypes.string_at(0), "was killed by SIGSEGV"),
    "abort": (LOAD, lambda connection: os.abort(), "was killed by SIGABRT"),
    "exit": (LOAD, lambda connection: os._exit(0), "ended with status 0"),
    "close": (
        LOAD,
        lambda connection: connection.shutdown(socket.SHUT_RDWR),
        "ended with status|was killed by SIGKILL",
    ),
    # Done to whoever comes next; what is said of the liar itself depends on who is faster.
    "answer twice": (RUN, _answer_then(_header(outputs=[], classes=[]), ONE, SCORES), ""),
    "answer for ever": (RUN, _answer_then(_flood, ONE, SCORES), ""),
    "die after the answer": (RUN, _answer_then(_die, ONE, SCORES), ""),
    "answer the next too": (LATER, _opened([]), None),
    "an error for the next": (LATER, _header(error="it is no model"), None),
    "never let go": (LATER, _sleep, None),
    "crash when letting go": (LATER, lambda connection: ctypes.string_at(0), None),
    "a word of its own": (RUN, _arrays(SCORES, word="0" * 32, **ONE), "no answer that can be read"),
}


def serve(connection, mechanisms):
    lie, lying, loaded, finding = None, False, False, False

    def receive(*arguments, before_arrays):
        def before(question):
            if lie is not None and lie[0] == LATER and question["ask"] in (LIST, LOAD) and loaded:
                lie[1](connection)
            before_arrays(question)

        nonlocal lie, lying, loaded, finding
        question, arrays = wire.receive(*arguments, before_arrays=before)
        if question["ask"] in (LIST, LOAD):
            told = re.search(rb"<lie: (.*?)>", arrays[0].tobytes())
            lie = LIES[told[1].decode()] if told else None
        if question["ask"] == LOAD and lie is not None and lie[0] == RUN:
            del arrays[1 + len(question["locations"]) :]  # asked alone, it lies
        loaded = question["ask"] not in (LIST, LOAD)
        lying = lie is not None and (question["ask"] == lie[0] or (lie[0] == OPEN and question.get("open", False)))
        finding = question["ask"] == FIND
        WORDS.append(question.get("word"))
        return question, arrays

    def send(*arguments):
        if lying:
            lie[1](connection)
        elif finding and lie is not None and lie[0] == READ:
            _found()(connection)
        else:
            wire.send(*arguments)

    engine_wire.wire = types.SimpleNamespace(receive=receive, send=send, WireError=wire.WireError)
    engine_wire.serve(connection, mechanisms)
