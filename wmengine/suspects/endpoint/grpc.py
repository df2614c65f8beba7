"""The Open Inference Protocol over gRPC: the same questions as over REST, in a tenth of the bytes.

The few messages that are needed are written down here as a table instead of generated code, which would have to match
the installed version of protobuf. Fields that the table leaves out (parameters) are skipped when they arrive.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmengine._optional import require
from wmengine.suspects.answers import Outputs
from wmengine.suspects.base import one_line
from wmengine.suspects.endpoint import model
from wmengine.suspects.endpoint.address import Address, shown
from wmengine.suspects.endpoint.model import DTYPES, MAXIMUM_DIMENSIONS, Declared, declared
from wmengine.suspects.endpoint.options import EndpointOptions
from wmengine.suspects.endpoint.patience import Refused, Unavailable

SERVICE = "inference.GRPCInferenceService"
_TENSOR = "name:1 string, datatype:2 string, shape:3 int64*"
# Field names, numbers and types as in open_inference_grpc.proto; * is repeated.
_MESSAGES = {
    "ModelMetadataRequest": "name:1 string, version:2 string",
    "TensorMetadata": _TENSOR,
    "ModelMetadataResponse": "name:1 string, inputs:4 TensorMetadata*",
    "InferTensorContents": (
        "int_contents:2 int32*, int64_contents:3 int64*, uint_contents:4 uint32*, uint64_contents:5 uint64*, "
        "fp32_contents:6 float*, fp64_contents:7 double*, bytes_contents:8 bytes*"
    ),
    "InferTensor": f"{_TENSOR}, contents:5 InferTensorContents",
    "RequestedOutput": "name:1 string",
    "ModelInferRequest": (
        "model_name:1 string, model_version:2 string, inputs:5 InferTensor*, outputs:6 RequestedOutput*, "
        "raw_input_contents:7 bytes*"
    ),
    "ModelInferResponse": "outputs:5 InferTensor*, raw_output_contents:6 bytes*",
}
_CONTENTS = {name: f"{name.lower()}_contents" for name in ("FP32", "FP64", "INT64", "UINT64", "BYTES")}
_CONTENTS |= {f"{kind}{bits}": f"{kind.lower()}_contents" for kind in ("INT", "UINT") for bits in (8, 16, 32)}
_LATER = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN", "ABORTED")
_NEVER = ("UNAUTHENTICATED", "PERMISSION_DENIED", "NOT_FOUND", "UNIMPLEMENTED")


class GrpcModel:
    """A model behind grpc://HOST:PORT/NAME[/VERSION], or grpcs:// with TLS."""

    def __init__(self, options: EndpointOptions) -> None:
        self.address = Address.of(options.url, options.headers, ("grpcs", "grpc"))
        parts = self.address.parts
        path = parts.path.strip("/").split("/")
        if not path[0] or len(path) > 2 or parts.port is None or parts.query:
            raise ValueError(
                f"a model over gRPC is {parts.scheme}://HOST:PORT/NAME[/VERSION], and this is {shown(options.url)!r}"
            )
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when it is imported: an error is one line, and ours
        grpc = require("grpc", extra="endpoint")
        self._messages = messages()
        self._model, self._version = path[0], path[1] if len(path) == 2 else ""
        self._outputs = [] if options.output is None else [options.output]
        if any(name.lower().endswith("-bin") for name in self.address.headers):
            raise ValueError("over gRPC the name of a header must not end in -bin, which is for bytes")
        self._metadata = [(key.lower(), value) for key, value in self.address.headers.items()]
        settings = [
            ("grpc.max_receive_message_length", model.MAXIMUM_ANSWER),
            ("grpc.max_send_message_length", -1),
            ("grpc.enable_retries", 0),  # retries are ours to count
            ("grpc.enable_http_proxy", 0),
        ]
        if parts.scheme == "grpcs":
            self._channel = grpc.secure_channel(parts.netloc, grpc.ssl_channel_credentials(), settings)
        else:
            self._channel = grpc.insecure_channel(parts.netloc, settings)

    def inputs(self, seconds: float) -> list[Declared]:
        message = self._messages["ModelMetadataRequest"](name=self._model, version=self._version)
        answer = self._call("ModelMetadata", message, "ModelMetadataResponse", seconds)
        return [declared(each.name, each.datatype, list(each.shape)) for each in answer.inputs[:64]]

    def ask(self, to: Declared, rows: NDArray[Any], seconds: float) -> Outputs:
        made = self._messages
        little_endian = rows.astype(rows.dtype.newbyteorder("<"), copy=False).tobytes()
        request = made["ModelInferRequest"](
            model_name=self._model,
            model_version=self._version,
            inputs=[made["InferTensor"](name=to.name, datatype=to.datatype, shape=rows.shape)],
            outputs=[made["RequestedOutput"](name=output) for output in self._outputs],
            raw_input_contents=[little_endian],
        )
        answer = self._call("ModelInfer", request, "ModelInferResponse", seconds)
        raw = answer.raw_output_contents
        if raw and len(raw) != len(answer.outputs):
            raise Refused(f"answers with {len(answer.outputs)} outputs and the contents of {len(raw)}")
        return [
            (output.name, _array(output, raw[index] if raw else None))
            for index, output in enumerate(answer.outputs)
            if output.datatype in DTYPES
        ]

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: str, message: Any, answer: str, seconds: float) -> Any:
        grpc = require("grpc", extra="endpoint")
        ask: Callable[..., Any] = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda value: value.SerializeToString(),
            response_deserializer=self._messages[answer].FromString,
        )
        try:
            return ask(message, timeout=seconds, metadata=self._metadata)
        except grpc.RpcError as error:
            code, details = error.code().name, error.details() or ""
            said = f"answers {code} ({one_line(Exception(details))})"
            if code in _LATER and "larger than max" not in details and "deserializing" not in details:
                raise Unavailable(said, 0.0, reached=code != "UNAVAILABLE") from None
            raise Refused(said, hopeless=code in _NEVER) from None


