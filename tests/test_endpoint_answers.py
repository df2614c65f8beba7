"""What endpoints promise about strangers' servers: no answer harms us, and nothing secret leaves or is shown."""

import datetime
import ipaddress
import json
import random
import socket
import ssl
import time
from types import SimpleNamespace

import numpy as np
import pytest
from endpoint_stub import (
    CLASSES,
    COUNT,
    INPUTS,
    MARK,
    answer,
    classes,
    judged,
    marked_model,
    posted,
    scores,
    serving,
    tensor,
)

import wmengine as wm
from wmengine.errors import SuspectError
from wmengine.suspects.endpoint import http, model

pytestmark = pytest.mark.usefixtures("no_long_pauses")


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
    "scores of no class": one_output(b"FP32", b"[]", b"[60, 0]"),
    "no answers": one_output(b"FP32", b"[]", b"[0]"),
    "nested empty lists": one_output(b"FP32", b"[[[]]]", b"[60, 10]"),
    "null for numbers": one_output(b"INT64", b"null"),
    "nested nulls": one_output(b"INT64", b"[[null], [[null]]]", b"[60]"),
    "a null shape": one_output(b"FP32", b"[1]", b"null"),
    "a shape without end": one_output(b"FP32", b"[1]", b"[" + b"1," * 100 + b"1]"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_one_line_of_error(name):
    with serving(lambda request: (200, {}, GARBAGE[name])) as stub:
        verdict = judged(stub)
        with pytest.raises(SuspectError):
            wm.endpoint(stub.url).answer({"input": INPUTS})
    assert verdict.decision == "error"
    assert stub.url in verdict.error
    assert "\n" not in verdict.error
    assert len(verdict.error) < 400


@pytest.mark.parametrize("length", ["-5", "x", "1, 2", "9" * 5000])
def test_a_length_that_is_none_is_one_line_of_error(length):
    with serving(posted(lambda request: (200, {"Content-Length": length, "Connection": "close"}, b"{}"))) as stub:
        verdict = judged(stub, tries=1, timeout=0.5)
    assert verdict.decision == "error"
    assert "\n" not in verdict.error


def test_numbers_as_texts_are_read_and_not_a_number_is_a_miss():
    def behave(request):
        found = scores(tensor(request.json)).astype(str)
        found[3] = "NaN"
        return answer(found)

    with serving(posted(behave)) as stub:
        assert judged(stub, batch=COUNT).matched == COUNT - 1


@pytest.mark.parametrize(
    "inputs",
    [
        5,
        [1],
        [{"name": [1], "datatype": {}, "shape": {}}],
        [{"shape": [10**4000, -1, -1, -1]}],
        [{"shape": [0, 3, 4, None]}],
        [{"shape": [True] * 4}],
        [{"shape": [1] * 1000}],
    ],
)
def test_a_description_that_makes_no_sense_is_no_exception(inputs):
    with serving(lambda request: {"inputs": inputs} if request.method == "GET" else marked_model(request)) as stub:
        verdict = judged(stub)
    assert verdict.owned or len(verdict.error) < 1100


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
                answered += len(suspect.answer({"input": INPUTS[:2]})) == 2
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
        verdict = judged(stub, timeout=0.3, deadline=0.8)
    assert verdict.decision == "error"
    assert "does not answer within" in verdict.error


def test_an_answer_cut_off_in_time_is_not_taken_for_a_whole_one():
    with serving(posted(lambda request: drip(request, b"HTTP/1.0 200 OK\r\n\r\n"))) as stub:
        assert "does not answer within" in judged(stub, timeout=0.2, deadline=0.3).error


def test_an_answer_without_end_is_cut_off_by_size(monkeypatch):
    monkeypatch.setattr(model, "MAXIMUM_ANSWER", 100_000)

    def flood(request):
        request.handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            request.handler.wfile.write(b"4000\r\n" + b" " * 0x4000 + b"\r\n")

    for behave in (flood, lambda request: (200, {"Content-Length": str(10**15)}, b" " * 200_000)):
        with serving(posted(behave)) as stub:
            verdict = judged(stub, batch=60, tries=1)
        assert verdict.decision == "error"
        assert "more than 100000 bytes" in verdict.error


@pytest.mark.parametrize(
    "claims",
    [
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",  # read as "all that comes"
        b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",  # and trailers for ever
        b"\r\nHTTP/1.1 100 Continue\r\n\r\n",
    ],
)
def test_an_answer_whose_frame_has_no_end_is_cut_off_by_size(claims, monkeypatch):
    monkeypatch.setattr(model, "MAXIMUM_ANSWER", 100_000)
    sent = []

    def flood(request):
        status = b"HTTP/1.1 200 OK\r\n" if claims[:1] == b"T" else b"HTTP/1.1 100 Continue\r\n"
        request.handler.wfile.write(status + claims)
        line = b"HTTP/1.1 100 Continue\r\n\r\n" if claims[:1] != b"T" else b"X: y\r\n"
        for _ in range(500):
            request.handler.wfile.write(line * 10_000)
            sent.append(len(line) * 10_000)

    with serving(posted(flood)) as stub:
        verdict = judged(stub, tries=1, batch=60, deadline=5)
    assert "answers with more than" in verdict.error
    assert sum(sent) / len(stub.questions) < 20 << 20  # what the sockets had taken by then


def test_half_an_answer_is_asked_again():
    def behave(request):
        if len(stub.questions) % 2:
            request.handler.close_connection = True
            return 200, {"Content-Length": "5000"}, json.dumps(answer(scores(tensor(request.json)))).encode()
        return answer(scores(tensor(request.json)))

    with serving() as stub:
        stub.behave = posted(behave)
        assert judged(stub).matched == COUNT
    half = (200, {"Content-Length": "5000", "Connection": "close"}, b"{}")
    with serving(posted(lambda request: half)) as stub:
        assert "2 bytes read, 4998 more expected" in judged(stub, tries=1).error


@pytest.mark.parametrize(
    "location", ["//[", "http://[::1", "file:///etc/passwd", "http://user:word@\x1b[2Jhost/", "?\xe9"]
)
def test_a_redirect_to_nowhere_is_refused(location):
    with serving(posted(lambda request: (307, {"Location": location}, b""))) as stub:
        verdict = judged(stub, tries=1)
    assert verdict.decision == "error"
    assert verdict.error.isprintable()
    assert "word" not in verdict.error


def test_what_a_stranger_says_moves_no_cursor():
    said = json.dumps({"error": "\x1b[2J\x07\u202egone"}).encode()
    with serving(posted(lambda request: (400, {}, said))) as stub:
        assert judged(stub).error.isprintable()
    with serving(posted(lambda request: answer(scores(tensor(request.json))[:, :3], "\x1b[2J"))) as stub:
        assert judged(stub).error.isprintable()


def test_redirects_are_not_followed_and_the_error_says_where_they_lead():
    with serving() as other, serving() as stub:
        stub.behave = posted(lambda request: (307, {"Location": f"{other.url}/infer?token=s3cret"}, b""))
        verdict = judged(stub)
    assert f"redirects to {other.url}/infer?token=…, and redirects are not followed" in verdict.error
    assert (len(stub.questions), other.requests) == (1, [])


def test_a_connection_that_was_closed_meanwhile_is_opened_again():
    def behave(request):
        request.handler.close_connection = True  # without a word about it
        return marked_model(request)

    with serving(behave) as stub:
        assert judged(stub, tries=2, batch=20).owned
    assert len(stub.questions) >= 4


def test_compressed_answers_are_not_unpacked():
    with serving(posted(lambda request: (200, {"Content-Encoding": "gzip"}, b"x"))) as stub:
        assert "compresses its answer" in judged(stub).error


def test_names_of_classes_are_answers_where_their_order_is_given():
    names = [f"kind {number}" for number in range(CLASSES)]

    def behave(request):
        return answer([name(number) for number in classes(tensor(request.json))], "y", "BYTES")

    def name(number):
        return names[number] if number else "none of these"

    with serving(posted(behave)) as stub:
        named = judged(stub, labels=names)
        assert named.matched == (MARK.arrays["labels"] > 0).sum()
        assert "answers with names of classes, such as" in judged(stub).error
        name = str  # and numbers need no names
        assert judged(stub).matched == COUNT


def test_a_fixed_batch_that_would_fill_the_memory_is_refused():
    def behave(request):
        return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [10**9, 3, 4, 4]}]}

    with serving(behave) as stub:
        assert "has a fixed batch of 1000000000, and at most" in judged(stub).error


