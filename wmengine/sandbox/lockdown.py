"""What a process gives up before it looks at a stranger's bytes: files, network, processes, new code, unbounded memory.

It keeps no capability either, where it is root's. Three mechanisms of Linux, each taken for good and without root:
resource limits, landlock (no path can be opened) and a seccomp filter (a list of system calls; whatever is not on it
fails with EPERM). Everything that the work needs must be imported before. Where the kernel lacks a mechanism the others
still hold, and `apply` says which are in force.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from dataclasses import dataclass

MECHANISMS = ("limits", "landlock", "seccomp")

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 4, 38, 22
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_LANDLOCK_VERSION = 1  # the flag that asks for the ABI's version


@dataclass(frozen=True)
class _Architecture:
    """A processor's audit number and its numbers of the system calls that the filter knows."""

    audit: int
    calls: dict[str, int]


# Of each architecture's own table (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
_ARCHITECTURES = {
    "x86_64": _Architecture(
        0xC000003E,
        {
            "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10,
            "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "readv": 19,
            "writev": 20, "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "sendto": 44,
            "recvfrom": 45, "exit": 60, "fcntl": 72, "gettimeofday": 96,
            "getrusage": 98, "sigaltstack": 131, "gettid": 186, "futex": 202, "sched_getaffinity": 204,
            "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "tgkill": 234,
            "ppoll": 271, "set_robust_list": 273, "getcpu": 309, "getrandom": 318, "membarrier": 324, "rseq": 334,
        },
    ),
    "aarch64": _Architecture(
        0xC00000B7,
        {
            "fcntl": 25, "close": 57, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "ppoll": 73,
            "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98, "set_robust_list": 99, "nanosleep": 101,
            "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123,
            "sched_yield": 124, "tgkill": 131, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
            "rt_sigreturn": 139, "getrusage": 165, "gettimeofday": 169, "getcpu": 168, "getpid": 172, "gettid": 178,
            "sendto": 206, "recvfrom": 207, "brk": 214, "munmap": 215, "mremap": 216,
            "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278, "membarrier": 283,
            "rseq": 293,
        },
    ),
}  # fmt: skip

_PROT_EXEC = 0x4
# F_GETFD, F_SETFD, F_GETFL, F_SETFL. F_SETOWN and F_SETSIG would send any signal to any process of the same user.
_FCNTL = (1, 2, 3, 4)
_MSG_NOSIGNAL = 0x4000  # the one flag of ours: out-of-band data, for one, has broken kernels

_libc = ctypes.CDLL(None, use_errno=True)


class LockdownError(Exception):
    """A mechanism that this kernel has could not be put in force."""


def supported() -> dict[str, bool]:
    """Which mechanisms this kernel and processor have; nothing is put in force."""
    linux = platform.system() == "Linux"
    return {
        "limits": os.name == "posix",
        "landlock": linux and _landlock_version() > 0,
        "seccomp": linux and platform.machine() in _ARCHITECTURES and _has_seccomp(),
    }


def apply(memory_bytes: int) -> tuple[str, ...]:
    """Put every mechanism of this kernel in force in this process, for good; the names of those that are.

    memory_bytes: address space beyond what the process has now. Raises LockdownError where one that the kernel has
    refuses: then nothing of a stranger's may be looked at.
    """
    have = supported()
    in_force = []
    if have["limits"]:
        _limit(memory_bytes)
        in_force.append("limits")
    if platform.system() == "Linux":
        _drop_capabilities()
        _prctl(_PR_SET_DUMPABLE, 0)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if have["landlock"]:
        _restrict_paths()
        in_force.append("landlock")
    if have["seccomp"]:
        _filter_calls()
        in_force.append("seccomp")
    return tuple(in_force)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that forked it ends; `parent` is that thread's process."""
    if platform.system() == "Linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we could ask
        raise LockdownError("the process that this one should die with is gone")


def die_first() -> None:
    """Where memory runs out for the whole machine, the kernel's choice is this process and not the one it serves."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")


def _limit(memory_bytes: int) -> None:
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,  # no process or thread, root's excepted, on kernels without seccomp too
        resource.RLIMIT_AS: _address_space() + memory_bytes,
    }
    for which, most in limits.items():
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))


def _drop_capabilities() -> None:
    """None is left: with root's, allowed calls could do more (lock memory, declare pages that all share broken).

    Who has none, as ordinary users, is not asked to: a service manager may forbid the call.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        if all(int(line.split()[1], 16) == 0 for line in status if line.startswith(("CapPrm:", "CapAmb:"))):
            return
    version_3, this_process = 0x20080522, 0
    header, none = struct.pack("=Ii", version_3, this_process), bytes(24)
    if _libc.capset(ctypes.create_string_buffer(header, 8), ctypes.create_string_buffer(none, 24)) != 0:
        raise LockdownError(f"capabilities could not be dropped: {os.strerror(ctypes.get_errno())}")


