"""The operators for torch tensors, gathered: each family has a module of its own, schemas in torch.library."""

from __future__ import annotations

from wmengine.ops.torch_cross_entropy import MarkedCrossEntropy, marked_cross_entropy
from wmengine.ops.torch_embedding import embedding_loss
from wmengine.ops.torch_matches import bit_matches, label_matches, match_counts, pack_bits
from wmengine.ops.torch_projection import project, project_adjoint
from wmengine.ops.torch_soft_nearest_neighbor import soft_nearest_neighbor

__all__ = [
    "MarkedCrossEntropy",
    "bit_matches",
    "embedding_loss",
    "label_matches",
    "marked_cross_entropy",
    "match_counts",
    "pack_bits",
    "project",
    "project_adjoint",
    "soft_nearest_neighbor",
]
