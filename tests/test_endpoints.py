"""What endpoints promise: the mark is found behind them, little is sent and nothing secret, and no answer harms us."""

import datetime
import ipaddress
import json
import random
import ssl
import time
from collections import Counter

import numpy as np
import pytest
from endpoint_stub import (
    CLASSES,
    COUNT,
    INPUTS,
    MARK,
    answer,
    classes,
    is_trigger,
    marked_model,
    scores,
    serving,
    tensor,
)

import wmengine as wm
from wmengine.errors import SuspectError
from wmengine.stats import binomial_log10_tail
from wmengine.suspects import patience
from wmengine.suspects.base import CHUNK
from wmengine.suspects.patience import Patience, Refused, Spent, Unavailable

# Then `verify` asks eight triggers twice once more, to see whether answers depend on the batch.
AGAIN = 16


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.001)


def judged(stub, queries="all", url=None, **options):
    suspect = wm.endpoint(url or stub.url, **options)
    try:
        return wm.verify(suspect, MARK, queries=queries)
    finally:
        suspect.close()


def posted(behave):
    """A behaviour that describes nothing and answers questions so."""
    return lambda request: marked_model(request) if request.method == "GET" else behave(request)


# --- the mark is found ------------------------------------------------------------------------------------------------


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
    assert "4 ways of putting the triggers were tried and paid for" in verdict.notes


def test_labels_are_answers_too():
    def behave(request):
        return answer(np.array(classes(tensor(request.json))), "label", "INT64")

    with serving(posted(behave)) as stub:
        assert judged(stub).owned


def test_one_score_for_two_classes_is_an_answer_too():
    def behave(request):
        given = tensor(request.json)
        return answer(given.mean(axis=(1, 2, 3))) if len(given) == 1 else (400, {}, b"")

    with serving(posted(behave)) as stub:
        suspect = wm.endpoint(stub.url)
        found = suspect.query(INPUTS, 2)
        assert "the suspect gives one score, read as class 1 where it is above 0" in suspect.notes
    assert np.array_equal(found, INPUTS.mean(axis=(1, 2, 3)) > 0)


def test_a_fixed_batch_is_padded_and_a_batch_of_one_is_found_out():
    def behave(request, size):
        if request.method == "GET":
            return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [size, 3, 4, 4]}] if size == 7 else []}
        given = tensor(request.json)
        return (400, {}, b"") if len(given) != size else answer(scores(given))

    with serving(lambda request: behave(request, 7)) as stub:
        assert judged(stub).owned
    assert {len(tensor(request.json)) for request in stub.questions} == {7}
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


# --- budget, decoys, refusals -----------------------------------------------------------------------------------------


def test_the_budget_is_kept_and_what_was_not_asked_is_a_miss():
    with serving() as stub:
        verdict = judged(stub, budget=25)
    assert len(stub.images) == 25
    assert verdict.matched == 25
    assert verdict.log10_p == pytest.approx(binomial_log10_tail(25, COUNT, 0.1))
    assert "35 triggers were not asked: the budget of 25 queries is used up" in verdict.notes
    assert not [note for note in verdict.notes if "change" in note]
    with serving() as stub:
        verdict = judged(stub, budget=40, decoys=1)
    assert (len(stub.images), verdict.matched) == (40, 20)


def test_retries_are_paid_from_the_budget():
    with serving(posted(lambda request: (503, {}, b""))) as stub:
        verdict = judged(stub, budget=100, batch=30)
    assert verdict.decision == "error"
    assert len(stub.images) == 90


