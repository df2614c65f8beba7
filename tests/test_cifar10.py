"""CIFAR-10 as the tables read it, from every form that it comes in."""

import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.robustness import cifar10
from wmengine.demo import Data


def test_cifar10_is_read_the_same_from_every_form_that_it_comes_in(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(40, 200, (12, 1, 1, 3)).astype(np.uint8)
    pictures = np.broadcast_to(colours, (12, 32, 32, 3))  # of one colour, which JPEG keeps
    labels = np.array([0] * 5 + [1] * 5 + [0, 1])
    held = {"x_train": pictures[:10], "y_train": labels[:10], "x_test": pictures[10:], "y_test": labels[10:]}
    np.savez(tmp_path / "cifar10.npz", **held)
    read = cifar10.load(tmp_path)
    assert [len(labels) for _, labels in read] == [5, 5, 2]
    assert torch.equal(read.test[0][:, :, 5, 7], torch.from_numpy(colours[10:, 0, 0] / np.float32(255)))
    (tmp_path / "cifar10.npz").unlink()
    (tmp_path / "cifar-10-batches-py").mkdir()
    for number, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        rows = slice(2 * number, 2 * number + 2)
        batch = {b"data": pictures[rows].transpose(0, 3, 1, 2).reshape(2, 3072), b"labels": labels[rows].tolist()}
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch))
    assert_same(cifar10.load(tmp_path), read, 0.0)
    with tarfile.open(tmp_path / "cifar10.tar.xz", "w:xz") as archive:
        for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            file = tmp_path / f"{number}.jpg"
            Image.fromarray(picture).save(file, quality=95)
            archive.add(file, f"./{'train' if number < 10 else 'test'}/{('airplane', 'bird')[label]}/{number:04}.jpg")
    assert_same(cifar10.load(tmp_path), read, 0.02)


def assert_same(found: Data, expected: Data, tolerance: float) -> None:
    for (pictures, labels), (others, same) in zip(found, expected, strict=True):
        assert torch.equal(labels, same)
        assert torch.allclose(pictures, others, atol=tolerance, rtol=0.0)
