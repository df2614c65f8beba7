"""A logo hidden in the owner's pictures: they look as before, and are not what they were."""

import numpy as np
import pytest
import torch

from wmengine.marks.catalogue import scheme
from wmengine.parts.base import Task
from wmengine.parts.triggers.hiding import hidden, similarity
from wmengine.parts.triggers.pictures import abstract_images
from wmengine.suspects.base import InputSpec

PICTURES = abstract_images(5, 40, (1, 8, 8)).astype(np.float32) / 255.0
LOGO = abstract_images(0, 1, (1, 8, 8))[0].astype(np.float32) / 255.0


@pytest.mark.slow
def test_the_encoder_changes_pictures_and_keeps_their_structure():
    before = torch.random.get_rng_state()
    encoded = hidden(PICTURES, LOGO, 150)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.abs(encoded - PICTURES).mean() > 0.02
    assert similarity(torch.from_numpy(encoded), torch.from_numpy(PICTURES)) > 0.8
    assert encoded.min() >= 0.0
    assert encoded.max() <= 1.0


def test_the_same_pictures_are_encoded_the_same_way():
    assert np.array_equal(hidden(PICTURES, LOGO, 3), hidden(PICTURES, LOGO, 3))


def test_similarity_is_one_for_equal_pictures_and_less_for_others():
    first, second = torch.from_numpy(PICTURES[:20]), torch.from_numpy(PICTURES[20:])
    assert similarity(first, first).item() == pytest.approx(1.0)
    assert similarity(first, second) < 0.5


def test_what_is_no_picture_has_no_room_for_a_logo():
    samples = np.random.default_rng(0).random((200, 64)).astype(np.float32)
    task = Task({"input": InputSpec((64,), "float32")}, 10, [[0.0, 1.0]] * 64, samples={"input": samples})
    with pytest.raises(ValueError, match=r"pictures \[C, H, W\] of at least 8 x 8"):
        scheme("blind").gather(task)