def test_decoys_are_shuffled_in_and_their_answers_are_not_looked_at():
    with serving() as stub:
        verdict = judged(stub, decoys=1.5)
        assert (verdict.decision, verdict.matched, verdict.queries) == ("owned", COUNT, COUNT)
        sent = stub.images
        own = [is_trigger(image) for image in sent[:-AGAIN]]
        assert sum(own[: COUNT // 2]) < COUNT // 2 - 5  # mixed: not the triggers first
        assert 2.2 * COUNT < len({image.tobytes() for image in sent}) < 2.8 * COUNT
        # Decoys look like triggers, and repeat as triggers do.
        others = [image for image in sent if not is_trigger(image)]
        assert all(image.min() == -1 and image.max() == 1 for image in others)
        counts = Counter(image.tobytes() for image in sent)
        repeated = [content for content, count in counts.items() if count == 3]
        assert len(repeated) > 8
        first = {image.tobytes() for image in others}
        stub.requests.clear()
        judged(stub, decoys=1.5)
        assert not first & {image.tobytes() for image in stub.images if not is_trigger(image)}


@pytest.mark.parametrize("options", [{"layout": "channels last"}, {"datatype": "UINT8"}, {"scaling": "0 to 255"}])
def test_decoys_are_put_as_triggers_are(options):
    with serving(posted(lambda request: answer(np.eye(CLASSES)[[3] * len(tensor(request.json))]))) as stub:
        judged(stub, decoys=1, **options)
    assert len(stub.images) == 2 * (COUNT + AGAIN)
    assert len({(image.shape, float(image.min()), float(image.max())) for image in stub.images}) == 1


def test_decoys_find_the_way_among_several():
    with serving(posted(lambda request: answer(np.eye(CLASSES)[[3] * len(tensor(request.json))]))) as stub:
        judged(stub, decoys=1, scaling="any")
    ranges = Counter((float(image.min()), float(image.max())) for image in stub.images)
    assert ranges[-1, 1] == 2 * (COUNT + AGAIN)
    assert ranges[0, 1] == ranges[0, 255] == 2 * COUNT
    assert len(stub.images) == 2 * (4 * COUNT + AGAIN)


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


def test_an_endpoint_that_goes_away_keeps_what_it_had_answered():
    with serving() as stub:

        def behave(request):
            return (503, {}, b"") if len(stub.questions) > 3 else answer(scores(tensor(request.json)))

        stub.behave = posted(behave)
        verdict = judged(stub, batch=10, tries=2)
    assert (verdict.decision, verdict.matched) == ("owned", 30)
    assert any("were not asked" in note for note in verdict.notes)
    assert len(stub.questions) == 3 + 3 * 2  # three requests that failed twice each end the asking


# --- patience ---------------------------------------------------------------------------------------------------------


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

    for value in (lambda: "1", lambda: in_seconds(2)):
        with serving() as stub:

            def behave(request, value=value, stub=stub):
                if len(stub.questions) == 1:
                    return 429, {"Retry-After": value()}, b""
                return answer(scores(tensor(request.json)))

            stub.behave = posted(behave)
            started = time.monotonic()
            assert judged(stub).owned
            assert 0.8 < time.monotonic() - started < 3
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
    assert verdict.seconds < 2


# --- hostile answers --------------------------------------------------------------------------------------------------


def one_output(datatype, data, shape=b"[1]"):
    return b'{"outputs": [{"name": "y", "shape": %s, "datatype": "%s", "data": %s}]}' % (shape, datatype, data)


GARBAGE = {
    "empty": b"",
    "text": b"<html>hello</html>",
    "not utf-8": b'{"outputs": "\xff"}',
    "nested": b"[" * 200_000,
    "nested data": one_output(b"FP32", b"[" * 900 + b"]" * 900),
    "a list": b"[1, 2]",
    "null": b"null",
    "no outputs": b"{}",
    "outputs of numbers": b'{"outputs": [1]}',
    "no shape": b'{"outputs": [{"name": "y", "datatype": "FP32", "data": [1]}]}',
    "an odd shape": one_output(b"FP32", b"[1]", b"[-1, 1.5]"),
    "a huge shape": one_output(b"FP32", b"[1]", b"[99999999999999999999]"),
    "an odd type": b'{"outputs": [{"name": "y", "shape": [1], "datatype": ["FP32"], "data": [1]}]}',
    "texts": one_output(b"FP32", b'["x"]'),
    "class names": one_output(b"BYTES", b'["cat"]'),
    "objects": one_output(b"FP32", b"[{}]"),
    "huge integers": one_output(b"INT64", b"[" + b"9" * 4000 + b"]"),
    "too many digits": one_output(b"INT64", b"[" + b"9" * 9000 + b"]"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_one_line_of_error(name):
    with serving(lambda request: (200, {}, GARBAGE[name])) as stub:
        verdict = judged(stub)
    assert verdict.decision == "error"
    assert stub.url in verdict.error
    assert "\n" not in verdict.error
    assert len(verdict.error) < 400


@pytest.mark.parametrize("seed", range(2))
def test_mutated_answers_only_ever_give_one_sentence(seed):
    chance = random.Random(seed)
    body = one_output(b"FP32", b"[1, 2, 3, 4, 5, 6]", b"[2, 3]")
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    parts = [b"NaN", b"-1", b"[", b"{}", b"null", b"1e400", b"INT64", b"\r\n", b"Transfer-Encoding: chunked\r\n"]

    def behave(request):
        changed = bytearray(whole)
        for _ in range(chance.randrange(6)):
            place = chance.randrange(len(changed))
            changed[place : place + chance.randrange(8)] = chance.choice([*parts, b"", chance.randbytes(3)])
        request.handler.wfile.write(changed)
        request.handler.close_connection = True

    answered = 0
    with serving(behave) as stub:
        for _ in range(100):
            options = {"input": "x", "datatype": "FP32", "layout": "as recorded"}
            suspect = wm.endpoint(stub.url, **options, tries=1, timeout=0.3, deadline=0.6)
            said = "one sentence"
            try:
                answered += len(suspect.query(INPUTS[:2])) == 2
            except SuspectError as error:
                said = str(error)
            assert "\n" not in said
            assert len(said) < 500
    assert 10 < answered < 90


def test_nan_and_infinity_are_abstentions():
    def behave(request):
        found = scores(tensor(request.json)).astype(object)
        text = json.dumps(answer(found))
        return 200, {}, text.replace("1.0", "NaN", 1).replace("1.0", "1e999", 1).encode()

    with serving(posted(behave)) as stub:
        verdict = judged(stub)
    assert (verdict.decision, verdict.matched) == ("owned", COUNT - 4)
    assert f"4 of {COUNT} answers hold NaN or Inf or name no class, and count as misses" in verdict.notes


def test_another_task_is_refused_naming_both_numbers_of_classes():
    with serving(posted(lambda request: answer(np.zeros((len(tensor(request.json)), 1000))))) as stub:
        assert "1000 classes and the watermark has 10" in judged(stub).error


def drip(request, lines):
    """Bytes without end, one every tenth of a second, which no timeout of a socket would notice."""
    request.handler.wfile.write(lines)
    while True:
        time.sleep(0.05)
        request.handler.wfile.write(b"x")


@pytest.mark.parametrize(
    "lines", [b"", b"HTTP/1.1 200 OK\r\nX-Long: ", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"]
)
def test_a_slow_answer_is_cut_off_in_time(lines):
    with serving(posted(lambda request: drip(request, lines))) as stub:
        started = time.monotonic()
        verdict = judged(stub, timeout=0.3, deadline=0.8)
        assert time.monotonic() - started < 1.5
    assert verdict.decision == "error"
    assert "does not answer within" in verdict.error


def test_an_answer_cut_off_in_time_is_not_taken_for_a_whole_one():
    with serving(posted(lambda request: drip(request, b"HTTP/1.0 200 OK\r\n\r\n"))) as stub:
        assert "does not answer within" in judged(stub, timeout=0.2, deadline=0.3).error


def test_an_answer_without_end_is_cut_off_by_size():
    def flood(request):
        request.handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            request.handler.wfile.write(b"4000\r\n" + b" " * 0x4000 + b"\r\n")

    for behave in (flood, lambda request: (200, {"Content-Length": str(10**15)}, b" " * 200_000)):
        with serving(posted(behave)) as stub:
            suspect = wm.endpoint(stub.url, batch=60, tries=1)
            suspect._model.client.limit = 100_000
            verdict = wm.verify(suspect, MARK)
        assert verdict.decision == "error"
        assert "more than 100000 bytes" in verdict.error


def test_redirects_to_other_hosts_are_refused_and_those_at_home_are_followed():
    with serving() as other, serving() as stub:
        stub.behave = lambda request: (307, {"Location": f"{other.url}/infer"}, b"")
        verdict = judged(stub)
        assert "nothing is sent to other hosts" in verdict.error
        assert other.requests == []
        stub.behave = lambda request: (302, {"Location": "/v2/models/detector"}, b"")
        assert "redirects again and again" in judged(stub).error

        def moved(request):
            if "new" not in request.path:
                return 308, {"Location": request.path.replace("detector", "new")}, b""
            return marked_model(request)

        stub.behave = moved
        assert judged(stub).owned


def test_a_connection_that_was_closed_meanwhile_is_opened_again():
    def behave(request):
        request.handler.close_connection = True  # without a word about it
        return marked_model(request)

    with serving(behave) as stub:
        assert judged(stub, tries=1, batch=20).owned
    assert len(stub.questions) == 4


def test_compressed_answers_are_not_unpacked():
    with serving(posted(lambda request: (200, {"Content-Encoding": "gzip"}, b"x"))) as stub:
        assert "compresses its answer" in judged(stub).error


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate of 127.0.0.1, and a server's context with it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stub")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key").write_bytes(key.private_bytes(*private))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "crt", folder / "key")
    return folder / "crt", context


def test_tls_is_verified(certificate, monkeypatch):
    path, context = certificate
    with serving(tls=context) as stub:
        verdict = judged(stub)
        assert "no valid certificate" in verdict.error
        assert stub.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        assert judged(stub).owned


def test_a_slow_answer_over_tls_is_cut_off_in_time(certificate, monkeypatch):
    path, context = certificate
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with serving(posted(lambda request: drip(request, b"HTTP/1.1 200 OK\r\nX-Long: ")), tls=context) as stub:
        verdict = judged(stub, timeout=0.3, deadline=0.5)
    assert "does not answer within" in verdict.error
    assert verdict.seconds < 1.5


def test_tokens_come_from_the_environment_and_show_up_nowhere(monkeypatch):
    monkeypatch.setenv("STUB_TOKEN", "s3cret-token")
    headers = {"Authorization": "Bearer ${STUB_TOKEN}"}

    def behave(request):
        said = json.dumps({"error": f"who is {request.headers['Authorization']}?"}).encode()
        return marked_model(request) if behave.open else (403, {}, said)

    behave.open = True
    with serving(behave) as stub:
        assert judged(stub, headers=headers).owned
        assert stub.requests[-1].headers["Authorization"] == "Bearer s3cret-token"
        behave.open = False
        verdict = judged(stub, headers=headers)
    assert "s3cret" not in verdict.to_json()
    assert "who is Bearer ***?" in verdict.error
    monkeypatch.delenv("STUB_TOKEN")
    with pytest.raises(ValueError, match="environment variable STUB_TOKEN, and it is not set"):
        wm.endpoint("https://host/v2/models/m", headers=headers)


def test_tokens_are_not_sent_in_the_clear(monkeypatch):
    monkeypatch.setenv("STUB_TOKEN", "s3cret-token")
    for url in ("http://example.com/v2/models/m", "grpc://example.com:80/m"):
        with pytest.raises(ValueError, match="is not encrypted"):
            wm.endpoint(url, headers={"x-key": "${STUB_TOKEN}"})
    assert wm.endpoint("https://example.com/v2/models/m", headers={"x-key": "${STUB_TOKEN}"})


# --- templates --------------------------------------------------------------------------------------------------------


def test_a_batch_as_lists_with_scores_somewhere_in_the_answer():
    def behave(request):
        assert request.json["parameters"] == {"top": 10}
        images = np.array(request.json["instances"], np.float32)
        found = [{"scores/all": {f"c{n}": score for n, score in enumerate(row)}} for row in scores(images).tolist()]
        return {"result": [{"rows": found}]}

    request = {
        "body": {"instances": "${inputs}", "parameters": {"top": 10}},
        "answers": "/result/0/rows",
        "scores": "/scores~1all",
        "labels": [f"c{number}" for number in range(CLASSES)],
    }
    with serving(behave) as stub:
        assert judged(stub, url=f"{stub.origin}/classify?version=2", request=request).owned
    assert {request.path for request in stub.requests} == {"/classify?version=2"}
    assert len(stub.requests) == 3


@pytest.mark.parametrize("encoding", ["png", "bytes", "list"])
def test_one_image_at_a_time_with_the_name_of_its_class(encoding):
    import base64
    import io

    from PIL import Image

    labels = dict(zip((image.tobytes() for image in MARK.arrays["triggers"]), MARK.arrays["labels"], strict=True))
    names = [f"kind {number}" for number in range(CLASSES)]

    def behave(request):
        content = request.json["image"]["data"]
        if encoding == "png":
            pixels = np.moveaxis(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))), -1, 0)
        elif encoding == "bytes":
            pixels = np.moveaxis(np.frombuffer(base64.b64decode(content), np.uint8).reshape(4, 4, 3), -1, 0)
        else:
            pixels = np.moveaxis(np.array(content, np.uint8), -1, 0)
        label = labels[np.ascontiguousarray(pixels).tobytes()]
        return [{"label": names[label] if label else "none of these", "score": 0.9}]

    options = {} if encoding == "png" else {"datatype": "UINT8", "layout": "channels last"}
    request = {"body": {"image": {"data": "${input}"}}, "encoding": encoding, "label": "/0/label", "labels": names}
    with serving(behave) as stub:
        verdict = judged(stub, request={**request, "method": "PUT"}, **options)
    assert verdict.owned
    assert verdict.matched == (MARK.arrays["labels"] > 0).sum()
    assert stub.requests[0].method == "PUT"


def test_what_is_no_image_is_no_png():
    with serving(lambda request: []) as stub:
        suspect = wm.endpoint(stub.url, request={"body": "${input}", "encoding": "png", "label": ""})
        with pytest.raises(SuspectError, match=r"inputs \[2, 4, 4\] are no images"):
            suspect.query(np.zeros((3, 2, 4, 4), np.uint8))
        assert stub.requests == []


def test_a_grey_image_is_a_grey_png():
    import io

    from PIL import Image

    from wmengine.suspects.request_template import encode_png

    image = np.random.default_rng(0).integers(0, 256, (1, 5, 9), np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(image)))), image[0])


