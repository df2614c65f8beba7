"""How near results must come to the float64 reference."""

import numpy as np


def assert_close(actual, expected, tolerance=1e-5, at_least=1e-30):
    """A tensor within `tolerance` of the largest expected value (or of `at_least`), NaN where NaN is expected."""
    expected = np.asarray(expected, dtype=np.float64)
    actual = actual.detach().cpu().double().numpy()
    assert actual.shape == expected.shape
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    actual, expected = np.nan_to_num(actual), np.nan_to_num(expected)
    assert np.abs(actual - expected).max(initial=0.0) <= tolerance * np.abs(expected).max(initial=at_least)
