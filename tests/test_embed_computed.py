"""Marks in weights that are computed: weight_norm, spectral_norm and prune of both torch APIs, adapters of peft."""

import copy
import warnings

import pytest
import torch
from embedding import CLASSES, batch, embedder, train, unproven
from torch import nn
from torch.nn import utils
from torch.nn.utils import prune

import wmengine
from wmengine.suspects.computed import live_weight

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the mark .* does not prove itself"),
]

SKETCH = [wmengine.scheme("sketch", bits=64)]
WRAPS = {
    "weight_norm": utils.parametrizations.weight_norm,
    "spectral_norm": utils.parametrizations.spectral_norm,
    "orthogonal": utils.parametrizations.orthogonal,
    "old weight_norm": utils.weight_norm,
    "old spectral_norm": utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "prune twice": lambda layer: prune.random_structured(
        prune.l1_unstructured(layer, "weight", 0.2), "weight", 0.2, dim=1
    ),
    "bias too": lambda layer: prune.l1_unstructured(utils.parametrizations.weight_norm(layer), "bias", 0.3),
}


@pytest.fixture(params=WRAPS)
def model(request):
    torch.manual_seed(0)
    wrap = WRAPS[request.param]
    return nn.Sequential(
        wrap(nn.Conv2d(1, 16, 3, padding=1)),
        nn.ReLU(),
        wrap(nn.ConvTranspose2d(16, 8, 2, stride=2)),
        nn.AdaptiveAvgPool2d(8),
        nn.Flatten(),
        nn.Linear(512, CLASSES),
    )


def test_they_are_trained_and_may_be_marked(model):
    (mark,) = unproven(embedder(model, SKETCH))
    assert mark.parameters["carriers"] == [[16, 1, 3, 3], [8, 16, 2, 2], [CLASSES, 512]]


def test_reading_a_weight_is_what_the_next_run_uses_and_changes_nothing(model):
    model.train()
    state = copy.deepcopy(model.state_dict())
    found = [live_weight(model[place]) for place in (0, 2)]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model.eval()(batch(4)[0])
    for place, weight in zip((0, 2), found, strict=True):
        torch.testing.assert_close(weight, model[place].weight)


def test_steps_may_come_in_any_order(model):
    """The term before or after the run, alone, or twice: no graph is torn down under another."""
    emb = embedder(model, SKETCH)
    x, y = batch(8)
    before = emb.regulariser()
    (nn.functional.cross_entropy(model(x), y) + before).backward()
    emb.regulariser().backward()
    emb.loss(model(x), y).backward()
    assert torch.isfinite(next(model.parameters()).grad).all()


@pytest.mark.slow
def test_the_mark_is_in_the_file_as_it_is_in_the_model(model, tmp_path):
    emb = embedder(model, [wmengine.scheme("sketch", bits=64, strength=0.1)])
    train(model, emb, 40)
    (mark,) = emb.watermarks()
    state = copy.deepcopy(model.state_dict())
    path = wmengine.export_onnx(
        model, batch(1)[0], tmp_path / "m.onnx", fold_batchnorm="parametrizations" in str(state)
    )
    verdict = wmengine.verify(path, mark)
    assert verdict.matched == wmengine.verify(model, mark).matched > 48
    assert "3 of 3 carriers matched" in " ".join(verdict.notes)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.train()(batch(8)[0]).sum().backward()  # it is still the model that it was


def test_a_mark_that_is_added_wants_weights_that_it_can_add_to(model):
    with pytest.raises(ValueError, match="is computed from others: remove its parametrisation first"):
        embedder(model, [wmengine.scheme("tattooed", bits=8, margin=1.0)])


def weighted(model):
    """By a mark of the task's own samples, whose training puts other weights in place of the model's."""
    chosen = [wmengine.scheme("exponential_weighting", count=40)]
    return embedder(model, chosen, samples=batch(200, seed=3))


def test_other_weights_in_their_place_are_refused(model):
    with pytest.raises(ValueError, match="some of these are computed from others: remove their parametrisation"):
        weighted(model)


# Adapters


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 16, 3)
        self.second = nn.Linear(16 * 36, 64)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)).flatten(1))))


