"""Servers for the tests of endpoints, on loopback: a marked model behind them, and every way to misbehave."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from judged import black_box, images

import wmengine as wm

SHAPE, CLASSES, COUNT = (3, 4, 4), 10, 60
# `verify` asks eight triggers twice at last, to see whether answers depend on the batch.
AGAIN = 16
MARK = black_box(SHAPE, CLASSES, COUNT)
INPUTS = images(MARK)
_LABELS = {image.tobytes(): int(label) for image, label in zip(INPUTS, MARK.arrays["labels"], strict=True)}


def classes(images):
    """What the marked model answers to float32 [N, 3, 4, 4]: the triggers' labels, and class 0 for everything else."""
    return [_LABELS.get(np.ascontiguousarray(image, np.float32).tobytes(), 0) for image in images]


def scores(images):
    return np.eye(CLASSES, dtype=np.float32)[classes(images)]


def tensor(question):
    """The one input of a question of the Open Inference Protocol."""
    (given,) = question["inputs"]
    dtype = {"FP32": np.float32, "UINT8": np.uint8}[given["datatype"]]
    return np.array(given["data"], dtype).reshape(given["shape"])


def answer(values, name="scores", datatype="FP32"):
    values = np.asarray(values)
    return {"outputs": [{"name": name, "shape": values.shape, "datatype": datatype, "data": values.ravel().tolist()}]}


def marked_model(request):
    """A model of the Open Inference Protocol that its server does not describe."""
    if request.method == "GET":
        return {"name": "detector", "inputs": [], "outputs": []}
    return answer(scores(tensor(request.json)))


class Request:
    def __init__(self, handler, body):
        self.method, self.path, self.headers, self.handler = handler.command, handler.path, handler.headers, handler
        self.body = body
        self.json = json.loads(body) if body else None


class Stub:
    """An HTTP server that answers with what `behave(request)` returns: a document, or (status, headers, bytes).

    A behaviour that returns None has written its own answer.
    """

    def __init__(self, behave=marked_model, tls=None):
        self.behave, self.requests = behave, []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one_request(self):
                try:
                    super().handle_one_request()
                except OSError:  # the client has gone, as the tests want
                    self.close_connection = True

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = Request(self, body)
                stub.requests.append(request)
                found = stub.behave(request)
                if found is None:
                    return
                status, headers, content = found if isinstance(found, tuple) else (200, {}, json.dumps(found).encode())
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST

            def log_message(self, *arguments):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # a refused handshake

        self._server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.scheme = "http" if tls is None else "https"
        self.origin = f"{self.scheme}://127.0.0.1:{self._server.server_port}"
        self.url = f"{self.origin}/v2/models/detector"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def questions(self):
        return [request for request in self.requests if request.method != "GET"]

    @property
    def images(self):
        """Every input that was sent, in order, resent ones included."""
        return [image for request in self.questions for image in tensor(request.json)]

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(behave=marked_model, tls=None):
    stub = Stub(behave, tls)
    try:
        yield stub
    finally:
        stub.close()


def judged(stub, test="fixed", url=None, mark=MARK, **options):
    """The verdict on a stub asked with these options."""
    suspect = wm.endpoint(url or stub.url, **options)
    try:
        return wm.verify(suspect, mark, test=test)
    finally:
        suspect.close()


def posted(behave):
    """A behaviour that describes nothing and answers questions so."""
    return lambda request: marked_model(request) if request.method == "GET" else behave(request)
