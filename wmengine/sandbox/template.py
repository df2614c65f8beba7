"""The template process, `python -m wmengine.sandbox.template FD MODULE`: imports once, then forks workers.

It takes orders on the inherited socket FD, a JSON message each, and answers each with one: {"fork": memory_bytes,
"prepared": whether MODULE.prepare() must have been called} comes with a socket for the new worker, and often with the
memory that it reads questions from; it is not locked down for null, and is answered by its process number and whether
it is prepared; {"end": process} kills a worker, if it still lives, and is answered by how it ended; an order that
cannot be followed is answered by {"error": reason}. Each order has a "number", and its answer the same. It never sees a
model's bytes. When its socket closes, it ends, and the kernel kills its workers.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from wmengine.sandbox import lockdown, wire

MAXIMUM_ORDER = 4096
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def main() -> NoReturn:
    control, template = socket.socket(fileno=int(sys.argv[1])), os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it hands that on, and we could not wait for workers
    service = importlib.import_module(sys.argv[2])
    service.preload()
    _keep_freed_memory()
    gc.freeze()  # a worker's collections must not touch, and so copy, the pages that it shares with us
    control.sendall(b'{"ready": true}')
    ended: dict[int, dict[str, Any]] = {}
    prepared = False
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MAXIMUM_ORDER, 2)
        if not message:
            os._exit(0)  # taking down what was imported would take a while, and somebody waits for it
        order = json.loads(message)
        _collect(ended)
        answer: dict[str, Any]
        try:
            if "fork" in order:
                if order["prepared"] and not prepared:
                    service.prepare()
                    gc.freeze()
                    prepared = True
                process = os.fork()
                if process == 0:
                    _become_worker(service, control, descriptors, order, template)
                ended.pop(process, None)  # a number used before
                answer = {"process": process, "prepared": prepared}
            else:
                process = int(order["end"])
                answer = ended.pop(process) if process in ended else _end(process)
        except OSError as error:  # no more processes, or a worker of the template before this one
            answer = {"error": str(error)}
        for descriptor in descriptors:
            os.close(descriptor)
        control.sendall(json.dumps(answer | {"number": order["number"]}).encode())


def _keep_freed_memory() -> None:
    """Have workers reuse what a model gave back, not return it to the kernel and fault it in again, page by page."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):  # glibc's; what another C library does is its own affair
        allocator.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest it takes
        allocator.mallopt(M_TRIM_THRESHOLD, 256 << 20)


def _collect(ended: dict[int, dict[str, Any]]) -> None:
    """Note how workers ended that died by themselves: of a fault, or because their client was forgotten."""
    while True:
        try:
            process, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not process:
            return
        ended[process] = _account(status, usage)


def _end(process: int) -> dict[str, Any]:
    """Kill one of our own children and say how it ended: what died before by itself keeps its own cause."""
    gone, status, usage = os.wait4(process, os.WNOHANG)  # raises where it is no child
    if not gone:
        os.kill(process, signal.SIGKILL)
        _, status, usage = os.wait4(process, 0)
    return _account(status, usage)


def _account(status: int, usage: resource.struct_rusage) -> dict[str, Any]:
    return {"status": status, "peak_kb": usage.ru_maxrss, "seconds": usage.ru_utime + usage.ru_stime}


def _become_worker(
    service: Any, control: socket.socket, descriptors: Sequence[int], order: dict[str, Any], template: int
) -> NoReturn:
    """Keep one socket, memory to read and nothing else, lock down, and serve until the socket closes. Never returns."""
    try:
        lockdown.die_with_parent(template)
        control.close()
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        memory = [wire.memory_to_read(each) for each in descriptors[1:]]
        os.dup2(descriptors[0], 3)
        os.closerange(4, 1 << 16)
        connection = wire.Channel(fileno=3)
        connection.shared = memory[0] if memory else None
        lockdown.die_first()
        try:
            in_force = () if order["fork"] is None else lockdown.apply(order["fork"])
        except lockdown.LockdownError as error:
            wire.receive(connection, 0)
            wire.send(connection, {"error": str(error)})
            raise
        service.serve(connection, in_force)
        os._exit(0)
    finally:
        os._exit(70)  # EX_SOFTWARE: nothing can be printed any more


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
