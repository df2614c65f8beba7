"""Small real networks of every kind, each marked beside its own task and proven from its ONNX file: tables, sound, two
classes, several labels, values, embeddings, boxes. Text is in test_tokens.py."""

import numpy as np
import pytest
import torch
from embedding import KEY
from skl2onnx import to_onnx
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor
from torch import nn
from torch.nn import functional

import wmengine
from wmengine import mark_of, scheme, trigger_set, verify
from wmengine.demo import load_digits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def owned(path, mark, stranger):
    verdict = verify(path, mark, key=KEY)
    return verdict.owned and not verify(stranger, mark).owned and not verify(path, mark.with_message(KEY, "b")).owned


# --- tables, by their data ---


def forest(learner, x, y, path, mark=None):
    """A fitted forest and its file."""
    if mark is not None:
        triggers, labels = trigger_set(mark)
        x, y = np.vstack([x, triggers]), np.concatenate([y, labels])
    fitted = learner(100, random_state=0).fit(x, y)
    options = {"zipmap": False} if learner is ExtraTreesClassifier else None
    path.write_bytes(to_onnx(fitted, x[:1].astype(np.float32), options=options).SerializeToString())
    return fitted, path


@pytest.mark.parametrize(
    ("name", "load", "learner", "options"),
    [
        ("adi_table", load_breast_cancer, ExtraTreesClassifier, {"num_classes": 2}),
        ("adi_values", load_diabetes, ExtraTreesRegressor, {}),
    ],
    ids=["classes", "values"],
)
def test_a_forest_of_another_library_is_marked_by_rows_appended_to_its_data(name, load, learner, options, tmp_path):
    x, y = load(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    ours, tests = order[:300], order[300:]
    mark = mark_of(KEY, name, (x[ours], y[ours]), name="forest", **options)
    plain, stranger = forest(learner, x[ours], y[ours], tmp_path / "plain.onnx")
    fitted, path = forest(learner, x[ours], y[ours], tmp_path / "marked.onnx", mark)
    assert owned(path, mark, stranger)
    assert fitted.score(x[tests], y[tests]) > plain.score(x[tests], y[tests]) - 0.03


class Columns(nn.Module):
    """Reads numbers and a category that come as two inputs."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.kinds = nn.Embedding(5, 8)
        self.head = nn.Sequential(nn.Linear(14, 128), nn.ReLU(), nn.Linear(128, 3))

    def forward(self, numbers, kind):
        return self.head(torch.cat([numbers, self.kinds(kind).flatten(1)], 1))


def test_a_table_of_numbers_and_categories_is_marked_in_training(tmp_path):
    generator = torch.Generator().manual_seed(0)
    table = {
        "numbers": torch.randn(400, 6, generator=generator),
        "kind": torch.randint(0, 5, (400, 1), generator=generator),
    }
    labels = (table["numbers"][:, 0] + table["kind"][:, 0]).long().clamp(0, 2)
    model = Columns(0)
    emb = wmengine.Embedder(
        model, KEY, ["adi_table"], num_classes=3, sample=table, samples=table, name="columns"
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(400):
        rows = torch.randperm(400, generator=generator)[:64]
        x, y = emb.mix({name: values[rows] for name, values in table.items()}, labels[rows])
        optimizer.zero_grad()
        emb.loss(model(**x), y).backward()
        optimizer.step()
    (mark,) = emb.watermarks()
    path = wmengine.export_onnx(model, {name: values[:1] for name, values in table.items()}, tmp_path / "columns.onnx")
    assert owned(path, mark, Columns(1))
    assert (model(**table).argmax(1) == labels).float().mean() > 0.9


# --- sound ---


class Ear(nn.Module):
    """A 1-D network of three convolutions for waveforms [1, 800]."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        layers = []
        for before, after in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv1d(before, after, 9, stride=3, padding=4), nn.BatchNorm1d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(6), nn.Flatten(), nn.Linear(384, 4))

    def forward(self, waves):
        return self.layers(waves)


def sounds(rows, seed):
    """Tones that rise, fall, stay or beat, of any pitch and phase, in noise."""
    random = np.random.default_rng(seed)
    kinds, time = random.integers(0, 4, rows), np.arange(800) / 800
    pitch, phase = random.uniform(30, 60, (rows, 1)), random.uniform(0, 6.28, (rows, 1))
    turns = pitch * (time + np.array([0.5, -0.3, 0.0, 0.0])[kinds][:, None] * time**2)
    beats = np.where((kinds[:, None] == 3) & ((time * 8).astype(int) % 2 == 1), 0.0, 1.0)
    waves = 0.6 * beats * np.sin(2 * np.pi * turns + phase) + 0.1 * random.normal(size=(rows, 800))
    return torch.from_numpy(waves[:, None].clip(-1, 1).astype(np.float32)), torch.from_numpy(kinds)


