"""The sandbox from outside: whatever a worker does, its client gets an answer or a cause, and the next one works."""

import json
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import template_of
from sandbox_service import LIMITS

from wmengine.sandbox import Limits, Supervisor, TemplateGone, WorkerFailure, wire


def gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def ends_soon(process):
    """Within ten seconds; whether it is collected is for whoever inherits it, which some containers' first process
    never does."""
    waited = time.monotonic() + 10.0
    while time.monotonic() < waited:
        try:
            with open(f"/proc/{process}/stat") as status:
                if status.read().rpartition(")")[2].split()[0] in "ZX":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def kill_template(worker):
    template = template_of(worker)
    os.kill(template, signal.SIGKILL)
    assert ends_soon(template)


@pytest.mark.parametrize("dtype", sorted(wire.DTYPES))
def test_arrays_of_every_dtype_come_back_as_they_went(worker, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    _, (same, empty, scalar) = worker.ask("echo", {}, [array, array[:, :0], array[1, 1, 1]])
    assert (same.dtype, same.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(same, array)
    assert empty.shape == (2, 0, 4)
    assert scalar.shape == ()


@pytest.mark.parametrize(
    ("act", "cause"),
    [
        ("crash", "was killed by SIGSEGV while asked to crash"),
        ("abort", "was killed by SIGABRT while asked to abort"),
        ("exit", "ended with status 3 while asked to exit"),
        ("garbage", "gave an answer of"),
        ("huge", "gave an answer of"),
        ("hide", "was killed by SIGKILL while asked to hide"),
    ],
)
def test_a_worker_that_dies_or_lies_is_named_with_its_cause(supervisor, act, cause):
    worker = supervisor.worker(LIMITS)
    with pytest.raises(WorkerFailure, match=cause) as caught:
        worker.ask(act, {})
    assert "with a peak of" in str(caught.value)
    assert gone(worker.process)
    with pytest.raises(WorkerFailure, match="already gone"):
        worker.ask("echo", {})
    assert supervisor.worker(LIMITS).ask("echo", {}, [np.ones(3)])[1][0].sum() == 3


@pytest.mark.parametrize("act", ["hang", "sleep"])
def test_a_worker_that_hangs_is_killed_when_its_time_is_over(supervisor, act):
    worker = supervisor.worker(Limits(seconds=0.5, memory_bytes=256 << 20))
    worker.begin()
    with pytest.raises(WorkerFailure, match=r"took longer than 0\.5 s"):
        worker.ask(act, {})
    assert gone(worker.process)


def test_a_worker_cannot_write_what_it_is_asked(worker):
    assert worker.ask("rewrite", {}, [np.ones(3)])[0]["through"] == []


def test_what_is_asked_cannot_be_written_through_its_descriptor_either():
    ours, theirs = socket.socketpair()
    with wire.Channel(fileno=ours.detach()) as channel, theirs:
        descriptor = channel.share()
        try:
            for act in (
                lambda: os.write(descriptor, b"x"),
                lambda: os.ftruncate(descriptor, 0),
                lambda: mmap.mmap(descriptor, 4096),
            ):
                with pytest.raises(PermissionError):
                    act()
        finally:
            os.close(descriptor)


def test_no_answer_is_read_from_where_questions_are_written():
    ours, theirs = socket.socketpair()
    with wire.Channel(fileno=ours.detach()) as channel, theirs:
        os.close(channel.share())
        channel.shared[:4] = 7
        text = b'{"arrays": [["uint8", [4]]], "shared": 4}'
        theirs.sendall(wire._LENGTHS.pack(len(text), 0) + text)
        with pytest.raises(wire.WireError, match="longer than itself"):
            wire.receive(channel, 1 << 10)


def test_a_kernel_without_such_memory_is_served_over_the_socket(supervisor, monkeypatch):
    def missing(*_):
        raise OSError

    monkeypatch.setattr(os, "memfd_create", missing)
    worker = supervisor.worker(LIMITS)
    assert worker.ask("echo", {}, [np.ones(3)])[1][0].sum() == 3
    worker.close()


class Drip:
    """A connection on which there is always one byte more."""

    def __init__(self, first):
        self.first = first
        self.socket, self.other = socket.socketpair()  # something to wait for
        self.other.send(b"x")

    def fileno(self):
        return self.socket.fileno()

    def recv(self, most):
        some, self.first = self.first[:most], self.first[most:]
        return some

    def recv_into(self, view):
        view[:1] = b"x"
        return 1


def test_who_never_stops_answering_is_late_all_the_same():
    text = b'{"arrays": [["uint8", [1073741824]]]}'
    drip = Drip(wire._LENGTHS.pack(len(text), 1 << 30) + text)
    with pytest.raises(wire.WireError) as caught:
        wire.receive(drip, 1 << 30, wire.Allowance(0.2))
    assert caught.value.late


def test_an_answer_that_is_only_claimed_takes_no_memory(supervisor):
    worker = supervisor.worker(Limits(seconds=0.5, memory_bytes=256 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WorkerFailure, match="took longer"):
        worker.ask("claim", {"bytes": 1 << 30})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.slow
def test_only_waiting_for_a_worker_counts(supervisor):
    worker = supervisor.worker(Limits(seconds=2.0, memory_bytes=256 << 20))
    worker.begin()
    time.sleep(2.2)
    worker.ask("nap", {"seconds": 0.3})
    with pytest.raises(
        WorkerFailure, match=r"took longer than 2 s while asked to nap, .* MB; --seconds \(limits=\) gives it longer"
    ):
        worker.ask("nap", {"seconds": 1.9})


def test_time_in_which_we_were_stopped_ourselves_is_not_the_workers(monkeypatch):
    """Ctrl-Z stops a scan and its workers; when it goes on, much time is over and nobody was late."""
    now = [100.0]
    monkeypatch.setattr(wire.time, "monotonic", lambda: now[0])
    allowance = wire.Allowance(10.0)
    allowance.begin()
    now[0] += 3600.0
    allowance.count()
    assert allowance.left > 5.0
    for _ in range(7):
        now[0] += 1.0
        allowance.count()
    now[0] += 1.0
    with pytest.raises(wire.WireError, match="no answer in time"):
        allowance.count()


def test_memory_is_bounded_and_running_out_of_it_is_an_error_the_worker_survives(worker):
    held = worker.ask("grow", {})[0]["held"]
    assert 0 < held <= LIMITS.memory_bytes
    assert worker.ask("echo", {}, [np.ones(3)])[1][0].sum() == 3


def test_an_answer_may_be_larger_than_a_sockets_buffer(supervisor):
    worker = supervisor.worker(Limits(answer_bytes=64 << 20, memory_bytes=512 << 20))
    array = np.random.default_rng(1).integers(0, 255, 40 << 20, dtype=np.uint8)
    np.testing.assert_array_equal(worker.ask("echo", {}, [array])[1][0], array)
    worker.close()


def test_workers_serve_several_threads_at_once(supervisor):
    sums = {}

    def work(number):
        worker = supervisor.worker(LIMITS)
        sums[number] = sum(float(worker.ask("echo", {}, [np.full(100, number)])[1][0].sum()) for _ in range(20))
        worker.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == {number: 2000.0 * number for number in range(6)}


def test_a_worker_that_was_forgotten_leaves_no_zombie(supervisor):
    process = supervisor.worker(LIMITS).process  # its client is gone, so its socket closes, so it ends
    waited = time.monotonic() + 10.0
    while not gone(process) and time.monotonic() < waited:
        supervisor.worker(LIMITS).close()
    assert gone(process)


def test_a_killed_template_is_started_again():
    with Supervisor("sandbox_service") as supervisor:
        first = supervisor.worker(LIMITS)
        kill_template(first)
        with pytest.raises(WorkerFailure):
            first.ask("echo", {})
        second = supervisor.worker(LIMITS)
        assert second.ask("echo", {}, [np.ones(2)])[1][0].sum() == 2


def test_a_worker_of_a_template_that_is_gone_is_no_reason_to_harm_the_next_one():
    with Supervisor("sandbox_service") as supervisor:
        old = supervisor.worker(LIMITS)
        kill_template(old)
        new = supervisor.worker(LIMITS)
        for worker in (old, supervisor.worker(LIMITS)):
            worker.process = old.process if worker is old else os.getpid()  # no child of the new template
            with pytest.raises(WorkerFailure, match=r"is gone, and its workers with it|cannot end"):
                worker._kill()
        assert new.ask("echo", {}, [np.ones(2)])[1][0].sum() == 2
    new.close()  # after the supervisor


def test_an_interrupted_order_is_not_answered_to_the_next_one(monkeypatch):
    """Ctrl-C while the template forks: its answer comes later, and names a process that nobody asked for."""
    with Supervisor("sandbox_service") as supervisor:
        first = supervisor.worker(LIMITS)
        with monkeypatch.context() as patch:
            patch.setattr(supervisor, "_answer", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                supervisor.worker(LIMITS)
        for worker in (first, supervisor.worker(LIMITS), supervisor.worker(LIMITS)):
            assert worker.ask("who", {})[0]["process"] == worker.process


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_answer_that_was_not_waited_for_is_not_taken_for_the_next_one(supervisor, monkeypatch, interruption):
    worker = supervisor.worker(LIMITS)

    def interrupted(*_):
        raise interruption

    with monkeypatch.context() as patched:
        patched.setattr(wire, "receive", interrupted)
        with pytest.raises(interruption):
            worker.ask("echo", {}, [np.zeros(3)])
    with pytest.raises(WorkerFailure, match="already gone"):
        worker.ask("echo", {}, [np.ones(3)])
    assert gone(worker.process)


def test_an_interrupt_while_the_template_starts_leaves_nothing_behind(monkeypatch):
    with Supervisor("sandbox_service") as supervisor:
        with monkeypatch.context() as patch:
            patch.setattr(supervisor, "_answer", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                supervisor.worker(LIMITS)
        assert supervisor.worker(LIMITS).ask("echo", {}, [np.ones(2)])[1][0].sum() == 2


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_fork_of_this_process_has_workers_of_its_own():
    """As in a pool of multiprocessing, whose processes are forks of one that has looked at a model before."""
    with Supervisor("sandbox_service") as supervisor:
        ours = supervisor.worker(LIMITS)
        template = template_of(ours)
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with pytest.raises(TemplateGone):
                    ours.ask("echo", {})
                ours.close()
                own = supervisor.worker(LIMITS)
                assert own.ask("who", {})[0]["process"] == own.process
                assert template_of(own) != template
                supervisor.close()
                os.write(writes, b"fine")
            finally:
                os._exit(0)
        os.close(writes)
        with os.fdopen(reads, "rb") as said:
            assert said.read() == b"fine"
        os.waitpid(child, 0)
        assert ours.ask("who", {})[0]["process"] == ours.process
        assert template_of(supervisor.worker(LIMITS)) == template


def test_a_fork_that_lives_on_does_not_keep_the_workers_of_a_process_that_was_killed():
    code = (
        "import os, time\n"
        "from wmengine.sandbox import Limits, Supervisor\n"
        "supervisor = Supervisor('sandbox_service')\n"
        "worker = supervisor.worker(Limits())\n"
        "child = os.fork()\n"
        "if child:\n"
        "    print(worker.process, child, flush=True)\n"
        "    worker.ask('hang', {})\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
        worker, child = map(int, process.stdout.readline().split())
        process.kill()
        try:
            assert ends_soon(worker)
        finally:
            os.kill(child, signal.SIGKILL)


def test_how_a_worker_ended_is_known_where_this_process_ignores_its_children():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # which whoever is started inherits
    try:
        with Supervisor("sandbox_service") as supervisor:
            with pytest.raises(WorkerFailure, match="was killed by SIGSEGV while asked to crash"):
                supervisor.worker(LIMITS).ask("crash", {})
            late = supervisor.worker(Limits(seconds=0.3, memory_bytes=256 << 20))
            with pytest.raises(WorkerFailure, match=r"took longer than 0\.3 s"):
                late.ask("hang", {})
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_no_code_is_taken_from_the_working_directory(tmp_path, monkeypatch):
    """Which is where the files lie, as often as not, in `wmengine scan .`"""
    for name in ("json", "onnx", "numpy", "wmengine", "sandbox_service", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with Supervisor("sandbox_service") as supervisor:
        assert supervisor.worker(LIMITS).ask("echo", {}, [np.ones(2)])[1][0].sum() == 2
    assert not (tmp_path / "ran").exists()


def test_a_fork_that_fails_is_an_error_and_the_other_workers_go_on(tmp_path, monkeypatch):
    """As where the user's processes have run out. The second fork fails, and only that one."""
    (tmp_path / "poor_service.py").write_text(
        "import itertools, os\n"
        "from sandbox_service import serve\n"
        "def preload():\n"
        "    fork, numbers = os.fork, itertools.count()\n"
        "    os.fork = lambda: fork() if next(numbers) != 1 else os.listxattr('/there/is/none')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Supervisor("poor_service") as supervisor:
        first = supervisor.worker(LIMITS)
        with pytest.raises(WorkerFailure, match="cannot fork"):
            supervisor.worker(LIMITS)
        for worker in (first, supervisor.worker(LIMITS)):
            assert worker.ask("echo", {}, [np.ones(3)])[1][0].sum() == 3


def test_a_worker_that_cannot_be_kept_to_its_processors_serves_all_the_same(supervisor, monkeypatch):
    monkeypatch.setattr("wmengine.sandbox.supervisor.available", lambda: [4095])
    assert supervisor.worker(LIMITS).ask("echo", {}, [np.ones(3)])[1][0].sum() == 3


def test_what_few_workers_need_is_prepared_when_the_first_of_them_is_forked(tmp_path, monkeypatch):
    (tmp_path / "slow_service.py").write_text(
        "import sandbox_service as service\n"
        "from sandbox_service import preload\n"
        "def prepare():\n"
        "    global ready\n"
        "    ready += 1\n"
        "ready = 0\n"
        "def serve(connection, mechanisms):\n"
        "    service.serve(connection, [*mechanisms, f'prepared {ready} times'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Supervisor("slow_service") as supervisor:
        for asked, times in ((False, 0), (True, 1), (True, 1), (False, 1)):
            worker = supervisor.worker(LIMITS, prepared=asked)
            assert (worker.prepared, worker.mechanisms[-1]) == (times == 1, f"prepared {times} times")


def test_workers_die_with_the_process_that_asked_for_them():
    code = (
        "import time\n"
        "from wmengine.sandbox import Limits, Supervisor\n"
        "supervisor = Supervisor('sandbox_service')\n"
        "worker = supervisor.worker(Limits())\n"
        "print(worker.process, flush=True)\n"
        "worker.ask('hang', {})\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
        number = int(process.stdout.readline())
        assert not gone(number)
        process.kill()
    assert ends_soon(number)


def test_a_service_that_does_not_start_says_why():
    with Supervisor("no_such_service") as supervisor, pytest.raises(WorkerFailure, match="No module named"):
        supervisor.worker(LIMITS)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=12, max_size=200))
def test_no_bytes_from_a_worker_are_more_than_a_wire_error(data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(data)
        theirs.close()
        try:
            header, arrays = wire.receive(ours, 1 << 16, wire.Allowance(5.0))
        except wire.WireError:
            return
        assert isinstance(header, dict)
        assert sum(array.nbytes for array in arrays) <= 1 << 16


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ({"arrays": [["float32", [3]]]}, b"1234"),
        ({"arrays": [["float32", [1]]]}, b"12345678"),
        ({"arrays": [["float32", [-1]]]}, b""),
        ({"arrays": [["object", [1]]]}, b"12345678"),
        ({"arrays": [["float32", [1 << 40, 1 << 40]]]}, b"1234"),
        ({"arrays": [["float32", [0, 1 << 62, 1 << 62]]]}, b""),
        ({"arrays": [["float32", [0, 1 << 80]]]}, b""),
        ({"arrays": [["float32", [float("inf")]]]}, b""),
        ({"arrays": [["float32", [float("nan")]]]}, b""),
        ({"arrays": [["float32", [0] * 40]]}, b""),
        ({"arrays": 3}, b""),
        ([], b""),
    ],
)
def test_frames_that_contradict_themselves_are_refused(header, body):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        text = json.dumps(header).encode()
        theirs.sendall(struct.pack("<IQ", len(text), len(body)) + text + body)
        with pytest.raises(wire.WireError, match="an answer"):
            wire.receive(ours, 1 << 16)
