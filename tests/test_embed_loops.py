"""Marks survive what real loops do: scaled gradients, averaged weights, compilation, several processes, crashes."""

import copy

import pytest
import torch
from distributed_training import train_in_two
from embedding import KEY, batch, embedder, network, train, unproven
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import wmengine
from wmengine.suspects.weights import unwrap

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_scaled_gradients_accumulated_over_micro_batches_end_owned():
    """As mixed precision trains: float16 logits, a GradScaler, a step every second batch."""
    model = network()
    emb = embedder(model)
    optimizer, scaler = torch.optim.Adam(model.parameters(), 3e-3), torch.amp.GradScaler("cpu")
    for step in range(100):
        x, y = emb.mix(*batch(32, seed=step))
        with torch.autocast("cpu", dtype=torch.float16):
            loss = emb.loss(model(x), y) / 2
        scaler.scale(loss).backward()
        if step % 2:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert all(wmengine.verify(model, mark, key=KEY).owned for mark in emb.watermarks())


@pytest.mark.slow
def test_a_moving_average_of_the_weights_holds_the_marks_and_is_what_watermarks_judges():
    model = network()
    emb = embedder(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(100):
        x, y = emb.mix(*batch(64, seed=step))
        emb.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    assert all(wmengine.verify(average, mark, key=KEY).owned for mark in emb.watermarks(average))
    with pytest.warns(UserWarning, match="does not prove itself"):
        emb.watermarks(network())  # an average that nobody updated


def test_a_mark_that_is_added_when_training_is_over_is_added_to_the_model_that_is_shipped():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4))
    emb = embedder(model, [wmengine.scheme("tattooed", bits=64)], num_classes=None)
    average = copy.deepcopy(model)
    (mark,) = emb.watermarks(average)
    assert [wmengine.verify(each, mark).owned for each in (average, model)] == [True, False]


@pytest.mark.slow
def test_a_compiled_model_is_marked():
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    emb = embedder(compiled)
    train(compiled, emb, 50)
    marks = emb.watermarks()
    assert all(wmengine.verify(each, mark, key=KEY).owned for mark in marks for each in (model, compiled))


@pytest.mark.slow
def test_two_processes_train_one_marked_model(tmp_path):
    """By DDP and by FSDP: the gradients of one process, triggers in two orders, and both marks owned in both; by the
    first FSDP triggers alone."""
    torch.multiprocessing.spawn(train_in_two, (str(tmp_path / "store"),), nprocs=2)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_a_launchers_rank_is_enough_for_an_order_of_its_own(name, monkeypatch):
    """Frameworks make the model before the processes know each other."""
    drawn = []
    for rank in "010":
        monkeypatch.setenv(name, rank)
        drawn.append(embedder(network()).mix(*batch(64))[0])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


class Sharded(nn.Sequential):
    """As torch's fully_shard leaves a module."""

    def reshard(self):
        """Unused."""

    def unshard(self):
        """Unused."""


def test_shards_are_neither_written_nor_added_to(tmp_path):
    model = Sharded(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4))
    with pytest.raises(ValueError, match=r"weights are sharded: load what .*get_model_state_dict"):
        wmengine.export_onnx(model, batch(1)[0], tmp_path / "m.onnx")
    for name, options in {"tattooed": {"bits": 64}, "exponential_weighting": {"count": 40}}.items():
        with pytest.raises(ValueError, match="weights are sharded"):
            embedder(model, [wmengine.scheme(name, **options)], samples=batch(200, seed=3))


def test_weights_that_are_cut_into_pieces_are_not_taken_for_weights(tmp_path):
    class FullyShardedDataParallel(nn.Module):
        """By its name, as torch has it: making one takes processes."""

    cut = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), FullyShardedDataParallel())
    with pytest.raises(ValueError, match=r"shard with torch.distributed.fsdp.fully_shard"):
        unwrap(cut)
    with pytest.raises(ValueError, match=r"weights are sharded: load what .*get_model_state_dict"):
        wmengine.export_onnx(cut, batch(1)[0], tmp_path / "m.onnx")
    for verdict in wmengine.verify_all(cut, unproven(embedder(nn.Sequential(*network())))):
        assert (verdict.scheme == "adi") != ("cuts weights into pieces" in (verdict.error or ""))


# Going on after a crash


@pytest.mark.slow
def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path):
    """To the bit, and with the baseline of the model before it was marked."""
    whole = network()
    train_on(whole, embedder(whole), optimizer_of(whole), range(24))
    model = network()
    emb, optimizer = embedder(model), optimizer_of(model)
    train_on(model, emb, optimizer, range(12))
    for mark in unproven(emb):
        mark.save(tmp_path / f"{mark.scheme}.wm")
    torch.save([model.state_dict(), optimizer.state_dict(), emb.state_dict()], tmp_path / "checkpoint.pt")
    model = network(seed=7)
    optimizer = optimizer_of(model)
    weights, moments, state = torch.load(tmp_path / "checkpoint.pt")
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    again = wmengine.Embedder(
        model, marks=[tmp_path / "sketch.wm", tmp_path / "adi.wm"], schemes=[wmengine.scheme("sketch", bits=64)],
        sample=batch(8, seed=77)[0],
    )  # fmt: skip
    again.load_state_dict(state)
    train_on(model, again, optimizer, range(12, 24))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    before, after = unproven(embedder(network())), unproven(again)
    assert [mark.baseline for mark in after] == [mark.baseline for mark in before]


def optimizer_of(model):
    return torch.optim.Adam(model.parameters(), 2e-3)


def train_on(model, emb, optimizer, steps):
    model.train()
    for step in steps:
        x, y = emb.mix(*batch(64, seed=step))
        emb.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_resumed_run_that_derives_its_marks_anew_from_another_sample_is_told():
    """Another range of values is another mark, which the checkpoint's state is not of."""
    state = embedder(network()).state_dict()
    again = embedder(network(), sample=2 * batch(64)[0])
    with pytest.raises(ValueError, match="this state is of other marks: make the Embedder with marks="):
        again.load_state_dict(state)