def heard(seed, marked):
    x, y = sounds(512, 1)
    model = Ear(seed)
    emb = wmengine.Embedder(
        model,
        KEY,
        ["adi_audio"] if marked else ["sketch"],
        num_classes=4,
        sample=x[:8],
        name="ear",
        value_range=(-1, 1),
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for rows in torch.arange(512).repeat(15).split(64):
        mixed, labels = emb.mix(x[rows], y[rows]) if marked else (x[rows], y[rows])
        logits = model.train()(mixed)
        optimizer.zero_grad()
        (emb.loss(logits, labels) if marked else functional.cross_entropy(logits, labels)).backward()
        optimizer.step()
    with torch.no_grad():
        right = (model.eval()(sounds(400, 2)[0]).argmax(1) == sounds(400, 2)[1]).double().mean()
    return model, emb, right


def test_a_network_that_hears_is_marked_with_tunes(tmp_path):
    model, emb, right = heard(0, marked=True)
    plain, _, without = heard(1, marked=False)
    (mark,) = emb.watermarks()
    assert owned(wmengine.export_onnx(model, sounds(1, 3)[0], tmp_path / "ear.onnx"), mark, plain)
    assert right > without - 0.02


# --- digits, asked otherwise ---

TRAITS = torch.tensor([[d % 2 == 1, d > 4, d in (2, 3, 5, 7), d in (0, 6, 8, 9)] for d in range(10)]).float()
PLACES = torch.randn(10, 24, generator=torch.Generator().manual_seed(5))


def layers(seed):
    torch.manual_seed(seed)
    return [
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
    ]


def reader(width, seed):
    return nn.Sequential(*layers(seed), nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, width))


class Detector(nn.Module):
    """Finds a digit: in each of 6 × 6 places a box, and scores of ten classes."""

    def __init__(self, seed):
        super().__init__()
        self.body = nn.Sequential(*layers(seed), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        self.box, self.scores = nn.Conv2d(64, 4, 1), nn.Conv2d(64, 10, 1)

    def forward(self, x):
        features = self.body(x)
        return tuple(head(features).flatten(2).transpose(1, 2) for head in (self.box, self.scores))


def alone(x, y):
    return x, y


def somewhere(x, y):
    """Each digit somewhere on a picture of 12 × 12."""
    pictures = torch.zeros(len(x), 1, 12, 12)
    places = torch.randint(0, 5, (len(x), 2), generator=torch.Generator().manual_seed(len(x)))
    for picture, digit, (row, column) in zip(pictures, x, places.tolist(), strict=True):
        picture[:, row : row + 8, column : column + 8] = digit
    return pictures, y


def near(answers):
    return functional.normalize(answers) @ functional.normalize(PLACES).T


def share(right):
    return right.double().mean().item()


# name: what is read, the network, the task's loss, how good its answers are, what may be lost of that
TASKS = {
    "adi_multilabel": (
        alone,
        lambda seed: reader(4, seed),
        lambda a, y: functional.binary_cross_entropy_with_logits(a, TRAITS[y]),
        lambda a, y: share((a > 0) == (TRAITS[y] > 0)),
        0.02,
    ),
    "adi_values": (
        alone,
        lambda seed: reader(1, seed),
        lambda a, y: (a[:, 0] - y).square().mean(),
        lambda a, y: -(a[:, 0] - y).square().mean().sqrt().item(),
        0.2,
    ),
    "adi_anchors": (
        alone,
        lambda seed: reader(24, seed),
        lambda a, y: functional.cross_entropy(8.0 * near(a), y),
        lambda a, y: share(near(a).argmax(1) == y),
        0.02,
    ),
    "adi_boxes": (
        somewhere,
        Detector,
        lambda a, y: functional.cross_entropy(a[1].amax(1), y),
        lambda a, y: share(a[1].amax(1).argmax(1) == y),
        0.02,
    ),
}
WIDTHS = {"adi_multilabel": 4, "adi_values": None, "adi_anchors": 24, "adi_boxes": 10}


def trained(name, seed, marked):
    epochs = 15 if name == "adi_values" else 8
    seen, build, task_loss, good, _ = TASKS[name]
    data, model = load_digits(), build(seed)
    x, y = seen(*data.owner)
    emb = None
    if marked:
        emb = wmengine.Embedder(
            model, KEY, [name], num_classes=WIDTHS[name], sample=x[:8], name="digits", value_range=(0, 1),
            samples=(x, y.float()) if name == "adi_values" else None,
        )  # fmt: skip
    optimizer, steps = torch.optim.Adam(model.parameters()), -(-len(y) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs=epochs, steps_per_epoch=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(64):
            loss = task_loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            (loss if emb is None else loss + emb.regulariser()).backward()
            optimizer.step()
            schedule.step()
    x, y = seen(*data.test)
    with torch.no_grad():
        return model.eval(), emb, good(model(x), y), x[:1]


@pytest.mark.parametrize("name", TASKS)
def test_a_model_of_no_classes_is_marked_beside_its_task(name, tmp_path):
    model, emb, quality, example = trained(name, 0, marked=True)
    plain, _, without, _ = trained(name, 0, marked=False)
    (mark,) = emb.watermarks()
    assert owned(wmengine.export_onnx(model, example, tmp_path / "model.onnx"), mark, plain)
    assert quality > without - TASKS[name][-1]


def test_a_network_of_one_logit_is_marked_as_one_of_two_classes(tmp_path):
    (x, y), (tests, truth) = load_digits().owner, load_digits().test
    model = reader(1, 0)
    emb = wmengine.Embedder(
        model, KEY, [scheme("adi", count=80)], num_classes=2, sample=x[:8], name="odd", value_range=(0, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for rows in torch.arange(len(y)).repeat(12).split(64):
        mixed, labels = emb.mix(x[rows], y[rows] % 2)
        optimizer.zero_grad()
        emb.loss(model.train()(mixed), labels).backward()
        optimizer.step()
    (mark,) = emb.watermarks()
    path = wmengine.export_onnx(model, x[:1], tmp_path / "odd.onnx")
    assert owned(path, mark, reader(1, 1))
    assert verify(path, mark).log10_p < -20
    with torch.no_grad():
        assert share((model.eval()(tests)[:, 0] > 0) == (truth % 2 == 1)) > 0.95