@pytest.mark.parametrize(
    "document",
    [{}, {"rows": 3}, {"rows": [1]}, {"rows": [["x"] * 9] * 60}, {"rows": [{}] * 60}, {"rows": [[]] * 60}, [], 5],
)
def test_a_template_that_does_not_fit_the_answer_is_an_error(document):
    with serving(lambda request: document) as stub:
        verdict = judged(
            stub, batch=60, request={"body": {"x": "${inputs}"}, "answers": "/rows", "scores": ""}, tries=1
        )
    assert verdict.decision == "error"


def test_names_without_labels_are_an_error_that_says_so():
    with serving(lambda request: {"label": "cat"}) as stub:
        verdict = judged(stub, request={"body": ["${input}"], "label": "/label"})
    assert "the template gives no labels" in verdict.error


GOOD = {"body": {"x": "${inputs}"}, "scores": ""}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({**GOOD, "lable": ""}, "no field 'lable'"),
        ({**GOOD, "method": "GET"}, "POST or PUT"),
        ({**GOOD, "encoding": "jpeg"}, "one of list, png, bytes"),
        ({**GOOD, "body": {"x": "all of ${inputs}"}}, "once, as a value of its own"),
        ({**GOOD, "body": ["${inputs}", "${input}"]}, "once, as a value of its own"),
        ({"scores": ""}, "once, as a value of its own"),
        ({"body": "${inputs}"}, "either scores or label"),
        ({**GOOD, "label": ""}, "either scores or label"),
        ({**GOOD, "scores": "a"}, "scores must be a JSON pointer"),
        ({**GOOD, "answers": 3}, "answers must be a JSON pointer"),
        ({"body": "${input}", "answers": "/a", "scores": ""}, "the whole answer is that of one input"),
        ({**GOOD, "labels": ["a", "a"]}, "names of all classes"),
        ({**GOOD, "labels": "ab"}, "names of all classes"),
    ],
)
def test_a_template_that_is_none_is_refused_before_anything_is_sent(request_, said):
    with pytest.raises(ValueError, match=said):
        wm.endpoint("https://host/", request=request_)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("https://host/model.onnx", {}, "downloaded first"),
        ("https://host/v2/models/m?token=x", {}, "is no model of the Open Inference Protocol"),
        ("https://user:word@host/v2/models/m", {}, "no password"),
        ("https://host:0/v2/models/m", {}, "an endpoint is https://HOST"),
        ("https://host:port/v2/models/m", {}, "an endpoint is https://HOST"),
        ("https:///v2/models/m", {}, "an endpoint is https://HOST"),
        ("ftp://host/v2/models/m", {}, "begins with https"),
        ("grpc://host/m", {}, "grpc://HOST:PORT/NAME"),
        ("grpc://host:1/a/b/c", {}, "grpc://HOST:PORT/NAME"),
        ("https://host/v2/models/m", {"budget": 0}, "budget must be a whole number above 0"),
        ("https://host/v2/models/m", {"batch": 2.5}, "batch must be a whole number"),
        ("https://host/v2/models/m", {"rate": float("nan")}, "rate must be a number above 0"),
        ("https://host/v2/models/m", {"timeout": None}, "timeout must be a number above 0"),
        ("https://host/v2/models/m", {"decoys": -1}, "decoys must be from 0"),
        ("https://host/v2/models/m", {"layout": "NHWC"}, "layout must be one of as recorded, channels last"),
        ("https://host/v2/models/m", {"scaling": "0-1"}, "scaling must be one of any, as recorded"),
        ("https://host/v2/models/m", {"datatype": "INT8"}, "datatype must be one of FP32"),
        ("https://host/v2/models/m", {"input": 3}, "input must be a name"),
        ("https://host/v2/models/m", {"headers": {"Host": "x"}}, "'Host', which is no header of your own"),
        ("https://host/v2/models/m", {"headers": {"a": "b\nc"}}, "printable ASCII"),
        ("https://host/", {"request": GOOD, "input": "x"}, "names of the Open Inference Protocol"),
        ("https://host/", {"request": {**GOOD, "encoding": "png"}, "datatype": "FP32"}, "a PNG holds bytes"),
        ("https://host/", {"request": {"body": "${input}", "label": ""}, "batch": 2}, "leave batch out"),
    ],
)
def test_what_is_no_endpoint_is_the_callers_mistake(url, options, said):
    with pytest.raises(ValueError, match=said):
        wm.endpoint(url, **options)


