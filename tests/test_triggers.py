"""Trigger inputs: the same bytes on every machine, strong and smooth enough to be learned, and no two alike."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from wmengine.parts.triggers.pictures import abstract_images
from wmengine.suspects.adapters import to_input

KEY = 0x0123456789ABCDEF


@pytest.mark.parametrize(
    ("shape", "digest"),
    [
        ((1, 8, 8), "c908703bdabcc85cee2f947b41c11e88ba395802bc90593b7c8a126d91452cc9"),
        ((1, 28, 28), "9cf17bb476ca1ddc665cb8b6a3d12c8be253c78596af9f4c9f711082bccb39b5"),
        ((3, 32, 32), "ed83a24827838415d670a638d26c89d92c8b6ee1d569a7640944ae6fb823297e"),
        ((64,), "593d41d8f18ef4edf2468b898edb8c25e70d62c1fb26c0df7fca322ea35831a8"),
    ],
)
def test_golden_triggers(shape: tuple[int, ...], digest: str) -> None:
    assert hashlib.sha256(abstract_images(KEY, 100, shape).tobytes()).hexdigest() == digest


def test_golden_triggers_of_a_large_image_that_is_not_square() -> None:
    digest = hashlib.sha256(abstract_images(KEY, 10, (3, 48, 64)).tobytes()).hexdigest()
    assert digest == "79388f0eb0c491094e5e8514b2f8a9a60d2d8159c32b89d49e2444030ad24674"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 6),
    st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple).filter(lambda shape: len(shape) > 1 or shape[0] > 3),
)
def test_any_shape_gets_distinct_bytes_and_a_longer_set_begins_with_the_shorter(
    key: int, count: int, shape: tuple[int, ...]
) -> None:
    few, more = abstract_images(key, count, shape), abstract_images(key, count + 2, shape)
    assert few.dtype == np.uint8
    assert few.shape == (count, *shape)
    assert np.array_equal(more[:count], few)
    assert len({image.tobytes() for image in more}) == count + 2


def test_two_keys_share_no_trigger() -> None:
    first, second = (abstract_images(key, 200, (1, 8, 8)) for key in (KEY, KEY ^ 1 << 63))
    assert not {image.tobytes() for image in first} & {image.tobytes() for image in second}


def distances(images: np.ndarray) -> np.ndarray:
    """Mean absolute difference of every pair, in units of 255."""
    flat = images.reshape(len(images), -1)
    return pdist(flat / (255 * flat.shape[1]), "cityblock")


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 16, 16), (3, 32, 32)])
def test_triggers_are_far_apart_even_in_64_pixels(shape: tuple[int, ...]) -> None:
    for key in (1, 2, 3):
        apart = distances(abstract_images(key, 100, shape))
        assert apart.min() > 0.1
        assert apart.mean() > 0.3


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 16, 16), (3, 32, 32), (3, 96, 64)])
def test_each_image_spans_the_range_with_strong_contrast(shape: tuple[int, ...]) -> None:
    images = abstract_images(KEY, 50, shape)
    assert (images.min(axis=(1, 2, 3)) == 0).all()
    assert (images.max(axis=(1, 2, 3)) == 255).all()
    assert images.std(axis=(1, 2, 3)).min() > 25
    assert np.median(images.std(axis=(1, 2, 3))) > 60


@pytest.mark.parametrize(("shape", "share"), [((1, 8, 8), 0.75), ((1, 28, 28), 0.45), ((3, 32, 32), 0.45)])
def test_neighbouring_pixels_are_alike(shape: tuple[int, ...], share: float) -> None:
    images = abstract_images(KEY, 100, shape).astype(np.float64)
    across = np.abs(np.diff(images, axis=3)).mean()
    shuffled = np.random.default_rng(0).permuted(images.reshape(100, shape[0], -1), axis=2).reshape(images.shape)
    assert across < share * np.abs(np.diff(shuffled, axis=3)).mean()


def test_inputs_without_a_picture_get_uniform_bytes() -> None:
    counts = np.bincount(abstract_images(KEY, 100, (512,)).reshape(-1), minlength=256)
    assert float(((counts - 200) ** 2 / 200).sum()) < 330  # 0.1 % point of 255 degrees of freedom


def test_an_input_too_small_for_distinct_triggers_is_refused() -> None:
    assert abstract_images(KEY, 1, (1, 1, 1)).tolist() == [[[[0]]]]
    with pytest.raises(ValueError, match=r"inputs of shape \(1, 1, 1\) are too small for 2 distinct triggers; ask for"):
        abstract_images(KEY, 2, (1, 1, 1))
    assert len(np.unique(abstract_images(KEY, 200, (1,)))) == 200


@pytest.mark.parametrize(("count", "shape"), [(-1, (1, 8, 8)), (1, ()), (1, (1, 0, 8)), (1, (1, -8, 8))])
def test_an_impossible_set_is_refused(count: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a shape of positive sizes"):
        abstract_images(KEY, count, shape)


@pytest.mark.parametrize("key", [-1, 2**64])
def test_a_generator_key_has_64_bits(key: int) -> None:
    with pytest.raises(ValueError, match="philox_key"):
        abstract_images(key, 1, (1, 8, 8))


# --- as a network reads them ---


def test_both_ends_of_every_channel_s_range_are_hit_exactly() -> None:
    triggers = np.array([[[[0, 255]], [[0, 255]]]], dtype=np.uint8)
    for low, high in ((-2.1179039478, 2.6400001049), (0.0, 1.0), (-1e30, 1.0), (-(2.0**-126), 3.4e38), (5.0, 5.0)):
        low32, high32 = np.float32(low), np.float32(high)
        read = to_input(triggers, [[float(low32).hex(), float(high32).hex()], [0.0, 255.0]])
        assert read.dtype == np.float32
        assert read[0, 0, 0].tolist() == [low32, high32]
        assert read[0, 1, 0].tolist() == [0.0, 255.0]


@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_levels_lie_evenly_between_the_ends(first: float, second: float) -> None:
    low, high = min(first, second), max(first, second)
    read = to_input(np.arange(256, dtype=np.uint8).reshape(256, 1), [[low, high]])[:, 0]
    assert (np.diff(read) >= 0).all()
    assert np.allclose(
        read, low + (high - low) * np.arange(256) / 255, rtol=1e-6, atol=1e-6 * (abs(low) + abs(high)) + 2e-45
    )


@pytest.mark.parametrize(
    "triggers",
    [np.zeros((2, 3, 4, 4), np.uint8), np.zeros((2, 1, 4, 4), np.float32), np.zeros(3, np.uint8)],
)
def test_triggers_that_do_not_fit_the_range_are_refused(triggers: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"triggers must be uint8\[N, 1, ...\] for a value_range of 1 channels"):
        to_input(triggers, [[0.0, 1.0]])
