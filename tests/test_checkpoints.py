"""What reading a checkpoint promises: a state dict shows the weights that its network shows, and nothing of it runs."""

import io
import json
import math
import os
import pickle
import struct
import tracemalloc
import zipfile
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import test_onnx_tensors
import torch
from judged import white_box
from onnx import helper
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import wmengine as wm
from wmengine import ops
from wmengine.errors import SuspectError
from wmengine.parts.matching import fitted, match_tensors
from wmengine.parts.sources.weights import folded
from wmengine.suspects import open_suspect
from wmengine.suspects.base import InputSpec
from wmengine.suspects.torch_pickle import tensors_of

SHAPE = (3, 8, 8)


class Network(nn.Module):
    """More than ten blocks of one shape, in the order of registration, which is none of the alphabet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(
            *[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(11)]
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = Network().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def adam(model):
    """An optimiser that holds a tensor for each of the model's."""
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


FILES = {
    "safetensors": lambda model, path: save_file(model.state_dict(), path),
    "state dict": lambda model, path: torch.save(model.state_dict(), path),
    "checkpoint": lambda model, path: torch.save(
        {"epoch": 3, "model": model.state_dict(), "optimizer": adam(model).state_dict()}, path
    ),
    "module": torch.save,
    "compressed": lambda model, path: compressed(model, path),
}


def compressed(model, path):
    torch.save(model.state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def shown(suspect, signature=None):
    return [(each.shape, folded(*each.read(), "flat")) for each in suspect.tensors(signature)]


@pytest.mark.parametrize("form", FILES)
def test_every_checkpoint_shows_the_folded_weights_of_its_network(network, tmp_path, form):
    """In the order of execution, by the order of the file or by that of its names."""
    FILES[form](network, tmp_path / "m.bin")
    suspect = open_suspect(tmp_path / "m.bin")
    expected = shown(open_suspect(network), {"x": InputSpec(SHAPE, "float32")})
    matching = match_tensors([shape for shape, _ in expected], suspect.tensors())
    found = shown(suspect)

    def holds(pairing):
        return all(
            np.allclose(found[place][1], values, rtol=1e-5)
            for place, (_, values) in zip(pairing, expected, strict=True)
        )

    assert any(map(holds, matching.tries))
    assert "no graph" in " ".join(map(str, suspect.facts))


def test_a_mark_is_found_in_a_checkpoint_under_other_names_and_at_half_precision(tmp_path):
    """The one tensor that holds the bits is renamed and lies among others of its shape."""
    shape = (64, 32, 3, 3)
    mark = white_box([shape], shape=SHAPE)
    signs = (2.0 * mark.arrays["bits"] - 1.0).astype(np.float32)
    held = ops.sketch_adjoint(signs, int(mark.arrays["carrier_keys"][0]), math.prod(shape)).reshape(shape)
    generator = torch.Generator().manual_seed(0)
    state = {f"renamed.{number}": torch.randn(shape, generator=generator) for number in range(3)}
    state["renamed.1"] += torch.from_numpy(np.array(held / held.std()))
    for kind in (torch.float16, torch.bfloat16):
        half = {name: values.to(kind) for name, values in state.items()}
        save_file(half, tmp_path / "m.safetensors")
        torch.save(half, tmp_path / "m.pt")
        for name in ("m.safetensors", "m.pt"):
            verdict = wm.verify(tmp_path / name, mark)
            assert verdict.decision == "owned", verdict
            assert f"3 of 3 weights are {str(kind).removeprefix('torch.')}" in verdict.notes
            assert any("3 of the 3 possible orders" in note for note in verdict.notes)
    stranger = {f"renamed.{number}": torch.randn(shape, generator=generator) for number in range(3)}
    save_file(stranger, tmp_path / "m.safetensors")
    assert wm.verify(tmp_path / "m.safetensors", mark).decision == "not_proven"


def test_a_mark_that_knows_its_modules_finds_them_whatever_the_order(tmp_path):
    """Neither the file nor the alphabet has the order in which they run."""
    shape, names = (64, 64), ("b", "c", "a")
    mark = replace(white_box([shape] * 3, shape=SHAPE), names=names)
    signs = (2.0 * mark.arrays["bits"] - 1.0).astype(np.float32)
    generator = np.random.default_rng(0)
    state = {}
    for name, key in zip(names, mark.arrays["carrier_keys"], strict=True):
        held = ops.sketch_adjoint(signs, int(key), math.prod(shape)).reshape(shape)
        state[f"{name}.weight"] = torch.from_numpy(held / held.std() + generator.normal(size=shape)).float()
    torch.save({"model": {name: state[name] for name in sorted(state, reverse=True)}}, tmp_path / "m.pt")
    verdict = wm.verify(tmp_path / "m.pt", mark)
    assert verdict.decision == "owned"
    assert any("3 of the 3 possible orders" in note for note in verdict.notes)
    assert wm.verify(tmp_path / "m.pt", replace(mark, names=None)).log10_p > verdict.log10_p


def test_weights_that_their_layer_computes_are_composed(tmp_path):
    torch.manual_seed(0)

    def masked(layer):
        prune.random_unstructured(layer, "weight", 0.5)
        return layer

    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Conv2d(3, 5, 3), dim=1)
    layers = {
        "old weight norm": old,
        "weight norm": parametrizations.weight_norm(nn.Linear(4, 6)),
        "old spectral norm": nn.utils.spectral_norm(nn.Linear(5, 7)),
        "spectral norm": parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)),
        "pruned": masked(nn.Linear(8, 9)),
    }
    model = nn.ModuleDict(layers).eval()
    with torch.no_grad():
        for name in ("old spectral norm", "old weight norm"):
            layers[name](torch.ones(1, 5) if name.startswith("old s") else torch.ones(1, 3, 8, 8))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    found = {tensor.source: tensor.values for tensor in open_suspect(tmp_path / "m.pt").tensors()}
    assert found.keys() == {f"{name}.weight" for name in layers}
    for name, layer in layers.items():
        np.testing.assert_allclose(found[f"{name}.weight"], layer.weight.detach(), rtol=1e-5, err_msg=name)


