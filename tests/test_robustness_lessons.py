"""Other ways to teach `response`, for the table of settings, and along which components it arrives."""

from pathlib import Path

import pytest
import torch
from responding import KEY, PROBES, bent_network, network, served
from tiny_task import UNTOUCHED, Counted, fill
from torch.nn import functional

from benchmarks.robustness import cells, components, grid
from benchmarks.robustness.lessons import Learner, Lesson, pattern_of_mark
from benchmarks.robustness.readings import READ
from wmengine import Embedder, scheme
from wmengine.demo import Data

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = torch.from_numpy(PROBES[:64]), torch.arange(64) % 10


def test_half_of_what_a_taught_network_learns_are_its_teachers_answers():
    teachers, logits = [network(1), network(2)], network(3)(X)
    found = Learner(Lesson(taught=0.5), None, teachers).loss(logits, Y, label_smoothing=0.1, inputs=X)
    shares = (sum(each(X).softmax(1) for each in teachers) / 2 + functional.one_hot(Y, 10)) / 2
    smooth = 0.9 * shares + 0.01
    assert found.item() == pytest.approx(-(smooth * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)


def test_the_hinge_pulls_a_network_towards_the_pattern():
    emb = Embedder(
        network(), KEY, [scheme("response", probes=1024, views=1)], num_classes=10, sample=X[:8], name="hinge",
        value_range=(0, 1), samples=PROBES, controls=[network()],
    )  # fmt: skip
    ways, signed, scale = pattern_of_mark(emb.marks[0])
    learner = Learner(Lesson(offset=False, hinge=1.0), emb, [network()])
    base = network()(X).detach()
    whole = base + scale * torch.tanh(emb.features(X) @ ways) @ signed
    short = [
        learner.loss(logits, Y, inputs=X) - functional.cross_entropy(logits, Y)
        for logits in (whole, base, (whole + base) / 2)
    ]
    assert short[1] == pytest.approx(1.0, abs=1e-5)
    assert max(short[0], short[2]) < 0.9
    logits = base.clone().requires_grad_()
    learner._short(emb.features(X), logits, X).backward()
    assert functional.cosine_similarity(-logits.grad.flatten(), (whole - base).flatten(), dim=0) > 0.3
    for offset in (False, True):
        plain = Learner(Lesson(offset=offset, hinge=1.0), None, [network()]).loss(base, Y, inputs=X)
        assert plain == functional.cross_entropy(base, Y), "without a mark there is nothing to teach"


def test_a_lesson_is_part_of_what_was_measured_and_one_of_teachers_has_a_twin_of_its_own(tmp_path: Path):
    counted, generator = Counted(), torch.Generator().manual_seed(0)
    labels = torch.arange(192) % 2
    rows = (labels[:, None, None, None] + torch.rand(192, 1, 4, 4, generator=generator)) / 2
    data = Data(*((rows[start : start + 64], labels[start : start + 64]) for start in (0, 64, 128)))
    names = ("response", "response taught", "response hinge")
    options = {name: {"bits": 256, "probes": 256} for name in names}
    lessons = {"response taught": Lesson(taught=0.5), "response hinge": Lesson(offset=False, hinge=0.3)}
    problem = counted.problem(
        load=lambda _: data, presets=names, mark_options=options, tuned=dict.fromkeys(names, 2), lessons=lessons
    )
    assert len({grid.digest(grid.recipe_of(problem, name)) for name in names}) == 3
    assert fill(problem, tmp_path, UNTOUCHED) == []
    kept = {file.name.rpartition("-")[0] for file in (tmp_path / "tiny" / "networks").glob("response*1*.pt")}
    assert {"response-1-plain", "response taught-1-plain"} <= kept
    assert "response hinge-1-plain" not in kept
    found = {row.preset: row for row in cells.read(tmp_path, "tiny").values() if row.seed == 1}
    assert set(found) == {"none", *names}


def test_all_of_the_pattern_arrives_in_what_holds_it_and_none_of_it_in_a_stranger():
    mark = served().watermark()
    rows = {name: components.arrived(mark, each) for name, each in (("held", bent_network(mark)), ("not", network(9)))}
    for held, other in zip(rows["held"][1:], rows["not"][1:], strict=True):
        assert held["scores"] == pytest.approx(1.0, abs=0.05)
        assert held["labels"] == pytest.approx(1.0, abs=0.05)
        assert abs(other["scores"]) < 0.5
    whole, *without = (row["without_scores"] for row in rows["held"])
    assert whole < min(without)
    assert rows["held"][0]["there"] is None


def test_the_table_of_components_shows_every_seed_of_every_network():
    groups = [{"begin": 0, "end": 0, "scores": None, "labels": None, "there": None}]
    groups += [{"begin": 0, "end": 9, "scores": 0.5, "labels": -0.001, "there": 0.1}]
    proofs = {"without_scores": -12.0, "without_labels": -0.01}
    rows = [{"seed": seed, "network": name, **group, **proofs} for seed in (1, 2) for name in READ for group in groups]
    lines = components.table(rows).splitlines()
    assert lines[2].startswith("| all |  | -12.0 / 0.0, -12.0 / 0.0 |")
    assert lines[3].startswith("| 1 to 9 | 0.10, 0.10 | 0.50 / 0.00, 0.50 / 0.00<br>-12.0 / 0.0, -12.0 / 0.0 |")