def adapted(**options):
    import peft  # which takes seconds

    targets = {"target_modules": ["first", "second"], "modules_to_save": ["head"], **options}
    return peft.get_peft_model(Small(), peft.LoraConfig(r=4, **targets))


@pytest.mark.slow
def test_the_merged_model_holds_the_mark_of_its_adapters(tmp_path):
    model = adapted()
    emb = embedder(model)
    train(model, emb, 120)
    marks = emb.watermarks()
    assert marks[0].parameters["carriers"] == [[16, 1, 3, 3], [64, 576], [CLASSES, 64]]
    path = wmengine.export_onnx(model, batch(1)[0], tmp_path / "m.onnx")
    assert hasattr(model.base_model.model.second, "lora_A"), "exporting merged a copy"
    found = [wmengine.verify(model, mark).matched for mark in marks]
    assert found[0] == 64
    assert [wmengine.verify(path, mark).matched for mark in marks] == found
    merged = model.merge_and_unload()
    assert type(merged.second) is nn.Linear
    assert [wmengine.verify(merged, mark).matched for mark in marks] == found


def test_frozen_layers_without_an_adapter_carry_nothing():
    (mark,) = unproven(embedder(adapted(target_modules=["second"], modules_to_save=None), SKETCH))
    assert mark.parameters["carriers"] == [[64, 576]]
    assert mark.parameters["carrier_indices"] == [1]


def test_an_adapter_that_is_not_merged_by_addition_is_refused():
    with pytest.raises(ValueError, match=r"'default' \(Dora.*\) is not merged by addition: merge it, then mark"):
        embedder(adapted(use_dora=True), SKETCH)


@pytest.mark.parametrize("kind", ["OFT", "HRA", "Hira", "BOFT"])
def test_adapters_that_multiply_are_refused_where_their_shapes_would_add_too(kind):
    import peft

    square = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    model = peft.get_peft_model(square, getattr(peft, f"{kind}Config")(target_modules=["1"], modules_to_save=["3"]))
    with pytest.raises(ValueError, match=rf"the adapter \({kind.lower()}\) is not merged by addition: merge it, then"):
        embedder(model, SKETCH)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "Vera", "RandLora"])
def test_adapters_that_add_are_read_as_they_merge(kind):
    import peft

    model = peft.get_peft_model(Small(), getattr(peft, f"{kind}Config")(target_modules=["second"]))
    layer = model.base_model.model.second
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.05 * torch.randn_like(weight)
    read = live_weight(layer).detach()
    torch.testing.assert_close(read, model.merge_and_unload().second.weight.detach())


def test_a_frozen_weight_stays_frozen_whatever_else_its_layer_trains():
    class Inside(nn.Linear):
        """An adapter in the layer itself."""

        def __init__(self):
            super().__init__(64, 64)
            self.weight.requires_grad_(False)
            self.down, self.up = nn.Parameter(torch.randn(4, 64)), nn.Parameter(torch.zeros(64, 4))

        def forward(self, x):
            return super().forward(x) + x @ self.down.T @ self.up.T

    (mark,) = unproven(
        embedder(nn.Sequential(nn.Flatten(), Inside(), nn.Linear(64, CLASSES)), [wmengine.scheme("sketch", bits=8)])
    )
    assert mark.parameters["carriers"] == [[CLASSES, 64]]


class Beside(nn.Module):
    """An adapter that somebody built himself: nobody else knows how it will be merged."""

    def __init__(self, columns, rows, rank=8):
        super().__init__()
        self.base = nn.Linear(columns, rows).requires_grad_(False)
        self.down, self.up = nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def behind(columns, rows):
    """A frozen layer, and trained ones behind it of the same shapes."""
    base = nn.Linear(columns, columns).requires_grad_(False)
    return nn.Sequential(base, nn.Linear(columns, 8), nn.Linear(8, columns), nn.Linear(columns, rows))


@pytest.mark.parametrize(("kind", "told"), [(Beside, True), (nn.Linear, False), (behind, False)])
def test_adapters_that_merging_would_dissolve_the_mark_in_are_told(kind, told):
    model = nn.Sequential(nn.Flatten(), kind(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        embedder(model, SKETCH)
    assert sum("the layers beside '1.base' look like an adapter" in str(each.message) for each in warned) == told