def test_the_command_line_takes_urls_and_options(tmp_path, capfd):
    from wmengine.cli import main

    MARK.save(tmp_path / "m.wm")
    options = tmp_path / "options.json"
    options.write_text('{"budget": 70, "batch": 20, "layout": "as recorded"}')
    mark = ["--watermark", str(tmp_path / "m.wm"), "--json"]
    with serving() as stub:
        assert main(["verify", stub.url, *mark]) == 0
        stub.requests.clear()
        assert main(["verify", stub.url, *mark, "--endpoint-options", str(options)]) == 0
        assert len(stub.images) == 70
        assert {len(tensor(request.json)) for request in stub.questions} <= {20, 10}
        capfd.readouterr()
        for content, said in (
            ("{", "is no JSON"),
            ("[]", "must hold one JSON object"),
            ('{"bugdet": 3}', "holds 'bugdet', which is no option; these are: request, headers, input"),
            ('{"headers": 3}', "headers must be a JSON object"),
        ):
            options.write_text(content)
            assert main(["verify", stub.url, *mark, "--endpoint-options", str(options)]) == 2
            assert said in capfd.readouterr().err
    assert main(["verify", str(tmp_path / "m.onnx"), *mark, "--endpoint-options", str(options)]) == 2


# --- documents --------------------------------------------------------------------------------------------------------