def test_tied_weights_count_once_and_views_are_read_as_they_lie(tmp_path):
    shared, wide = torch.randn(4, 6), torch.randn(8, 8)
    torch.save({"a": shared, "b": shared, "turned": wide.t(), "part": wide[2:5, 1:7:2]}, tmp_path / "m.pt")
    found = {tensor.source: tensor.values for tensor in open_suspect(tmp_path / "m.pt").tensors()}
    assert found.keys() == {"a", "turned", "part"}
    for name, values in (("a", shared), ("turned", wide.t()), ("part", wide[2:5, 1:7:2])):
        assert np.array_equal(found[name], values.numpy())


def test_packed_and_turned_matrices_are_read_as_the_carriers_have_them(tmp_path):
    """Queries, keys and values in one matrix, and a transposed convolution, whose file does not say what it is."""
    attention, up = nn.MultiheadAttention(12, 3), nn.ConvTranspose2d(5, 4, 2)
    torch.save({"attention": attention.state_dict(), "up": up.state_dict()}, tmp_path / "m.pt")
    shapes = [(12, 12)] * 4 + [(4, 5, 2, 2)]
    tensors = fitted(shapes, open_suspect(tmp_path / "m.pt").tensors())
    (pairing,) = match_tensors(shapes, tensors).tries
    found = [tensors[place].values for place in pairing]
    parts = attention.in_proj_weight.detach().chunk(3)
    expected = [*parts, attention.out_proj.weight.detach(), up.weight.detach().transpose(0, 1)]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs.numpy())


