"""Passports (deepipr_v1 to _v3, passport_norm): what their signs are, what survives, and what is refused."""

import copy

import numpy as np
import onnx
import pytest
import torch
from embedding import CLASSES, KEY, batch, embedder, network, train, unproven
from torch import nn

import wmengine
from wmengine.demo import build_network, load_digits
from wmengine.demo import train as train_digits
from wmengine.parts.sources.passports import marked_channels, passports_of, read
from wmengine.parts.training.passport_course import affine, through_passports
from wmengine.suspects.base import Tensor
from wmengine.suspects.module import ModuleSuspect
from wmengine.suspects.weights import module_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

PRIVATE = ("deepipr_v2", "deepipr_v3", "passport_norm")
CHANNELS = 48  # of the tests' network, whose two convolutions have 16 and 32


def made(name, seed=0, also=(), **options):
    """A network that fits a scheme, and its Embedder."""
    model = network(seed)
    if name == "deepipr_v1":
        model = wmengine.passport(model, batch(2)[0])
    return model, embedder(model, [wmengine.scheme(name, **options), *also])


def mark_of(emb):
    return unproven(emb)[0]


def reading(model, mark):
    """y [T] as it is read of a module."""
    return mark.preset.source.observe(mark, ModuleSuspect(model), mark.total).found[0].y


@pytest.fixture(scope="module", params=["deepipr_v1", *PRIVATE])
def marked(request):
    model, emb = made(request.param, seed=3)
    train(model, emb, 80)
    return request.param, model.eval(), emb.watermarks()[0]


# --- what is read ---


def test_a_mark_has_a_bit_for_every_channel_at_most_256_and_spreads_fewer_evenly():
    assert mark_of(made("deepipr_v2")[1]).total == CHANNELS
    assert mark_of(made("deepipr_v2", bits=20)[1]).total == 20
    assert marked_channels(4, 12).tolist() == [0, 3, 6, 9]
    assert marked_channels(256, 4800)[-1] == 4781
    assert marked_channels(48, 48).tolist() == list(range(48))


def test_a_scale_is_the_average_of_a_convolution_of_the_weight_with_a_passport():
    """The passport function itself, with a picture as the passport and its average patch as what ours draws."""
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    pictures = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    patches = nn.functional.unfold(pictures, 3, padding=1).mean(2)
    theirs = nn.functional.conv2d(pictures, weight, padding=1).mean((2, 3))
    for ours, expected in zip(affine(weight, patches), theirs, strict=True):
        torch.testing.assert_close(ours, expected)


def test_what_is_read_is_what_is_trained_but_for_the_size_of_filters():
    torch.manual_seed(0)
    weight, patches = torch.randn(6, 3, 3, 3, dtype=torch.float64), torch.randn(2, 27, dtype=torch.float64)
    scale, _ = affine(weight, patches)
    expected = (scale / weight.flatten(1).norm(dim=1)).numpy()
    np.testing.assert_allclose(read(Tensor(weight.numpy(), "w"), patches[0].numpy()), expected, rtol=1e-12)
    factors = np.array([1.0, -1.0, 0.01, -7.0, 0.0, 3.0])
    found = read(Tensor(weight.numpy(), "w", factors), patches[0].numpy())
    np.testing.assert_allclose(found, expected * np.sign(factors), rtol=1e-12)


def test_training_sees_the_signs_that_are_read_whatever_the_signs_of_scales():
    model, emb = made("deepipr_v2", seed=1)
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight)
    emb.mix(*batch(8))
    emb.regulariser()
    assert emb.metrics["deepipr_v2"]["matched"] == wmengine.verify(model, mark_of(emb)).matched


def test_passports_are_standard_normal_and_another_for_each_weight_and_use():
    patches = passports_of(mark_of(made("deepipr_v2")[1]))
    assert [each.shape for each in patches] == [(2, 9), (2, 144)]
    assert abs(patches[1].mean()) < 0.3
    assert 0.8 < patches[1].std() < 1.2
    assert len({row.tobytes() for row in [*patches[0], *patches[1][:, :9]]}) == 4


@pytest.mark.slow
def test_neither_scaling_nor_flipping_nor_folding_changes_what_is_read(marked, tmp_path):
    name, model, mark = marked
    before = reading(model, mark)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight[3] *= 7.0
        if name in PRIVATE:
            other[3].weight[5] *= -1.0
            other[4].weight[5] *= -1.0
            other[4].running_mean[5] *= -1.0
    np.testing.assert_allclose(reading(other, mark), before, rtol=1e-5)
    for fold in (False, True):
        path = wmengine.export_onnx(model, batch(1)[0], tmp_path / f"{fold}.onnx", fold_batchnorm=fold)
        assert ("BatchNormalization" in {node.op_type for node in onnx.load(path).graph.node}) != fold
        verdict = wmengine.verify(path, mark, key=KEY)
        assert (verdict.decision, verdict.matched) == ("owned", wmengine.verify(model, mark).matched)
        assert verdict.matched >= CHANNELS - 2
        tensors = wmengine.suspects.open_suspect(path).tensors()
        y = np.concatenate([read(tensors[place], patch[0]) for place, patch in enumerate(passports_of(mark))])
        np.testing.assert_allclose(y, before, rtol=1e-4, atol=1e-5)