def _array(output: Any, raw: bytes | None) -> NDArray[Any]:
    """One output, from its own contents or from raw bytes, little-endian or texts each behind its length."""
    dtype, shape = np.dtype(DTYPES[output.datatype]), list(output.shape)
    if len(shape) > MAXIMUM_DIMENSIONS or min(shape, default=0) < 0:
        raise Refused(f"answers with a tensor of the shape {shape[:MAXIMUM_DIMENSIONS]}")
    if raw is None:
        return np.asarray(getattr(output.contents, _CONTENTS[output.datatype]), dtype).reshape(shape)
    if output.datatype == "BYTES":
        return np.array(_texts(raw), dtype).reshape(shape)
    return np.frombuffer(raw, dtype.newbyteorder("<")).reshape(shape).astype(dtype)


def _texts(data: bytes) -> list[bytes]:
    texts, place = [], 0
    while place < len(data):
        (length,) = struct.unpack_from("<I", data, place)
        texts.append(data[place + 4 : place + 4 + length])
        place += 4 + length
    if place != len(data):
        raise Refused("answers with texts that are cut off")
    return texts


@lru_cache(maxsize=1)
def messages() -> dict[str, Any]:
    """The messages of the table, as classes."""
    require("google.protobuf", extra="endpoint")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    Field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="open_inference_grpc.proto", package="inference", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields.split(", "):
            label, kind = field.split(" ")
            called, number = label.split(":")
            repeated = Field.LABEL_REPEATED if kind.endswith("*") else Field.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            added = message.field.add(name=called, number=int(number), label=repeated)
            if kind in _MESSAGES:
                added.type, added.type_name = Field.TYPE_MESSAGE, f".inference.{kind}"
            else:
                added.type = getattr(Field, f"TYPE_{kind.upper()}")
    # A pool of our own: another client of the protocol may be loaded, with all fields.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}")) for name in _MESSAGES
    }
