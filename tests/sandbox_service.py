"""What a worker of the sandbox tests runs: every way in which a stranger's model could misbehave, on request."""

import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket as sockets
import threading
import time

import numpy as np

from wmengine.sandbox import Limits, wire

LIMITS = Limits(seconds=20.0, memory_bytes=256 << 20, answer_bytes=1 << 20)


def preload():
    np.ones((8, 8)) @ np.ones((8, 8))


def serve(connection, mechanisms):
    while True:
        try:
            question, arrays = wire.receive(connection, 1 << 40)
        except wire.WireError:
            return
        asked = question["ask"]
        header, answers = {"mechanisms": list(mechanisms)}, []
        if asked == "echo":
            answers = arrays
        elif asked == "crash":
            ctypes.string_at(0)
        elif asked == "abort":
            os.abort()
        elif asked == "exit":
            os._exit(3)
        elif asked == "hang":
            while True:
                pass
        elif asked == "nap":
            time.sleep(question["seconds"])
        elif asked == "who":
            header = {"process": os.getpid()}
        elif asked == "call everything":
            header = {"let through": _let_through(question["numbers"])}
        elif asked == "claim":  # an answer of which nothing comes
            connection.sendall(wire._LENGTHS.pack(14, question["bytes"]) + b'{"arrays": []}')
            time.sleep(1e6)
        elif asked == "sleep":
            time.sleep(1e6)
        elif asked == "hide":  # the socket closes, and the process goes on
            connection.close()
            while True:
                time.sleep(1)
        elif asked == "grow":
            kept = []
            try:
                while True:
                    kept.append(np.ones(1 << 20))
            except MemoryError:
                header = {"held": sum(each.nbytes for each in kept)}
        elif asked == "garbage":
            connection.sendall(b"\xff" * 64)
            continue
        elif asked == "huge":
            connection.sendall(wire._LENGTHS.pack(2, 1 << 40) + b"{}")
            continue
        elif asked == "raw":
            connection.sendall(arrays[0].tobytes())
            continue
        elif asked == "forbidden":
            header = {"refused": {name: _refused(FORBIDDEN[name]) for name in question.get("only", FORBIDDEN)}}
        elif asked == "rewrite":  # the question, by any means
            header = {"through": [name for name, act in _rewriting(connection.shared).items() if act()]}
        elif asked == "allowed":
            header = {"sum": float((np.ones((300, 300)) @ np.ones((300, 300))).sum()), "random": len(os.urandom(8))}
        wire.send(connection, header, answers)


def _refused(act):
    try:
        act()
    except (OSError, ValueError) as error:  # setrlimit makes a ValueError of it
        return "refused" if getattr(error, "errno", errno.EPERM) == errno.EPERM else str(error)
    return "it worked"


def _let_through(numbers):
    """Which system calls are not refused, each called with nothing but zeros."""
    libc = ctypes.CDLL(None, use_errno=True)
    nothing, through = [ctypes.c_long(0)] * 6, []
    for number in numbers:
        ctypes.set_errno(0)
        if libc.syscall(ctypes.c_long(number), *nothing) != -1 or ctypes.get_errno() != errno.EPERM:
            through.append(number)
    return through


def _rewriting(shared):
    """Ways to write to the memory that questions lie in; each says whether it worked."""
    libc, address = ctypes.CDLL(None), ctypes.c_void_p(shared.ctypes.data)
    return {
        "the array": lambda: _worked(lambda: shared.setflags(write=True)),
        "its pages": lambda: libc.mprotect(address, 4096, 3) == 0,
    }


def _worked(act):
    try:
        act()
    except ValueError:
        return False
    return True


def _run_machine_code():
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(_page()), 4096, 5) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def _start_a_thread():
    try:
        threading.Thread(target=lambda: None).start()
    except RuntimeError:  # what Python makes of it
        raise OSError(errno.EPERM, "no thread") from None


def _send_descriptors():
    connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM, 0, fileno=3)
    try:
        sockets.send_fds(connection, [b"x"], [0, 1, 2])
    finally:
        connection.detach()


def _send(flags):
    connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM, 0, fileno=3)
    try:
        connection.send(b"x", flags)
    finally:
        connection.detach()


def _page():
    address = ctypes.addressof(ctypes.create_string_buffer(8192))
    return (address + 4095) // 4096 * 4096


FORBIDDEN = {
    "read a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "write a file": lambda: os.open("/tmp/wmengine-was-here", os.O_WRONLY | os.O_CREAT),
    "list a directory": lambda: os.listdir("/"),
    "reach the network": lambda: sockets.socket(sockets.AF_INET),
    "open a socket": lambda: sockets.socket(sockets.AF_UNIX),
    "fork": os.fork,
    "start a thread": _start_a_thread,
    "execute": lambda: os.execv("/bin/true", ["true"]),
    "signal its parent": lambda: os.kill(os.getppid(), 0),
    "raise its limits": lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 50, 1 << 50)),
    "delete a file": lambda: os.unlink("/tmp/wmengine-was-here"),
    "have the kernel signal others": lambda: fcntl.fcntl(3, fcntl.F_SETOWN, os.getppid()),
    "choose the signal": lambda: fcntl.fcntl(3, 10, signal.SIGKILL),  # F_SETSIG
    "send descriptors": _send_descriptors,
    "send out of band": lambda: _send(sockets.MSG_OOB),
    "trace": lambda: _refuse_unless(ctypes.CDLL(None, use_errno=True).ptrace(16, os.getppid(), None, None) == 0),
    "run new code": _run_machine_code,
}


def _refuse_unless(worked):
    if not worked:
        raise OSError(ctypes.get_errno(), "refused")
