"""What attacks promise of the forms of a model: the copy is attacked, the original stays, and no half file is left."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from attacked import ARRAYS, classifier, content, normal, run, values
from onnx import TensorProto, helper
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

import wmengine as wm
from wmengine.attacks.page import PAGE

TYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
X = np.random.default_rng(0).normal(size=(40, 3, 6, 6)).astype(np.float32)


@pytest.fixture
def model(tmp_path):
    onnx.save(classifier(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def tensors(tmp_path):
    """A safetensors file of every floating type, of integers and of a bias, with metadata."""
    arrays = {np.dtype(kind).name: normal(20, 30).astype(kind) for kind in TYPES}
    save_file(
        {**arrays, "steps": np.arange(6).reshape(2, 3), "bias": normal(9)}, tmp_path / "m.safetensors", {"a": "b"}
    )
    return tmp_path / "m.safetensors"


def loaded(path):
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def answers(path, x=X):
    return run(path, x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- what each attack does ---


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.95, 1.0])
def test_exactly_the_share_of_the_smallest_weights_falls(share):
    model = network()
    before, after = (
        torch.cat([each[0].weight.flatten(), each[4].weight.flatten()])
        for each in (model, wm.attacks.run("prune", model, share=share))
    )
    gone = after == 0
    assert int(gone.sum()) == round(share * len(gone))
    assert torch.equal(before[~gone], after[~gone])
    if 0 < share < 1:
        assert before[gone].abs().max() <= before[~gone].abs().min()


def test_of_each_layer_the_share_falls_and_of_equal_weights_no_more():
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[4].weight *= 1e-3
    pruned = wm.attacks.run("prune", model, share=0.25, per_layer=True)
    for layer in (0, 4):
        assert int((pruned[layer].weight == 0).sum()) == round(0.25 * pruned[layer].weight.numel())


def test_noise_is_as_large_as_the_tensor_it_is_added_to():
    model = network()
    with torch.no_grad():
        model[4].weight *= 100
    noisy = wm.attacks.run("noise", model, sigma=0.1)
    for layer in (0, 4):
        ratio = (noisy[layer].weight - model[layer].weight).std() / model[layer].weight.std()
        assert 0.09 < ratio.item() < 0.11
    assert torch.equal(noisy[1].weight, model[1].weight)


@pytest.mark.parametrize(("attack", "option"), [("prune", "share"), ("noise", "sigma")])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "half"])
def test_an_option_out_of_range_is_named(attack, option, value):
    with pytest.raises(ValueError, match=f"^{option} must be"):
        wm.attacks.run(attack, network(), **{option: value})


def test_float16_is_what_the_file_holds_and_the_answers_stay(model, tmp_path):
    out = wm.attacks.run("fp16", model, out=tmp_path / "half.onnx")
    assert {name for name, array in values(out).items() if array.dtype == np.float16} == {"a", "b", "bias"}
    assert np.allclose(answers(model), answers(out, X.astype(np.float16)), atol=0.1)


@pytest.mark.parametrize("kind", ["qdq", "qoperator", "dynamic"])
def test_eight_bits_in_each_of_the_tools_ways(model, tmp_path, kind):
    data = None if kind == "dynamic" else X
    out = wm.attacks.run("int8", model, data, kind=kind, out=tmp_path / "int8.onnx")
    operators = {node.op_type for node in onnx.load(out).graph.node}
    assert operators & {"qdq": {"DequantizeLinear"}, "qoperator": {"QLinearConv"}, "dynamic": {"ConvInteger"}}[kind]
    assert not any(array.ndim > 1 and array.dtype == np.float32 for array in values(out).values())
    assert np.abs(answers(model) - answers(out)).max() < 0.2 * np.abs(answers(model)).max()
    with pytest.raises(ValueError, match="the model holds no floating weights of two axes or more, which 'prune'"):
        wm.attacks.run("prune", out, out=tmp_path / "pruned.onnx")


@pytest.mark.parametrize(
    ("data", "options", "named"),
    [
        (None, {}, "the attack 'int8' needs data=inputs"),
        (X, {"kind": "int4"}, "kind must be one of qdq, qoperator, dynamic, and it is 'int4'"),
        (X, {"calibration": 0}, "calibration must be from 1 to"),
        (X[:, :2], {}, r"takes x \[n, 3, 6, 6\], and a row of data is \[2, 6, 6\]"),
        (X[0, 0], {}, r"takes x \[n, 3, 6, 6\], and a row of data is \[6\]"),
        ({"image": X}, {}, "takes the inputs x: give them as data, a dict of arrays by these names"),
    ],
)
def test_what_cannot_be_calibrated_is_named(model, tmp_path, data, options, named):
    with pytest.raises(ValueError, match=named):
        wm.attacks.run("int8", model, data, out=tmp_path / "int8.onnx", **options)


def test_a_fixed_batch_is_calibrated_with(tmp_path):
    onnx.save(classifier(batch=5), tmp_path / "five.onnx")
    out = wm.attacks.run("int8", tmp_path / "five.onnx", {"x": X.astype(np.float64)}, out=tmp_path / "int8.onnx")
    assert answers(out, X[:5]).shape == (5, 10)
    with pytest.raises(ValueError, match="takes batches of 5, and data has 3 inputs"):
        wm.attacks.run("int8", tmp_path / "five.onnx", X[:3], out=tmp_path / "other.onnx")


def test_a_file_without_anything_to_put_into_eight_bits_is_refused(tmp_path):
    saved = classifier()
    del saved.graph.node[:]
    saved.graph.node.append(helper.make_node("Identity", ["x"], ["y"]))
    onnx.save(saved, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="holds no weights that ONNX Runtime's tool can put into 8 bits"):
        wm.attacks.run("int8", tmp_path / "m.onnx", kind="dynamic", out=tmp_path / "int8.onnx")


def test_options_that_leave_no_numbers_are_refused_and_masks_of_infinity_are_no_weights(tmp_path):
    mask = np.where(np.tri(6, dtype=bool), 0, -np.inf).astype(np.float32)
    onnx.save(classifier(ARRAYS | {"mask": mask}), tmp_path / "m.onnx")
    out = wm.attacks.run("noise", tmp_path / "m.onnx", out=tmp_path / "noisy.onnx", sigma=1.0)
    assert np.array_equal(values(out)["mask"], mask)
    save_file({"mask": mask, "a": ARRAYS["a"]}, tmp_path / "m.safetensors")
    out = wm.attacks.run("fp16", tmp_path / "m.safetensors", out=tmp_path / "half.safetensors")
    assert np.array_equal(loaded(out)[0]["mask"], mask.astype(np.float16))
    for attack, options in (("noise", {"sigma": 1e300}), ("rescale", {"high": 1e300})):
        with pytest.raises(ValueError, match="would hold numbers that are not finite in float32"):
            wm.attacks.run(attack, tmp_path / "m.onnx", out=tmp_path / "p.onnx", **options)


def test_a_renamed_file_shares_no_name_and_answers_the_same(model, tmp_path):
    def names(path):
        graph = onnx.load(path).graph
        held = {value.name for value in (*graph.input, *graph.output, *graph.initializer, graph)}
        return held | {name for node in graph.node for name in (node.name, *node.input, *node.output)} - {""}

    out = wm.attacks.run("rename", model, out=tmp_path / "renamed.onnx")
    assert not names(model) & names(out)
    assert np.array_equal(answers(model), answers(out))


def test_names_in_subgraphs_are_renamed_as_well(tmp_path):
    shown = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    branches = {
        name: helper.make_graph([helper.make_node(kind, ["y"], ["z"], name=kind)], name, [], shown)
        for name, kind in {"then_branch": "Neg", "else_branch": "Abs"}.items()
    }
    saved = classifier(ARRAYS | {"yes": np.array(True)})
    saved.graph.node.append(helper.make_node("If", ["yes"], ["z"], **branches))
    saved.graph.output[0].name = "z"
    onnx.save(saved, tmp_path / "m.onnx")
    out = wm.attacks.run("rename", tmp_path / "m.onnx", out=tmp_path / "renamed.onnx")
    assert np.array_equal(answers(tmp_path / "m.onnx"), answers(out))
    assert b"else_branch" in out.read_bytes()  # an attribute's name is the operator's
    assert not any(name in out.read_bytes() for name in (b"Neg\x1a", b"classifier", b"bias"))


def test_names_in_functions_are_renamed_as_well(tmp_path):
    saved = classifier()
    inner = helper.make_node("Neg", ["precious"], ["secret"], name="hidden")
    opset = [helper.make_opsetid("", 20)]
    saved.functions.append(helper.make_function("shop", "turn", ["precious"], ["secret"], [inner], opset))
    saved.opset_import.append(helper.make_opsetid("shop", 1))
    saved.graph.node[-1].output[0] = "before"
    saved.graph.node.append(helper.make_node("turn", ["before"], ["y"], domain="shop"))
    saved.graph.doc_string = saved.doc_string = saved.graph.input[0].doc_string = "made by the shop"
    onnx.save(saved, tmp_path / "m.onnx")
    out = wm.attacks.run("rename", tmp_path / "m.onnx", out=tmp_path / "renamed.onnx")
    assert np.array_equal(answers(tmp_path / "m.onnx"), answers(out))
    assert not any(name in out.read_bytes() for name in (b"precious", b"secret", b"hidden", b"turn", b"made by"))


# --- forms ---


def test_of_an_onnx_file_only_the_weights_change(model, tmp_path):
    before = model.read_bytes()
    out = wm.attacks.run("noise", model, out=tmp_path / "noisy.onnx", sigma=0.5)
    saved, original = onnx.load(out), onnx.load(model)
    changed = {
        one.name for one, other in zip(saved.graph.initializer, original.graph.initializer, strict=True) if one != other
    }
    assert changed == {"a", "b"}
    del saved.graph.initializer[:], original.graph.initializer[:]
    assert saved == original
    assert model.read_bytes() == before


@pytest.mark.parametrize("kind", TYPES)
def test_weights_keep_their_type_and_those_left_alone_every_bit(tmp_path, kind):
    weights = np.random.default_rng(1).normal(size=(20, 30)).astype(kind)
    onnx.save(classifier(ARRAYS | {"w": weights}), tmp_path / "m.onnx")
    pruned = values(wm.attacks.run("prune", tmp_path / "m.onnx", out=tmp_path / "p.onnx", per_layer=True))["w"]
    assert pruned.dtype == weights.dtype
    assert int((pruned == 0).sum()) == 300
    assert (pruned == weights)[pruned != 0].all()


def test_weights_beside_an_onnx_file_are_read_and_written_whole(tmp_path):
    model = tmp_path / "m.onnx"
    onnx.save(classifier(), model, save_as_external_data=True, location="weights", size_threshold=0)
    before = [path.read_bytes() for path in (model, tmp_path / "weights")]
    out = wm.attacks.run("prune", model, out=tmp_path / "p.onnx", share=0.5)
    assert sum(int((array == 0).sum()) for array in values(out).values() if array.dtype == np.float32) == 748
    assert [path.read_bytes() for path in (model, tmp_path / "weights")] == before


def test_weights_of_a_large_model_lie_beside_it(model, tmp_path, monkeypatch):
    from wmengine.attacks import files

    monkeypatch.setattr(files, "INLINE", 1000)
    (tmp_path / "out").mkdir()
    out = wm.attacks.run("permute", model, out=tmp_path / "out" / "p.onnx")
    assert sorted(os.listdir(out.parent)) == ["p.onnx", "p.onnx.data"]
    assert np.allclose(answers(model), answers(out), atol=1e-5)


def test_of_a_safetensors_file_only_the_weights_change(tensors, tmp_path):
    before, bytes_before = loaded(tensors), tensors.read_bytes()
    out = wm.attacks.run("noise", tensors, out=tmp_path / "n.safetensors", sigma=0.5)
    after = loaded(out)
    assert after[1] == before[1] == {"a": "b"}
    for name, array in before[0].items():
        assert (after[0][name].dtype, after[0][name].shape) == (array.dtype, array.shape)
        assert np.array_equal(after[0][name], array) == (name in ("steps", "bias"))
    assert tensors.read_bytes() == bytes_before


def test_a_safetensors_file_is_cast_to_float16(tensors, tmp_path):
    after, metadata = loaded(wm.attacks.run("fp16", tensors, out=tmp_path / "h.safetensors"))
    assert metadata == {"a": "b"}
    assert {name for name, array in after.items() if array.dtype != np.float16} == {"steps"}
    assert np.array_equal(after["float32"], loaded(tensors)[0]["float32"].astype(np.float16))


def test_files_are_attacked_without_torch(model, tensors, tmp_path):
    code = f"""