def test_only_what_a_carrier_may_be_is_read(tmp_path):
    """The other weight's numbers are not even there."""
    mark = white_box([(64, 32)], shape=SHAPE, bits=64)
    header = {
        "carrier": {"dtype": "F32", "shape": [64, 32], "data_offsets": [0, 8192]},
        "large": {"dtype": "F32", "shape": [1 << 14, 1 << 20], "data_offsets": [8192, 8192 + (1 << 36)]},
    }
    text = json.dumps(header).encode()
    with open(tmp_path / "m.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + np.random.default_rng(0).bytes(8192))
    with pytest.raises(SuspectError, match="not as long"):
        open_suspect(tmp_path / "m.safetensors")
    header["large"] = {"dtype": "F32", "shape": [1 << 10, 1 << 14], "data_offsets": [8192, 8192 + (1 << 26)]}
    text = json.dumps(header).encode()
    with open(tmp_path / "m.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + np.random.default_rng(0).bytes(8192))
        file.truncate(8 + len(text) + 8192 + (1 << 26))
    suspect = open_suspect(tmp_path / "m.safetensors")
    carrier, large = suspect.tensors()
    large.read = None
    suspect.tensors = lambda signature=None: [carrier, large]
    assert wm.verify(suspect, mark).decision == "not_proven"


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_few_numbers_of_very_many_take_no_memory(tmp_path, compression):
    """A megabyte of zeros in the archive is a gigabyte of them; the place of a view in a large storage is no matter."""
    count = 1 << 23
    views = {"apart": tensor_pickle(shape=(64, 64), strides=(1 << 17, 1))}
    if compression == zipfile.ZIP_DEFLATED:
        views["far behind"] = tensor_pickle(offset=count - 4096, shape=(64, 64), strides=(64, 1))
    for view in views.values():
        (weight,) = open_suspect(archive(tmp_path / "m.pt", view, bytes(4 * count), compression)).tensors()
        tracemalloc.start()
        with pytest.raises(SuspectError, match="a few numbers of very many"):
            weight.read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < count


def test_a_part_of_a_large_storage_is_read_where_it_lies(tmp_path):
    whole = torch.randn(1 << 20)
    torch.save({"w": whole[1 << 19 :][:4096].view(64, 64), "all": whole}, tmp_path / "m.pt")
    (weight,) = open_suspect(tmp_path / "m.pt").tensors()
    tracemalloc.start()
    assert np.array_equal(weight.values.ravel(), whole[1 << 19 :][:4096])
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.slow
def test_memory_is_that_of_a_weight_however_large_the_file(tmp_path):
    """Half a gigabyte, of which each of the 128 weights may be one of the carriers."""
    shape, count = (1024, 1024), 128
    size = 4 * math.prod(shape)
    ends = [number * size for number in range(count + 1)]
    header = {
        f"layers.{number}.weight": {"dtype": "F32", "shape": shape, "data_offsets": place}
        for number, place in enumerate(pairwise(ends))
    }
    text = json.dumps(header).encode()
    with open(tmp_path / "m.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + count * size)
    mark = white_box([shape] * 2, shape=SHAPE)
    wm.verify(tmp_path / "m.safetensors", mark)  # what is imported and compiled at first is not counted
    tracemalloc.start()
    verdict = wm.verify(tmp_path / "m.safetensors", mark)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "2 of 2 carriers" in " ".join(verdict.notes)
    assert peak < 8 * size


class Runs:
    def __reduce__(self):
        return os.mkdir, ("/tmp/this-must-not-be-made-by-a-pickle",)


def archive(path, content, numbers=b"", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", numbers)
    return path


def tensor_pickle(offset=0, shape=(2, 2), strides=(2, 1), key="0"):
    """What torch would write for one float tensor "w", whatever it says of it."""

    storage = object()

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, offset, shape, strides, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, key, "cpu", 4) if value is storage else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"w": Tensor()})
    return stream.getvalue()


def test_nothing_that_a_pickle_wants_to_run_is_run(tmp_path):
    torch.save({"bad": Runs(), "w": torch.ones(2, 3)}, tmp_path / "m.pt")
    (tensor,) = open_suspect(tmp_path / "m.pt").tensors()
    assert np.array_equal(tensor.values, np.ones((2, 3)))
    assert not os.path.exists("/tmp/this-must-not-be-made-by-a-pickle")


HOSTILE_PICKLES = {
    "endless": b"\x80\x02" + b"(" * 100,
    "no pickle": b"hello",
    "nothing on the stack": b"\x80\x020.",
    "a memo without end": b"\x80\x02Kr\xff\xff\xff\xff.",
    "nested deeper than names": b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
    "more steps than networks take": b"\x80\x02" + b"N0" * 3_000_000 + b"N.",
    "an extension": b"\x80\x02\x82\x01.",
    "numbers that are not there": tensor_pickle(offset=3),
    "numbers of another file": tensor_pickle(key="../../1"),
    "strides beyond the end": tensor_pickle(strides=(1 << 40, 1)),
    "numbers again and again": tensor_pickle(shape=(1 << 20, 1 << 20), strides=(0, 0)),
    "another number of strides": tensor_pickle(strides=(1,)),
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_a_pickle_that_torch_would_not_write_is_one_error(tmp_path, name):
    path = archive(tmp_path / "m.pt", HOSTILE_PICKLES[name], np.ones(4, np.float32).tobytes())
    with pytest.raises(SuspectError, match="is no checkpoint that can be read"):
        open_suspect(path)


def test_an_archive_of_too_many_files_is_not_listed(tmp_path):
    torch.save({"w": torch.ones(4, 4)}, tmp_path / "m.pt")
    assert len(open_suspect(tmp_path / "m.pt").tensors()) == 1
    content = (tmp_path / "m.pt").read_bytes()
    end = content.rindex(b"PK\x05\x06")
    long = bytes(40) + struct.pack("<Q", 1 << 40) + bytes(8) + b"PK\x06\x07" + bytes(16)
    claims = {
        "short": content[: end + 12] + struct.pack("<L", 1 << 30) + content[end + 16 :],
        "long": content[:end] + long + content[end:],
        "behind a comment": content[:-2] + struct.pack("<H", 5) + b"hello",
    }
    for claim in claims.values():
        (tmp_path / "m.pt").write_bytes(claim)
        with pytest.raises(SuspectError, match="an archive"):
            open_suspect(tmp_path / "m.pt")


def test_a_file_larger_than_any_checkpoint_is_not_even_hashed(tmp_path):
    """It lies on disk as one page."""
    size = 1 << 40
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 19, 1 << 19], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "m.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    with pytest.raises(SuspectError, match="larger than"):
        open_suspect(tmp_path / "m.safetensors")


def test_negative_places_are_no_places():
    assert list(tensors_of(tensor_pickle(offset=-1))) == []
    assert [path for path, _ in tensors_of(tensor_pickle())] == ["w"]


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[]",
        b"{" + b'"a":1}',
        b'{"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}',
        b'{"w": {"dtype": "F32", "shape": [1e999, 2], "data_offsets": [0, 16]}}',
        b'{"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [1, 17]}}',
        b'{"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": "ab"}}',
    ],
)
def test_a_header_that_lies_is_one_error(tmp_path, header):
    path = tmp_path / "m.safetensors"
    header = header if header[:1] == b"{" else b"{" + header
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(SuspectError, match="is no checkpoint that can be read"):
        open_suspect(path)
    path.write_bytes(struct.pack("<Q", 1 << 20) + header)
    with pytest.raises(SuspectError, match="is no checkpoint that can be read"):
        open_suspect(path)


