"""`response`: bits in the answers to ordinary inputs, at a service and in a network, proven exactly."""

import math
import warnings
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from responding import KEY, PROBES, answers, bent_network, labels_of, network, served, service, size_of

from wmengine import Embedder, Key, Watermark, scheme, verify
from wmengine.errors import WatermarkError
from wmengine.judging.asking import Terms
from wmengine.judging.judge import judge_suspect
from wmengine.judging.looks import looks_of_bits
from wmengine.marking.power import log10_p_at_best
from wmengine.marking.serving import bent
from wmengine.parts.responses.gathering import Candidates
from wmengine.parts.responses.pattern import contrasts, directions, keyed_normals, pattern_of
from wmengine.parts.responses.reading import projected, told, told_by_labels, unexplained
from wmengine.parts.responses.views import viewed, views_of
from wmengine.suspects import open_suspect
from wmengine.suspects.adapters import AS_RECORDED, to_input, to_levels

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


# views


def test_pictures_are_asked_in_six_views_and_other_inputs_as_they_are():
    assert [views_of(shape, 6) for shape in ((3, 32, 32), (1, 8, 8), (3, 4, 32), (16,), (1, 4000))] == [6, 6, 1, 1, 1]
    picture = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)
    seen = [viewed(picture, view)[0, 0] for view in range(6)]
    assert (seen[0] == picture[0, 0]).all()
    assert (seen[1] == picture[0, 0, :, ::-1]).all()
    for place, moved in enumerate(seen[2:]):
        rows = moved.T if place > 1 else moved
        whole = picture[0, 0].T if place > 1 else picture[0, 0]
        first, rest, of = (rows[0], rows[1:], whole[:-1]) if place % 2 == 0 else (rows[-1], rows[:-1], whole[1:])
        assert (rest == of).all()
        assert (first == (whole[0] if place % 2 == 0 else whole[-1])).all()


def test_a_pool_holds_each_probe_once_and_asks_it_in_every_view_one_view_after_the_other():
    held = service(scheme=scheme("response", probes=512, views=6)).watermark()
    probes, source = held.arrays["probes"], held.preset.source
    assert (len(probes), size_of(held), held.arrays["answers"].shape[1]) == (512, 3072, 3072)
    (asked,) = source.inputs(held, AS_RECORDED, 0, 3072).values()
    for view in range(6):
        part = asked[512 * view : 512 * (view + 1)]
        assert (part == to_input(viewed(probes, view), held.parameters["value_range"])).all()
    for start, stop in ((0, 1), (500, 530), (511, 2100), (3071, 3072), (5, 5)):
        assert (source.inputs(held, AS_RECORDED, start, stop)["input"] == asked[start:stop]).all()


def test_only_pictures_can_have_views():
    held = mark()
    inputs = [{**held.parameters["inputs"][0], "shape": [1, 64]}]
    with pytest.raises(ValueError, match="views must be"):
        held.preset.check({**held.parameters, "inputs": inputs, "views": 2})


def test_a_pool_that_is_too_large_is_said():
    rows = torch.rand(64, 1, 8, 8)
    with pytest.raises(ValueError, match="needs 256 probes, of which its 720 MiB, 192 of them for answers, hold 209"):
        Embedder(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 40_000)), KEY, ["response"], num_classes=40_000,
            sample=rows[:2], name="d", value_range=(0, 1), samples=rows,
        )  # fmt: skip


def test_candidates_are_the_owner_s_rows_and_means_of_two_however_they_are_asked_for():
    rows = np.random.default_rng(0).random((70, 1, 8, 8)).astype(np.float32)
    every = Candidates(rows, 300, [[0.0, 1.0]])
    assert len(every) == 370
    assert (every[:70] == to_levels(rows, [[0.0, 1.0]])).all()
    between = every[70:].astype(int)
    ends = every[:70].astype(int)
    for made in between[:20]:
        sums = ends[:, None] + ends[None]
        assert (np.abs(sums - 2 * made) <= 2).all(axis=(2, 3, 4)).any(), "a mean of two rows, rounded"
    assert (every[np.array([3, 369, 70])] == np.concatenate([every[3:4], every[369:], every[70:71]])).all()
    assert len(Candidates(rows, 8, [[0.0, 1.0]])) == 140


# how suspects are asked


def test_a_sequential_test_stops_when_the_answer_is_clear_and_pays_for_its_looks():
    size = size_of(mark())
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


# what it could prove


def test_what_is_foreseen_of_a_mark_is_what_networks_prove_that_hold_it_whole():
    whole = bent_network(mark())
    proven = [verify(each, mark(), key=KEY).log10_p for each in (whole, labels_of(whole))]
    assert log10_p_at_best(mark(), 0.5) == pytest.approx(proven, rel=0.05)
    served_too = log10_p_at_best(mark(), 0.5, lambda logits, pattern: bent(logits, pattern, shares=False))
    assert served_too == pytest.approx([verify(served(), mark(), key=KEY).log10_p], rel=0.05)


def test_a_mark_that_could_not_prove_itself_is_warned_about_when_it_is_made():
    weak, words = scheme("response", probes=256, bits=256, features=2), r"= -?\d\.\d by its scores"
    with pytest.warns(UserWarning, match=f"even a network that holds it whole .*{words} and -?\\d\\.\\d by its labels"):
        Embedder(
            network(), KEY, [weak], num_classes=10, sample=torch.from_numpy(PROBES[:8]), name="d", value_range=(0, 1),
            samples=PROBES,
        )  # fmt: skip
    with pytest.warns(UserWarning, match=f"even the service would prove log10 p {words}, where -9 is needed"):
        service(scheme=weak)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        service()


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


@pytest.mark.parametrize(("mixtures", "smoothing"), [(0, 0.1), (8, 0.0)])
def test_trigger_rows_beside_it_are_learned_as_they_are(mixtures, smoothing):
    """And labels are smoothed if nothing is said of it, unless mixtures are answered as the base answers them."""
    model = network()
    emb = Embedder(
        model,
        KEY,
        ["adi", scheme("response", probes=256, mixtures=mixtures)],
        num_classes=10,
        sample=torch.from_numpy(PROBES[:8]),
        name="d",
        value_range=(0, 1),
        samples=PROBES,
    )
    x, y = emb.mix(torch.from_numpy(PROBES[:32]), torch.arange(32) % 10)
    plain, task = emb.split(y)
    offset = emb._offsets[0].offset(emb.features(x)) * task[:, None]
    for given, used in (({}, smoothing), ({"label_smoothing": 0.05}, 0.05)):
        expected = torch.nn.functional.cross_entropy(model(x) - offset, plain, label_smoothing=used)
        with torch.no_grad():  # without the term of mixtures
            assert torch.allclose(emb.loss(model(x), y, inputs=x, **given), expected, atol=1e-5)


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


def test_an_embedder_is_copied_with_its_base():
    model = network()
    made, x, y = embedder(model), torch.from_numpy(PROBES[:32]), torch.arange(32) % 10
    assert torch.equal(deepcopy(made).loss(model(x), y, inputs=x), made.loss(model(x), y, inputs=x))
