"""Where there is no GPU, Triton kernels run in Triton's interpreter on CPU tensors; it is asked for before import."""

import ctypes
import os


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