def test_a_model_that_begins_as_a_checkpoint_is_a_model(tmp_path):
    """Its first nine bytes are a field that nobody reads."""
    made = test_onnx_tensors.graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [test_onnx_tensors.weight()])
    content = b"\x79\x01\0\0\0\0\0\0{" + made.SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content)
    suspect = open_suspect(tmp_path / "m.onnx")
    assert suspect.answer({"x": test_onnx_tensors.INPUTS}).values.shape == (5, test_onnx_tensors.CLASSES)


def test_a_checkpoint_answers_nothing_and_says_what_to_do(tmp_path):
    save_file({"w": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    suspect = open_suspect(tmp_path / "m.safetensors")
    for ask in (suspect.answer, lambda inputs: suspect.activations(0, inputs)):
        with pytest.raises(SuspectError, match="export it to ONNX"):
            ask({"x": np.zeros((1, 4))})
    with pytest.raises(FileNotFoundError):
        open_suspect(tmp_path / "none.safetensors")


def test_an_index_names_files_beside_it_and_no_others(tmp_path):
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    weights = {f"w{number}": torch.full((4, 4), float(number)) for number in range(3)}
    save_file({"w1": weights["w1"], "w2": weights["w2"]}, home / "a.safetensors")
    torch.save({"w0": weights["w0"]}, home / "b.bin")
    torch.save({"w0": weights["w0"]}, outside / "b.bin")
    (home / "link.bin").symlink_to(outside / "b.bin")
    index = home / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w1": "a.safetensors", "w0": "b.bin", "w2": "a.safetensors"}}))
    suspect = open_suspect(index)
    assert [tensor.source for tensor in suspect.tensors()] == ["w1", "w2", "w0"]
    assert all(np.array_equal(tensor.values, weights[tensor.source]) for tensor in suspect.tensors())
    (home / "b.bin").write_bytes((home / "a.safetensors").read_bytes())
    assert open_suspect(index).sha256 != suspect.sha256
    for name in ("../outside/b.bin", str(outside / "b.bin"), "link.bin", "none.bin", "..", 7):
        index.write_text(json.dumps({"weight_map": {"w0": name}}))
        with pytest.raises(SuspectError, match="is no checkpoint that can be read"):
            open_suspect(index)


def test_the_files_of_an_index_may_be_a_caches_own_blobs_and_nobody_elses(tmp_path):
    """As Hugging Face's cache has them: links to files named by their hash."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(4, 4)}, blobs / ("a" * 64))
    (blobs / ("b" * 40)).write_text(json.dumps({"weight_map": {"w": "m.safetensors"}}))
    (snapshot / "m.safetensors").symlink_to(f"../../blobs/{'a' * 64}")
    (snapshot / "m.index.json").symlink_to(f"../../blobs/{'b' * 40}")
    (tensor,) = open_suspect(snapshot / "m.index.json").tensors()
    assert np.array_equal(tensor.values, np.ones((4, 4)))
    (tmp_path / "mine").hardlink_to(blobs / ("a" * 64))
    with pytest.raises(SuspectError, match="also linked from elsewhere"):
        open_suspect(snapshot / "m.index.json")


def test_a_file_that_changes_while_it_is_judged_is_refused(tmp_path):
    save_file({"w": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    (tensor,) = open_suspect(tmp_path / "m.safetensors").tensors()
    with open(tmp_path / "m.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(SuspectError, match="changes while it is read"):
        tensor.read()
