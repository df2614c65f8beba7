"""`response`: bits in the answers to ordinary inputs, at a service and in a network, proven exactly."""

import math
import threading
from copy import deepcopy
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from responding import KEY, PROBES, answers, bent_network, labels_of, network, served, service

from wmengine import Embedder, Key, Watermark, export_onnx, response, scheme, verify, verify_all
from wmengine.errors import WatermarkError
from wmengine.judging.asking import Terms
from wmengine.judging.judge import judge_suspect
from wmengine.judging.looks import looks_of_bits
from wmengine.marking.serving import GAP, bent
from wmengine.marks.preset import array_digest
from wmengine.parts.responses.gathering import base_of
from wmengine.parts.responses.pattern import contrasts, directions, keyed_normals, pattern_of
from wmengine.parts.responses.reading import projected, told, told_by_labels, unexplained
from wmengine.suspects import open_suspect
from wmengine.suspects.base import Answers
from wmengine.testing import small_network

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def mark() -> Watermark:
    return served().watermark()


# the pattern


def test_normals_are_normal_and_a_contrast_favours_some_classes_at_the_cost_of_others():
    drawn = keyed_normals(b"k" * 32, 4000, 10)
    assert abs(drawn.mean() - 8.0) < 0.05
    assert abs(drawn.std() - 2.0) < 0.05
    assert np.allclose(contrasts(drawn).sum(axis=1), 0.0)
    assert np.allclose(np.square(contrasts(drawn)).sum(axis=1), 1.0)
    assert np.allclose(np.square(directions(drawn)).sum(axis=1).mean(), 1.0, atol=0.05)


def test_two_classes_have_a_contrast_whatever_is_drawn():
    same = np.array([[8, 8], [3, 9], [9, 3]], np.uint8)
    assert np.allclose(contrasts(same), np.array([[1, -1], [-1, 1], [1, -1]]) / math.sqrt(2))


def test_the_pattern_turns_round_with_the_bits():
    features = np.random.default_rng(0).normal(size=(5, 12))
    arrays = {"directions": keyed_normals(b"a" * 32, 300, 12), "contrasts": keyed_normals(b"b" * 32, 300, 7)}
    bits = np.random.default_rng(1).integers(0, 2, 300).astype(np.uint8)
    found = pattern_of(features, arrays, bits)
    assert found.shape == (5, 7)
    assert np.allclose(found.sum(axis=1), 0.0)
    assert np.allclose(pattern_of(features, arrays, 1 - bits), -found)


# reading


def test_scores_probabilities_and_log_probabilities_say_the_same():
    scores = np.random.default_rng(0).normal(size=(50, 6)) * 4
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    for said in (shares, np.log(shares), scores + 100.0):
        assert np.allclose(told(said), told(scores))
    assert np.allclose(told(scores).sum(axis=1), 1.0)


def test_what_is_no_number_or_no_class_is_left_out_alone():
    scores = np.random.default_rng(0).normal(size=(5, 3))
    scores[1, 2], scores[3, 0] = np.nan, np.inf
    assert np.isnan(told(scores)).all(axis=1).tolist() == [False, True, False, True, False]
    lowest = np.array([[0.0, -np.inf, 1.0]])
    assert np.isfinite(told(lowest)).all()
    assert np.isnan(told_by_labels(np.array([0, 3, -1, 2]), 3)).any(axis=1).tolist() == [False, True, True, False]


def test_what_controls_explain_leaves_nothing_to_read():
    logs = np.random.default_rng(0).normal(size=(2, 400, 5))
    logs -= np.log(np.exp(logs).sum(axis=2, keepdims=True))
    said = 0.3 * np.exp(logs[0]) + 0.2 * logs[1]
    assert np.abs(unexplained(said, logs)).max() < 0.03 * np.abs(said - said.mean(axis=0)).max()


def test_bits_are_the_signs_of_what_follows_their_direction_and_contrast():
    features = np.random.default_rng(2).normal(size=(3000, 20)).clip(-3, 3)
    arrays = {"directions": keyed_normals(b"a" * 32, 256, 20), "contrasts": keyed_normals(b"b" * 32, 256, 8)}
    bits = np.random.default_rng(1).integers(0, 2, 256).astype(np.uint8)
    y = projected(pattern_of(features, arrays, bits), features, arrays)
    assert ((y > 0) == bits).mean() > 0.7
    assert np.allclose(projected(np.zeros((3000, 8)), features, arrays), 0.0)
    exact = [
        ((phi - phi.mean())[:, None] * pattern_of(features, arrays, bits) @ v).sum()
        for phi, v in zip(
            np.tanh(features @ directions(arrays["directions"]).T).T, contrasts(arrays["contrasts"]), strict=True
        )
    ]
    assert np.allclose(y, exact)


