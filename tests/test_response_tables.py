"""`response` in models of tables: rows of columns, each with a range and a unit of its own, of scikit-learn too."""

from functools import cache

import numpy as np
import pytest
import torch
from responding import KEY, labels_of
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from wmengine import Embedder, controls, export_onnx, response, scheme, verify

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the mark"),
]


@cache
def table(load):
    """Rows and labels, in a random order, and each column's range."""
    data, order = load(), np.random.default_rng(0)
    order = order.permutation(len(data.target))
    rows, labels = data.data[order].astype(np.float32), data.target[order]
    return rows, labels, np.stack([rows.min(axis=0), rows.max(axis=0)], axis=1)


@cache
def fitted(load):
    rows, labels, _ = table(load)
    half = len(rows) // 2
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(rows[:half], labels[:half])


@cache
def served(load):
    rows, labels, ranges = table(load)
    return response(
        fitted(load).predict_proba, KEY, num_classes=len(set(labels)), sample=rows[:64], name="rows",
        value_range=ranges, probes=rows[len(rows) // 2 :], scheme=scheme("response", bits=256, probes=1024),
    )  # fmt: skip


def test_a_service_of_scikit_learn_is_proven_by_its_scores_and_turns_no_decision():
    rows, mark = table(load_digits)[0][-400:], served(load_digits).watermark()
    assert np.array_equal(served(load_digits)(rows).argmax(axis=1), fitted(load_digits).predict(rows))
    assert np.allclose(served(load_digits)(rows).sum(axis=1), 1.0)
    assert verify(served(load_digits), mark, key=KEY).owned
    assert verify(labels_of(served(load_digits)), mark, key=KEY).decision == "not_proven"
    assert verify(fitted(load_digits).predict_proba, mark, key=KEY).decision == "not_proven"


def test_probes_are_rows_and_means_of_rows_within_each_columns_range():
    mark, (_, _, ranges) = served(load_breast_cancer).watermark(), table(load_breast_cancer)
    (rows,) = mark.preset.source.examples(mark).values()
    assert (rows >= ranges[:, 0]).all()
    assert (rows <= ranges[:, 1]).all()
    assert mark.parameters["views"] == 1


def test_columns_count_alike_whatever_their_units():
    """Those of breast cancer are from thousandths to thousands."""
    rows = table(load_breast_cancer)[0]
    assert rows.std(axis=0).max() > 1e4 * rows.std(axis=0).min()
    assert served(load_breast_cancer).watermark().parameters["dimensions"] == 30


class Columns(nn.Sequential):
    """Two layers on rows as they are, standardised within."""

    def __init__(self, rows, classes):
        super().__init__(nn.BatchNorm1d(rows.shape[1]), nn.Linear(rows.shape[1], 128), nn.ReLU())
        self.extend([nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, classes)])


@pytest.mark.slow
def test_a_network_of_rows_is_proven_by_scores_by_labels_and_from_its_file(tmp_path):
    rows, labels, ranges = table(load_digits)
    half = len(rows) // 2
    x, y = torch.from_numpy(rows[:half]), torch.from_numpy(labels[:half])
    torch.manual_seed(0)
    base = Columns(rows, 10)
    optimizer = torch.optim.Adam(base.parameters(), 3e-3)
    for at in torch.arange(half).repeat(15).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(base(x[at]), y[at], label_smoothing=0.1).backward()
        optimizer.step()
    known = controls(base.eval(), x, epochs=15)
    model = Columns(rows, 10)
    model.load_state_dict(base.state_dict())
    emb = Embedder(
        model, KEY, [scheme("response", bits=512, probes=2048, mixtures=256)], num_classes=10, sample=x[:8],
        name="rows", value_range=ranges, samples=rows[half:], controls=known,
    )  # fmt: skip
    (mark,) = emb.fit([(x[at], y[at]) for at in torch.arange(half).split(256)], epochs=120, rate=3e-3)
    path = export_onnx(model.eval(), x[:1], tmp_path / "rows.onnx")
    for suspect in (model, path, labels_of(lambda given: model(torch.from_numpy(given)).detach())):
        assert verify(suspect, mark, key=KEY).owned
    assert all(verify(control, mark, key=KEY).log10_p > -3 for control in known)
    accuracy = [
        (each(torch.from_numpy(rows[half:])).argmax(1).numpy() == labels[half:]).mean() for each in (base, model)
    ]
    assert accuracy[1] > accuracy[0] - 0.02
