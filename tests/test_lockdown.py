"""What a sandboxed worker has given up, seen from inside it and in the filter that the kernel is given."""

import os
import platform
import struct

import pytest
from sandbox_service import LIMITS

from wmengine.sandbox import Supervisor, WorkerFailure, lockdown, supported


def test_a_worker_reports_every_mechanism_of_this_kernel(worker):
    assert worker.mechanisms == tuple(name for name, there in supported().items() if there)


@pytest.mark.skipif(not all(supported().values()), reason=f"this kernel lacks some of {supported()}")
def test_a_worker_has_no_files_network_processes_or_new_code(worker):
    header, _ = worker.ask("forbidden", {})
    assert header["refused"] == dict.fromkeys(header["refused"], "refused")
    assert len(header["refused"]) == 17
    assert worker.ask("allowed", {})[0]["sum"] == 300.0**3
    assert not os.path.exists("/tmp/wmengine-was-here")


@pytest.mark.skipif(not supported()["seccomp"], reason="this kernel has no seccomp")
def test_the_kernel_refuses_every_call_that_is_not_listed(worker):
    """Also by the numbers of x32, the third way into a 64-bit kernel; 335 and 336 are traps of the kernel's own."""
    listed = {*lockdown._ARCHITECTURES[platform.machine()].calls.values(), 335, 336}
    numbers = [number for number in range(600) if number not in listed]
    numbers += [number | 1 << 30 for number in range(600)]
    assert worker.ask("call everything", {"numbers": numbers})[0]["let through"] == []


@pytest.mark.skipif(platform.system() != "Linux", reason="capabilities are Linux's")
def test_a_worker_has_no_capability_left(worker):
    with open(f"/proc/{worker.process}/status") as status:
        held = {line.split()[0]: int(line.split()[1], 16) for line in status if line.startswith("Cap")}
    assert held["CapEff:"] == held["CapPrm:"] == held["CapInh:"] == held["CapAmb:"] == 0


def test_a_worker_shares_no_memory_that_anyone_can_write_and_can_run_none(worker):
    with open(f"/proc/{worker.process}/maps") as maps:
        rights = {line.split()[1] for line in maps}
    assert not [each for each in rights if "w" in each and ("x" in each or "s" in each)]


@pytest.mark.skipif(not all(supported().values()), reason=f"this kernel lacks some of {supported()}")
@pytest.mark.parametrize(
    ("missing", "older"), [("landlock", "_landlock_version = lambda: 0"), ("seccomp", "_has_seccomp = lambda: False")]
)
def test_where_the_kernel_lacks_a_mechanism_the_others_hold_and_are_named(tmp_path, monkeypatch, missing, older):
    (tmp_path / "older_service.py").write_text(
        f"from wmengine.sandbox import lockdown\nfrom sandbox_service import preload, serve\nlockdown.{older}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Supervisor("older_service") as supervisor:
        worker = supervisor.worker(LIMITS)
        assert worker.mechanisms == tuple(name for name in lockdown.MECHANISMS if name != missing)
        tries = ["read a file", "write a file", "execute", "raise its limits", "signal its parent"]
        refused = worker.ask("forbidden", {"only": tries})[0]["refused"]
        assert len(refused) == 5
        assert all(said == "refused" or "Permission denied" in said for said in refused.values()), refused


def test_a_worker_that_cannot_give_up_its_rights_serves_nobody_and_says_why(tmp_path, monkeypatch):
    (tmp_path / "stubborn_service.py").write_text(
        "from wmengine.sandbox import lockdown\nfrom sandbox_service import preload, serve\n"
        "def refuse(memory_bytes):\n    raise lockdown.LockdownError('landlock refused its rules')\n"
        "lockdown.apply = refuse\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with (
        Supervisor("stubborn_service") as supervisor,
        pytest.raises(WorkerFailure, match="it cannot be locked down: landlock refused its rules"),
    ):
        supervisor.worker(LIMITS)


@pytest.mark.skipif(platform.system() != "Linux", reason="the choice is Linux's")
def test_the_kernel_ends_workers_first_where_memory_runs_out(worker):
    with open(f"/proc/{worker.process}/oom_score_adj") as score:
        assert score.read() == "1000\n"


@pytest.mark.parametrize("machine", sorted(lockdown._ARCHITECTURES))
def test_the_filter_allows_what_is_listed_and_nothing_else(machine):
    """The program, interpreted: every system call number against the table, with the special arguments both ways."""
    architecture = lockdown._ARCHITECTURES[machine]
    program = list(struct.iter_unpack("=HBBI", lockdown.seccomp_program(machine, 77)))

    def run(number, audit=architecture.audit, arguments=(0, 0, 0)):
        data = struct.pack("<IIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
        at = accumulator = 0
        while True:
            code, then, otherwise, constant = program[at]
            at += 1
            if code == 0x20:
                (accumulator,) = struct.unpack_from("<I", data, constant)
            elif code == 0x15:
                at += then if accumulator == constant else otherwise
            elif code == 0x45:
                at += then if accumulator & constant else otherwise
            else:
                return constant

    allow, refuse = 0x7FFF0000, 0x00050001
    calls = {number: name for name, number in architecture.calls.items()}
    conditional = {"tgkill", "fcntl"}  # not allowed with nothing but zeros
    for number in range(600):
        listed = number in calls and calls[number] not in conditional
        assert run(number) == (allow if listed else refuse), number
    named = architecture.calls
    assert run(named["tgkill"], arguments=(77, 0, 0)) == allow
    commands = [command for command in range(2000) if run(named["fcntl"], arguments=(3, command, 0)) == allow]
    assert commands == [1, 2, 3, 4]
    for call, flags in {"sendto": [0, 0x4000], "recvfrom": [0]}.items():
        let = [bit for bit in (0, *(1 << n for n in range(32))) if run(named[call], arguments=(3, 0, 9, bit)) == allow]
        assert let == flags
    assert not {"sendmsg", "recvmsg", "ioctl", "kill", "prctl", "setrlimit", "clone", "clone3"} & set(named)
    for call in ("mmap", "mprotect"):
        assert run(named[call], arguments=(0, 0, 4)) == refuse
        assert run(named[call], arguments=(0, 0, 3)) == allow
    assert run(named["read"], audit=1) == 0x80000000
    assert all(len(program) > at + max(row[1], row[2]) for at, row in enumerate(program) if row[0] in (0x15, 0x45))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of this processor's system calls are not known")
def test_the_table_of_system_calls_is_the_kernels():
    header = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"
    if not os.path.exists(header):
        pytest.skip("the kernel's headers are not installed")
    with open(header) as lines:
        kernel = {
            words[1][5:]: int(words[2])
            for words in map(str.split, lines)
            if words[:1] == ["#define"] and len(words) == 3
        }
    for name, number in lockdown._ARCHITECTURES["x86_64"].calls.items():
        assert kernel[name] == number, name
