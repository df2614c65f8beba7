"""A device that is none: its tensors lie on the CPU, say that they lie elsewhere, and refuse to be mixed with others.

What a GPU would refuse is refused here, and what would make a training loop wait for a GPU is counted: reading a number
or a size that depends on values, and copies between the devices that are not asynchronous. `torch.ops.wmengine` runs as
on a CPU. Like CUDA, it takes indices and single numbers that lie on the CPU.
"""

import collections
import contextlib
import traceback

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from wmengine.ops import torch_cross_entropy

NAME = "pretended"
aten = torch.ops.aten
MIXING = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
READING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


class PretendedTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "layout": raw.layout}
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), dtype=raw.dtype, device=f"{NAME}:0", **layout)

    def __init__(self, raw):
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of a Device")


class Device(TorchDispatchMode):
    """Where the device is there. `waits`: how often a line of the package, or of another's, waited for it."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        here = [each for each in tensors if isinstance(each, PretendedTensor)]
        if here and function not in MIXING:
            for each in tensors:
                index = function in INDEXING and not each.is_floating_point() and isinstance(args[0], PretendedTensor)
                if not (isinstance(each, PretendedTensor) or each.dim() == 0 or index):
                    raise RuntimeError(f"{function} of tensors on {NAME} and of {tuple(each.shape)} on {each.device}")
        stays = isinstance(args[0], PretendedTensor) if function in MIXING else bool(here)
        if kwargs.get("device") is not None:
            stays = torch.device(kwargs["device"]).type == NAME
            kwargs["device"] = "cpu" if stays else kwargs["device"]
        copied = function in MIXING and any(isinstance(each, PretendedTensor) != stays for each in tensors)
        if (here and function in READING) or (copied and not kwargs.get("non_blocking")):
            self.waits[f"{function} at {self.caller()}"] += 1
        raw_args, raw_kwargs = tree_map(
            lambda each: each.raw if isinstance(each, PretendedTensor) else each, (args, kwargs)
        )
        found = function(*raw_args, **raw_kwargs)
        if not stays:
            return found
        found = tree_map(lambda each: PretendedTensor(each) if isinstance(each, torch.Tensor) else each, found)
        return return_and_correct_aliasing(function, args, kwargs, found) if here else found

    @staticmethod
    def caller():
        for frame in reversed(traceback.extract_stack()):
            if "/wmengine/" in frame.filename:
                return f"{frame.filename.rsplit('/wmengine/')[-1]}:{frame.lineno}"
        return "nowhere in wmengine"


@contextlib.contextmanager
def pretended(monkeypatch):
    """The device, and what torch has for devices that it knows."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        backend_registration._setup_privateuseone_for_python_backend(NAME)

    def placed(make):
        return lambda *args, device=None, **kwargs: make(*args, **kwargs).to("cpu" if device is None else device)

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    autocast = torch.autocast
    monkeypatch.setattr(torch, "tensor", placed(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", placed(torch.as_tensor))
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu" if kind == NAME else kind, *args, **kwargs)
    )
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch_cross_entropy, "_writes_gradient", lambda logits: False)  # as on a GPU in a graph
    with Device() as device:
        yield device
