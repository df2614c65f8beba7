"""Hostile files: weights that lie elsewhere, and what is no model at all."""

import os
import socket
from pathlib import Path

import numpy as np
import onnx
from hostile_models import (
    CLASSES,
    FEATURES,
    SECRET,
    WEIGHT,
    classifier,
    constant,
    external,
    into,
    model,
    node,
    subgraph,
    value,
    with_external,
)
from onnx import helper

CORPUS = {}
hostile = into(CORPUS)


def secret_outside(folder: Path) -> Path:
    """A file that a model must not reach: the classifier's very weights, so that reading them would go unnoticed."""
    outside = folder.parent.parent / "outside"
    outside.mkdir(exist_ok=True)
    secret = outside / f"{folder.name}.bin"
    secret.write_bytes((SECRET * 20)[: WEIGHT.nbytes])
    return secret


@hostile("not inside the model's directory")
def parent_directory(folder, path):
    return with_external(f"../../outside/{secret_outside(folder).name}")


@hostile("not inside the model's directory")
def absolute_path(folder, path):
    return with_external(str(secret_outside(folder)))


@hostile("not inside the model's directory")
def up_again_from_a_subdirectory(folder, path):
    (folder / "down").mkdir()
    return with_external(f"down/../../../outside/{secret_outside(folder).name}")


@hostile("regular file and no link")
def symbolic_link(folder, path):
    (folder / "w.bin").symlink_to(secret_outside(folder))
    return with_external("w.bin")


@hostile("regular file and no link")
def symbolic_link_to_a_directory(folder, path):
    (folder / "down").symlink_to(secret_outside(folder).parent)
    return with_external(f"down/{secret_outside(folder).name}")


@hostile("also linked from elsewhere")
def hard_link(folder, path):
    (folder / "w.bin").hardlink_to(secret_outside(folder))
    return with_external("w.bin")


@hostile("not a regular file")
def pipe_of_weights(folder, path):
    os.mkfifo(folder / "w.bin")
    return with_external("w.bin")


@hostile("a directory")
def directory_of_weights(folder, path):
    (folder / "w.bin").mkdir()
    return with_external("w.bin")


@hostile("regular file and no link")
def zeros_without_end(folder, path):
    (folder / "w.bin").symlink_to("/dev/zero")
    return with_external("w.bin")


@hostile("missing")
def missing_weights():
    return with_external("w.bin")


@hostile("missing")
def processes_own_memory():
    return with_external("*/_ORT_MEM_ADDR_/*", offset=4096, length=WEIGHT.nbytes)


@hostile("is larger than")
def hole_of_a_terabyte(folder, path):
    with open(folder / "w.bin", "wb") as file:
        file.truncate(1 << 40)
    return with_external("w.bin")


@hostile("ONNX Runtime", weights="cannot be read")
def no_bytes_of_weights(folder, path):
    (folder / "w.bin").touch()
    return with_external("w.bin", shape=(16, 400))


def _with_entries(**entries):
    def make(folder, path):
        (folder / "w.bin").write_bytes(WEIGHT.tobytes())
        return with_external("w.bin", **entries)

    return make


for _name, _entries in {
    "offset_at_the_end_of_the_world": {"offset": 2**63 - 1},
    "offset_and_length_that_overflow": {"offset": 2**63 - 8, "length": 2**63 - 8},
    "offset_beyond_64_bits": {"offset": 10**30},
    "offset_below_zero": {"offset": -4096},
    "length_beyond_the_file": {"length": 1 << 40},
    "offset_that_is_no_number": {"offset": "many"},
}.items():
    _make = _with_entries(**_entries)
    _make.__name__ = _name
    hostile("ONNX Runtime", weights="beyond the end|no number")(_make)


@hostile("says twice")
def two_locations(folder, path):
    (folder / "w.bin").write_bytes(WEIGHT.tobytes())
    made = with_external("w.bin")
    made.graph.initializer[0].external_data.add(key="location", value="*/_ORT_MEM_ADDR_/*")
    return made


