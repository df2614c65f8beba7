"""What reading a GGUF file promises: the numbers that llama.cpp reads, as checkpoints show them, and no harm done."""

import math
import random
import struct
import sys

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from judged import white_box
from mutations import EXTREMES

import wmengine as wm
from wmengine import ops
from wmengine.errors import SuspectError
from wmengine.suspects import open_suspect

WEIGHT = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)


def write(path, tensors, kind=Type.F32, architecture="gpt2", **values):
    """A file that llama.cpp's own package writes; `values` are numbers of its header."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("tokenizer.ggml.tokens", ["a", "list", "of texts"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    for name, value in values.items():
        writer.add_uint32(name.replace("__", "."), value)
    for name, weight in tensors.items():
        data = gguf.quantize(weight, kind)
        writer.add_tensor(name, data, raw_dtype=None if kind in (Type.F32, Type.F16) else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def header(*, magic=b"GGUF", version=3, tensors=1, values=b"", count=0, listed=b""):
    begun = magic + struct.pack("<IQQ", version, tensors, count) + values + listed
    return begun + bytes(-len(begun) % 32) + bytes(64)


def text(said):
    return struct.pack("<Q", len(said)) + said


def tensor(shape=(4, 4), kind=0, offset=0):
    return text(b"w") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q8_0])
def test_every_type_is_read_as_its_own_package_reads_it(tmp_path, kind):
    """Rows first, as in any other checkpoint; what has one axis is no weight."""
    write(tmp_path / "m.gguf", {"a.weight": WEIGHT, "b.weight": WEIGHT[:3] + 1, "norm": WEIGHT[0]}, kind)
    suspect = open_suspect(tmp_path / "m.gguf")
    tensors = suspect.tensors()
    assert [(each.source, each.shape) for each in tensors] == [("a.weight", (6, 256)), ("b.weight", (3, 256))]
    for found, weight in zip(tensors, (WEIGHT, WEIGHT[:3] + 1), strict=True):
        expected = gguf.dequantize(gguf.quantize(weight, kind), kind)
        assert np.array_equal(found.values, expected)
        np.testing.assert_allclose(found.values, weight, atol=0.6)
    assert ("2 of 2 weights are" in " ".join(map(str, suspect.facts))) == (kind != Type.F32)


def test_a_convolution_keeps_its_axes(tmp_path):
    kernel = WEIGHT.reshape(8, 4, 6, 8)
    (found,) = open_suspect(write(tmp_path / "m.gguf", {"conv": kernel}, Type.F16)).tensors()
    assert np.array_equal(found.values, kernel.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("kind", [Type.F16, Type.Q8_0, Type.Q4_0])
def test_a_mark_is_found_in_a_quantised_file_under_llama_cpps_names(tmp_path, kind):
    shape = (64, 256)
    mark = white_box([shape])
    signs = (2.0 * mark.arrays["bits"] - 1.0).astype(np.float32)
    held = ops.sketch_adjoint(signs, int(mark.arrays["carrier_keys"][0]), math.prod(shape)).reshape(shape)
    generator = np.random.default_rng(0)
    weights = {f"blk.{number}.ffn_up.weight": generator.normal(size=shape).astype(np.float32) for number in range(3)}
    stranger = wm.verify(write(tmp_path / "stranger.gguf", weights, kind), mark)
    weights["blk.1.ffn_up.weight"] += np.array(held / held.std())
    marked = wm.verify(write(tmp_path / "marked.gguf", weights, kind), mark)
    assert (marked.decision, stranger.decision) == ("owned", "not_proven")


def test_queries_and_keys_of_llamas_are_read_as_they_were_trained(tmp_path):
    """The converter interleaves the halves of each head's rows, of this architecture and no other."""

    def reordered(weight, heads):
        return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)

    queries, keys, values = (np.random.default_rng(seed).normal(size=(16, 32)).astype(np.float32) for seed in range(3))
    stored = {
        "blk.0.attn_q.weight": reordered(queries, 4),
        "blk.0.attn_k.weight": reordered(keys, 2),
        "blk.0.attn_v.weight": values,
    }
    counts = {"llama__attention__head_count": 4, "llama__attention__head_count_kv": 2}
    llama = open_suspect(write(tmp_path / "m.gguf", stored, architecture="llama", **counts))
    for found, expected in zip(llama.tensors(), (queries, keys, values), strict=True):
        assert np.array_equal(found.values, expected)
    other = open_suspect(write(tmp_path / "n.gguf", stored, architecture="qwen2", **counts))
    assert all(np.array_equal(each.values, stored[each.source]) for each in other.tensors())
    odd = write(tmp_path / "o.gguf", stored, architecture="llama", llama__attention__head_count=0)
    with pytest.raises(SuspectError, match="has a weight that cannot be read"):
        open_suspect(odd).tensors()[0].read()


