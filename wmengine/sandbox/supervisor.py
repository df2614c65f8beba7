"""The trusted side: starts workers, gives each suspect its time, kills what is late, and says how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wmengine._processors import available, keep_to
from wmengine.sandbox import wire
from wmengine.sandbox.wire import Array

TEMPLATE_SECONDS = 60.0
GONE = "the template of the sandbox is gone, and its workers with it"
PACKAGES = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # where wmengine lies


@dataclass(frozen=True)
class Limits:
    """What one suspect may use: seconds that its worker is waited for in all, bytes of memory, bytes of one answer."""

    seconds: float = 120.0
    memory_bytes: int = 4 << 30
    answer_bytes: int = 1 << 30


class WorkerFailure(Exception):
    """A worker that died, hung or lied; the message says what it was doing, how it ended, and its peak of memory."""


class TemplateGone(WorkerFailure):
    """Somebody killed the template, and all workers with it: nothing that this worker did."""


class Supervisor:
    """One template process and the workers forked from it; safe to use from several threads. Use as a context.

    A fork of this process has no share in them: there the workers are gone, and the next one starts a template anew.

    service: the module that workers run, with a function `preload()` for the template and `serve(connection,
    mechanisms)` for each worker. It may have another one, `prepare()`, for what takes long and few workers need: the
    template calls it before the first fork that asks for it.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready = False  # to take orders
        self._number = 0  # of orders
        self._generation = 0  # of templates: each knows its own workers alone
        _supervisors.add(self)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to start the template, where there is none: whoever asks for a worker waits less."""
        with self._lock, contextlib.suppress(OSError):
            self._launch()

    def close(self) -> None:
        """End the template, and with it every worker."""
        with self._lock:
            self._close()

    def worker(self, limits: Limits, confined: bool = True, prepared: bool = False) -> Worker:
        """A fresh worker, forked and locked down, on the processors of the thread that asks.

        Raises WorkerFailure where there can be none.

        Not confined, for what must reach a GPU's driver: it keeps its files and its memory, and has a time limit only.
        prepared: by the service's `prepare`; it may be so without being asked for.
        """
        try:
            pair = socket.socketpair()
        except OSError as error:
            raise WorkerFailure(f"there is no socket for a worker: {error}") from None
        ours = wire.Channel(fileno=pair[0].detach())
        try:
            with pair[1] as theirs:
                order = {"fork": limits.memory_bytes if confined else None, "prepared": prepared}
                memory = ours.share()
                try:
                    passed = [theirs.fileno()] if memory is None else [theirs.fileno(), memory]
                    answer, generation = self._order(order, passed)
                finally:
                    if memory is not None:
                        os.close(memory)
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        keep_to(available(), answer["process"])
        return Worker(self, ours, answer["process"], generation, limits, answer["prepared"])

    def has(self, generation: int) -> bool:
        """Whether this template was not left behind: another one has been started, or this process is a fork."""
        return generation == self._generation

    def end(self, process: int, generation: int) -> dict[str, Any]:
        """Kill a worker, if it still lives, and say how it ended: status as of wait(2), peak_kb, seconds of processor
        time. The template does it, as the parent: no other process can have that number by now."""
        return self._order({"end": process}, generation=generation)[0]

    def _order(
        self, order: dict[str, Any], passed: Sequence[int] = (), generation: int | None = None
    ) -> tuple[dict[str, Any], int]:
        """The template's answer, and which template gave it; `generation` is the only one that may."""
        with self._lock:
            for attempt in range(2):
                if generation is not None and (self._control is None or generation != self._generation):
                    raise TemplateGone(GONE)
                try:
                    control = self._start()
                    self._number += 1
                    text = json.dumps(order | {"number": self._number}).encode()
                    socket.send_fds(control, [text], passed)
                    answer = self._answer(control)
                    while answer["number"] != self._number:  # to an order whose sender was interrupted (Ctrl-C)
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
        message = control.recv(4096)
        if not message:
            raise ConnectionResetError
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _launch(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a message is an order or an answer
        environment = {
            name: os.environ[name]
            for name in ("PATH", "LD_LIBRARY_PATH", "LANG", "TZ", "CUDA_VISIBLE_DEVICES")
            if name in os.environ
        }
        # Workers are forked for every few models, and each would fault its memory in page by page.
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
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
        self._control = ours
        self._generation += 1
        return ours

    def _start(self) -> socket.socket:
        control = self._launch()
        if self._ready:
            return control
        assert self._process is not None
        try:
            self._answer(control)
        except BaseException as error:
            self._process.kill()
            said = self._process.communicate()[1].decode(errors="replace").strip().splitlines() or ["nothing was said"]
            self._close()
            if not isinstance(error, OSError):
                raise
            raise WorkerFailure(f"the sandbox does not start: {said[-1]}") from None
        self._ready = True
        return control

    def forked(self) -> None:
        """In a fork: let go of what is the first process's, so that its end is still the template's end."""
        self._lock = threading.Lock()  # another thread may have held it
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            if self._process.stderr is not None:
                self._process.stderr.close()
            self._process.returncode = 0  # no child of this one: not to be waited for
        self._process, self._control, self._ready = None, None, False
        self._generation += 1

    def _close(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0 if self._ready else 0.0)
            self._process.kill()
            self._process.wait()
            if self._process.stderr is not None:
                self._process.stderr.close()
        self._process, self._control, self._ready = None, None, False


_supervisors: weakref.WeakSet[Supervisor] = weakref.WeakSet()


def _forked() -> None:
    for supervisor in list(_supervisors):
        supervisor.forked()


os.register_at_fork(after_in_child=_forked)


class Worker:
    """One sandboxed process. `ask` sends a question and waits for its answer, within the time that `begin` gave.

    Only waiting for the worker counts: what its client does between two questions (fetching weights from a slow store,
    scoring) is not held against a suspect.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        connection: wire.Channel,
        process: int,
        generation: int,
        limits: Limits,
        prepared: bool,
    ) -> None:
        self.process = process
        self.prepared = prepared
        self._generation = generation
        self.limits = limits
        self.alive = True
        self.mechanisms: tuple[str, ...] = ()
        self._supervisor = supervisor
        self._connection = connection
        self.begin()
        header, _ = self.ask("start", {})
        if "error" in header:
            self.close()
            raise WorkerFailure(f"it cannot be locked down: {header['error']}")
        self.mechanisms = tuple(str(name) for name in header["mechanisms"])

    def begin(self) -> None:
        """A new suspect: none of its time is used up."""
        self._allowance = wire.Allowance(self.limits.seconds)

    def go_on_for(self, other: Worker) -> None:
        """The suspect of another worker, in what is left of its time."""
        self._allowance = other._allowance

    def ask(
        self, doing: str, question: dict[str, Any], arrays: Sequence[Array] = ()
    ) -> tuple[dict[str, Any], list[Array]]:
        """The answer to a question; `doing` says in an error what was asked for.

        Raises WorkerFailure where the worker is late, dies, or answers in no way that can be read; it is gone then.
        """
        if not self.alive:
            raise WorkerFailure(f"the worker was already gone when asked to {doing}")
        if not self._supervisor.has(self._generation):
            raise TemplateGone(GONE)
        try:
            wire.send(self._connection, {"ask": doing} | question, arrays, self._allowance)
            return wire.receive(self._connection, self.limits.answer_bytes, self._allowance)
        except wire.WireError as error:
            raise WorkerFailure(self._ended(doing, error)) from None
        except BaseException:  # Ctrl-C, or no memory: an answer that is still to come would pass for the next one's
            self.close()
            raise

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
        self._connection.shared = None
        return self._supervisor.end(self.process, self._generation)

    def _ended(self, doing: str, error: wire.WireError) -> str:
        seconds = self.limits.seconds - self._allowance.left
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
        mend = "; --seconds (limits=) gives it longer" if error.late else ""
        peak = ended["peak_kb"] // 1024
        return f"it {why} while asked to {doing}, after {seconds:.1f} s, with a peak of {peak} MB{mend}"
