"""The operators for torch tensors, gathered: each family has a module of its own, schemas in torch.library."""

from __future__ import annotations

import torch

from wmengine.ops import cpu
from wmengine.ops.torch_cross_entropy import MarkedCrossEntropy, marked_cross_entropy
from wmengine.ops.torch_embedding import embedding_loss
from wmengine.ops.torch_library import Tensor, check_tensor, cuda
from wmengine.ops.torch_linear_cross_entropy import marked_linear_cross_entropy
from wmengine.ops.torch_matches import bit_matches, label_matches, pack_bits
from wmengine.ops.torch_projection import project, project_adjoint, sketch, sketch_adjoint
from wmengine.ops.torch_soft_nearest_neighbor import soft_nearest_neighbor

__all__ = [
    "MarkedCrossEntropy",
    "bit_matches",
    "embedding_loss",
    "label_matches",
    "marked_cross_entropy",
    "marked_linear_cross_entropy",
    "match_counts",
    "pack_bits",
    "project",
    "project_adjoint",
    "sketch",
    "sketch_adjoint",
    "soft_nearest_neighbor",
]


def match_counts(outputs: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`wmengine.ops.match_counts`; on a CPU the tensors are read through NumPy, without a copy."""
    check_tensor("outputs", outputs, 3)
    expected = torch.as_tensor(expected, device=outputs.device)
    if outputs.device.type == "cuda" and outputs.dtype != torch.float64:
        counts, invalid = cuda().match_counts(outputs, expected)
        return counts, invalid
    answers = outputs.detach()
    bfloat16 = answers.dtype == torch.bfloat16  # which NumPy lacks: it goes there as its bits
    scores = (answers.view(torch.uint16) if bfloat16 else answers).cpu().numpy()
    counted, bad = cpu.match_counts(scores, expected.cpu().numpy(), bfloat16=bfloat16)
    return torch.from_numpy(counted).to(outputs.device), torch.from_numpy(bad).to(outputs.device)