def test_numbers_begin_where_the_header_aligns_them(tmp_path):
    values = text(b"general.alignment") + struct.pack("<II", 4, 256)
    begun = header(values=values, count=1, listed=tensor((16, 1)))
    content = begun.rstrip(b"\0").ljust(256, b"\0") + np.arange(16, dtype=np.float32).tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    (found,) = open_suspect(tmp_path / "m.gguf").tensors()
    assert np.array_equal(found.values, np.arange(16, dtype=np.float32)[None])


def test_only_quantised_numbers_need_llama_cpps_package(tmp_path, monkeypatch):
    for name, kind in (("half", Type.F16), ("int8", Type.Q8_0)):
        write(tmp_path / f"{name}.gguf", {"w": WEIGHT}, kind)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert open_suspect(tmp_path / "half.gguf").tensors()[0].read()[0].shape == WEIGHT.shape
    with pytest.raises(SuspectError, match=r"gguf is not installed: pip install 'wmengine\[gguf\]'"):
        open_suspect(tmp_path / "int8.gguf")


HUGE = (1 << 64) - 1
LIES = {
    "no header": b"GGUF and nothing of it",
    "an older version": header(version=1, listed=tensor()),
    "big-endian": header(version=3 << 24, listed=tensor()),
    "more tensors than bytes": header(tensors=HUGE, listed=tensor()),
    "more values than bytes": header(count=HUGE, listed=tensor()),
    "a text without end": header(values=struct.pack("<Q", HUGE), count=1),
    "a list without end": header(values=text(b"a") + struct.pack("<IIQ", 9, 4, HUGE), count=1),
    "a list of texts without end": header(values=text(b"a") + struct.pack("<IIQ", 9, 8, HUGE), count=1),
    "lists in lists in lists": header(
        values=text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, count=1
    ),
    "a value of no kind": header(values=text(b"a") + struct.pack("<II", 77, 0), count=1, listed=tensor()),
    "a name that is no text": header(values=text(b"\xff") + struct.pack("<IB", 0, 0), count=1, listed=tensor()),
    "aligned to nothing": header(values=text(b"general.alignment") + struct.pack("<II", 4, 0), count=1),
    "aligned by a text": header(values=text(b"general.alignment") + struct.pack("<I", 8) + text(b"a"), count=1),
    "more axes than ggml has": header(listed=tensor((1,) * 5)),
    "axes without end": header(listed=text(b"w") + struct.pack("<I", (1 << 32) - 1)),
    "larger than the file": header(listed=tensor((1 << 40, 1 << 40))),
    "behind the file": header(listed=tensor(offset=HUGE)),
    "a type that there is not": header(listed=tensor(kind=1000)),
    "rows that are no blocks": header(listed=tensor((4, 8), kind=8)),
    "integers alone": header(listed=tensor(kind=26)),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_one_error(tmp_path, name):
    (tmp_path / "m.gguf").write_bytes(LIES[name])
    with pytest.raises(SuspectError, match="is no checkpoint that can be read"):
        open_suspect(tmp_path / "m.gguf")


def test_a_file_that_was_cut_short_anywhere_is_one_error(tmp_path):
    content = write(tmp_path / "m.gguf", {"w": WEIGHT[:, :32]}, Type.Q8_0).read_bytes()
    used = len(content.rstrip(b"\0"))  # what follows fills the last block of the alignment
    for length in [*range(9, 400, 7), used - 40]:
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(SuspectError, match="is no checkpoint that can be read"):
            open_suspect(tmp_path / "cut.gguf")


def test_what_chance_makes_of_a_file_is_read_or_is_one_error(tmp_path):
    generator = random.Random(0)
    seeds = [
        write(tmp_path / f"{kind.name}.gguf", {"blk.0.attn_q.weight": WEIGHT}, kind, "llama", **counts).read_bytes()
        for kind, counts in ((Type.F32, {}), (Type.Q8_0, {"llama__attention__head_count": 3}))
    ]
    read = 0
    for _ in range(600):
        content = bytearray(generator.choice(seeds))
        for _ in range(generator.choice([1, 1, 2, 4])):
            place = generator.randrange(4, 400)
            size = generator.choice([1, 4, 8])
            changed = generator.choice([generator.getrandbits(64), *EXTREMES]) % (1 << (8 * size))
            content[place : place + size] = changed.to_bytes(size, "little")
        (tmp_path / "m.gguf").write_bytes(content)
        try:
            for each in open_suspect(tmp_path / "m.gguf").tensors():
                each.read()
            read += 1
        except SuspectError:
            pass
    assert 100 < read < 500
