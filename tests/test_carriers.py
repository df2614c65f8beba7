"""What carriers promise: filters on axis 0, one order whoever asks, pairing by structure with every choice counted."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from wmengine.carriers import MAXIMUM_TRIES, Tensor, evaluating, filters_first, match_tensors, module_tensors, unwrap


def tensors(*shapes):
    return [Tensor(np.zeros(shape, np.float32), f"weight {index}") for index, shape in enumerate(shapes)]


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
    ((path, weight, filters),) = module_tensors(nn.Sequential(layer))
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
    assert [path for path, *_ in module_tensors(model, torch.zeros(2, 1, 5, 5))] == ["first", "second", "head"]
    assert [path for path, *_ in module_tensors(model)] == ["head", "unused", "second", "first"]


def test_looking_for_weights_leaves_the_model_as_it_was():
    model = Shuffled()
    model.second.eval()
    training = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    module_tensors(model, torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in model.modules()] == training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in model.modules())


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
    with pytest.raises(RuntimeError):
        module_tensors(model, torch.zeros(2, 7, 5, 5))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
def test_wrappers_are_looked_through():
    model = nn.Linear(2, 2)
    model.module = nn.Linear(2, 2)  # a plain attribute of that name is no wrapper
    assert unwrap(torch.compile(nn.DataParallel(model))) is model


def test_as_many_tensors_as_carriers_are_one_free_pairing_in_order():
    matching = match_tensors([(8, 4, 3, 3), (10, 8), (8, 4, 3, 3)], tensors((8, 4, 3, 3), (8, 4, 3, 3), (10, 8)))
    assert matching.tries == ((0, 2, 1),)
    assert (matching.found, matching.possible) == (3, 1)
    assert matching.notes == ("3 of 3 carriers matched to the suspect's tensors by shape and order",)


def test_more_or_fewer_tensors_than_carriers_are_tries_that_keep_the_order():
    more = match_tensors([(4, 3), (4, 3)], tensors((4, 3), (4, 3), (4, 3)))
    assert set(more.tries) == {(0, 1), (0, 2), (1, 2)}
    fewer = match_tensors([(4, 3)] * 3, tensors((4, 3), (5, 3), (4, 3)))
    assert set(fewer.tries) == {(0, 2, None), (0, None, 2), (None, 0, 2)}
    assert (more.found, fewer.found, fewer.possible) == (2, 2, 3)
    assert any("3 orders" in note and "paid" in note for note in fewer.notes)


def test_choices_of_several_shapes_multiply_up_to_the_cap():
    shapes = [(4, 3), (5, 3)]
    both = match_tensors(shapes, tensors((4, 3), (5, 3), (4, 3), (5, 3)))
    assert len(set(both.tries)) == both.possible == 4
    crowd = match_tensors([(4, 3)] * 20 + [(5, 3)], tensors(*[(4, 3)] * 40, (5, 3), (5, 3)))
    assert crowd.possible == 2 * math.comb(40, 20)
    assert len(set(crowd.tries)) == len(crowd.tries) == MAXIMUM_TRIES
    assert all(pairing == tuple(sorted(pairing[:20])) + pairing[20:] for pairing in crowd.tries)
    assert any(f"{MAXIMUM_TRIES} of the {crowd.possible} possible orders" in note for note in crowd.notes)


def test_a_network_inside_a_larger_one_is_among_the_first_tries():
    """Its layers are all there in a row, before, between or behind others of their shapes."""
    shapes = [(4, 3)] * 5 + [(5, 3)] * 4
    larger = match_tensors(shapes, tensors(*[(4, 3)] * 9, *[(5, 3)] * 9))
    assert larger.possible == math.comb(9, 5) * math.comb(9, 4) > MAXIMUM_TRIES
    for first in range(5):
        for second in range(6):
            row = (*range(first, first + 5), *range(9 + second, 9 + second + 4))
            assert row in larger.tries


def test_the_recorded_places_are_tried_first_where_they_fit():
    many = tensors(*[(4, 3)] * 80)
    recorded = match_tensors([(4, 3)], many, [70])
    plain = match_tensors([(4, 3)], many)
    assert recorded.tries == ((70,), *plain.tries)
    assert recorded.possible == plain.possible == 80
    known = match_tensors([(4, 3)], many[:5], [2])
    assert known.tries == ((2,), (0,), (1,), (3,), (4,))
    assert match_tensors([(4, 3)], tensors((5, 3), (4, 3)), [1]).tries == ((1,),)
    for misplaced in ([0], [2]):  # another shape there, and nothing there
        assert match_tensors([(4, 3)], tensors((5, 3), (4, 3)), misplaced).tries == ((1,),)
    half = match_tensors([(4, 3), (4, 3)], tensors((4, 3), (5, 3), (4, 3), (4, 3)), [0, 1])
    assert half.tries == match_tensors([(4, 3), (4, 3)], tensors((4, 3), (5, 3), (4, 3), (4, 3))).tries


def test_other_shapes_do_not_match_not_even_transposed():
    matching = match_tensors([(8, 4, 3, 3), (10, 8)], tensors((8, 4, 5, 5), (8, 10), (4, 8, 3, 3)))
    assert (matching.found, matching.tries) == (0, ((None, None),))
    assert match_tensors([(8, 4)], []).found == 0


def test_axes_of_length_one_are_overlooked_only_where_a_shape_is_missing():
    """A Linear rewritten as a 1x1 convolution is found; beside a Linear of its own shape it is not tried."""
    assert match_tensors([(8, 4)], tensors((8, 4, 1, 1))).tries == ((0,),)
    assert match_tensors([(8, 4, 3)], tensors((8, 4, 1, 3))).tries == ((0,),)
    assert match_tensors([(8, 4)], tensors((8, 4, 1, 1), (8, 4))).tries == ((1,),)
    assert match_tensors([(8, 1)], tensors((8, 1, 1, 1))).tries == ((0,),)
    mixed = match_tensors([(8, 4), (8, 4, 1, 1)], tensors((8, 4, 1, 1), (8, 4, 1, 1)))
    assert mixed.tries == ((0, 1),)
