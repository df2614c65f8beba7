"""What the tests on a GPU share: tensors there, a training step, and leaving out what its memory has no room for."""

import pytest
import torch

from wmengine import ops

THERE = torch.cuda.is_available()
DEVICE = torch.device("cuda")
KEYS = [3, 2**63 + 5, 2**64 - 1]


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def integers(*shape, seed=0, low=-1, high=4, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, dtype=dtype).to(DEVICE)


def needs_memory(gib):
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


SHAPES = [(6, 5, 3, 3), (33, 41), (700, 300), (64, 64, 1, 1)]


def layers(dtype=torch.float32):
    return [random(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(SHAPES)]


def embed(weights, bits, **settings):
    return ops.embedding_loss(weights, [*KEYS, 77][: len(weights)], bits, **settings)


def training_step(weights, logits, labels, bits):
    marked = ops.marked_cross_entropy(logits, labels, groups=1)
    loss = marked.loss + embed(weights, bits, carrier="unit_filters", projection="sketch", link="bce")[0]
    return loss, torch.autograd.grad(loss, [*weights, logits])


def step_inputs():
    labels = torch.arange(64, device=DEVICE) % 10
    return layers(), random(64, 10, seed=9).requires_grad_(), labels, torch.ones(256, dtype=torch.uint8, device=DEVICE)