import sys
import wmengine as wm
for attack in ("prune", "noise", "permute", "fp16", "rename", "int8"):
    options = {{"kind": "dynamic"}} if attack == "int8" else {{}}
    wm.attacks.run(attack, {str(model)!r}, out={str(tmp_path)!r} + f"/{{attack}}.onnx", **options)
wm.attacks.run("prune", {str(tensors)!r}, out={str(tmp_path / "p.safetensors")!r})
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_of_a_module_a_copy_is_attacked(dtype):
    model = network().to(dtype).train()
    model[4].weight.requires_grad_(False)
    before, random = state(model), torch.random.get_rng_state()
    attacked = wm.attacks.run("prune", model, share=0.5)
    assert equal(state(model), before)
    assert model.training
    assert not attacked.training
    assert not attacked[4].weight.requires_grad
    assert torch.equal(torch.random.get_rng_state(), random)
    kept = attacked[0].weight != 0
    assert torch.equal(attacked[0].weight[kept], model[0].weight[kept])
    assert attacked[0].weight.dtype == dtype
    assert not {id(each) for each in model.parameters()} & {id(each) for each in attacked.parameters()}


@pytest.mark.parametrize("attack", ["noise", "rescale"])
def test_the_same_seed_gives_the_same_result_and_another_seed_another(model, tmp_path, attack):
    first, again, other = (
        wm.attacks.run(attack, model, out=tmp_path / f"{number}.onnx", seed=seed).read_bytes()
        for number, seed in enumerate((7, 7, 8))
    )
    assert first == again != other


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["fp16", "int8", "rename"])
def test_a_module_is_exported_for_attacks_that_end_in_a_file(tmp_path, attack):
    model, before = network().eval(), state(network())
    out = wm.attacks.run(attack, model, torch.from_numpy(X), out=tmp_path / "attacked.onnx")
    with torch.no_grad():
        expected = model(torch.from_numpy(X)).numpy()
    assert np.abs(answers(out, X.astype(np.float16 if attack == "fp16" else np.float32)) - expected).max() < 0.2
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(out).graph.node}
    assert equal(state(model), before)


