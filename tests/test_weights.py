"""The weights of a module: filters on axis 0, in the order of execution, found without a trace left in the model."""

import numpy as np
import pytest
import torch
from torch import nn

from wmengine.suspects.weights import call, evaluating, filters_first, going_into, module_tensors, unwrap


class Shuffled(nn.Module):
    """Registered in another order than it runs, with a layer used twice, one never reached, and one tied weight."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.second = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.first = nn.Conv2d(1, 4, 3)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight

    def forward(self, x):
        x = self.second(self.second(self.norm(self.first(x)))) + torch.rand(1)
        return self.tied(self.head(self.drop(x.mean((2, 3)))))


LAYERS = [
    nn.Conv1d(4, 6, 3, groups=2, bias=False),
    nn.Conv2d(2, 3, (2, 3), bias=False),
    nn.Conv3d(2, 3, 2, bias=False),
    nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False),
    nn.ConvTranspose2d(2, 3, 2, stride=2, bias=False),
    nn.ConvTranspose3d(6, 3, 2, groups=3, bias=False),
    nn.Linear(5, 4, bias=False),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_filter_o_makes_output_channel_o_and_no_other(layer):
    """The definition of a filter, checked on the layer itself: without row o, output channel o alone is silent."""
    ((path, weight, filters, *_),) = module_tensors(nn.Sequential(layer))
    rows = filters(weight.detach())
    spatial = () if isinstance(layer, nn.Linear) else (4,) * (weight.ndim - 2)
    x = torch.ones(1, getattr(layer, "in_channels", 5), *spatial)
    for o in range(len(rows)):
        changed = torch.ones_like(rows)
        changed[o] = 0
        # filters_first only permutes, so it is undone by asking where each entry of the weight went
        places = filters(torch.arange(weight.numel()).reshape(weight.shape)).reshape(-1)
        values = torch.empty(weight.numel())
        values[places] = changed.reshape(-1)
        with torch.no_grad():
            layer.weight.copy_(values.reshape(weight.shape))
        silent = [channel for channel in range(len(rows)) if not layer(x)[0, channel].abs().sum()]
        assert (path, silent) == ("0", [o])


def test_filters_first_is_the_same_in_numpy_and_torch():
    weight = torch.randn(6, 2, 3, 2)
    ours = filters_first(weight.numpy(), 3, transposed=True)
    assert ours.shape == (6, 2, 3, 2)
    assert np.array_equal(ours, filters_first(weight, 3, transposed=True).numpy())


def test_a_sample_gives_the_order_of_execution_each_weight_once():
    model = Shuffled()
    assert [path for path, *_ in module_tensors(model, {"x": torch.zeros(2, 1, 5, 5)})] == ["first", "second", "head"]
    assert [path for path, *_ in module_tensors(model)] == ["head", "unused", "second", "first"]


def test_looking_for_weights_leaves_the_model_as_it_was():
    model = Shuffled()
    model.second.eval()
    training = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    module_tensors(model, {"x": torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0))})
    assert [module.training for module in model.modules()] == training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_writes_to_its_buffers_gets_them_back():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return x

    model = Counter()
    with evaluating(model):
        model(torch.zeros(1))
        assert model.calls.item() == 1
    assert model.calls.item() == 0


def test_the_model_is_restored_when_its_forward_pass_fails():
    model = Shuffled()
    with pytest.raises(ValueError, match=r"does not run on inputs torch.float32 \[2, 7, 5, 5\]"):
        module_tensors(model, {"x": torch.zeros(2, 7, 5, 5)})
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
def test_wrappers_are_looked_through():
    model = nn.Linear(2, 2)
    model.module = nn.Linear(2, 2)  # a plain attribute of that name is no wrapper
    assert unwrap(torch.compile(nn.DataParallel(model))) is model


class Two(nn.Module):
    def forward(self, first, second):
        return first - second


class Whatever(nn.Module):
    def forward(self, *args, **kwargs):
        return kwargs["first"] - kwargs["second"]


def test_several_inputs_are_passed_by_name_where_the_model_has_these_names_and_in_order_otherwise():
    two, five = torch.tensor(2.0), torch.tensor(5.0)
    assert call(Two(), {"second": two, "first": five}) == 3.0
    assert call(Whatever(), {"second": two, "first": five}) == 3.0
    assert call(Two(), {"x": two, "y": five}) == -3.0
    assert call(nn.Identity(), {"whatever": five}) == 5.0


def test_what_goes_into_a_layer_is_what_it_first_gets_and_lets_gradients_through():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    found = going_into(model, "2", {"x": torch.randn(3, 1, 4, 4)})
    assert found.shape == (3, 32)
    found.sum().backward()
    assert model[0].weight.grad is not None
    assert not any(module._forward_pre_hooks for module in model.modules())


def of_two(self, a, b):
    return a, b


def behind_another(self, ids=None, a=None):
    assert ids is None
    return a


def by_keyword(self, *, a):
    return a


def of_any(self, **given):
    return tuple(given.values())


def of_a_dict(self, rows):
    return tuple(rows.values())


def under_another_name(self, x, y=None):
    return x if y is None else (x, y)


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (of_two, "ab"),
        (of_two, "ba"),
        (of_two, "xy"),
        (behind_another, "a"),
        (by_keyword, "a"),
        (of_any, "ab"),
        (of_a_dict, "ab"),
        (under_another_name, "a"),
        (under_another_name, "ab"),
    ],
)
def test_a_module_gets_its_inputs_as_its_forward_takes_them(forward, names):
    model = type("Model", (nn.Module,), {"forward": forward})()
    inputs = {name: torch.full((2, 3), float(place)) for place, name in enumerate(names)}
    expected = tuple(inputs[name] for name in ("ab" if names == "ba" else names))
    found = call(model, inputs)
    assert all(ours is theirs for ours, theirs in zip([found] if len(names) == 1 else found, expected, strict=True))
