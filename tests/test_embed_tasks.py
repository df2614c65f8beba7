"""What a task keeps beside marks: class weights, smoothing, soft labels of mixup and cutmix, a loss of its own."""

import warnings

import pytest
import torch
from embedding import CLASSES, batch, embedder, network
from torch.nn import functional

import wmengine

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.5])
ADI = [wmengine.scheme("adi", count=40)]


def mixup(x, y, seed=0):
    """Each row with a part of another one, labels likewise (Zhang et al. 2018)."""
    generator = torch.Generator().manual_seed(seed)
    part, other = torch.rand((), generator=generator), torch.randperm(len(y), generator=generator)
    soft = functional.one_hot(y, CLASSES).float()
    return part * x + (1 - part) * x[other], part * soft + (1 - part) * soft[other]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("soft", [False, True])
def test_without_triggers_the_loss_is_torchs_cross_entropy(soft, weight, smoothing, dtype):
    """In value and in gradient, ignored rows of hard labels included."""
    emb = embedder(network(), ADI)
    x, y = batch(32)
    if soft:
        _, y = mixup(x, y)
    else:
        y[:5] = -100
    emb.mix(x, y)
    logits = (3 * torch.randn(32, CLASSES, generator=torch.Generator().manual_seed(1))).to(dtype).requires_grad_()
    found = emb.loss(logits, y, weight=weight, label_smoothing=smoothing)
    wide = logits.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    target, weight = y.to(wide) if soft else y, None if weight is None else weight.to(wide)
    expected = functional.cross_entropy(wide, target, weight, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.backward()
    expected.backward()
    near = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(logits.grad, wide.grad.to(dtype), rtol=1e-4, atol=near)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_the_tasks_and_a_trigger_weighs_one(smoothing):
    emb = embedder(network(), ADI)
    _, y = emb.mix(*batch(32))
    logits = torch.randn(len(y), CLASSES)
    labels, task = emb.split(y)
    each = [
        functional.cross_entropy(logits[rows], labels[rows], of, reduction="sum", label_smoothing=smoothing)
        for rows, of in ((task, WEIGHT), (~task, None))
    ]
    expected = sum(each) / (WEIGHT[labels[task]].sum() + (~task).sum())
    torch.testing.assert_close(emb.loss(logits, y, weight=WEIGHT, label_smoothing=smoothing), expected)


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(4, 1), [1.0] * 4])
def test_other_class_weights_are_refused(weight):
    emb = embedder(network(), ADI)
    x, y = emb.mix(*batch(8))
    with pytest.raises(ValueError, match=r"weight must be a tensor \[4\]"):
        emb.loss(torch.zeros(len(x), CLASSES), y, weight=weight)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, "much"])
@pytest.mark.parametrize("soft", [False, True])
def test_other_smoothing_is_refused(soft, smoothing):
    labels = torch.full((8, CLASSES), 1 / CLASSES) if soft else torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="label_smoothing must be a number from 0 to 1, and it is"):
        embedder(network(), ADI).loss(torch.zeros(8, CLASSES), labels, label_smoothing=smoothing)


def test_labels_of_several_classes_at_once_are_no_soft_labels():
    emb = embedder(network(), ADI)
    x, _ = batch(8)
    several = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).repeat(8, 1)
    for refused in (lambda: emb.mix(x, several), lambda: emb.loss(torch.zeros(8, CLASSES), several)):
        with pytest.raises(ValueError, match="must be shares of the classes that add up to 1"):
            refused()


@pytest.mark.parametrize(("name", "options"), [("adi_multilabel", {}), ("adi_anchors", {"choices": 4})])
def test_a_task_without_classes_has_a_loss_of_its_own(name, options):
    emb = embedder(network(), [wmengine.scheme(name, **options)])
    for refused in (
        lambda: emb.loss(torch.zeros(8, CLASSES), torch.full((8, CLASSES), 0.25)),
        lambda: emb.fit([batch(8)], epochs=1),
    ):
        with pytest.raises(ValueError, match=rf"{name}' is of a task without classes: add regulariser\(\)"):
            refused()


