"""The trusted side: starts workers, gives each question a deadline, kills what is late, and says how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wmengine.sandbox import wire
from wmengine.sandbox.wire import Array

TEMPLATE_SECONDS = 60.0
PACKAGES = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # where wmengine lies


@dataclass(frozen=True)
class Limits:
    """What one suspect may use: wall-clock seconds, bytes of memory, bytes of one answer."""

    seconds: float = 120.0
    memory_bytes: int = 4 << 30
    answer_bytes: int = 1 << 30


class WorkerFailure(Exception):
    """A worker that died, hung or lied; the message says what it was doing, how it ended, and its peak of memory."""


class TemplateGone(WorkerFailure):
    """Somebody killed the template, and all workers with it: nothing that this worker did."""


class Supervisor:
    """One template process and the workers forked from it; safe to use from several threads. Use as a context.

    service: the module that workers run, with a function `preload()` for the template and `serve(connection,
    mechanisms)` for each worker.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._generation = 0  # of templates: each knows its own workers alone

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the template, and with it every worker."""
        with self._lock:
            self._close()

    def worker(self, limits: Limits, confined: bool = True) -> Worker:
        """A fresh worker, forked and locked down. Raises WorkerFailure where there can be none.

        Not confined, for what must reach a GPU's driver: it keeps its files and its memory, and has a deadline only.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise WorkerFailure(f"there is no socket for a worker: {error}") from None
        try:
            with theirs:
                answer, generation = self._order({"fork": limits.memory_bytes if confined else None}, theirs)
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        return Worker(self, ours, int(answer["process"]), generation, limits)

    def end(self, process: int, generation: int) -> dict[str, Any]:
        """Kill a worker, if it still lives, and say how it ended: status as of wait(2), peak_kb, seconds of processor
        time. The template does it, as the parent: no other process can have that number by now."""
        return self._order({"end": process}, generation=generation)[0]

    def _order(
        self, order: dict[str, Any], passed: socket.socket | None = None, generation: int | None = None
    ) -> tuple[dict[str, Any], int]:
        """The template's answer, and which template gave it; `generation` is the only one that may."""
        with self._lock:
            for attempt in range(2):
                if generation is not None and (self._control is None or generation != self._generation):
                    raise TemplateGone("the template of the sandbox is gone, and its workers with it")
                try:
                    control = self._start()
                    socket.send_fds(control, [json.dumps(order).encode()], [passed.fileno()] if passed else [])
                    answer = self._answer(control)
                except OSError as error:
                    self._close()  # somebody killed the template, and its workers went with it; or it cannot start
                    if attempt or generation is not None:
                        raise TemplateGone(f"the template of the sandbox is gone: {error}") from None
                    continue
                if "error" in answer:
                    raise WorkerFailure(f"the template of the sandbox cannot {next(iter(order))}: {answer['error']}")
                return answer, self._generation
        raise AssertionError("unreachable")

    def _answer(self, control: socket.socket) -> dict[str, Any]:
        line = b""
        while not line.endswith(b"\n"):
            part = control.recv(4096)
            if not part:
                raise ConnectionResetError
            line += part
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair()
        environment = {
            name: os.environ[name]
            for name in ("PATH", "LD_LIBRARY_PATH", "LANG", "TZ", "CUDA_VISIBLE_DEVICES")
            if name in os.environ
        }
        environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "ORT_DISABLE_TELEMETRY"), "1")
        # Never from the working directory: it may be the folder of a stranger's files, with an `onnx.py` among them.
        paths = [os.path.abspath(path) for path in [*sys.path, PACKAGES] if path]
        environment |= {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONSAFEPATH": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "wmengine.sandbox.template", str(theirs.fileno()), self._service],
                pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, cwd="/",
            )  # fmt: skip
        ours.settimeout(TEMPLATE_SECONDS)
        try:
            self._answer(ours)
        except OSError:
            self._process.kill()
            said = self._process.communicate()[1].decode(errors="replace").strip().splitlines() or ["nothing was said"]
            ours.close()
            self._process = None
            raise WorkerFailure(f"the sandbox does not start: {said[-1]}") from None
        self._control = ours
        self._generation += 1
        return ours

    def _close(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
            self._process.kill()
            self._process.wait()
            if self._process.stderr is not None:
                self._process.stderr.close()
        self._process = self._control = None


class Worker:
    """One sandboxed process. `ask` sends a question and waits for its answer, within the time that `begin` set."""

    def __init__(
        self, supervisor: Supervisor, connection: socket.socket, process: int, generation: int, limits: Limits
    ) -> None:
        self.process = process
        self._generation = generation
        self.limits = limits
        self.alive = True
        self.mechanisms: tuple[str, ...] = ()
        self._supervisor = supervisor
        self._connection = connection
        self._deadline = 0.0
        self._started = 0.0
        self.begin()
        header, _ = self.ask("start", {})
        self.mechanisms = tuple(str(name) for name in header["mechanisms"])

    def begin(self) -> None:
        """A new suspect: its time starts now."""
        self._started = time.monotonic()
        self._deadline = self._started + self.limits.seconds

    def ask(
        self, doing: str, question: dict[str, Any], arrays: Sequence[Array] = ()
    ) -> tuple[dict[str, Any], list[Array]]:
        """The answer to a question; `doing` says in an error what was asked for.

        Raises WorkerFailure where the worker is late, dies, or answers in no way that can be read; it is gone then.
        """
        if not self.alive:
            raise WorkerFailure(f"the worker was already gone when asked to {doing}")
        try:
            wire.send(self._connection, {"ask": doing} | question, arrays, self._deadline)
            return wire.receive(self._connection, self.limits.answer_bytes, self._deadline)
        except wire.WireError as error:
            raise WorkerFailure(self._ended(doing, error)) from None

    def interrupt(self) -> None:
        """From any thread: whoever waits for an answer learns at once that there is none."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Kill the process."""
        if self.alive:
            with contextlib.suppress(WorkerFailure):  # the template died first, and took it along
                self._kill()

    def _kill(self) -> dict[str, Any]:
        self.alive = False
        self._connection.close()
        return self._supervisor.end(self.process, self._generation)

    def _ended(self, doing: str, error: wire.WireError) -> str:
        seconds = time.monotonic() - self._started
        # What a worker died of is decided before its socket closes: it is killed only if it closed that by itself.
        ended = self._kill()
        status = int(ended["status"])
        if error.late:
            why = f"took longer than {self.limits.seconds:g} s"
        elif not error.closed:
            why = f"gave {error}"
        elif os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            name = signal.Signals(number).name if number in signal.Signals._value2member_map_ else str(number)
            why = f"was killed by {name}"
        else:
            why = f"ended with status {os.waitstatus_to_exitcode(status)}"
        return f"it {why} while asked to {doing}, after {seconds:.1f} s, with a peak of {ended['peak_kb'] // 1024} MB"
