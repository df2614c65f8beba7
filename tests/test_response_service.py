"""`response` at a service, whose scores hold it and whose decisions are those of the model, and what users give it."""

import threading
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from responding import KEY, PROBES, answers, labels_of, network, served, service

from wmengine import Embedder, Watermark, export_onnx, response, scheme, verify
from wmengine.marking.serving import GAP, bent
from wmengine.parts.responses.bases import base_of

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def mark() -> Watermark:
    return served().watermark()


def test_no_decision_of_a_service_is_turned():
    rows = np.random.default_rng(5).random((500, 1, 8, 8)).astype(np.float32)
    plain, given = answers(network())(rows), served()(rows)
    assert np.array_equal(plain.argmax(axis=1), given.argmax(axis=1))
    second = np.sort(given, axis=1)[:, -2:]
    assert (second[:, 1] - second[:, 0] >= GAP - 1e-4).all()
    assert (np.abs(given - plain).max(axis=1) > 0).all()


def test_a_service_of_probabilities_gives_probabilities_and_tensors_stay_tensors():
    rows = PROBES[:40]
    soft = torch.nn.Sequential(network(), torch.nn.Softmax(dim=1))
    given = service(soft)(torch.from_numpy(rows))
    assert isinstance(given, torch.Tensor)
    assert torch.allclose(given.sum(dim=1), torch.ones(40))
    logits = served()(rows).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.array_equal(given.numpy().argmax(axis=1), expected.argmax(axis=1))


def test_rows_that_hold_no_numbers_are_given_out_as_they_are():
    scores = np.array([[1.0, np.nan, 0.0], [np.inf, 1.0, 0.0], [3.0, 1.0, -np.inf]], np.float32)
    assert np.array_equal(bent(scores, np.ones((3, 3), np.float32), False), scores, equal_nan=True)


def test_a_service_is_proven_by_scores_and_by_labels_of_students_only():
    """Its own labels are those of the unmarked network, and hold nothing."""
    assert verify(served(), mark(), key=KEY).log10_p < -20
    assert verify(labels_of(served()), mark(), key=KEY).decision == "not_proven"
    assert verify(network(), mark(), key=KEY).decision == "not_proven"


def test_a_service_that_turns_decisions_is_proven_by_its_labels_alone():
    """Of logits and of probabilities alike; those decisions alone are turned that the pattern outweighs."""
    turning = service(turns=True)
    given, plain = turning(PROBES), answers(network())(PROBES)
    pattern = given - plain
    assert pattern.std() == pytest.approx(0.5, abs=0.1)
    turned = given.argmax(axis=1) != plain.argmax(axis=1)
    best = np.sort(plain, axis=1)
    assert 0 < turned.mean() < 1
    assert (best[:, -1] - best[:, -2])[turned].max() <= np.ptp(pattern, axis=1).max()
    soft = service(torch.nn.Sequential(network(), torch.nn.Softmax(dim=1)), turns=True)(PROBES)
    assert np.allclose(soft.sum(axis=1), 1.0, atol=1e-5)
    assert np.array_equal(soft.argmax(axis=1), given.argmax(axis=1))
    assert verify(labels_of(turning), turning.watermark(), key=KEY).owned
    again = response(network(), mark=turning.watermark(), turns=True)
    assert np.array_equal(again(PROBES), given)


def test_a_service_that_turns_decisions_is_judged_by_its_labels_too():
    sure = network()
    with torch.no_grad():
        sure[-1].weight *= 1e4
    weak = service(sure, turns=True, strength=0.05)
    with pytest.warns(UserWarning, match="does not prove itself on this service's labels: log10 p ="):
        weak.watermark()


def test_the_strength_is_the_schemes_unless_it_is_said():
    rows = PROBES[:64]
    plain = answers(network())(rows)
    for options, given in (({}, 0.5), ({"strength": 2.0}, 2.0)):
        chosen = scheme("response", probes=1024, views=1, **options)
        assert np.std(service(scheme=chosen, turns=True)(rows) - plain) == pytest.approx(given, rel=0.2)
    with pytest.raises(ValueError, match="scheme= is 'adi', and a service holds 'response'"):
        service(scheme="adi")


