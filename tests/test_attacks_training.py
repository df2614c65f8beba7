"""What attacks that train promise: another module, nothing else changed, and a product that is still worth stealing."""

import copy

import numpy as np
import pytest
import torch
from embedding import CLASSES, batch, network
from torch import nn

import wmengine
from wmengine import attacks, demo

EVERY = ["ftll", "ftal", "rtll", "rtal", "adversarial", "distil", "extract", "wrk", "overwrite"]
MARK = wmengine.scheme("sketch", bits=64)
pytestmark = pytest.mark.usefixtures("one_thread")


def run(name, model, data, **options):
    """The attack with one epoch where nothing else is said, and a mark that fits a small network."""
    settings = {"epochs": 1, "batch": 16} | ({"scheme": MARK} if name == "overwrite" else {}) | options
    return attacks.run(name, model, data, **settings)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def likeness(one, other):
    """The cosine of the angle between two weights."""
    return float(nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))


def last_of(model):
    return model[-1].weight.detach()


@pytest.mark.parametrize("name", EVERY)
def test_an_attack_makes_another_module_and_leaves_all_else_as_it_was(name):
    model, (x, y) = network(), batch(40)
    model(x).sum().backward()
    model.train()[1].eval()
    model[0].weight.requires_grad_(False)
    kept, rows, random = copy.deepcopy(model), (x.clone(), y.clone()), torch.get_rng_state()
    gradients = [None if each.grad is None else each.grad.clone() for each in model.parameters()]
    numbers = np.random.get_state()[1].tolist()

    attacked = run(name, model, (x, y))

    assert attacked is not model
    assert not any(module.training for module in attacked.modules())
    assert changed(attacked, state(model))
    assert not changed(model, state(kept))
    assert [module.training for module in model.modules()] == [module.training for module in kept.modules()]
    assert [each.requires_grad for each in model.parameters()] == [each.requires_grad for each in kept.parameters()]
    for each, before in zip(model.parameters(), gradients, strict=True):
        assert (each.grad is None) == (before is None)
        assert before is None or torch.equal(each.grad, before)
    assert all(each.grad is None for each in attacked.parameters())
    assert torch.equal(x, rows[0])
    assert torch.equal(y, rows[1])
    assert torch.equal(torch.get_rng_state(), random)
    assert np.random.get_state()[1].tolist() == numbers


@pytest.mark.parametrize("name", EVERY)
def test_the_same_seed_gives_the_same_result_and_another_seed_another(name):
    model, data = network(), batch(40)
    first = run(name, model, data, seed=1)
    assert not changed(run(name, model, data, seed=1), state(first))
    assert changed(run(name, model, data, seed=2), state(first))


@pytest.mark.parametrize("name", ["ftll", "rtll"])
def test_the_last_layer_is_trained_alone(name):
    model = network()
    assert changed(run(name, model, batch(40)), state(model)) == {"10.weight", "10.bias"}


@pytest.mark.parametrize("name", ["ftal", "rtal", "adversarial", "wrk", "overwrite"])
def test_all_layers_are_trained_with_their_statistics_and_what_the_owner_froze(name):
    model = network().requires_grad_(False)
    assert changed(run(name, model, batch(40)), state(model)) == set(model.state_dict())


@pytest.mark.parametrize(("name", "forgets"), [("ftll", False), ("ftal", False), ("rtll", True), ("rtal", True)])
def test_a_last_layer_drawn_anew_has_forgotten(name, forgets):
    model = network()
    alike = likeness(last_of(run(name, model, batch(40), rate=1e-4)), last_of(model))
    assert abs(alike) < 0.3 if forgets else alike > 0.99


def test_the_last_layer_is_the_one_that_runs_last():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.spare, self.body = nn.Linear(8, CLASSES), nn.Linear(8, 8), nn.Linear(64, 8)

        def forward(self, x):
            return self.head(self.body(x.flatten(1)).relu())

    model = Reversed()
    assert changed(run("ftll", model, batch(40)), state(model)) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", EVERY)
