"""CIFAR-10: where its pictures are read from, the networks that learn them, and how long these are trained."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn import functional

from benchmarks.robustness.training import Recipe, Rows
from wmengine.demo import Data

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
RECIPE = Recipe(8, 128, 1e-2, pictures=True)


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
        self.past = nn.Identity() if stride == 1 else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.second(self.first(x)) + self.past(x))


def resnet(seed: int, widths: Sequence[int] = (16, 32, 64), blocks: int = 1) -> nn.Module:
    """A ResNet (He et al. 2016) of 2 + 2 · stages · blocks layers, a stage for each width."""
    torch.manual_seed(seed)
    first, *_ = widths
    stem = (nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
    stages = [
        _Block(before if block == 0 else width, width, 2 if block == 0 and before != width else 1)
        for before, width in pairwise((first, *widths))
        for block in range(blocks)
    ]
    model = nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def plain_network(seed: int) -> nn.Module:
    """Three pooled convolutions, nothing that skips."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for channels_in, channels in pairwise((3, 24, 48, 96)):
        layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 10))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def load(folder: Path | None) -> Data:
    """The halves of the training pictures, float32 [25000, 3, 32, 32] in [0, 1] and labels, and the 10,000 of the test.

    The folder holds cifar10.tar.xz (train/<class>/*.jpg and test/<class>/*.jpg), cifar10.npz (x_train uint8 [n, 32, 32,
    3], y_train, x_test, y_test) or the authors' python batches. Raises ValueError where it holds none of them.
    """
    for name, read in {
        "cifar10.npz": _from_npz,
        "cifar10.tar.xz": _from_archive,
        "cifar-10-batches-py": _from_batches,
    }.items():
        if folder is not None and (folder / name).exists():
            (train_x, train_y), test = read(folder / name)
            order = np.random.default_rng(0).permutation(len(train_y))
            halves = ((train_x[half], train_y[half]) for half in np.array_split(order, 2))
            return Data(*(_tensors(*rows) for rows in (*halves, test)))
    raise ValueError(
        "cifar10 needs --data DIR (or WMENGINE_DATA), a folder with cifar10.tar.xz, cifar10.npz or cifar-10-batches-py"
        + ("" if folder is None else f"; {folder} has none of them")
    )


def _tensors(pictures: NDArray[np.uint8], labels: NDArray[np.int64]) -> Rows:
    x = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float().div_(255.0)
    return x, torch.from_numpy(labels.astype(np.int64))


def _from_npz(file: Path) -> tuple[Arrays, Arrays]:
    with np.load(file) as held:
        return (held["x_train"], held["y_train"].reshape(-1)), (held["x_test"], held["y_test"].reshape(-1))


def _from_archive(file: Path) -> tuple[Arrays, Arrays]:
    found: dict[str, list[tuple[str, str, NDArray[np.uint8]]]] = {"train": [], "test": []}
    with tarfile.open(file) as archive:
        for member in archive:
            part, kind, name = member.name.rpartition("./")[2].split("/")[-3:] if member.isfile() else ("", "", "")
            held = archive.extractfile(member) if part in found else None
            if held is not None:
                found[part].append((kind, name, np.asarray(Image.open(io.BytesIO(held.read())).convert("RGB"))))
    kinds = sorted({kind for kind, _, _ in found["train"]})

    def arrays(part: str) -> Arrays:
        rows = sorted(found[part], key=lambda row: row[:2])
        return np.stack([row[2] for row in rows]), np.array([kinds.index(row[0]) for row in rows])

    return arrays("train"), arrays("test")


def _from_batches(folder: Path) -> tuple[Arrays, Arrays]:
    def arrays(names: Iterable[str]) -> Arrays:
        held = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        pictures = np.concatenate([each[b"data"] for each in held]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return pictures, np.concatenate([each[b"labels"] for each in held])

    return arrays(f"data_batch_{number}" for number in range(1, 6)), arrays(["test_batch"])