def test_a_stranger_and_another_key_show_nothing(marked):
    name, model, mark = marked
    other = wmengine.Watermark.create(wmengine.Key("thief", bytes(32)), mark.preset, mark.parameters)
    assert wmengine.verify(model, other).decision == "not_proven"
    assert wmengine.verify(made(name, seed=9)[0], mark).decision == "not_proven"


def test_a_scale_folded_into_its_filters_takes_the_signs_of_shipped_passports():
    """F = γ·W, so <F, p> = γ² > 0: what the docstring says of deepipr_v1, and of no other."""
    model, emb = made("deepipr_v1", seed=3)
    patch = passports_of(mark_of(emb))[0]
    filters = model[0].weight.detach().numpy()
    scale = np.einsum("oikl,ikl->o", filters, patch[0].reshape(1, 3, 3))
    assert (scale < 0).any()
    assert (read(Tensor(filters * scale[:, None, None, None], "folded"), patch[0]) > 0).all()


def test_weights_that_are_no_numbers_are_misses_and_no_error():
    model, emb = made("deepipr_v2")
    with torch.no_grad():
        model[0].weight[:4] = float("nan")
        model[0].weight[4:8] = float("inf")
        model[0].weight[8:12] = 0.0
    verdict = wmengine.verify(model, mark_of(emb))
    assert (verdict.decision, verdict.error) == ("not_proven", None)


# --- what is trained ---


@pytest.mark.parametrize("name", ["deepipr_v1", *PRIVATE])
def test_the_loss_is_of_the_weights_as_they_are_now(name):
    model, emb = made(name)
    signs = 2.0 * mark_of(emb).symbols - 1.0
    emb.mix(*batch(16))
    with torch.no_grad():  # without gradients there is no branch to train: the sign loss alone
        for factor in (1.0, -5.0):
            model[0].weight *= factor
            model[3].weight *= factor
            emb.regulariser()
            gamma = np.concatenate(
                [
                    model[place].weight.flatten(1).numpy() @ patch[0]
                    for place, patch in zip((0, 3), passports_of(mark_of(emb)), strict=True)
                ]
            )
            expected = 0.1 * np.maximum(0.0, 0.1 - signs * gamma).sum()
            assert emb.regulariser().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_branch_trains_the_shared_weights_and_leaves_the_plain_network_as_it_is(name):
    model, emb = made(name)
    keys = list(model.state_dict())
    buffers = {each: value.clone() for each, value in model.named_buffers()}
    model.train()
    emb.mix(*batch(16))
    emb.regulariser().backward()
    assert all(torch.equal(value, buffers[each]) for each, value in model.named_buffers())
    assert all(module.training for module in model.modules())
    assert list(model.state_dict()) == keys == list(network().state_dict())
    assert model[8].weight.grad.abs().sum() > 0
    assert model[1].weight.grad is None  # its own scale and shift have no part in the branch


def test_a_branch_has_the_cross_entropy_of_the_network_with_other_scales():
    model, emb = made("deepipr_v2")
    model.eval()
    x, y = batch(16)
    emb.mix(x, y)
    other = copy.deepcopy(model)
    with torch.no_grad():
        signs = emb.regulariser()
        for place, (scale, shift) in zip((0, 3), passports_of(mark_of(emb)), strict=True):
            rows = other[place].weight.flatten(1)
            other[place + 1].weight.copy_(rows @ torch.from_numpy(scale))
            other[place + 1].bias.copy_(rows @ torch.from_numpy(shift))
        expected = signs + nn.functional.cross_entropy(other(x), y)
    assert emb.regulariser().item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("name", "learns"), [("deepipr_v2", False), ("deepipr_v3", True)])
def test_triggers_beside_it_go_through_the_branch_of_v3_and_not_of_v2(name, learns):
    losses = []
    for also in ((), (wmengine.scheme("adi", count=40),)):
        model, emb = made(name, also=also)
        model.eval()
        x, y = emb.mix(*batch(16))
        assert len(x) == len(y) == (18 if also else 16)
        losses.append(emb.regulariser().item())
    assert (losses[0] != pytest.approx(losses[1], rel=1e-6)) == learns


def test_several_inputs_by_name_go_through_the_branch_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES))

        def forward(self, left, right):
            return self.layers(left - 2 * right)

    sample = {"right": torch.randn(16, 8), "left": torch.randn(16, 8)}
    emb = embedder(Two(), ["passport_norm"], sample=sample)
    assert mark_of(emb).total == 32
    emb.mix(sample, torch.randint(0, CLASSES, (16,)))
    assert torch.isfinite(emb.regulariser())