# the service


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


# what is bound, and what p is


@pytest.mark.parametrize("suspect", ["a stranger", "a control", "constant", "random"])
def test_p_is_exact_on_fixed_suspects(suspect):
    random = np.random.default_rng(3)
    suspects = {
        "a stranger": answers(network(9)),
        "a control": answers(network()),
        "constant": lambda rows: np.tile(np.arange(10.0), (len(rows), 1)),
        "random": lambda rows: random.normal(size=(len(rows), 10)),
    }
    (said,) = judge_answers(suspects[suspect])
    y = mark().preset.source.observed(mark(), np.arange(len(said)), said)
    keys = np.random.default_rng(0).integers(0, 2, (2000, mark().total)).astype(np.uint8)
    p = []
    for look in looks_of_bits(y, list(keys)):
        test = mark().preset.test(mark(), mark().total, sequential=False)
        test.add(look)
        p.append(test.log10_p)
    for level in (0.1, 0.01, 0.001):
        most = level + 4.0 * math.sqrt(level / len(keys))
        assert (np.array(p) <= math.log10(level)).mean() <= most


def judge_answers(suspect):
    rows = mark().preset.source.examples(mark())["input"]
    return [told(suspect(rows))]


def test_whoever_exchanges_probes_features_or_controls_has_another_mark():
    held = mark()
    material = {name: held.arrays[name].copy() for name in held.parameters["material"]}
    for name in ("probes", "features", "answers", "whitening"):
        other = {**material, name: np.roll(material[name], 1)}
        with pytest.raises(ValueError, match="not the material that the parameters were described with"):
            scheme("response").derive(KEY, held.parameters, None, other)
    held.check_derivation(KEY)
    with pytest.raises(WatermarkError):
        held.check_derivation(Key("ACME Vision", b"x" * 32))


def test_copies_for_two_customers_are_told_apart_by_one_reading():
    copies = [mark().with_message(KEY, name) for name in ("a", "b")]
    findings = judge_suspect(open_suspect(served()), [mark(), *copies], Terms(sequential=False, log10_bar=9.0))
    assert findings[0].log10_p < -20
    assert all(found.log10_p > -3 for found in findings[1:])
    assert len({found.queries for found in findings}) == 1


# how suspects are asked


def test_a_sequential_test_stops_when_the_answer_is_clear_and_pays_for_its_looks():
    size = mark().parameters["pool"]
    found = verify(served(), mark(), key=KEY, test="sequential")
    assert found.owned
    assert found.queries < size
    assert any(each.code == "stopped" for each in found.facts)
    stranger = verify(network(9), mark(), key=KEY, test="sequential")
    assert stranger.queries < size
    assert any(each.code == "given_up" for each in stranger.facts)


def test_classes_that_were_renumbered_are_found_by_the_base_for_nothing():
    order = np.random.default_rng(0).permutation(10)
    found = verify(lambda rows: served()(rows)[:, order], mark(), key=KEY, classes="any")
    assert found.log10_p == pytest.approx(verify(served(), mark(), key=KEY).log10_p)
    assert any(each.code == "order_of_base" for each in found.facts)


def test_labels_counted_from_one_are_seen():
    copy = labels_of(bent_network(mark()))
    found = [verify(each, mark(), key=KEY) for each in (copy, lambda rows: copy(rows) + 1)]
    assert found[0].log10_p == pytest.approx(found[1].log10_p, abs=1e-6)
    assert found[0].log10_p < -9
    assert any(each.code == "from_one" for each in found[1].facts)


def test_a_suspect_of_other_inputs_or_classes_is_an_error():
    for suspect in (lambda rows: np.zeros((len(rows), 3)), lambda rows: 1 / 0):
        assert verify(suspect, mark(), key=KEY).decision == "error"


# in a network


