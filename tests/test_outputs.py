"""Where the logits are among what a torch module answers, for training, attacks and verification alike."""

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from embedding import batch, embedder, network, unproven
from torch import nn

from wmengine.suspects.module import ModuleSuspect
from wmengine.suspects.outputs import logits_of

pytestmark = pytest.mark.usefixtures("one_thread")

LOGITS, MAPS, LOSS = torch.randn(6, 4), torch.randn(6, 4, 3), torch.tensor(0.5)


@dataclasses.dataclass
class Answer:
    maps: Any
    scores: Any


class Named(NamedTuple):
    aux: Any
    logits: Any


ANSWERS = {
    "alone": lambda logits, _: logits,
    "a dict": lambda logits, maps: {"maps": maps, "out": logits},
    "a tuple": lambda logits, maps: (maps, logits),
    "a list": lambda logits, maps: [maps, logits],
    "a dataclass": lambda logits, maps: Answer(maps, logits),
    "a named tuple": lambda logits, _: Named(2 * logits, logits),
    "behind a loss": lambda logits, _: (LOSS, logits),
    "beside what is nothing": lambda logits, _: {"hidden": None, "past": (), "logits": logits},
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_logits_are_called_so_or_have_their_shape(kind):
    for classes in (4, None):
        assert torch.equal(logits_of(ANSWERS[kind](LOGITS, MAPS), classes), LOGITS)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_of_two_classes_one_number_is_the_logit_of_the_second(shape):
    single = LOGITS[:, 0].reshape(shape)
    for answer in (single, (LOSS, single), {"logits": single}):
        assert torch.equal(logits_of(answer, 2), torch.stack([torch.zeros(6), LOGITS[:, 0]], 1))
    assert logits_of(single, 4) is single


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_module_is_marked_and_judged_whatever_its_logits_are_in(kind):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return ANSWERS[kind](self.inner(x), x)

    model, plain = Wrapped(), network()
    found, expected = embedder(model), embedder(plain)
    x, y = found.mix(*batch(16))
    assert torch.equal(expected.mix(*batch(16))[0], x)
    torch.testing.assert_close(found.loss(model(x), y), expected.loss(plain(x), y))
    assert unproven(found)[1].baseline == unproven(expected)[1].baseline
    assert len(ModuleSuspect(model).answer({"x": x.numpy()}, 4)) == 18