@hostile("not UTF-8")
def location_that_is_no_text():
    return with_external("w.bin").SerializeToString().replace(b"w.bin", b"w\xff\xfein")


@hostile("not inside the model's directory")
def location_with_a_zero_byte():
    return with_external("w.bin\0.txt")


@hostile("in 524288 characters")
def location_of_a_megabyte():
    return with_external("w" * (1 << 19))


@hostile("10001 external files")
def ten_thousand_files(folder, path):
    (folder / "w.bin").write_bytes(WEIGHT.tobytes())
    return model([node("Identity", "x", "y")], [external(f"{number}.bin", f"w{number}") for number in range(10_001)])


@hostile("not inside the model's directory")
def location_in_a_constant(folder, path):
    held = external(f"../../outside/{secret_outside(folder).name}")
    return model([node("Constant", "", "w", value=held), node("Flatten", "x", "f"), node("MatMul", "f w", "y")])


@hostile("not inside the model's directory")
def location_in_a_sparse_tensor(folder, path):
    made = classifier()
    held = external(str(secret_outside(folder)), "v", [4])
    sparse = onnx.SparseTensorProto(values=held, indices=constant("i", np.arange(4)), dims=[FEATURES, CLASSES])
    made.graph.sparse_initializer.append(sparse)
    return made


@hostile("not inside the model's directory")
def location_in_a_subgraph(folder, path):
    held = external(str(secret_outside(folder)), "v")
    branch = subgraph([node("MatMul", "f v", "o")], [value("o")], initializers=[held])
    nodes = [node("Flatten", "x", "f"), node("If", "c", "y", then_branch=branch, else_branch=branch)]
    return model(nodes, [constant("c", True)])


@hostile("not inside the model's directory")
def location_in_a_function(folder, path):
    held = external(str(secret_outside(folder)), "v")
    body = [node("Constant", "", "v", value=held), node("MatMul", "a v", "b")]
    function = helper.make_function("f", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    return model([node("Flatten", "x", "f"), node("F", "f", "y", domain="f")], functions=[function])


@hostile("is empty")
def empty_file():
    return b""


@hostile("not an ONNX model")
def garbage():
    return np.random.default_rng(0).bytes(4096)


@hostile("not an ONNX model")
def truncated():
    return classifier().SerializeToString()[:-40]


@hostile("not an ONNX model")
def no_graph():
    return onnx.ModelProto(ir_version=9)


@hostile("not an ONNX model")
def text_that_names_a_location():
    return b"location " * 1000


@hostile("not a regular file")
def pipe(folder, path):
    os.mkfifo(path)


@hostile("cannot be read")
def unix_socket(folder, path):
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket has room for a hundred characters
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


@hostile("not a regular file")
def device(folder, path):
    path.symlink_to("/dev/zero")


@hostile("cannot be read")
def link_to_itself(folder, path):
    path.symlink_to(path)


@hostile("does not exist")
def link_to_nothing(folder, path):
    path.symlink_to(folder / "gone")


@hostile("is larger than")
def model_of_a_terabyte(folder, path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


@hostile("answers with 16 classes")
def onnx_runtimes_own_format_in_disguise():
    """A model for protobuf, and bytes that ONNX Runtime would take for its flat format, which nobody has checked."""
    head = bytes([0x7A, 0x40, 0, 0]) + b"ORTM" + bytes(0x3A)  # an unknown field of 64 bytes
    return head + model([node("Flatten", "x", "y")]).SerializeToString()


@hostile("not an ONNX model")
def protobuf_nested_ten_thousand_deep():
    """graph.node.attribute.g.node.attribute.g …: each level wraps the one below in four length-delimited fields."""
    content = b""
    for _ in range(10_000):
        for field in (0x32, 0x2A, 0x0A):  # AttributeProto.g is 6, NodeProto.attribute 5, GraphProto.node 1
            content = bytes([field]) + _varint(len(content)) + content
            if len(content) > 1 << 20:
                return bytes([0x3A]) + _varint(len(content)) + content
    return bytes([0x3A]) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    out = b""
    while number >= 128:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])