def embedder(model, **options):
    given = {"num_classes": 10, "sample": torch.from_numpy(PROBES[:8]), "name": "d", "value_range": (0, 1)}
    return Embedder(model, KEY, [scheme("response", probes=256)], **{**given, "samples": PROBES, **options})


def test_the_loss_wants_inputs_and_takes_features_that_were_kept():
    model = network()
    emb = embedder(model)
    x, y = torch.from_numpy(PROBES[:32]), torch.arange(32) % 10
    assert all(a is b for a, b in zip(emb.mix(x, y), (x, y), strict=True))
    with pytest.raises(ValueError, match=r"loss\(logits, labels, inputs=x\)"):
        emb.loss(model(x), y)
    with pytest.raises(ValueError, match="are of these 32 logits, and there are 8"):
        emb.loss(model(x), y, inputs=x[:8])
    kept = emb.features(x)
    assert torch.equal(emb.loss(model(x), y, features=kept), emb.loss(model(x), y, inputs=x))
    offset = model(x) - emb._offsets[0].offset(kept)
    expected = torch.nn.functional.cross_entropy(offset, y, label_smoothing=0.1)
    assert torch.allclose(emb.loss(model(x), y, inputs=x, label_smoothing=0.1), expected)


def test_trigger_rows_beside_it_are_learned_as_they_are():
    model = network()
    emb = Embedder(
        model,
        KEY,
        ["adi", scheme("response", probes=256)],
        num_classes=10,
        sample=torch.from_numpy(PROBES[:8]),
        name="d",
        value_range=(0, 1),
        samples=PROBES,
    )
    x, y = emb.mix(torch.from_numpy(PROBES[:32]), torch.arange(32) % 10)
    plain, task = emb.split(y)
    offset = emb._offsets[0].offset(emb.features(x)) * task[:, None]
    expected = torch.nn.functional.cross_entropy(model(x) - offset, plain)
    assert torch.allclose(emb.loss(model(x), y, inputs=x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": None}, "it needs samples="),
        ({"samples": PROBES[:20]}, "it needs 64 samples or more"),
        ({"controls": [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 9))]}, "scores of 10 classes"),
        ({"num_classes": None}, "it needs num_classes"),
    ],
)
def test_what_cannot_make_a_mark_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        embedder(network(), **options)


def test_marks_go_on_with_their_base_and_with_no_other_network():
    base = network()
    held = embedder(network(6), controls=[base]).watermarks
    with pytest.warns(UserWarning, match="does not prove itself"):
        (made,) = held()
    sample = torch.from_numpy(PROBES[:8])
    Embedder(network(6), marks=[made], sample=sample, controls=[base])
    with pytest.raises(ValueError, match="give controls= the networks that the mark was made with"):
        Embedder(network(6), marks=[made], sample=sample)


# what others could try


def test_a_mark_made_later_does_not_choose_the_order_of_the_classes_for_another():
    """Its own controls' answers are its maker's word, and could be made to suit bits that are known by then."""
    held = mark()
    material = {name: held.arrays[name] for name in held.parameters["material"]}
    material["answers"] = np.roll(material["answers"], 1, axis=2)
    digests = {**held.parameters["material"], "answers": array_digest(material["answers"])}
    later = Watermark.create(KEY, held.preset, {**held.parameters, "material": digests}, material=material)
    found = verify_all(served(), [later, held], key=KEY, classes="any")
    assert found[1].log10_p == pytest.approx(verify(served(), held, key=KEY).log10_p)


@pytest.mark.parametrize("sequential", [False, True])
def test_whoever_sets_how_many_probes_are_asked_pays_for_all_that_he_could_have_set(sequential):
    suspect, size = open_suspect(served()), mark().parameters["pool"]
    suspect.limit = lambda inputs, count: count // 2
    (found,) = judge_suspect(suspect, [mark()], Terms(sequential=sequential, log10_bar=50.0))
    looks = 4 if sequential else 1
    assert found.evidence.log10_share == pytest.approx(math.log10(0.5 / (looks * size)))
    assert found.queries <= size // 2


def test_a_deadline_that_ends_the_pool_is_paid_for_like_a_budget():
    suspect = open_suspect(served())
    whole = suspect.answer

    def answer(inputs, classes):
        given = whole(inputs, classes)
        return Answers(given.kind, given.values, unasked={len(given) - 1: "the time is up"})

    suspect.answer = answer
    (found,) = judge_suspect(suspect, [mark()], Terms(sequential=False, log10_bar=50.0))
    assert found.evidence.log10_share == pytest.approx(math.log10(0.5 / mark().parameters["pool"]))


