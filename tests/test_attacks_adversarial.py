"""What adversarial training promises: the worst inputs within eps are trained on, and are less bad afterwards."""

import torch
from embedding import batch, network
from torch import nn

from wmengine import attacks


class Recorder(nn.Module):
    """Keeps what it is trained on."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.seen.append(x.detach().clone())
        return self.model(x)


def loss_after_one_step(model, x, y, radius):
    """The loss on inputs that one step of the gradient's sign, so long, made worse."""
    moved = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(moved), y), moved)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x + radius * gradient.sign()), y))


def test_adversarial_training_is_on_worse_inputs_within_eps_and_within_the_range_of_the_data():
    model, (x, y) = attacks.run("ftal", network(), batch(128), epochs=4, batch=16), batch(128)
    trained = attacks.run("adversarial", Recorder(model), (x, y), eps=0.05, steps=5, epochs=1)
    moved = torch.cat(trained.seen)
    away, whose = torch.cdist(moved.flatten(1), x.flatten(1), p=torch.inf).min(dim=1)
    radius = 0.05 * float(x.max() - x.min())
    assert sorted(whose.tolist()) == list(range(128)), "every row once"
    assert radius / 2 < float(away.min()) <= float(away.max()) < radius * 1.001
    assert x.min() <= moved.min() <= moved.max() <= x.max()
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(model(rows), y[whose])) for rows in (x[whose], moved)]
    assert losses[1] > 1.5 * losses[0]


def test_adversarial_training_makes_a_model_err_less_on_worst_inputs():
    x, y = batch(256)
    model = attacks.run("ftal", network(), (x, y), epochs=4, batch=16)
    plain = attacks.run("ftal", model, (x, y), epochs=4, batch=16)
    robust = attacks.run("adversarial", model, (x, y), epochs=4, batch=16, eps=0.1, steps=5)
    losses = [loss_after_one_step(each, x, y, 0.1 * float(x.max() - x.min())) for each in (robust, plain, model)]
    assert losses == sorted(losses)
    assert losses[0] < losses[1] / 5
