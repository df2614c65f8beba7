"""What endpoints promise: the mark is found behind them, with few queries, in every layout, and politely."""

import numpy as np
import pytest
from endpoint_stub import (
    AGAIN,
    CLASSES,
    COUNT,
    INPUTS,
    MARK,
    SHAPE,
    answer,
    classes,
    judged,
    marked_model,
    posted,
    scores,
    serving,
    tensor,
)
from judged import black_box

import wmengine as wm
from wmengine.errors import SuspectError
from wmengine.identity.key import Key
from wmengine.parts.statistics.tails import binomial_log10_tail
from wmengine.suspects.adapters import to_input
from wmengine.suspects.base import CHUNK
from wmengine.suspects.endpoint.address import Address
from wmengine.suspects.endpoint.options import EndpointOptions
from wmengine.suspects.endpoint.patience import Patience, Unavailable
from wmengine.suspects.endpoint.suspect import EndpointSuspect

pytestmark = pytest.mark.usefixtures("no_long_pauses")


def test_a_url_is_a_suspect_whose_mark_is_found():
    with serving() as stub:
        verdict = wm.verify(stub.url, MARK)
        assert (verdict.decision, verdict.matched, verdict.suspect, verdict.sha256) == ("owned", COUNT, stub.url, None)
        assert wm.verify(f"{stub.origin}/some/where/v2/models/a/versions/3/infer", MARK).owned
        assert stub.requests[-1].path == "/some/where/v2/models/a/versions/3/infer"


def test_nothing_but_inputs_is_sent():
    with serving() as stub:
        judged(stub)
    assert len(stub.images) == COUNT + AGAIN
    for request in stub.questions:
        assert request.json.keys() == {"inputs"}
        assert request.json["inputs"][0].keys() == {"name", "shape", "datatype", "data"}
        assert set(request.headers) == {"Host", "Accept", "Accept-Encoding", "Content-Type", "Content-Length"}


def test_a_model_without_the_mark_is_not_proven():
    with serving(posted(lambda request: answer(np.eye(CLASSES)[[3] * len(tensor(request.json))]))) as stub:
        verdict = judged(stub)
    assert verdict.decision == "not_proven"
    assert verdict.matched == (MARK.arrays["labels"] == 3).sum()


def test_the_sequential_test_asks_no_more_than_it_needs():
    with serving() as stub:
        assert judged(stub, "sequential").owned
    assert len(stub.images) == 16 + AGAIN


def test_what_the_server_declares_is_what_it_gets():
    def behave(request):
        if request.method == "GET":
            return {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 4, 4, 3]}]}
        given = tensor(request.json)
        assert given.dtype == np.uint8
        assert request.json["inputs"][0]["name"] == "pixels"
        return answer(scores(np.moveaxis(given, -1, 1).astype(np.float32) / np.float32(127.5) - 1))

    # Bytes are put back on the mark's scale in float32 there, so most and not all images are the very same.
    with serving(behave) as stub:
        verdict = judged(stub)
    assert stub.questions
    assert not verdict.error
    assert "triggers were put channels last, as bytes" in verdict.notes


def test_what_the_options_say_is_what_it_gets():
    def behave(request):
        given = tensor(request.json)
        assert request.json["inputs"][0]["name"] == "x"
        assert request.json["outputs"] == [{"name": "y"}]
        both = answer(np.zeros((len(given), CLASSES)), "other")["outputs"]
        return {"outputs": both + answer(scores(np.moveaxis(given, -1, 1)), "y")["outputs"][:1]}

    with serving(posted(behave)) as stub:
        # a server may send more than it was asked for
        suspect = wm.endpoint(stub.url, input="x", output="y", layout="channels last", datatype="FP32")
        verdict = wm.verify(suspect, MARK)
    assert all(request.method == "POST" for request in stub.requests)
    assert verdict.owned, verdict
    assert "triggers were put channels last" in verdict.notes


def test_a_server_that_describes_its_model_wrongly_can_be_overruled():
    def behave(request):
        if request.method == "GET":
            return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [3, 4, 4]}]}  # without the batch
        return answer(scores(tensor(request.json)))

    with serving(behave) as stub:
        assert judged(stub).error.endswith("or give a layout where the server describes its model wrongly")
        assert judged(stub, layout="as recorded").owned


def test_axes_of_length_1_are_put_as_the_server_describes_them():
    def behave(request):
        if request.method == "GET":
            return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 1, 3, 4, 4]}]}
        return answer(scores(tensor(request.json)[:, 0]))

    with serving(behave) as stub:
        assert judged(stub).owned


