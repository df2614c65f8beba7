"""Fixtures of several files; and without a GPU, one thread and Triton's interpreter, asked for before imports."""

import ctypes
import os

import pytest

from wmengine import _cpu


def gpu_is_there() -> bool:
    """The driver is asked first: importing torch takes seconds, and most test files can do without it."""
    try:
        if ctypes.CDLL("libcuda.so.1").cuInit(0) != 0:
            return False
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()


if not gpu_is_there():
    os.environ["TRITON_INTERPRET"] = "1"
    # Steps and batches that are small spend their time waiting for the other threads; subprocesses are told so too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(params=_cpu.instruction_sets())
def instruction_set(request):
    """Each instruction set of this processor in turn."""
    before = _cpu.instruction_set()
    _cpu.set_instruction_set(request.param)
    yield request.param
    _cpu.set_instruction_set(before)


@pytest.fixture
def threads():
    """`ops.set_num_threads`, for the length of a test."""
    from wmengine import ops

    before = ops.get_num_threads()
    yield ops.set_num_threads
    ops.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """torch on one thread: steps and batches that are small would spend their time waiting for the others."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_long_pauses(monkeypatch):
    """Endpoints that fail are tried again at once."""
    from wmengine.suspects.endpoint import patience

    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.001)


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
    """A folder of suspects and the registry of two marks: see `scan_models.fill`."""
    import scan_models

    return scan_models.fill(tmp_path_factory.mktemp("bucket"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The files of a network that learned a mark and of its twin: see `exported.plain`."""
    import exported

    return exported.plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def supervisor():
    """A template of workers that do what `sandbox_service` is asked for."""
    from wmengine.sandbox import Supervisor

    with Supervisor("sandbox_service") as one:
        yield one


@pytest.fixture
def worker(supervisor):
    from sandbox_service import LIMITS

    one = supervisor.worker(LIMITS)
    yield one
    one.close()


@pytest.fixture
def counted(monkeypatch):
    """The tiny task of `tiny_task`, and "worse" for the only attack."""
    import tiny_task

    from wmengine.attacks import Attack, catalogue

    found = tiny_task.Counted()
    worse = Attack("worse", "stand-in", found.worse, "module", needs="labels", defaults={"sigma": 1.0})
    monkeypatch.setattr(catalogue, "ATTACKS", {"worse": worse})
    return found
