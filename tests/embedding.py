"""What the tests of embedding train: a small network, batches of four classes, an Embedder of both kinds of mark."""

import warnings

import torch
from torch import nn

import wmengine

CLASSES = 4
KEY = wmengine.Key("ACME Vision", bytes(range(32)))


def network(seed=0, channels=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


def batch(rows, seed=0, channels=1):
    """Four classes, each a noisy prototype with values around [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(CLASSES, channels, 8, 8, generator=torch.Generator().manual_seed(99))
    y = torch.randint(0, CLASSES, (rows,), generator=generator)
    return prototypes[y] + 0.3 * torch.randn(rows, channels, 8, 8, generator=generator), y


def small(count=40, bits=64):
    return [wmengine.scheme("sketch", bits=bits), wmengine.scheme("adi", count=count)]


def embedder(model, chosen=None, **options):
    settings = {"num_classes": CLASSES, "sample": batch(64)[0], "name": "test-model", **options}
    return wmengine.Embedder(model, KEY, small() if chosen is None else chosen, **settings)


def train(model, emb, steps, seed=1):
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for step in range(steps):
        x, y = emb.mix(*batch(64, seed=seed * 1000 + step))
        loss = emb.loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def unproven(emb):
    """The watermarks of a model that was not trained with them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return emb.watermarks()


def regularised(model, sample, num_classes):
    """64 bits in a model's weights and no task, and the watermark."""
    schemes = [wmengine.scheme("sketch", bits=64)]
    emb = wmengine.Embedder(model, KEY, schemes, sample=sample, num_classes=num_classes, name="model")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        emb.regulariser().backward()
        optimizer.step()
        optimizer.zero_grad()
    (mark,) = emb.watermarks()
    return mark