def test_only_scalings_that_are_asked_for_are_tried():
    stranger = posted(lambda request: answer(np.eye(CLASSES)[[3] * len(tensor(request.json))]))
    with serving(stranger) as stub:
        judged(stub)
        assert len(stub.images) == COUNT + AGAIN
        assert all(image.min() == -1 and image.max() == 1 for image in stub.images)
    with serving(stranger) as stub:
        judged(stub, scaling="0 to 1")
        assert all(image.min() == 0 and image.max() == 1 for image in stub.images)
    with serving(stranger) as stub:
        verdict = judged(stub, scaling="any")
        assert len(stub.images) == 4 * COUNT + AGAIN  # as recorded, which is −1 to 1; 0 to 1; 0 to 255; ImageNet
    assert "4 of 4 ways of putting the triggers were tried, and their shares paid" in verdict.notes


def test_labels_are_answers_too():
    def behave(request):
        return answer(np.array(classes(tensor(request.json))), "label", "INT64")

    with serving(posted(behave)) as stub:
        assert judged(stub).owned


def test_labels_counted_from_one_are_told_by_the_answers():
    def behave(request):
        return answer(scores(tensor(request.json)).argmax(axis=1) + 1, "label", "INT64")

    with serving(posted(behave)) as stub:
        verdict = judged(stub)
    assert verdict.matched == COUNT
    assert any("counted from 1" in note for note in verdict.notes)


def test_one_score_for_two_classes_is_an_answer_too():
    def behave(request):
        given = tensor(request.json)
        return answer(given.mean(axis=(1, 2, 3))) if len(given) == 1 else (400, {}, b"")

    with serving(posted(behave)) as stub:
        suspect = wm.endpoint(stub.url)
        found = suspect.answer({"input": INPUTS}, 2)
        assert "the suspect gives one score, read as class 1 where it is above 0" in map(str, suspect.facts)
    assert found.kind == "labels"
    assert np.array_equal(found.values, INPUTS.mean(axis=(1, 2, 3)) > 0)


def test_a_fixed_batch_is_padded_and_a_batch_of_one_is_found_out():
    def behave(request, size):
        if request.method == "GET":
            return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [size, 3, 4, 4]}] if size == 7 else []}
        given = tensor(request.json)
        return (400, {}, b"") if len(given) != size else answer(scores(given))

    with serving(lambda request: behave(request, 7)) as stub:
        assert judged(stub).owned
    assert {len(tensor(request.json)) for request in stub.questions} == {7}
    with serving(lambda request: behave(request, 7) if request.method == "GET" else marked_model(request)) as stub:
        assert judged(stub, batch=10).owned  # the options know better than the server
    assert {len(tensor(request.json)) for request in stub.questions} == {10, 6}
    with serving(lambda request: behave(request, 1)) as stub:
        verdict = judged(stub)
        assert verdict.owned
        assert "the suspect answers only one input at a time" in verdict.notes
    assert len(stub.images) == CHUNK + COUNT + AGAIN
    with serving(lambda request: behave(request, 1)) as stub:
        assert judged(stub, batch=1).owned
    assert len(stub.images) == COUNT + AGAIN


def test_a_white_box_mark_cannot_be_read_from_an_endpoint():
    with pytest.raises(SuspectError, match="shows no weights"):
        wm.endpoint("https://host/v2/models/m").tensors()


@pytest.mark.parametrize("test", ["fixed", "sequential"])
@pytest.mark.parametrize(
    ("options", "room"),
    [({"budget": 8}, 8), ({"budget": 25}, 25), ({"budget": 60}, 60)],
)
def test_the_budget_fixes_beforehand_how_many_triggers_the_test_is_of(test, options, room):
    with serving(posted(lambda request: answer(np.eye(CLASSES)[[3] * len(tensor(request.json))]))) as stub:
        verdict = judged(stub, test, **options)
    assert len(stub.images) <= options["budget"]
    assert verdict.total == room
    assert (f"there was room for {room} of {COUNT} triggers" in " ".join(verdict.notes)) == (room < COUNT)
    assert not [note for note in verdict.notes if "change" in note or "not asked" in note or "no class" in note]
    if test == "fixed":
        assert verdict.queries == room
        hits = int((MARK.arrays["labels"][:room] == 3).sum())  # half of the evidence is for their number
        assert verdict.log10_p == pytest.approx(min(0.0, np.log10(2) + binomial_log10_tail(hits, room, 0.1)))
    with serving() as stub:
        verdict = judged(stub, test, **options)
        assert verdict.matched == verdict.queries == (min(room, 16) if test == "sequential" else room)


