"""Honest models made hostile by chance: bits flipped, bytes moved, and fields changed where protobuf still holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from hostile_models import classifier, constant, model, node, value
from onnx import TensorProto, helper

# Numbers at the edges of what fields, sizes and counters hold.
EXTREMES = [0, 1, -1, 2, 7, 127, 255, 1 << 16, (1 << 31) - 1, -(1 << 31), 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63)]
_OPERATORS = """
Add AveragePool ArgMax BatchNormalization Cast Clip Concat ConstantOfShape Conv ConvTranspose CumSum DequantizeLinear
Dropout Einsum Expand Flatten Gather GatherND Gemm GlobalAveragePool GRU Identity If InstanceNormalization Loop LpPool
LSTM MatMul MatMulInteger MaxPool MaxUnpool Mod NonZero OneHot Pad QuantizeLinear Range ReduceSum Relu Reshape Resize
RNN Scan ScatterND Shape Slice Softmax SpaceToDepth Split Squeeze Tile TopK Transpose Unique Unsqueeze Where
Attention FusedConv FusedGemm FusedMatMul QLinearConv QAttention MatMulNBits SkipLayerNormalization
"""
OPERATORS = _OPERATORS.split()


def mutants(seeds: list[bytes], seed: int, count: int) -> Iterator[bytes]:
    """count files, each an honest one with one to four changes; the same for the same seed."""
    generator = random.Random(seed)
    parsed = [onnx.ModelProto.FromString(data) for data in seeds]
    for _ in range(count):
        if generator.random() < 0.4:
            yield _changed_bytes(generator.choice(seeds), generator)
            continue
        model = onnx.ModelProto()
        model.CopyFrom(generator.choice(parsed))
        for _ in range(generator.choice([1, 1, 1, 2, 4])):
            generator.choice(_CHANGES)(model, generator)
        yield model.SerializeToString()


def _changed_bytes(data: bytes, generator: random.Random) -> bytes:
    content = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        at = generator.randrange(len(content))
        length = generator.choice([1, 1, 2, 4, 8, 64])
        kind = generator.randrange(5)
        if kind == 0:
            content[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            content[at] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])
        elif kind == 2:
            content[at:at] = generator.randbytes(length)
        elif kind == 3 and len(content) > 2 * length:
            del content[at : at + length]
        else:
            source = generator.randrange(len(content))
            content[at:at] = content[source : source + length]
    return bytes(content)


def _messages(message: Any) -> list[Any]:
    """A message and every one below it."""
    found = [message]
    for field, held in message.ListFields():
        if field.message_type is not None:
            for part in [held] if hasattr(held, "ListFields") else held:
                found += _messages(part)
    return found


def _change_a_number(model: Any, generator: random.Random) -> None:
    """Any integer of any message to an extreme: dimensions, types, attributes, versions, enumerations."""
    message = generator.choice(_messages(model))
    numbers = [(field, value) for field, value in message.ListFields() if field.cpp_type in (1, 2, 3, 4, 8)]
    if not numbers:
        return
    field, value = generator.choice(numbers)
    extreme = generator.choice(EXTREMES)
    try:
        if isinstance(value, int):
            setattr(message, field.name, extreme)
        else:
            value[generator.randrange(len(value))] = extreme
    except (ValueError, OverflowError):  # does not fit into the field
        pass


def _repeat_a_part(model: Any, generator: random.Random) -> None:
    parts = _parts(model)
    if parts:
        container = generator.choice(parts)
        kept = [container[index] for index in range(len(container))]
        container.append(generator.choice(kept))


def _drop_a_part(model: Any, generator: random.Random) -> None:
    parts = _parts(model)
    if parts:
        container = generator.choice(parts)
        del container[generator.randrange(len(container))]


def _parts(model: Any) -> list[Any]:
    """Every repeated field that holds something."""
    return [
        value
        for message in _messages(model)
        for _, value in message.ListFields()
        if hasattr(value, "append") and len(value) > 0
    ]


def _swap_an_operator(model: Any, generator: random.Random) -> None:
    if model.graph.node:
        node = generator.choice(model.graph.node)
        node.op_type = generator.choice(OPERATORS)
        node.domain = generator.choice(["", "", "", "com.microsoft", "ai.onnx.ml"])


def _rewire(model: Any, generator: random.Random) -> None:
    graph = model.graph
    names = [each.name for each in graph.initializer] + [name for node in graph.node for name in node.output]
    names += [each.name for each in graph.input] + [""]
    if graph.node:
        node = generator.choice(graph.node)
        end = generator.choice([node.input, node.input, node.output])
        if end:
            end[generator.randrange(len(end))] = generator.choice(names)


def _give_an_attribute(model: Any, generator: random.Random) -> None:
    names = "axis axes group kernel_shape strides pads dilations perm to keepdims transA transB alpha mode num_heads"
    content = generator.choice(
        [*EXTREMES, [generator.choice(EXTREMES) for _ in range(generator.randint(1, 8))], 3e38, "?"]
    )
    if model.graph.node:
        node = generator.choice(model.graph.node)
        node.attribute.append(helper.make_attribute(generator.choice(names.split()), content))


def _send_weights_elsewhere(model: Any, generator: random.Random) -> None:
    if model.graph.initializer:
        tensor = generator.choice(model.graph.initializer)
        tensor.data_location = TensorProto.EXTERNAL
        for key, values in {
            "location": ["w.bin", "../w.bin", "/etc/passwd", "", "*/_ORT_MEM_ADDR_/*"],
            "offset": ["0", "-1", str(1 << 63), "x"],
            "length": ["4", str(1 << 40), "-8"],
        }.items():
            if generator.random() < 0.7:
                tensor.external_data.add(key=key, value=generator.choice(values))


def _nest(model: Any, generator: random.Random) -> None:
    """The graph inside one of its own nodes."""
    if model.graph.node:
        inner = onnx.GraphProto()
        inner.CopyFrom(model.graph)
        node = generator.choice(model.graph.node)
        node.attribute.append(helper.make_attribute(generator.choice(["body", "then_branch", "else_branch"]), inner))


def _flip_a_bit_of_a_weight(model: Any, generator: random.Random) -> None:
    raw = [each for each in model.graph.initializer if each.raw_data]
    if raw:
        tensor = generator.choice(raw)
        content = bytearray(tensor.raw_data)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        tensor.raw_data = bytes(content[: generator.choice([len(content)] * 8 + [len(content) // 2, 0])])


_CHANGES: list[Callable[[Any, random.Random], None]] = [
    _change_a_number,
    _change_a_number,
    _repeat_a_part,
    _drop_a_part,
    _swap_an_operator,
    _rewire,
    _give_an_attribute,
    _send_weights_elsewhere,
    _nest,
    _flip_a_bit_of_a_weight,
]


def seeds():
    """Honest models of several kinds: convolutions, quantised weights, branches, functions, recurrences."""
    generator = np.random.default_rng(0)

    def normal(name, *shape):
        return constant(name, generator.normal(size=shape).astype(np.float32))

    convolutions = [
        node("Conv", "x w1 b1", "c", pads=[1, 1, 1, 1]), node("BatchNormalization", "c b1 b1 b1 v", "n"),
        node("Relu", "n", "r"), node("MaxPool", "r", "p", kernel_shape=[2, 2]), node("Conv", "p w2", "g", group=2),
        node("GlobalAveragePool", "g", "a"), node("Flatten", "a", "f"), node("Gemm", "f w3", "y", transB=1),
    ]  # fmt: skip
    weights = [
        normal("w1", 4, 1, 3, 3),
        normal("b1", 4),
        constant("v", np.ones(4, np.float32)),
        normal("w2", 6, 2, 1, 1),
    ]
    quantised = [
        node("Flatten", "x", "f"), node("QuantizeLinear", "f s z", "q"), node("DequantizeLinear", "q s z", "d"),
        node("DequantizeLinear", "wq ws", "w", axis=0), node("Transpose", "w", "t", perm=[1, 0]),
        node("MatMul", "d t", "h"), node("Reshape", "h shape", "y"),
    ]  # fmt: skip
    integers = [constant("s", np.float32(0.1)), constant("z", np.uint8(128)), constant("shape", np.array([0, -1]))]
    integers += [
        constant("wq", generator.integers(-99, 99, (10, 16)).astype(np.int8)),
        constant("ws", np.full(10, 0.1, np.float32)),
    ]
    branch = onnx.helper.make_graph([node("Relu", "s", "o")], "inner", [], [value("o")])
    recurrent = [
        node("Squeeze", "x one", "q"), node("Transpose", "q", "t", perm=[1, 0, 2]),
        node("GRU", "t w r", "- h", hidden_size=10), node("Squeeze", "h zero", "y"),
    ]  # fmt: skip
    states = [normal("w", 1, 30, 4), normal("r", 1, 30, 10)]
    states += [constant("one", np.array([1])), constant("zero", np.array([0]))]
    attention = [
        node("Reshape", "x shape", "t"), node("Attention", "t w b", "a", domain="com.microsoft", num_heads=2),
        node("ReduceMean", "a", "m", axes=[1], keepdims=0), node("Gemm", "m o", "y"),
    ]  # fmt: skip
    heads = [normal("w", 4, 12), normal("b", 12), normal("o", 4, 10), constant("shape", np.array([-1, 4, 4]))]
    return [
        each.SerializeToString()
        for each in (
            classifier(),
            model(convolutions, [*weights, normal("w3", 10, 6)]),
            model(quantised, integers),
            classifier(
                node("If", "c", "y", then_branch=branch, else_branch=branch), initializers=[constant("c", True)]
            ),
            model(recurrent, states),
            model(attention, heads),
            classifier(node("ArgMax", "s", "y", axis=1), outputs=[value("y", TensorProto.INT64)]),
        )
    ]
