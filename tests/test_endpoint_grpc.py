"""What endpoints over gRPC promise beyond what test_mlserver.py asks of a real server: statuses, tensors, metadata."""

import struct
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from endpoint_stub import CLASSES, COUNT, MARK, scores

import wmengine as wm
from wmengine.suspects.endpoint import model
from wmengine.suspects.endpoint.grpc import SERVICE, messages

pytestmark = pytest.mark.usefixtures("no_long_pauses")


def declared(**tensor):
    """A metadata answer that describes these inputs."""
    return messages()["ModelMetadataResponse"](name="m", inputs=[messages()["TensorMetadata"](**tensor)])


def images(request):
    (tensor,), (raw,) = request.inputs, request.raw_input_contents
    assert tensor.datatype == "FP32"
    return np.frombuffer(raw, "<f4").reshape(tensor.shape)


def raw_answer(values, name="scores", datatype="FP32", shape=None, raw=None):
    made = messages()
    output = made["InferTensor"](name=name, datatype=datatype, shape=shape or values.shape)
    contents = values.tobytes() if raw is None else raw
    return made["ModelInferResponse"](outputs=[output], raw_output_contents=[contents])


def typed_answer(field, datatype, values, shape):
    made = messages()
    contents = made["InferTensorContents"](**{field: values})
    output = made["InferTensor"](name="y", datatype=datatype, shape=shape, contents=contents)
    return made["ModelInferResponse"](outputs=[output])


@contextmanager
def serving(infer, metadata=None):
    """A server on loopback; yields its URL and the list of calls to ModelInfer, each with its metadata."""
    calls = []

    def describe(request, context):
        if metadata is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "no metadata here")
        return metadata

    def answer(request, context):
        calls.append((request, dict(context.invocation_metadata())))
        return infer(request, context)

    made = messages()
    handlers = {
        method: grpc.unary_unary_rpc_method_handler(
            function, made[f"{method}Request"].FromString, lambda message: message.SerializeToString()
        )
        for method, function in (("ModelMetadata", describe), ("ModelInfer", answer))
    }
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}/detector/3", calls
    finally:
        server.stop(None)


def judged(url, **options):
    suspect = wm.endpoint(url, **options)
    try:
        return wm.verify(suspect, MARK)
    finally:
        suspect.close()


def test_the_mark_is_found_and_the_request_is_what_the_protocol_says(monkeypatch):
    monkeypatch.setenv("STUB_TOKEN", "s3cret")
    with serving(lambda request, context: raw_answer(scores(images(request)))) as (url, calls):
        assert judged(url, headers={"Authorization": "Bearer ${STUB_TOKEN}"}, output="scores").matched == COUNT
    request, metadata = calls[0]
    assert (request.model_name, request.model_version) == ("detector", "3")
    assert [each.name for each in request.outputs] == ["scores"]
    assert [each.name for each in request.inputs] == ["input"]
    assert metadata["authorization"] == "Bearer s3cret"


def test_what_the_server_declares_is_what_it_gets():
    def infer(request, context):
        given = images(request)
        assert given.shape[1:] == (4, 4, 3)
        return raw_answer(scores(np.moveaxis(given, -1, 1)))

    described = declared(name="pixels", datatype="FP32", shape=[-1, 4, 4, 3])
    with serving(infer, described) as (url, calls):
        verdict = wm.verify(url, MARK)
    assert verdict.owned
    assert calls[0][0].inputs[0].name == "pixels"


@pytest.mark.parametrize(("field", "datatype"), [("fp32_contents", "FP32"), ("fp64_contents", "FP64")])
def test_scores_may_come_as_typed_contents(field, datatype):
    def infer(request, context):
        found = scores(images(request))
        return typed_answer(field, datatype, found.ravel().tolist(), found.shape)

    with serving(infer) as (url, _):
        assert judged(url).owned


def test_labels_may_come_as_integers():
    def infer(request, context):
        found = scores(images(request)).argmax(axis=1)
        return typed_answer("int_contents", "INT32", found.tolist(), found.shape)

    with serving(infer) as (url, _):
        assert judged(url).owned