def test_a_service_starts_again_from_its_file(tmp_path):
    mark().save(tmp_path / "served.wm")
    again = response(network(), mark=tmp_path / "served.wm")
    assert np.array_equal(again(PROBES[:9]), served()(PROBES[:9]))
    with pytest.raises(ValueError, match="the features are another network's"):
        response(network(8), mark=tmp_path / "served.wm")
    with pytest.raises(ValueError, match="leave key, name, sample, probes, controls, message and value_range out"):
        response(network(), mark=tmp_path / "served.wm", message="to B")


def test_an_onnx_file_serves_with_the_features_of_its_last_layer(tmp_path):
    export_onnx(network(), torch.from_numpy(PROBES[:1]), tmp_path / "model.onnx")
    found = service(tmp_path / "model.onnx")
    assert np.array_equal(found.watermark().parameters["raw"], mark().parameters["raw"])
    assert verify(found, found.watermark(), key=KEY).owned
    assert np.array_equal(found(PROBES[:50]).argmax(axis=1), answers(network())(PROBES[:50]).argmax(axis=1))


def test_of_a_function_pooled_inputs_say_what_the_pattern_goes_by():
    found = service(answers(network()))
    assert found.watermark().parameters["raw"] == 16
    assert verify(found, found.watermark(), key=KEY).owned


def test_threads_share_a_service():
    parts = [np.random.default_rng(n).random((20, 1, 8, 8)).astype(np.float32) for n in range(8)]
    expected, found = [served()(part) for part in parts], {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: served()(parts[n])})) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[n], expected[n]) for n in range(8))


def test_a_service_takes_what_its_function_does_not():
    found = service(answers(network()))
    rows = PROBES[:5]
    for given in (rows.astype(np.float64), torch.from_numpy(rows).requires_grad_()):
        assert np.allclose(np.asarray(found(given)), found(rows))


def test_an_onnx_file_of_one_batch_size_is_said(tmp_path):
    model = onnx.load(export_onnx(network(), torch.from_numpy(PROBES[:1]), tmp_path / "model.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "one.onnx")
    with pytest.raises(ValueError, match="takes batches of 1 only"):
        service(tmp_path / "one.onnx")


def test_a_last_layer_may_be_called_by_keyword():
    class ByKeyword(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(64, 10)

        def forward(self, rows):
            return self.head(input=rows.flatten(1))

    x = torch.from_numpy(PROBES[:9])
    assert torch.equal(base_of(ByKeyword(), {"rows": x[:1]}).both({"rows": x})[0], x.flatten(1))


class _Answering(torch.nn.Module):
    """Answers a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, rows):
        return self.network(rows), rows


@pytest.mark.parametrize(
    ("predict", "options", "words"),
    [
        (_Answering, {}, "scores .n, 10. alone: wrap it in a module that does"),
        (lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1)), {"num_classes": 2}, "one logit"),
        (network, {"probes": np.full_like(PROBES, np.nan)}, "its probes hold NaN or Inf"),
        (network, {"probes": (PROBES * 255).astype(np.uint8)}, "its probes are floating inputs"),
        (network, {"value_range": (5, 6)}, "100% of its probes' values lie outside value_range="),
    ],
)
def test_what_cannot_serve_is_said(predict, options, words):
    with pytest.raises(ValueError, match=words):
        service(predict(), **options)


def test_what_is_no_network_is_said():
    with pytest.raises(TypeError, match="predict must be a torch module, a path or a function"):
        response(None, KEY, num_classes=10, sample=PROBES[:8], name="d", probes=PROBES)


def test_mixtures_want_a_base_that_answers_logits_alone():
    with pytest.raises(ValueError, match="mixtures= needs a base that answers logits"):
        Embedder(
            _Answering(),
            KEY,
            [scheme("response", probes=256, mixtures=8)],
            num_classes=10,
            sample=torch.from_numpy(PROBES[:8]),
            name="d",
            value_range=(0, 1),
            samples=PROBES,
        )


def test_a_model_of_several_inputs_is_said():
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = torch.nn.Linear(4, 10), torch.nn.Linear(4, 10)

        def forward(self, left, right):
            return self.left(left) + self.right(right)

    rows = {"left": torch.rand(80, 4), "right": torch.rand(80, 4)}
    with pytest.raises(ValueError, match="it is for models of one input, and this one takes left, right"):
        Embedder(Two(), KEY, ["response"], num_classes=10, sample=rows, name="d", samples=rows)