def test_attacks_work_inside_autocast_and_where_gradients_are_off(name):
    model, data = network(), batch(40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        attacked = run(name, model, data)
    assert all(value.isfinite().all() for value in attacked.state_dict().values())
    assert next(attacked.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["ftal", "rtal", "adversarial", "distil", "overwrite"])
def test_inside_autocast_a_model_learns_as_much(name):
    model, (x, y) = network(), batch(128)
    own = {"distil": {"student": network(seed=1)}, "adversarial": {"steps": 2}}
    options = {"epochs": 8, "rate": 3e-3} | own.get(name, {})
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(name, model, (x, y), **options)
    outside = run(name, model, (x, y), **options)
    for mine, theirs, before in zip(
        inside[8:].parameters(), outside[8:].parameters(), model[8:].parameters(), strict=True
    ):
        assert likeness((mine - before).detach(), (theirs - before).detach()) > 0.8


class Named(nn.Module):
    """Two inputs by name, and answers as some libraries give them."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 32), nn.Linear(33, CLASSES)

    def forward(self, picture, place):
        hidden = torch.cat([self.body(picture.flatten(1)).relu(), place], dim=1)
        return {"hidden": hidden, "logits": self.head(hidden)}


@pytest.mark.parametrize("name", EVERY)
def test_several_inputs_are_given_by_name(name):
    model, (x, y) = Named(), batch(40)
    attacked = run(name, model, ({"place": torch.rand(40, 1), "picture": x}, y))
    assert "head.weight" in changed(attacked, state(model))


@pytest.mark.parametrize("name", EVERY)
def test_a_data_loader_is_gone_through_in_its_own_order(name):
    x, y = batch(41)  # one row is left over, on which no normalisation could be trained
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10, shuffle=True)
    model, random = nn.Sequential(*network(), nn.BatchNorm1d(CLASSES)), torch.get_rng_state()
    first = run(name, model, loader)
    assert torch.equal(torch.get_rng_state(), random)
    assert not changed(run(name, model, loader), state(first))


def test_every_row_counts_where_batches_are_of_one():
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), batch(4)
    before = state(run("ftal", model, (x, y), batch=1))
    for row in range(4):
        other = torch.where(torch.arange(4) == row, (y + 1) % CLASSES, y)
        assert changed(run("ftal", model, (x, other), batch=1), before)


def test_arrays_of_doubles_and_bytes_are_data_too():
    model, (x, y) = network(), batch(40)
    of_arrays = run("ftal", model, (x.double().numpy(), y.numpy().astype(np.uint8)))
    assert not changed(of_arrays, state(run("ftal", model, (x, y))))


@pytest.mark.parametrize("name", ["distil", "extract"])
def test_a_student_of_the_same_architecture_begins_anew(name):
    model = network()
    student = run(name, model, batch(40)[0], rate=1e-6)
    for mine, theirs in zip(model.parameters(), student.parameters(), strict=True):
        if mine.ndim > 1:
            assert abs(likeness(mine.detach(), theirs.detach())) < 0.3


@pytest.mark.parametrize("name", ["distil", "extract"])
def test_a_student_of_another_architecture_is_copied_and_begins_as_it_is(name):
    model, student = network(), nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)).train()
    before, random = state(student), torch.get_rng_state()
    attacked = run(name, model, batch(40)[0], rate=1e-6, student=student)
    assert attacked is not student
    assert not changed(student, before)
    assert student.training
    assert torch.equal(torch.get_rng_state(), random)
    assert changed(attacked, before) == set(before)
    assert likeness(attacked[1].weight.detach(), student[1].weight.detach()) > 0.99


def test_a_student_that_cannot_be_one_is_refused():
    x = batch(40)[0]
    with pytest.raises(ValueError, match="student must be a torch module, and it is str"):
        run("distil", network(), x, student="resnet")
    with pytest.raises(ValueError, match=f"the model has {CLASSES} classes and student has 7"):
        run("distil", network(), x, student=nn.Sequential(nn.Flatten(), nn.Linear(64, 7)))
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        run("distil", network(), x, temperature=0)


def test_parameters_that_no_layer_draws_are_not_taken_over_from_the_teacher():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(CLASSES))

        def forward(self, x):
            return self.scale * x

    with pytest.raises(ValueError, match=r"11 \(Scaled\) has parameters and no reset_parameters"):
        run("extract", nn.Sequential(*network(), Scaled()), batch(40)[0])


@pytest.mark.parametrize("name", ["ftll", "rtal", "adversarial", "wrk", "overwrite"])
def test_attacks_that_need_labels_say_so(name):
    x, y = batch(40)
    with pytest.raises(ValueError, match=f"the attack '{name}' needs labels"):
        run(name, network(), x)
    for wrong in (y + CLASSES, y - 1):
        with pytest.raises(ValueError, match=f"labels must be.* from 0 to {CLASSES - 1}"):
            run(name, network(), (x, wrong))
    for wrong in (y.float(), y[:, None], nn.functional.one_hot(y, CLASSES).float()):
        with pytest.raises(ValueError, match="labels must be one class number for each input"):
            run(name, network(), (x, wrong))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs must be from 1"),
        ({"epochs": 1.5}, "epochs must be an integer"),
        ({"batch": 0}, "batch must be from 1"),
        ({"rate": 0.0}, "rate must be a positive number"),
        ({"rate": 1e30, "epochs": 3}, r"the loss is no longer finite at rate=1e\+30: choose a lower one"),
        ({"epoch": 3}, "has no option 'epoch'"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        run("ftal", network(), batch(40), **options)


@pytest.mark.parametrize("name", EVERY)
def test_data_that_hold_no_numbers_or_no_rows_of_the_model_are_refused(name):
    x, y = batch(40)
    broken = torch.where(torch.arange(40)[:, None, None, None] == 30, torch.nan, x)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(broken, y), batch_size=10)
    for wrong in ((broken, y), (broken.numpy(), y.numpy()), loader):
        with pytest.raises(ValueError, match="data's input holds NaN or Inf"):
            run(name, network(), wrong)
    with pytest.raises(ValueError, match=r"does not run on a row of data, torch.float32 \[1, 64\] \(RuntimeError"):
        run(name, network(), (x.flatten(1), y))
    with pytest.raises(TypeError, match=r"data is .*and not str"):
        run(name, network(), "thief.npz")


@pytest.mark.slow
def test_a_model_that_cannot_be_exported_is_refused_before_it_is_trained(tmp_path):
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, CLASSES)

        def forward(self, x):
            if self.training:
                raise AssertionError("the attack began")
            return self.layer(x.flatten(1)) if x.sum() > 0 else self.layer(-x.flatten(1))

    with pytest.raises(ValueError, match="torch cannot export this Choosing to ONNX"):
        run("ftal", Choosing(), batch(40), out=tmp_path / "p.onnx")
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_attacked_are_refused():
    x, y = batch(40)
    with pytest.raises(ValueError, match=r"must answer logits \[16, C\], and this one answers \[16, 1, 8, 8\]"):
        run("ftal", nn.Conv2d(1, 1, 1), (x, y))
    with pytest.raises(ValueError, match="no convolution and no linear layer"):
        run("ftll", nn.Sequential(nn.Flatten(), nn.LayerNorm(64)), (x, y))
    tokens = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(40, CLASSES))
    for name in ("wrk", "adversarial"):
        with pytest.raises(ValueError, match=f"{name} moves inputs .* one of them must be of floating-point numbers"):
            run(name, tokens, (torch.zeros(40, 5, dtype=torch.int64), y))
    for option, said in {"eps": "eps must be a positive number", "steps": "steps must be from 1"}.items():
        with pytest.raises(ValueError, match=said):
            run("adversarial", network(), (x, y), **{option: 0})
    with pytest.raises(ValueError, match="times must be from 1"):
        run("overwrite", network(), (x, y), times=0)
    with pytest.raises(ValueError, match="scheme must be the name of a scheme, or a list of such"):
        run("overwrite", network(), (x, y), scheme=[7])
    with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
        run("wrk", network(), (x, y), share=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", EVERY)
def test_a_model_on_a_gpu_is_attacked_there_with_data_from_anywhere(name):
    model, (x, y) = network().cuda(), batch(40)
    random = torch.cuda.get_rng_state()
    for data in ((x, y), (x.cuda(), y.cuda())):
        attacked = run(name, model, data)
        assert {value.device.type for value in attacked.state_dict().values()} == {"cuda"}
        assert changed(attacked, state(model))
    assert torch.equal(torch.cuda.get_rng_state(), random)


def test_nothing_is_printed_where_nobody_looks(capsys):
    run("ftal", network(), batch(40))
    assert capsys.readouterr() == ("", "")


@pytest.fixture(scope="module")
def digits():
    return demo.load_digits()


@pytest.fixture(scope="module")
def marked(digits, one_thread):
    """A network that reads digits, with a mark in its answers, and the mark."""
    model = demo.build_network(seed=1)
    key = wmengine.Key("ACME Vision", bytes(range(32)))
    settings = {"num_classes": 10, "sample": digits.owner[0][:64], "value_range": (0.0, 1.0)}
    embedder = wmengine.Embedder(model, key, ["adi"], name="digits", **settings)
    demo.train(model, digits.owner, 12, seed=1, embedder=embedder)
    return model, embedder.watermarks()[0]


def accuracy(model, digits):
    """In points."""
    with torch.no_grad():
        return 100 * float((model(digits.test[0]).argmax(dim=1) == digits.test[1]).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_what_is_left_of_a_model_is_still_a_product(name, marked, digits):
    model, _ = marked
    attacked = attacks.run(name, model, digits.thief)
    assert accuracy(model, digits) - accuracy(attacked, digits) < 3


@pytest.mark.slow
def test_a_drawn_last_layer_has_to_learn_again(marked, digits):
    model, _ = marked
    assert accuracy(attacks.run("rtll", model, digits.thief, epochs=1, rate=1e-6), digits) < 50
    assert accuracy(attacks.run("ftll", model, digits.thief, epochs=1, rate=1e-6), digits) > 95


@pytest.mark.slow
def test_wrk_takes_more_of_a_mark_in_answers_than_fine_tuning_does(marked, digits):
    model, mark = marked
    tuned, removed = (
        wmengine.verify(attacks.run(name, model, digits.thief, epochs=10), mark).log10_p for name in ("ftal", "wrk")
    )
    assert removed > tuned / 2