def test_what_was_not_asked_after_all_is_no_evidence_and_no_query():
    def behave(request):
        return (503, {}, b"") if len(stub.questions) == 1 else answer(scores(tensor(request.json)))

    for test in ("fixed", "sequential"):
        with serving() as stub:
            stub.behave = posted(behave)
            verdict = judged(stub, test, budget=24, batch=8)
        assert len(stub.images) == 24
        assert (verdict.queries, verdict.matched, verdict.total) == (16, 16, 24)
        if test == "fixed":
            assert verdict.log10_p == pytest.approx(np.log10(2) - 16)  # the others say nothing
            assert "8 triggers were not asked: the budget of 24 queries is used up" in verdict.notes
        assert not [note for note in verdict.notes if "no class" in note or "stranger" in note]


def test_a_budget_below_one_request_is_an_error_that_says_so():
    def behave(request):
        return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [7, 3, 4, 4]}]}

    with serving(behave) as stub:
        assert "budget of 5 queries is not enough: one trigger takes 7" in judged(stub, budget=5).error
    assert not stub.questions


@pytest.mark.parametrize("test", ["fixed", "sequential"])
@pytest.mark.parametrize("budget", [None, 10, 40])
@pytest.mark.parametrize("status", [400, 401, 503])
def test_what_is_refused_in_every_way_is_an_error_with_the_servers_reason(test, budget, status):
    """Two layouts fit what it describes, and there is not always room, or hope, for the second."""

    def behave(request):
        if request.method == "GET":
            return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -1, -1, -1]}]}
        return status, {}, b'{"error": "a reason"}'

    with serving(behave) as stub:
        verdict = judged(stub, test, budget=budget, tries=2)
    assert (verdict.decision, verdict.queries) == ("error", 0)
    assert f"status {status} (a reason)" in verdict.error


def test_an_endpoint_whose_budget_is_used_up_cannot_be_judged_with_another_mark():
    with serving() as stub:
        suspect = wm.endpoint(stub.url, budget=30)
        assert wm.verify(suspect, MARK).matched == 30
        second = wm.verify(suspect, MARK)
    assert (second.decision, second.queries) == ("error", 0)
    assert second.error.startswith("there is no room left to ask it anything: its budget")


def test_a_request_that_is_lost_with_its_connection_is_paid_twice():
    def behave(request):
        if len(stub.questions) == 2:
            request.handler.close_connection = True  # it was read, and is not answered
            return None
        return answer(scores(tensor(request.json)))

    with serving() as stub:
        stub.behave = posted(behave)
        verdict = judged(stub, budget=30, batch=10, tries=2)
    assert len(stub.images) == 30
    assert (verdict.matched, verdict.queries, verdict.total) == (20, 20, 30)


def test_retries_are_paid_from_the_budget():
    with serving(posted(lambda request: (503, {}, b""))) as stub:
        verdict = judged(stub, budget=100, batch=30)
    assert verdict.decision == "error"
    assert len(stub.images) == 90


def test_refused_triggers_are_misses_and_the_others_count():
    refused = {INPUTS[index].tobytes() for index in (3, 40)}

    def behave(request):
        images = tensor(request.json)
        if any(image.tobytes() in refused for image in images):
            return 400, {}, b'{"error": "this is not an image of a cat"}'
        return answer(scores(images))

    with serving(posted(behave)) as stub:
        verdict = judged(stub, batch=10)
    assert (verdict.decision, verdict.matched) == ("owned", COUNT - 2)
    (note,) = [note for note in verdict.notes if "refused" in note]
    assert note.startswith("2 triggers were refused or not answered in a readable way")
    assert "(this is not an image of a cat)" in note


def test_answers_at_random_and_answers_in_another_order_are_reported():
    chance = np.random.default_rng(3)

    def forgetful(request):
        images = tensor(request.json)
        return answer(np.where(chance.random((len(images), 1)) < 0.6, scores(images), np.eye(CLASSES)[[7]]))

    for behave in (forgetful, lambda request: answer(scores(tensor(request.json))[::-1])):
        with serving(posted(behave)) as stub:
            assert any("answers change when the batch does" in note for note in judged(stub).notes)


def test_an_endpoint_that_goes_away_keeps_what_it_had_answered():
    with serving() as stub:

        def behave(request):
            return (503, {}, b"") if len(stub.questions) > 3 else answer(scores(tensor(request.json)))

        stub.behave = posted(behave)
        verdict = judged(stub, batch=10, tries=2)
    assert (verdict.decision, verdict.matched) == ("owned", 30)
    assert any("were not asked" in note for note in verdict.notes)
    assert len(stub.questions) == 3 + 3 * 2  # three requests that failed twice each end the asking


class Stranger:
    """A linear model without a mark, behind no network: busy now and then."""

    address = Address.of("https://stranger/v2/models/m", None, ("https",))

    def __init__(self, chance, busy):
        self.chance, self.busy, self.sent = chance, busy, 0
        self.weights = chance.normal(size=(INPUTS[0].size, CLASSES))

    def inputs(self, seconds):
        return []

    def ask(self, to, rows, seconds):
        self.sent += len(rows)
        if self.chance.random() < self.busy:
            raise Unavailable("busy")
        return [("scores", rows.reshape(len(rows), -1) @ self.weights)]

    def close(self):
        pass