def _address_space() -> int:
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _prctl(option: int, *values: int | ctypes.Array[ctypes.c_char]) -> None:
    arguments = [
        ctypes.c_ulong(value) if isinstance(value, int) else ctypes.cast(value, ctypes.c_void_p) for value in values
    ]
    arguments += [ctypes.c_ulong(0)] * (4 - len(arguments))
    if _libc.prctl(option, *arguments) != 0:
        raise LockdownError(f"prctl({option}) failed: {os.strerror(ctypes.get_errno())}")


def _syscall(number: int, *values: int | ctypes.Array[ctypes.c_char] | None) -> int:
    arguments = [ctypes.c_long(value) if isinstance(value, int) else value for value in values]
    return int(_libc.syscall(ctypes.c_long(number), *arguments))


def _landlock_version() -> int:
    """The kernel's landlock ABI, at most 0 where it has none; the call's number is the same on every architecture."""
    return _syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)


def _restrict_paths() -> None:
    """Handle every right that the kernel's landlock knows and grant none: no path, no TCP port, no outside signal."""
    version = _landlock_version()
    rights = 13 + (version >= 2) + (version >= 3) + (version >= 5)  # refer, truncate, ioctl on devices
    network = 0b11 if version >= 4 else 0  # bind, connect
    scopes = 0b11 if version >= 6 else 0  # abstract UNIX sockets, signals
    size = 8 if version < 4 else 16 if version < 6 else 24  # of the structure that this kernel knows
    attributes = ctypes.create_string_buffer(struct.pack("=QQQ", (1 << rights) - 1, network, scopes)[:size], size)
    ruleset = _syscall(_LANDLOCK_CREATE_RULESET, attributes, size, 0)
    if ruleset < 0:
        raise LockdownError(f"landlock refused its rules: {os.strerror(ctypes.get_errno())}")
    try:
        if _syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
            raise LockdownError(f"landlock could not be put in force: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(ruleset)


def _has_seccomp() -> bool:
    # With a null filter a kernel that has seccomp answers EFAULT, one without it EINVAL; nothing changes.
    ctypes.set_errno(0)
    _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), None, ctypes.c_ulong(0), ctypes.c_ulong(0))
    return ctypes.get_errno() == errno.EFAULT


def _filter_calls() -> None:
    program = seccomp_program(platform.machine(), os.getpid())
    filters = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(filters))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.create_string_buffer(header, len(header)))


def seccomp_program(machine: str, process: int) -> bytes:
    """The filter in classic BPF: 8 bytes an instruction (code, jump if true, jump if false, constant).

    It sees a system call's number, the architecture, and the call's arguments as 64-bit words of which it reads the
    lower half (both architectures are little-endian).
    """
    load, jump_equal, jump_any_bit, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    architecture = _ARCHITECTURES[machine]

    def argument(index: int) -> tuple[int, int, int, int]:
        return load, 0, 0, 16 + 8 * index

    def refuse_bits(index: int, bits: int) -> list[tuple[int, int, int, int]]:
        """Refuse the call where an argument has one of these bits, allow it otherwise."""
        return [argument(index), (jump_any_bit, 0, 1, bits), (give, 0, 0, refuse), (give, 0, 0, allow)]

    def allow_values(index: int, constants: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
        """Allow the call where an argument is one of these, refuse it otherwise."""
        tests = [(jump_equal, len(constants) - at, 0, constant) for at, constant in enumerate(constants)]
        return [argument(index), *tests, (give, 0, 0, refuse), (give, 0, 0, allow)]

    # Memory but no new code; a signal only to this very process (abort() sends one). What counts against every process
    # of the same user is not on the list: processes and threads (sessions run in one), and sendmsg, as descriptors in
    # flight do too.
    special = {
        "fcntl": allow_values(1, _FCNTL),
        "mmap": refuse_bits(2, _PROT_EXEC),
        "mprotect": refuse_bits(2, _PROT_EXEC),
        "tgkill": allow_values(0, (process,)),
        "sendto": allow_values(3, (0, _MSG_NOSIGNAL)),
        "recvfrom": allow_values(3, (0,)),
    }
    program = [
        (load, 0, 0, 4),
        (jump_equal, 1, 0, architecture.audit),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
    ]
    for name, number in architecture.calls.items():
        body = special.get(name, [(give, 0, 0, allow)])
        program += [(jump_equal, 0, len(body), number), *body]
    program.append((give, 0, 0, refuse))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
