"""`pytest -p tests.rehearsal`: the tests for a GPU on a CPU, so that they stay true while no GPU is at hand.

Operators that torch dispatches run as on any CPU; `wmengine.ops.cuda`'s fronts run the emulated module whose path the
environment gives as EMULATED_CUDA. What only a GPU can show, graphs, tuning and sizes past 2³¹, is left out.
"""

import contextlib
import importlib.util
import os

import pytest
import torch

from tests import gpu_tensors
from wmengine.ops import cuda

ONLY_ON_A_GPU = ("capture", "cuda_graphs", "tuning_measures", "two_to_the_31", "where_its_inputs_are")
NOT_OF_A_CPU = ("opcheck[dtype1]",)  # whose operators take float32
TOO_LONG = ("70-3000", "[label_matches]", "[shape6", "formula[shape2]", "compiled_training_step")  # tested elsewhere


class Stream:
    """All there is: work is done when a call returns."""

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


def pytest_configure():
    spec = importlib.util.spec_from_file_location("_cuda", os.environ["EMULATED_CUDA"])
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    cuda._compiled, cuda._place = lambda: emulated, lambda tensor: (0, 0)
    gpu_tensors.THERE, gpu_tensors.DEVICE = True, torch.device("cpu")
    torch.cuda.Stream, torch.cuda.current_stream = Stream, Stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    for name in ("synchronize", "set_sync_debug_mode", "_sleep"):
        setattr(torch.cuda, name, lambda *given: None)


def pytest_collection_modifyitems(items):
    for item in items:
        if any(part in item.name for part in ONLY_ON_A_GPU + NOT_OF_A_CPU + TOO_LONG):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, or takes long without"))