def test_a_host_by_its_number_in_version_6_needs_no_port(monkeypatch):
    asked = []

    def resolve(host, port, **options):
        asked.append((host, port))
        raise OSError("nowhere")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    assert judged(None, url="https://[2001:db8::1]/v2/models/m", tries=1).decision == "error"
    assert set(asked) == {("2001:db8::1", 443)}


def test_all_addresses_of_a_host_share_the_time(monkeypatch):
    waited = []

    class Nobody:
        """Who connects waits until his time is up."""

        def __init__(self, *_):
            pass

        def settimeout(self, seconds):
            self.seconds = seconds

        def connect(self, address):
            waited.append(self.seconds)
            raise TimeoutError

        def close(self):
            pass

    found = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.1", 80))
    monkeypatch.setattr("socket.getaddrinfo", lambda *given, **options: [found] * 50)
    monkeypatch.setattr("socket.socket", Nobody)
    monkeypatch.setattr(http, "time", SimpleNamespace(monotonic=lambda: sum(waited)))
    verdict = judged(None, url="http://many.example/v2/models/m", tries=1, timeout=30, deadline=100)
    assert "does not answer within 30 seconds" in verdict.error
    assert waited == pytest.approx([30] * 4)  # a question about the model and three to it, not 50 times each


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


def test_secrets_of_the_options_and_the_address_show_up_nowhere():
    def echo(request):
        said = f"{request.headers['X-Api-Key']} asks {request.path}, {request.headers['Authorization']}"
        return (400, {}, json.dumps({"error": said}).encode()) if echo.refuses else marked_model(request)

    echo.refuses = True
    headers = {"X-Api-Key": "abcdef123", "Authorization": "Bearer qwertz987"}
    with serving(echo) as stub:
        asked = {"url": f"{stub.origin}/?code=zyxwv5678", "request": {"body": "${inputs}", "scores": ""}}
        said = judged(stub, headers=headers, **asked).error
        assert "*** asks /?code=***, Bearer ***" in said
    hidden = {"outputs": [{"name": "abcdef123", "shape": [1], "datatype": "FP32", "data": ["qwertz987"]}]}
    with serving(posted(lambda request: hidden)) as stub:
        assert "qwertz987" not in judged(stub, headers=headers).to_json()
    hidden["outputs"][0]["data"] = [1.5]
    with serving(posted(lambda request: hidden)) as stub:
        assert "abcdef123" not in judged(stub, headers=headers).to_json()


