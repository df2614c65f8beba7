"""What endpoints promise to who asks: templates for other services, checked options, documents that are true."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from endpoint_stub import CLASSES, COUNT, MARK, SHAPE, answer, judged, scores, serving, tensor
from judged import KEY, black_box, images

import wmengine as wm
from wmengine.errors import SuspectError
from wmengine.suspects.endpoint.options import EndpointOptions, read_options
from wmengine.suspects.endpoint.suspect import EndpointSuspect
from wmengine.suspects.endpoint.template import Template

pytestmark = pytest.mark.usefixtures("no_long_pauses")


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
    }
    labels = [f"c{number}" for number in range(CLASSES)]
    with serving(behave) as stub:
        assert judged(stub, url=f"{stub.origin}/classify?version=2", request=request, labels=labels).owned
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
    request = {"body": {"image": {"data": "${input}"}}, "encoding": encoding, "label": "/0/label"}
    with serving(behave) as stub:
        verdict = judged(stub, request={**request, "method": "PUT"}, labels=names, **options)
    assert verdict.owned
    assert verdict.matched == (MARK.arrays["labels"] > 0).sum()
    assert stub.requests[0].method == "PUT"


def test_what_is_no_image_is_no_png():
    with serving(lambda request: []) as stub:
        suspect = wm.endpoint(stub.url, request={"body": "${input}", "encoding": "png", "label": ""})
        with pytest.raises(SuspectError, match=r"inputs \[2, 4, 4\] are no images"):
            suspect.answer({"input": np.zeros((3, 2, 4, 4), np.uint8)})
        assert stub.requests == []


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_image_is_a_png_of_as_many_channels(channels):
    import base64
    import io

    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (1, channels, 5, 9), np.uint8)
    sent = Template(body="${input}", encoding="png", label="").fill(image)
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(sent)))).reshape(5, 9, channels)
    assert np.array_equal(np.moveaxis(decoded, -1, 0), image[0])


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
    assert "no labels are given" in verdict.error


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
        ({**GOOD, "labels": ["a", "b"]}, "no field 'labels'"),
    ],
)
def test_a_template_that_is_none_is_refused_before_anything_is_sent(request_, said):
    with pytest.raises(ValueError, match=said):
        wm.endpoint("https://host/", request=request_)


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("https://host/model.onnx", {}, "downloaded first"),
        ("https://host/v2/models/m?token=x", {}, "is no model of the Open Inference Protocol"),
        ("https://user:word@host/v2/models/m", {}, "no password"),
        ("https://host:0/v2/models/m", {}, "an endpoint is https://HOST"),
        ("https://host:port/v2/models/m", {}, "an endpoint is https://HOST"),
        ("https:///v2/models/m", {}, "an endpoint is https://HOST"),
        ("ftp://host/v2/models/m", {}, "an endpoint is https://HOST"),
        ("grpc://host/m", {}, "grpc://HOST:PORT/NAME"),
        ("grpc://host:1/a/b/c", {}, "grpc://HOST:PORT/NAME"),
        ("https://host/v2/models/m", {"budget": 0}, "budget must be a whole number above 0"),
        ("https://host/v2/models/m", {"batch": 2.5}, "batch must be a whole number"),
        ("https://host/v2/models/m", {"rate": float("nan")}, "rate must be a number above 0"),
        ("https://host/v2/models/m", {"timeout": None}, "timeout must be a number above 0"),
        ("https://host/v2/models/m", {"layout": "NHWC"}, "layout must be one of as recorded, channels last"),
        ("https://host/v2/models/m", {"scaling": "0-1"}, "scaling must be one of any, as recorded"),
        ("https://host/v2/models/m", {"datatype": "INT8"}, "datatype must be one of FP32"),
        ("https://host/v2/models/m", {"input": 3}, "input must be a name"),
        ("https://host/v2/models/m", {"labels": ["a", "a"]}, "names of all classes"),
        ("https://host/v2/models/m", {"labels": "ab"}, "names of all classes"),
        ("https://host/v2/models/m", {"labels": 3}, "names of all classes"),
        ("https://host/v2/models/m", {"headers": {"Host": "x"}}, "'Host', which is no header of your own"),
        ("https://host/v2/models/m", {"headers": {"a": "b\nc"}}, "printable ASCII"),
        ("https://host/v2/models/m", {"headers": {"\xe9": "b"}}, "which is no header of your own"),
        ("https://host/v2/models/m", {"headers": {"Accept-Encoding": "gzip"}}, "which is no header of your own"),
        ("grpc://host:1/m", {"headers": {"x-bin": "b"}}, "must not end in -bin"),
        ("https://host/", {"request": {**GOOD, "body": [{1, 2}, "${inputs}"]}}, "body must be JSON"),
        ("https://host/", {"request": {**GOOD, "body": [float("nan"), "${inputs}"]}}, "JSON compliant"),
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
            ("[" * 100_000, "is no JSON"),
            ('{"budget": 3, "budget": 4}', "is no JSON (it gives 'budget' twice)"),
            ('{"bugdet": 3}', "holds 'bugdet', which is no option; these are: request, headers, input"),
            ('{"headers": 3}', "headers must be a JSON object"),
        ):
            options.write_text(content)
            assert main(["verify", stub.url, *mark, "--endpoint-options", str(options)]) == 2
            assert said in capfd.readouterr().err
    assert main(["verify", str(tmp_path / "m.onnx"), *mark, "--endpoint-options", str(options)]) == 2


SECRETS = {
    "url": "https://host/classify?version=2&code=zyxwv5678",
    "headers": {"X-Tenant": "qwertz987"},
    "request": {"body": {"api_key": "abcdef123", "inputs": "${inputs}"}, "scores": ""},
}


def test_the_settings_are_json_without_secrets():
    options = EndpointOptions(**SECRETS, rate=5, labels=("a", "b"))
    settings = EndpointSuspect(options).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["url"] == "https://host/classify?version=…&code=…"
    assert settings["headers"] == ["x-tenant"]
    assert settings["request"]["body"] == {"api_key": "***", "inputs": "${inputs}"}
    assert (settings["rate"], settings["tries"], settings["budget"]) == (5.0, 5, None)
    for secret in ("zyxwv5678", "qwertz987", "abcdef123"):
        assert secret not in json.dumps(settings)
        assert secret not in repr(options)


def test_how_it_was_asked_stands_in_the_verdict():
    with serving() as stub:
        verdict, other = (judged(stub, headers={"X-Tenant": "qwertz987"}, budget=budget) for budget in (70, 71))
    options = EndpointOptions(stub.url, headers={"X-Tenant": "another"}, budget=70)
    told = json.loads(verdict.to_json())["settings"]
    asked = {"test": "fixed", "classes": "same", "isolation": "persistent", "device": "cpu"}
    assert told == {**asked, **options.settings, "digest": options.digest()}
    assert "qwertz987" not in verdict.to_json()
    assert other.settings["digest"] != told["digest"]


NAMES = [f"kind {number}" for number in range(CLASSES)]
NAMED = black_box(SHAPE, CLASSES, COUNT, class_names=NAMES)


@pytest.mark.parametrize(
    ("mark", "labels", "is_paid"),
    [(NAMED, NAMES, False), (NAMED, NAMES[::-1], True), (MARK, NAMES, True)],
    ids=["those of the mark", "in another order", "of a mark that holds none"],
)
def test_names_of_classes_that_the_mark_does_not_hold_are_paid_for(mark, labels, is_paid):
    """Else whoever claims a model could order the names so that strangers match."""
    known = {rows.tobytes(): labels[label] for rows, label in zip(images(mark), mark.arrays["labels"], strict=True)}

    def behave(request):
        if request.method == "GET":
            return {"inputs": []}
        return answer([known[image.tobytes()] for image in tensor(request.json)], "y", "BYTES")

    with serving(behave) as stub:
        verdict = judged(stub, mark=mark, labels=labels)
        assert (verdict.decision, verdict.matched) == ("owned", COUNT)
        orders = math.lgamma(CLASSES + 1) / math.log(10) if is_paid else 0.0
        assert verdict.log10_p == pytest.approx(math.log10(2) - COUNT + orders)
        said = [note for note in verdict.notes if "what the classes' names stand for was said at verification" in note]
        assert bool(said) == is_paid
        suspect, proof = wm.endpoint(stub.url, labels=labels), {"key": KEY, "adversarial": True}
        if is_paid:
            with pytest.raises(ValueError, match=r"no labels= but those .* was made with"):
                wm.verify(suspect, mark, **proof)
        else:
            assert wm.verify(suspect, mark, **proof).owned


CHANGES = {
    "url": "https://host/v2/models/other",
    "headers": {"x-other": "1"},
    "input": "x",
    "output": "y",
    "datatype": "FP64",
    "layout": "flat",
    "scaling": "any",
    "labels": ["a", "b"],
    "batch": 3,
    "budget": 50,
    "rate": 2.0,
    "tries": 2,
    "timeout": 3.0,
    "deadline": 60.0,
    "request": {"body": {"x": "${inputs}"}, "scores": ""},
}


def test_the_digest_tells_apart_what_can_change_an_answer_and_nothing_else():
    options = EndpointOptions("https://host/v2/models/m", headers={"X-Tenant": "a"})
    assert CHANGES.keys() == {each.name for each in fields(EndpointOptions)}
    digests = {replace(options, **{name: value}).digest() for name, value in CHANGES.items()}
    assert len({options.digest(), *digests}) == 1 + len(CHANGES)
    same = replace(options, headers={"x-tenant": "b"}, deadline=600)
    assert same.digest() == EndpointSuspect(options).settings["digest"] == options.digest()


def test_an_option_that_is_none_is_a_type_error():
    with pytest.raises(TypeError, match="bugdet"):
        wm.endpoint("https://host/v2/models/m", bugdet=3)


def test_the_templates_in_the_documents_work(tmp_path, monkeypatch):
    import base64
    import io
    import re
    from pathlib import Path

    from PIL import Image

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
        names = json.loads(lists)["labels"]
        return [{"label": names[label(np.array(request.json["input"]["array"], np.uint8))], "score": 0.9}]

    monkeypatch.setenv("CLASSIFIER_TOKEN", "a-token")
    with serving(behave) as stub:
        for text in (pngs, lists):
            (tmp_path / "options.json").write_text(text)
            options = read_options(f"{stub.origin}/classify", tmp_path / "options.json")
            options = replace(options, rate=None)  # which would take half a minute
            assert wm.verify(EndpointSuspect(options), MARK).owned


def test_the_documented_options_are_those_there_are():
    import re
    from pathlib import Path

    page = (Path(__file__).resolve().parent.parent / "docs" / "endpoints.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"\w+", cell)]
    known = [each.name for each in (*fields(EndpointOptions), *fields(Template)) if each.name != "url"]
    assert sorted(names) == sorted(known)
