"""What each of two processes does in the test of distributed training; they import it by its name."""

import gc

import pytest
import torch
from embedding import CLASSES, KEY, batch, embedder, network
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import wmengine
from wmengine.suspects.computed import whole


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for place in (1, 3, 8):
        fully_shard(model[place], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_in_two(rank, store):
    torch.set_num_threads(1)
    plain = network().eval()
    emb = embedder(plain)
    mixed = emb.mix(*batch(32))
    emb.loss(plain(mixed[0]), mixed[1]).backward()
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for wrap in (DistributedDataParallel, sharded):
            train_wrapped(wrap, rank, plain, mixed)
        train_in_pieces(rank)
        gc.collect()  # what holds the group must be gone before it is
    finally:
        distributed.destroy_process_group()


def train_wrapped(wrap, rank, plain, mixed):
    model = wrap(network().eval())
    emb = embedder(model)
    gradients_are_those_of_one_process(emb, model, plain, mixed)
    each_process_draws_its_own_order(emb)
    train_on(model, emb, rank, 60)
    for mark in emb.watermarks():
        assert wmengine.verify(model, mark, key=KEY).owned, (wrap, mark.scheme)


def train_on(model, emb, rank, steps):
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    model.train()
    for step in range(steps):
        x, y = emb.mix(*batch(32, seed=2 * step + rank))
        emb.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_in_pieces(rank):
    """By the first of torch's classes: triggers need no weight, and a mark in weights is refused before and after."""
    model, triggers = in_pieces(network()), [wmengine.scheme("adi", count=40)]
    emb = embedder(model, triggers)
    train_on(model, emb, rank, 60)
    (mark,) = emb.watermarks()
    assert wmengine.verify(model, mark, key=KEY).owned
    for schemes in (["sketch"], ["adi", "deepsigns"]):
        with pytest.raises(ValueError, match=r"only marks of triggers go with it: shard with .*fully_shard"):
            embedder(model, schemes)
    plain = network()
    emb = embedder(plain)
    model = in_pieces(plain)
    with pytest.raises(ValueError, match="only marks of triggers go with it"):
        train_on(model, emb, rank, 2)


def in_pieces(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def gradients_are_those_of_one_process(emb, model, plain, mixed):
    for first in ("run", "term"):
        if first == "term":  # where nothing has gathered the weights
            (torch.nn.functional.cross_entropy(model(mixed[0]), mixed[1] % CLASSES)).backward()
            emb.regulariser().backward()
        else:
            emb.loss(model(mixed[0]), mixed[1]).backward()
        for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(whole(parameter.grad), expected.grad, rtol=1e-3, atol=1e-5)
        model.zero_grad()


def each_process_draws_its_own_order(emb):
    rows = emb.mix(*batch(64))[0][64:].contiguous()
    theirs = [torch.empty_like(rows) for _ in range(2)]
    distributed.all_gather(theirs, rows)
    assert not torch.equal(*theirs)