@pytest.mark.parametrize(
    "url",
    [
        "https://user:w0rd@host/v2/models/m",
        "https://user:w0rd@host/model",
        "https://user:w0rd@host:x/v2/models/m",
        "https://user:w0rd@[::1/v2/models/m",
        "HTTPS://user:w0rd@host/v2/models/m",
        "ftp://user:w0rd@host/v2/models/m",
        "grpcs://user:w0rd@host/m",
        "grpcs://user:w0rd@host:1/m/1/2",
        "https://host/v2?key=w0rd",
        "https://host:0/v2/models/m?key=w0rd",
    ],
)
def test_a_password_in_an_address_is_not_repeated(url):
    with pytest.raises(ValueError, match=r"endpoint|model") as caught:
        wm.endpoint(url)
    assert "w0rd" not in str(caught.value)


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch):
    with serving() as proxy, serving() as stub:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.origin)
        assert judged(stub).owned
    assert proxy.requests == []


def test_tokens_are_not_sent_in_the_clear(monkeypatch):
    monkeypatch.setenv("STUB_TOKEN", "s3cret-token")
    for url in (
        "http://example.com/v2/models/m",
        "grpc://example.com:80/m",
        "http://127.0.0.1.example.com/v2/models/m",
    ):
        for headers in ({"x-tenant": "${STUB_TOKEN}"}, {"Authorization": "Bearer written-here"}, {"X-API-Key": "1"}):
            with pytest.raises(ValueError, match="is not encrypted"):
                wm.endpoint(url, headers=headers)
        assert wm.endpoint(url, headers={"x-tenant": "acme"})
    assert wm.endpoint("https://example.com/v2/models/m", headers={"x-key": "${STUB_TOKEN}"})


@pytest.mark.parametrize("test", ["fixed", "sequential"])
def test_an_auxiliary_output_before_the_answer_is_a_try_and_a_budget_that_ends_keeps_what_was_seen(test):
    def behave(request):
        images = tensor(request.json)
        wrong = answer(np.eye(10)[[int(abs(image).sum() * 1e3) % 10 for image in images]], "auxiliary")
        return {"outputs": [*wrong["outputs"], *answer(scores(images))["outputs"]]}

    with serving(posted(behave)) as stub:
        verdict = judged(stub, test, budget=40)
        assert (verdict.decision, verdict.matched) == ("owned", 40 if test == "fixed" else 16)
        assert "2 outputs that answer differently were tried and paid for; number 2 counts" in verdict.notes
        verdict = judged(stub, test, budget=11)
        assert verdict.error is None
        assert verdict.matched == 11