def test_the_templates_in_the_documents_work(tmp_path, monkeypatch):
    import base64
    import io
    import re
    from pathlib import Path

    from PIL import Image

    from wmengine.suspects.endpoint import read_options

    page = (Path(__file__).resolve().parent.parent / "docs" / "endpoints.md").read_text(encoding="utf-8")
    pngs, lists = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    labels = dict(zip((image.tobytes() for image in MARK.arrays["triggers"]), MARK.arrays["labels"], strict=True))

    def label(pixels):
        return labels[np.ascontiguousarray(np.moveaxis(pixels, -1, 0)).tobytes()]

    def behave(request):
        if "images" in request.json:
            assert request.headers["Authorization"] == "Bearer a-token"
            images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in request.json["images"]]
            return {"predictions": [{"probabilities": np.eye(CLASSES)[label(image)].tolist()} for image in images]}
        names = json.loads(lists)["request"]["labels"]
        return [{"label": names[label(np.array(request.json["input"]["array"], np.uint8))], "score": 0.9}]

    monkeypatch.setenv("CLASSIFIER_TOKEN", "a-token")
    with serving(behave) as stub:
        for text in (pngs, lists):
            (tmp_path / "options.json").write_text(text)
            options = read_options(tmp_path / "options.json")
            options.pop("rate", None)  # which would take half a minute
            assert judged(stub, url=f"{stub.origin}/classify", **options).owned


def test_the_documented_options_are_those_there_are():
    import re
    from pathlib import Path

    from wmengine.suspects.request_template import FIELDS

    page = (Path(__file__).resolve().parent.parent / "docs" / "endpoints.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"\w+", cell)]
    assert sorted(names) == sorted([*wm.endpoint.__kwdefaults__, *FIELDS])
