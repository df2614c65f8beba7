"""From a torch module to an ONNX file that takes any batch size: torch's own exporter, quiet, its traces removed."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmengine._optional import require
from wmengine.suspects.computed import plain
from wmengine.suspects.weights import evaluating, unwrap

if TYPE_CHECKING:
    import torch


def export_onnx(
    model: torch.nn.Module,
    example: torch.Tensor | tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    fold_batchnorm: bool = True,
) -> Path:
    """Write a model, in eval mode, as one ONNX file whose first axis is a dynamic batch; returns the path.

    example: a batch of inputs (one row is enough), or several inputs: a tuple, named input, input_1, ... in the file,
    or a dict by the names that the model's forward has for them, which the file keeps. The first output is `logits`.
    fold_batchnorm: fold each BatchNorm into the convolution or linear layer before it, as torch's exporter does by
    default; otherwise the graph is written as traced. Weights lie in the file
    itself, or beside it in PATH.data from 2 GB on. A weight that is computed (weight_norm, spectral_norm, prune, any
    parametrisation, an adapter of peft) is written as it is now. The model's training flags and device stay;
    torch.compile and data-parallel wrappers are looked through. Raises ValueError for an example that is not a batch,
    and whatever torch.onnx.export raises for a model that it cannot export.
    """
    torch = require("torch", extra="train")
    require("onnxscript", extra="train")
    model = plain(unwrap(model, pieces=True))
    like = next(model.parameters(), None)
    named = isinstance(example, Mapping)
    if isinstance(example, Mapping):
        given, names = tuple(example.values()), list(example)
    else:
        given = example if isinstance(example, tuple) else (example,)
        names = ["input", *(f"input_{index}" for index in range(1, len(given)))]
    batches = []
    for rows in given:
        if not isinstance(rows, torch.Tensor) or rows.ndim < 1 or len(rows) == 0:
            raise ValueError("example must be a batch of inputs, such as x[:1], or a tuple or dict of batches")
        # Two rows: a batch of one looks to the tracer like an axis that is always 1.
        pair = torch.cat([rows[:1], rows[:1]]).to(device=rows.device if like is None else like.device)
        batches.append(pair.contiguous())
    if not all(each.is_contiguous() for each in model.parameters()):
        # Channels that lie last are pooled through strides, of which the exporter makes a tangle of Range and Gather.
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    batch = torch.export.Dim("batch")
    shapes = [{0: batch} for _ in batches]
    with evaluating(model), quiet():
        program = torch.onnx.export(
            model,
            () if named else tuple(batches),
            kwargs=dict(zip(names, batches, strict=True)) if named else None,
            dynamo=True,
            optimize=fold_batchnorm,
            dynamic_shapes=dict(zip(names, shapes, strict=True)) if named else tuple(shapes),
            input_names=names,
            output_names=["logits"],
            verbose=False,
        )
        _remove_traces(program.model)
        program.save(os.fspath(path))
    return Path(path)


def _remove_traces(model: Any) -> None:
    """Drop what the exporter adds beside the graph: stack traces, which hold the paths of the machine it ran on, and
    the shapes of weights listed once more, over which ONNX Runtime's dynamic quantizer trips when it turns a Gemm into
    a MatMul (microsoft/onnxruntime issue 25890)."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    for value in model.graph.initializers.values():
        value.type = value.shape = value.doc_string = None
        value.metadata_props.clear()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress lines, no warnings about torchvision or a tool's own deprecations, no graphs that it fails at."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