@pytest.mark.slow
def test_an_attacked_module_is_exported_to_out(tmp_path):
    model = network().eval()
    out = wm.attacks.run("prune", model, X[:1], out=tmp_path / "p.onnx", share=0.9)
    with torch.no_grad():
        expected = wm.attacks.run("prune", model, share=0.9)(torch.from_numpy(X)).numpy()
    assert np.allclose(answers(out), expected, atol=1e-5)


@pytest.mark.slow
def test_buffers_take_part_in_what_changes_a_graph():
    model = network().eval()
    with torch.no_grad():
        model[1].running_mean.copy_(torch.arange(8.0))
    before = state(model)
    attacked = wm.attacks.run("permute", model, X[:1])
    assert equal(state(model), before)
    assert not torch.equal(attacked[1].running_mean, model[1].running_mean)
    assert torch.equal(attacked[1].running_mean.sort().values, model[1].running_mean)


class Tied(nn.Module):
    """Two linear layers around one weight, which the graph holds as one."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(torch.relu(self.one(x)))


@pytest.mark.slow
def test_tied_parameters_stay_tied_and_channels_that_hang_on_them_where_they_are():
    with pytest.raises(ValueError, match="the model has no channels that can be permuted"):
        wm.attacks.run("permute", Tied().eval(), torch.rand(1, 6))
    pruned = wm.attacks.run("prune", Tied())
    assert pruned.one.weight is pruned.other.weight


# --- what cannot work ---

FILES = {
    "there.onnx": b"precious",
    "lone.onnx.data": b"weights of another model",
    "broken.onnx": b"no model at all",
    "broken.safetensors": b"no tensors at all",
    "model.pt": b"pickled",
}
CASES = [
    ("prune", "model.onnx", None, "the attack 'prune' ends in a file here: give out=, the .onnx file to write"),
    ("prune", "model.onnx", "p.safetensors", "p.safetensors must end in .onnx, as what is written is such a file"),
    ("prune", "m.safetensors", "p", "must end in .safetensors, as what is written is such a file"),
    ("prune", "model.onnx", "nowhere/p.onnx", "nowhere is no folder: make it first"),
    ("prune", "model.onnx", "there.onnx", "there.onnx is there already: choose another name"),
    ("prune", "model.onnx", "lone.onnx", "lone.onnx.data may hold another model's weights"),
    ("prune", "model.pt", "p.pt", "model.pt must be a file of .onnx or .safetensors, or a torch module"),
    ("prune", "broken.onnx", "p.onnx", "broken.onnx cannot be read as an ONNX file"),
    ("prune", "broken.safetensors", "p.safetensors", "broken.safetensors cannot be read as a safetensors file"),
    ("permute", "m.safetensors", "p.safetensors", "m.safetensors holds no graph, which this attack needs"),
    ("int8", "m.safetensors", "p.safetensors", "m.safetensors holds no graph, which this attack needs"),
    ("rename", "m.safetensors", "p.safetensors", "m.safetensors holds no graph, which this attack needs"),
    ("flip", "model.onnx", "p.onnx", "the model has no channels that can be flipped without changing what it answers"),
]


@pytest.mark.parametrize(("attack", "source", "out", "said"), CASES)
def test_what_cannot_work_is_one_sentence_and_leaves_the_folder_as_it_was(
    model, tensors, tmp_path, attack, source, out, said
):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=said) as raised:
        wm.attacks.run(attack, tmp_path / source, X, out=None if out is None else tmp_path / out)
    assert "\n" not in str(raised.value)
    assert content(tmp_path) == before
    assert sorted(tmp_path.iterdir()) == sorted(before)


def test_a_model_is_never_written_over_itself(model, tmp_path):
    (tmp_path / "link.onnx").symlink_to(model)
    for out in (model, tmp_path / "link.onnx"):
        with pytest.raises(ValueError, match=r"(model|link)\.onnx is the model itself, which stays as it is"):
            wm.attacks.run("prune", model, out=out, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"nothing\.onnx does not exist"):
        wm.attacks.run("prune", tmp_path / "nothing.onnx", out=tmp_path / "p.onnx")


def test_a_file_is_overwritten_only_if_told(model, tmp_path):
    out = tmp_path / "p.onnx"
    out.write_bytes(b"before")
    with pytest.raises(ValueError, match=r"p\.onnx is there already"):
        wm.attacks.run("prune", model, out=out)
    assert out.read_bytes() == b"before"
    assert wm.attacks.run("prune", model, out=out, overwrite=True) == out
    assert len(values(out)) == 4


def test_a_module_needs_somewhere_to_write_to_and_a_row_to_be_exported_with(tmp_path):
    with pytest.raises(ValueError, match="the attack 'fp16' ends in a file here: give out="):
        wm.attacks.run("fp16", network(), X)
    for attack, out in (("fp16", tmp_path / "p.onnx"), ("permute", None), ("prune", tmp_path / "p.onnx")):
        with pytest.raises(
            ValueError, match=f"for '{attack}' or for out= a torch module is exported: give data=inputs"
        ):
            wm.attacks.run(attack, network(), out=out)
    with pytest.raises(ValueError, match="the model holds no floating weights of two axes or more"):
        wm.attacks.run("noise", nn.BatchNorm2d(3))
    with pytest.raises(TypeError, match="a model is a torch module or the path of a file, and int is neither"):
        wm.attacks.run("noise", 7)


def test_an_unknown_attack_or_option_is_answered_with_the_known_ones(model, tmp_path):
    with pytest.raises(ValueError, match=r"no attack 'prunes'; the attacks are ftll, .*, prune, prune_filters"):
        wm.attacks.run("prunes", model, out=tmp_path / "p.onnx")
    with pytest.raises(ValueError, match="the attack 'prune' has no option 'ratio'; it has share, per_layer"):
        wm.attacks.run("prune", model, out=tmp_path / "p.onnx", ratio=0.5)
    with pytest.raises(ValueError, match="the attack 'permute' has no option 'share'; it has none"):
        wm.attacks.run("permute", model, out=tmp_path / "p.onnx", share=0.5)


def test_every_attack_of_the_page_says_what_it_promises_and_where_it_comes_from():
    assert len({attack.name for attack in PAGE}) == len(PAGE)
    for attack in PAGE:
        assert attack.promise
        assert attack.paper
        assert attack.family
