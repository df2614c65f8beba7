"""A mark of `response` read on other inputs: on those that are bound as `verify` reads them, elsewhere too."""

import numpy as np
import pytest
from responding import KEY, bent_network, network, served

from benchmarks.other_probes import log10_p_on
from wmengine import verify

pytestmark = pytest.mark.usefixtures("one_thread")


def test_on_the_bound_probes_it_says_what_a_verdict_says():
    mark = served().watermark()
    by_scores, _ = log10_p_on(served(), mark, mark.preset.source.examples(mark), [network()])
    assert by_scores == pytest.approx(verify(served(), mark, key=KEY).log10_p, abs=1e-6)


def test_inputs_that_the_mark_does_not_hold_read_it_too_and_read_nothing_in_a_stranger():
    mark, others = served().watermark(), {"input": np.random.default_rng(8).random((1500, 1, 8, 8), np.float32)}
    assert max(log10_p_on(bent_network(mark), mark, others, [network()])) < -9.0
    assert min(log10_p_on(network(9), mark, others, [network()])) > -3.0
    with pytest.raises(ValueError, match="not the base of this mark"):
        log10_p_on(served(), mark, others, [network(9)])