def test_what_was_proven_before_a_suspect_failed_stays_proven():
    asked = 0

    def failing(rows):
        nonlocal asked
        asked += len(rows)
        return served()(rows) if asked <= 600 else 1 / 0

    copy = mark().with_message(KEY, "a")
    terms = Terms(sequential=True, log10_bar=6.0)
    proven, other = judge_suspect(open_suspect(failing), [mark(), copy], terms)
    assert proven.error is None
    assert proven.log10_p < -6
    assert other.error is not None


@pytest.mark.parametrize("then", ["fails", "is used up", "answers in another shape", "answers otherwise"])
def test_a_suspect_that_is_asked_again_stays_owned_whatever_it_does_then(then):
    suspect, asked = open_suspect(served()), 0
    whole = suspect.answer

    def answer(inputs, classes):
        nonlocal asked
        given, before = whole(inputs, classes), asked
        asked += len(given)
        if before < mark().parameters["pool"]:
            return given
        return {
            "fails": lambda: 1 / 0,
            "is used up": lambda: Answers(
                "scores", given.values * np.nan, unasked=dict.fromkeys(range(len(given)), "")
            ),
            "answers in another shape": lambda: Answers("classes", np.zeros((len(given), 2), np.int64)),
            "answers otherwise": lambda: Answers("scores", -given.values),
        }[then]()

    suspect.answer = answer
    (found,) = judge_suspect(suspect, [mark()], Terms(sequential=False, log10_bar=9.0))
    assert found.error is None
    assert found.log10_p < -20
    said = {"fails": {"not_again"}, "is used up": set()}.get(then, {"inconstant"})
    assert {each.code for each in found.facts} & {"not_again", "inconstant"} == said
    assert all(str(each) for each in found.facts)


@pytest.mark.parametrize("options", [{}, {"classes": "any"}, {"test": "sequential"}])
@pytest.mark.parametrize("said", ["NaN", "no class", "the largest floats"])
def test_answers_that_say_nothing_prove_nothing(said, options):
    suspect = {
        "NaN": lambda rows: np.full((len(rows), 10), np.nan),
        "no class": lambda rows: np.full(len(rows), 1000),
        "the largest floats": lambda rows: np.tile([1.7e308, -1.7e308], (len(rows), 5)),
    }[said]
    found = verify(suspect, mark(), key=KEY, **options)
    assert (found.decision, found.log10_p) == ("not_proven", 0.0)
    assert said == "the largest floats" or any(each.code == "left_out" for each in found.facts)


def test_a_regression_on_more_answers_than_inputs_is_the_same():
    logs, said = np.random.default_rng(0).normal(size=(2, 50, 10)), np.random.default_rng(1).random((50, 10))
    twice = unexplained(np.tile(said, (2, 1)), np.tile(logs, (1, 2, 1)))
    assert np.allclose(unexplained(said, logs), twice[:50])


# what users give


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


def test_an_embedder_is_copied_with_its_base():
    model = network()
    made, x, y = embedder(model), torch.from_numpy(PROBES[:32]), torch.arange(32) % 10
    assert torch.equal(deepcopy(made).loss(model(x), y, inputs=x), made.loss(model(x), y, inputs=x))


def test_a_last_layer_may_be_called_by_keyword():
    class ByKeyword(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(64, 10)

        def forward(self, rows):
            return self.head(input=rows.flatten(1))

    x = torch.from_numpy(PROBES[:9])
    assert torch.equal(base_of(ByKeyword(), x[:1]).both(x)[0], x.flatten(1))


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
        (network, {"value_range": (5, 6)}, "the same for all probes: is value_range="),
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


def test_where_the_base_favours_a_class_no_other_way_of_asking_is_taken_for_it(tmp_path):
    """An untrained base names one class for nearly all probes, so that agreement says nothing."""
    plain = small_network(0).eval()
    found = service(plain)
    export_onnx(plain, torch.from_numpy(PROBES[:1]), tmp_path / "plain.onnx")
    verdict = verify(tmp_path / "plain.onnx", found.watermark(), key=KEY)
    assert not any(each.code == "put_otherwise" for each in verdict.facts)