@pytest.mark.parametrize("packed", [True, False])
def test_names_of_classes_are_answers_where_their_order_is_given(packed):
    names = [f"kind {number}" for number in range(CLASSES)]

    def infer(request, context):
        said = [names[number].encode() for number in scores(images(request)).argmax(axis=1)]
        if packed:
            return raw_answer(
                None, "y", "BYTES", [len(said)], b"".join(struct.pack("<I", len(each)) + each for each in said)
            )
        return typed_answer("bytes_contents", "BYTES", said, [len(said)])

    with serving(infer) as (url, _):
        assert judged(url, labels=names).matched == COUNT


BAD = {
    "too few bytes": lambda rows: raw_answer(scores(rows), raw=b"12"),
    "a negative shape": lambda rows: raw_answer(scores(rows), shape=[-len(rows), -CLASSES]),
    "a huge shape": lambda rows: raw_answer(scores(rows), shape=[2**62, 2**62]),
    "dimensions without end": lambda rows: raw_answer(scores(rows), shape=[1] * 80, raw=b"1234"),
    "nothing of a huge shape": lambda rows: raw_answer(scores(rows), shape=[0, 2**62, 2**62], raw=b""),
    "texts beyond the end": lambda rows: raw_answer(scores(rows), "y", "BYTES", [1], struct.pack("<I", 2**32 - 1)),
    "texts of a huge shape": lambda rows: raw_answer(scores(rows), "y", "BYTES", [-1, -1], struct.pack("<I", 1) + b"1"),
    "too many dimensions unpacked": lambda rows: typed_answer("fp32_contents", "FP32", [1.0], [1] * 80),
    "a shape of texts": lambda rows: raw_answer(scores(rows), datatype="BYTES", raw=struct.pack("<I", 3) + b"cat"),
    "contents without numbers": lambda rows: typed_answer("fp32_contents", "FP32", [1.0], [len(rows), CLASSES]),
    "half floats unpacked": lambda rows: typed_answer("fp32_contents", "FP16", [1.0], [1]),
    "scores of no class": lambda rows: raw_answer(scores(rows), shape=[len(rows), 0], raw=b""),
    "no outputs": lambda rows: messages()["ModelInferResponse"](),
    "contents of others": lambda rows: messages()["ModelInferResponse"](raw_output_contents=[b"1"]),
}


@pytest.mark.parametrize("name", BAD)
def test_garbage_is_one_line_of_error(name):
    with serving(lambda request, context: BAD[name](images(request))) as (url, _):
        verdict = judged(url)
    assert verdict.decision == "error"
    assert url in verdict.error
    assert "\n" not in verdict.error


def test_an_answer_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(model, "MAXIMUM_ANSWER", 1000)
    with serving(lambda request, context: raw_answer(scores(images(request)))) as (url, calls):
        verdict = judged(url, batch=60)
    assert verdict.matched == COUNT  # in smaller batches
    assert "the suspect answers only one input at a time" in verdict.notes
    assert len(images(calls[0][0])) == 60


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL", "DEADLINE_EXCEEDED"])
def test_passing_failures_are_tried_again(code):
    def infer(request, context):
        if len(calls) % 2:
            context.abort(grpc.StatusCode[code], "busy")
        return raw_answer(scores(images(request)))

    with serving(infer) as (url, calls):
        assert judged(url).owned


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "PERMISSION_DENIED", "NOT_FOUND", "UNIMPLEMENTED"])
def test_a_wrong_name_or_token_is_not_tried_again(code, monkeypatch):
    monkeypatch.setenv("STUB_TOKEN", "s3cret")

    def infer(request, context):
        context.abort(grpc.StatusCode[code], f"not you, {dict(context.invocation_metadata())['x-key']}")

    with serving(infer) as (url, calls):
        verdict = judged(url, headers={"X-Key": "${STUB_TOKEN}"})
    assert f"answers {code} (not you, ***)" in verdict.error
    assert len(calls) == 1


def test_a_slow_answer_is_cut_off_in_time():
    import threading

    released = threading.Event()

    def infer(request, context):
        released.wait(20)
        return raw_answer(scores(images(request)))

    with serving(infer) as (url, _):
        verdict = judged(url, timeout=0.2, deadline=0.5)
        released.set()
    assert "DEADLINE_EXCEEDED" in verdict.error


def test_without_grpc_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ImportError, match=r"grpc is not installed: pip install 'wmengine\[endpoint\]'"):
        wm.endpoint("grpc://host:8081/m")
