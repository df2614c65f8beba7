"""What endpoints promise about manners: a rate, pauses that double, a deadline, and when to stop asking."""

import datetime

import pytest
from endpoint_stub import MARK, answer, judged, posted, scores, serving, tensor

import wmengine as wm
from wmengine.suspects.endpoint import patience
from wmengine.suspects.endpoint.options import EndpointOptions
from wmengine.suspects.endpoint.patience import Patience, Refused, Spent, Unavailable
from wmengine.suspects.endpoint.suspect import EndpointSuspect

pytestmark = pytest.mark.usefixtures("no_long_pauses")


class Time:
    def __init__(self):
        self.now, self.pauses = 100.0, []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


def patient(rate=None, budget=None, tries=5, timeout=30.0, deadline=600.0):
    time = Time()
    return Patience(rate, budget, tries, timeout, deadline, clock=time.clock, sleep=time.sleep), time


def test_a_rate_and_a_deadline_are_a_budget_too():
    with serving() as stub:
        options = EndpointOptions(stub.url, rate=10.0, deadline=4.0, batch=20)
        verdict = wm.verify(EndpointSuspect(options, patience=patient(rate=10.0, deadline=4.0)[0]), MARK)
    assert (verdict.queries, verdict.matched, verdict.total) == (40, 40, 40)


def test_the_rate_is_of_inputs_and_holds_over_requests():
    asking, time = patient(rate=5.0)
    starts = []
    for inputs in (10, 5, 0, 1):
        asking.call(lambda seconds: starts.append(time.now), inputs)
    assert starts == pytest.approx([100, 102, 102, 103])


def test_pauses_double_with_chance_and_tries_are_counted(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.5)
    asking, time = patient(tries=9)
    tried = []

    def fail(seconds):
        tried.append(seconds)
        raise Unavailable("busy")

    with pytest.raises(Unavailable, match="busy"):
        asking.call(fail, 1)
    assert tried == [30.0] * 9
    for pause, longest in zip(time.pauses, (0.5, 1, 2, 4, 8, 16, 30, 30), strict=True):
        assert longest / 2 <= pause <= longest
    assert len({pause / longest for pause, longest in zip(time.pauses, (0.5, 1, 2, 4), strict=False)}) > 1


def test_no_try_begins_or_lasts_beyond_the_deadline():
    asking, time = patient(timeout=30, deadline=40)
    allowed = []

    def slow(seconds):
        allowed.append(seconds)
        time.now += seconds
        raise Unavailable("slow")

    with pytest.raises(Spent, match="slow, and the next try would be after the deadline"):
        asking.call(slow, 1)
    assert allowed[0] == 30
    assert 9 < allowed[1] < 10.001
    asking, _ = patient(rate=0.01, deadline=40)
    asking.call(lambda seconds: None, 1)
    with pytest.raises(Spent, match="deadline of 40 seconds"):
        asking.call(lambda seconds: None, 1)


def test_what_is_final_is_not_tried_again():
    asking, _ = patient()

    def refuse(seconds):
        asking.calls = getattr(asking, "calls", 0) + 1
        raise Refused("no")

    with pytest.raises(Refused):
        asking.call(refuse, 1)
    assert asking.calls == 1


def test_retry_after_is_honoured_as_seconds_and_as_a_date():
    def in_seconds(seconds):
        date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
        return date.strftime("%a, %d %b %Y %H:%M:%S GMT")

    for value, least in ((lambda: "100", 100), (lambda: in_seconds(100), 90)):
        with serving() as stub:

            def behave(request, value=value, stub=stub):
                if len(stub.questions) == 1:
                    return 429, {"Retry-After": value()}, b""
                return answer(scores(tensor(request.json)))

            stub.behave = posted(behave)
            asking, time = patient()
            assert wm.verify(EndpointSuspect(EndpointOptions(stub.url), patience=asking), MARK).owned
            assert len(time.pauses) == 1
            assert least <= time.pauses[0] <= 100
    with serving(posted(lambda request: (429, {"Retry-After": "86400"}, b""))) as stub:
        verdict = judged(stub)
        assert "status 429" in verdict.error
        assert len(stub.questions) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_failures_are_tried_again(status):
    with serving() as stub:

        def behave(request):
            return (status, {}, b"busy") if len(stub.questions) % 2 else answer(scores(tensor(request.json)))

        stub.behave = posted(behave)
        assert judged(stub).owned


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_a_wrong_address_or_token_is_not_tried_again(status):
    with serving(lambda request: (status, {}, b'{"error": "go away"}')) as stub:
        verdict = judged(stub)
        assert verdict.decision == "error"
        assert f"status {status} (go away)" in verdict.error
        assert len(stub.questions) == 1


def test_an_endpoint_that_always_fails_is_given_up_and_is_an_error():
    with serving(posted(lambda request: (500, {}, b""))) as stub:
        verdict = judged(stub, tries=4)
    assert verdict.decision == "error"
    assert "status 500" in verdict.error
    assert len(stub.questions) == 3 * 4


def test_nothing_listening_is_an_error_after_the_tries():
    with serving() as stub:
        url = stub.url
    verdict = wm.verify(wm.endpoint(url), MARK)
    assert verdict.decision == "error"
    assert "refused" in verdict.error