def test_a_network_on_passports_computes_its_scales_and_keeps_the_passports():
    model, emb = made("deepipr_v1")
    for norm, patch in zip((model[1], model[4]), passports_of(mark_of(emb)), strict=True):
        assert np.array_equal(norm.passports.numpy(), patch)
    assert {name for name in model.state_dict() if name.startswith("1.")} == {
        *("1.passports", "1.norm.running_mean", "1.norm.running_var", "1.norm.num_batches_tracked")
    }
    twin = copy.deepcopy(model.eval())
    x = batch(4)[0]
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        twin[0].weight.neg_()
        assert not torch.allclose(twin(x), model(x))  # a copy's scales are of its own weights
        again = wmengine.passport(network(seed=5), x).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), model(x))


# --- what is refused ---


def test_a_network_that_is_not_prepared_is_said_to_be_so():
    with pytest.raises(ValueError, match=r"'deepipr_v1' needs a network that runs on passports .* wmengine.passport\("):
        embedder(network(), ["deepipr_v1"])
    some = wmengine.passport(network(), batch(2)[0], marked=[1])
    with pytest.raises(ValueError, match="at the weights it marks, and nowhere else"):
        embedder(some, [wmengine.scheme("deepipr_v1", marked=(0,), bits=16)])
    embedder(some, [wmengine.scheme("deepipr_v1", marked=(1,), bits=32)])
    with pytest.raises(
        ValueError, match=r"'deepipr_v2' gives the normalisation '1\.norm' another scale, and it has none"
    ):
        embedder(wmengine.passport(network(), batch(2)[0]), ["deepipr_v2"])


def test_passports_go_where_a_scale_is_and_only_once():
    with pytest.raises(
        ValueError, match=r"passports are for trained weights .* here these are \[\], and marked is 'all'"
    ):
        wmengine.passport(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), batch(2)[0])
    with pytest.raises(ValueError, match=r"here these are \[0, 1\], and marked is \[2\]"):
        wmengine.passport(network(), batch(2)[0], marked=[2])
    with pytest.raises(ValueError, match="has no scale that passports could give, or has them already"):
        wmengine.passport(wmengine.passport(network(), batch(2)[0]), batch(2)[0])
    frozen = network()
    frozen[0].weight.requires_grad_(False)
    assert mark_of(embedder(frozen, ["deepipr_v2"])).parameters["carrier_indices"] == [1]


def test_a_branch_needs_the_batches():
    _, emb = made("deepipr_v2")
    with pytest.raises(ValueError, match="call mix before loss"):
        emb.regulariser()


def test_only_a_mark_with_passports_has_an_accuracy_with_them():
    model, emb = made("sketch", bits=64)
    with pytest.raises(ValueError, match="a mark of the scheme 'sketch' has no passports"):
        wmengine.passport_accuracy(model, mark_of(emb), *batch(8))
    _, emb = made("deepipr_v2")
    with pytest.raises(ValueError, match="is of a model with other weights"):
        wmengine.passport_accuracy(network(channels=2), mark_of(emb), *batch(8, channels=2))


# --- what they are worth ---


def test_passports_that_fit_can_be_solved_for_so_accuracy_proves_nothing():
    """From a plain network alone: W·p = γ and W·p' = β, of 32 filters and 144 unknowns each."""
    model, x = network(seed=2).eval(), batch(32)[0]
    nn.init.normal_(model[4].weight)
    nn.init.normal_(model[4].bias)
    wanted = torch.stack([model[4].weight, model[4].bias], dim=1)
    solved = torch.linalg.lstsq(model[3].weight.flatten(1), wanted).solution.T
    carrier = module_tensors(model, {"input": x[:1]})[1]
    with torch.no_grad():
        torch.testing.assert_close(
            through_passports(model, [carrier], [solved], {"input": x}), model(x), rtol=1e-3, atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepipr_v1", "deepipr_v2", "passport_norm"])
def test_on_digits_a_forged_passport_ruins_what_the_true_one_gives(name, tmp_path):
    data = load_digits()
    model = build_network(seed=1)
    if name == "deepipr_v1":
        model = wmengine.passport(model, data.owner[0][:2])
    emb = wmengine.Embedder(
        model, KEY, [name], num_classes=10, sample=data.owner[0][:64], name="digits", value_range=(0.0, 1.0)
    )
    train_digits(model, data.owner, 6, seed=1, embedder=emb)
    (mark,) = emb.watermarks()
    before = copy.deepcopy(model.state_dict())
    forged = [
        wmengine.Watermark.create(wmengine.Key("thief", bytes([n]) * 32), mark.preset, mark.parameters)
        for n in range(3)
    ]
    true = wmengine.passport_accuracy(model, mark, *data.test)
    assert true > 0.9
    assert max(wmengine.passport_accuracy(model, each, *data.test) for each in forged) < 0.4
    assert all(torch.equal(value, before[each]) for each, value in model.state_dict().items())
    verdict = wmengine.verify(wmengine.export_onnx(model, data.owner[0][:1], tmp_path / "model.onnx"), mark, key=KEY)
    assert verdict.owned
    if name == "deepipr_v1":
        with torch.no_grad():
            deployed = float((model(data.test[0]).argmax(1) == data.test[1]).double().mean())
        assert true == deployed