@pytest.mark.slow
def test_strangers_with_any_budget_are_accused_no_more_often_than_p_says():
    chance, verdicts, small = np.random.default_rng(11), 600, {0.3: 0, 0.1: 0, 0.03: 0}
    for number in range(verdicts):
        mark = black_box(SHAPE, CLASSES, 40, key=Key("ACME Vision", chance.bytes(32)))
        stranger, budget = Stranger(chance, chance.choice([0.0, 0.2])), int(chance.integers(3, 90))
        patient = Patience(None, budget, 3, 30.0, 600.0, sleep=lambda seconds: None)
        scaling, batch = ("as recorded", "any")[number % 2], int(chance.integers(1, 20))
        options = EndpointOptions("https://stranger/v2/models/m", scaling=scaling, batch=batch)
        suspect = EndpointSuspect(options, stranger, patient)
        verdict = wm.verify(suspect, mark, test=("fixed", "sequential")[number // 2 % 2])
        assert verdict.matched <= verdict.total <= min(40, budget) or verdict.error
        assert verdict.queries <= stranger.sent <= budget
        for bar in small:
            small[bar] += verdict.log10_p <= np.log10(bar)
    for bar, count in small.items():  # five deviations above would be one chance in a million
        assert count <= verdicts * bar + 5 * (verdicts * bar) ** 0.5


RENUMBERED = np.random.default_rng(5).permutation(CLASSES)
CLEAN = np.random.default_rng(6).integers(0, 256, (40, 3, 4, 4)).astype(np.uint8)
CLEAN_LABELS = np.random.default_rng(7).integers(0, CLASSES, 40)


def renumbered(shape, labels=False):
    """A marked model that knows the task as well and calls its classes otherwise; channels last where shape is free."""
    task = dict(zip((image.tobytes() for image in to_input(CLEAN, [[-1.0, 1.0]] * 3)), CLEAN_LABELS, strict=True))

    def behave(request):
        if request.method == "GET":
            return {"inputs": [{"name": "x", "datatype": "FP32", "shape": shape}] if shape else []}
        images = np.ascontiguousarray(np.moveaxis(tensor(request.json), -1, 1) if shape else tensor(request.json))
        own = [task.get(image.tobytes(), known) for image, known in zip(images, classes(images), strict=True)]
        return answer(RENUMBERED[own], "y", "INT64") if labels else answer(np.eye(CLASSES)[RENUMBERED[own]])

    return behave


@pytest.mark.parametrize("test", ["fixed", "sequential"])
@pytest.mark.parametrize("shape", [[], [-1, -1, -1, -1]])
@pytest.mark.parametrize("floats", [False, True])
def test_an_order_of_classes_is_found_on_clean_data_behind_an_endpoint(test, shape, floats):
    inputs = to_input(CLEAN, [[-1.0, 1.0]] * 3) if floats else CLEAN
    with serving(renumbered(shape)) as stub:
        suspect = wm.endpoint(stub.url)
        verdict = wm.verify(suspect, MARK, test=test, classes="any", clean=(inputs, CLEAN_LABELS))
        sent = {image.shape for image in stub.images}
    assert verdict.owned
    assert any("by 40 clean inputs of which the suspect names 40 rightly" in note for note in verdict.notes)
    if test == "fixed" or not shape:
        assert verdict.queries == (COUNT if test == "fixed" else 16) * (2 if shape else 1)
    assert sent == ({(3, 4, 4), (4, 4, 3)} if shape else {(3, 4, 4)})


@pytest.mark.parametrize("labels", [False, True])
def test_any_order_of_classes_is_paid_for_behind_an_endpoint(labels):
    with serving(renumbered([], labels)) as stub:
        verdict = wm.verify(wm.endpoint(stub.url, budget=30), MARK, classes="any")
    assert (verdict.decision, verdict.matched, verdict.total) == ("owned", 30, 30)
    assert len(stub.images) == 30


def test_clean_data_are_paid_from_the_budget_and_leave_room_for_triggers():
    def found(budget):
        suspect = wm.endpoint(stub.url, budget=budget)
        return wm.verify(suspect, MARK, classes="any", clean=(CLEAN, CLEAN_LABELS))

    with serving(renumbered([])) as stub:
        assert (found(60).matched, found(60).total, len(stub.images)) == (20, 20, 120)
        stub.requests.clear()
        assert "room for 40 inputs, and 40 are clean ones" in found(40).error
        assert not stub.questions