def test_soft_labels_and_numbers_that_say_the_same_are_the_same():
    """Triggers, their order, the loss, what counts as learned."""
    hard, soft = embedder(network()), embedder(network())
    for step in range(6):
        x, y = batch(64, seed=step)
        ours, numbers = hard.mix(x, y)
        theirs, shares = soft.mix(x, functional.one_hot(y, CLASSES).float())
        assert torch.equal(ours, theirs)
        assert all(map(torch.equal, hard.split(numbers)[1:], soft.split(shares)[1:]))
        assert torch.equal(hard.split(numbers)[0], soft.split(shares)[0].argmax(1))
        logits = 9.0 * functional.one_hot(hard.split(numbers)[0], CLASSES).float()
        torch.testing.assert_close(hard.loss(logits, numbers), soft.loss(logits, shares))
    assert hard.metrics == soft.metrics
    assert hard.metrics["adi"]["matched"] == 40


def test_labels_are_split_into_the_tasks_and_whose_rows_they_are():
    emb = embedder(network(), ADI)
    x, y = batch(32)
    y[3] = -100
    _, mixed = emb.mix(x, y)
    labels, task = emb.split(mixed)
    assert torch.equal(labels[:32], y)
    assert bool(task[:32].all())
    assert not bool(task[32:].any())
    assert bool(((labels[32:] >= 0) & (labels[32:] < CLASSES)).all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixup", "weights", "own loss"])
def test_a_model_trained_so_is_owned_by_both_marks_and_knows_its_task(kind):
    model = network()
    emb = embedder(model)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(110):
        x, y = batch(64, seed=step)
        x, y = emb.mix(*(mixup(x, y, step) if kind == "mixup" else (x, y)))
        logits = model(x)
        if kind == "own loss":
            labels, task = emb.split(y)
            focal = functional.multi_margin_loss(logits[task], labels[task])
            loss = focal + emb.loss(logits[~task], y[~task])
        else:
            loss = emb.loss(logits, y, weight=WEIGHT if kind == "weights" else None, label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emb.watermarks()
    x, y = batch(200, seed=5)
    with torch.no_grad():
        assert (model.eval()(x).argmax(1) == y).float().mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, True])
def test_such_a_loss_compiles_into_one_graph(soft):
    emb = embedder(network())
    x, y = batch(32)
    _, y = emb.mix(*(mixup(x, y) if soft else (x, y)))
    logits = torch.randn(len(y), CLASSES)
    step = torch.compile(emb.loss, fullgraph=True, backend="eager")
    found = step(logits, y, weight=WEIGHT, label_smoothing=0.1)
    torch.testing.assert_close(found, emb.loss(logits, y, weight=WEIGHT, label_smoothing=0.1))


def test_rows_that_are_ignored_may_hold_anything():
    emb = embedder(network(), ADI)
    x, y = batch(8)
    emb.mix(x, y)
    y[0] = -100
    logits = torch.randn(8, CLASSES)
    logits[0] = torch.nan
    logits.requires_grad_()
    loss = emb.loss(logits, y, weight=WEIGHT, label_smoothing=0.1)
    loss.backward()
    expected = functional.cross_entropy(logits[1:], y[1:], WEIGHT, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    assert torch.isfinite(logits.grad).all()


def test_of_no_rows_the_loss_is_the_regulariser():
    """As a loss of one's own asks for, where no mark has rows."""
    emb = embedder(network(), [wmengine.scheme("sketch", bits=64)])
    labels, task = emb.split(emb.mix(*batch(8))[1])
    logits = torch.zeros(8, CLASSES)
    assert bool(task.all())
    torch.testing.assert_close(emb.loss(logits[~task], labels[~task]), emb.regulariser())


def test_a_loss_without_mix_is_told():
    emb = embedder(network(), ADI)
    with pytest.warns(UserWarning, match="loss was called before any mix"):
        emb.loss(torch.zeros(8, CLASSES), torch.zeros(8, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once, and never where no mix is needed
        emb.loss(torch.zeros(8, CLASSES), torch.zeros(8, dtype=torch.int64))
        white = embedder(network(), [wmengine.scheme("sketch", bits=64)])
        white.loss(torch.zeros(8, CLASSES), torch.zeros(8, dtype=torch.int64))
