"""Fingerprints of a finished network: inputs to which it answers what networks made without it do not.

Nothing is embedded, and the expected labels are the network's own answers, not the key's: what a stranger matches is
known only from others made without the network, the owner's `controls=`. So the null is `rank`. The candidates, what
the network answers them and what the controls do are material; the key picks from them, so that not all are given away
with one question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.base import Arrays, Draw, Layout, Parameters, Task
from wmengine.parts.fields import MAX_TRIGGERS, canonical_integer, integer, positive
from wmengine.parts.statistics.rank import NULL_ANSWERS
from wmengine.parts.triggers.abstract import floating_input
from wmengine.parts.triggers.samples import SampleTriggers
from wmengine.suspects.adapters import to_input, to_levels

if TYPE_CHECKING:
    import torch

Rows = NDArray[np.float32]
LABELLED = ("samples", "labels", "controls")
_OWN, POOLED = "own_labels", "pool_answers"
_CANDIDATES = 2  # times as many as are picked
_SURROGATES, _PROXIES = 2, 8


@dataclass(frozen=True)
class OwnAnswers(SampleTriggers):
    """What all fingerprints share; `candidates` makes theirs."""

    fields: ClassVar[tuple[str, ...]] = (*SampleTriggers.fields, "controls")
    takes: ClassVar[tuple[str, ...]] = ("samples", "controls")

    def candidates(self, task: Task, model: torch.nn.Module, count: int) -> tuple[Rows, NDArray[np.int64] | None]:
        """Rows [P, ...] within the value range, about `count` of them, and their labels, None for the model's own."""
        raise NotImplementedError

    def gather(self, task: Task, total: int) -> dict[str, NDArray[Any]]:
        """ "samples" uint8 [P, ...]: candidates; "truth" int64 [P]: the model's answers, or what the scheme expects;
        "pool_answers" int64 [m, P]: the controls'."""
        assert task.model is not None
        from wmengine.parts.triggers.crafting import answers_of

        floating_input(task.inputs)
        rows, labels = self.candidates(task, task.model, min(self.pool, _CANDIDATES * self.questions(total)))
        levels = to_levels(rows, task.value_range or ())
        put = to_input(levels, task.value_range or ())
        truth = answers_of(task.model, put).argmax(axis=1) if labels is None else labels
        others = [answers_of(control, put).argmax(axis=1) for control in self.counted(task)]
        return {"samples": levels, "truth": truth.astype(np.int64), POOLED: np.stack(others).astype(np.int64)}

    def counted(self, task: Task) -> list[Any]:
        """The controls among which a suspect ranks: none that the candidates were chosen by."""
        return list(task.controls)

    def describe(self, task: Task, total: int, material: Arrays | None = None) -> Parameters:
        return {**super().describe(task, total, material), "controls": len((material or {}).get(POOLED, ()))}

    def check(self, parameters: Parameters, total: int) -> None:
        canonical_integer("controls", parameters["controls"], 1, MAX_TRIGGERS)
        super().check(parameters, total)

    def layout(self, parameters: Parameters, total: int) -> Layout:
        controls, pool = parameters["controls"], parameters["pool"]
        own: Layout = {POOLED: ("int64", (controls, pool)), NULL_ANSWERS: ("int64", (controls, total))}
        return {**super().layout(parameters, total), **own, _OWN: ("int64", (total,))}

    def composed(
        self, subkey: Draw, parameters: Parameters, total: int, material: Arrays, picked: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        return {
            "triggers": material["samples"][picked],
            _OWN: material["truth"][picked],
            NULL_ANSWERS: material[POOLED][:, picked],
        }

    def rows_of(self, task: Task, count: int) -> tuple[Rows, NDArray[np.int64]]:
        """`count` of the task's samples, in turn where there are fewer, and what they are: their labels, or else the
        model's answers."""
        from wmengine.parts.triggers.crafting import answers_of

        assert task.model is not None
        (given,) = task.samples.values()
        rows = np.resize(given, (count, *given.shape[1:])).astype(np.float32)
        if task.sample_labels is None:
            return rows, answers_of(task.model, rows).argmax(axis=1)
        return rows, np.resize(task.sample_labels, count)


@dataclass(frozen=True)
class KnownMistakes(OwnAnswers):
    """The network's own mistakes among the samples, asked again: what every fingerprint must beat (the baseline of
    Godinot et al.: "Queries, representation and detection", 2025). Needs labelled samples that it was not trained on.
    """

    takes: ClassVar[tuple[str, ...]] = LABELLED

    def candidates(self, task: Task, model: torch.nn.Module, count: int) -> tuple[Rows, NDArray[np.int64] | None]:
        from wmengine.parts.triggers.crafting import answers_of

        (rows,) = task.samples.values()
        rows = rows.astype(np.float32)
        wrong = answers_of(model, rows).argmax(axis=1) != task.sample_labels
        if not wrong.any():
            raise ValueError("the model makes no mistake on these samples: give more, and such that it never saw")
        return rows[wrong][: self.pool], None


@dataclass(frozen=True)
class BoundaryPoints(OwnAnswers):
    """Points near the boundary between two classes i and j: samples moved to lower relu(z_i − z_j + k) +
    relu(max_{t ≠ i, j} z_t − z_i) (Cao, Jia, Gong: "IPGuard", AsiaCCS 2021, equation 6); i is a sample's class and j
    the next likeliest. boundary: k.
    """

    boundary: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("boundary", self.boundary)

    def candidates(self, task: Task, model: torch.nn.Module, count: int) -> tuple[Rows, NDArray[np.int64] | None]:
        import torch

        from wmengine.parts.triggers.crafting import answers_of, moved

        rows, _ = self.rows_of(task, count)
        order = np.argsort(-answers_of(model, rows), axis=1, kind="stable")
        own, other = (torch.from_numpy(order[:, [place]]) for place in (0, 1))

        def loss(found: list[torch.Tensor]) -> torch.Tensor:
            (logits,) = found
            i, j = (logits.gather(1, each.to(logits.device)) for each in (own, other))
            rest = logits.scatter(1, torch.cat([own, other], dim=1).to(logits.device), -torch.inf)
            return ((i - j + self.boundary).relu() + (rest.amax(dim=1, keepdim=True) - i).relu()).sum()

        return moved([model], rows, loss, ends_of(task), steps=200, rate=0.01), None


@dataclass(frozen=True)
class TransferablePoints(OwnAnswers):
    """Adversarial points that students of the network share and networks made without it do not (Lukas, Zhang,
    Kerschbaum: "Deep neural network fingerprinting by conferrable adversarial examples", ICLR 2021).

    Two students are distilled here in `distilling` steps each, from the model's answers to the samples. Every second
    control says what others do, and only the rest are counted.
    """

    distilling: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("distilling", self.distilling, 1, MAX_TRIGGERS)

    def counted(self, task: Task) -> list[Any]:
        if len(task.controls) < 2:
            raise ValueError("it needs two controls or more: some make the points, and the others are counted")
        return list(task.controls[::2])

    def candidates(self, task: Task, model: torch.nn.Module, count: int) -> tuple[Rows, NDArray[np.int64] | None]:
        import torch

        from wmengine.parts.triggers.crafting import answers_of, moved, students

        self.counted(task)
        rows, own = self.rows_of(task, count)
        (samples,) = task.samples.values()
        copies = [model, *students(model, samples.astype(np.float32), _SURROGATES, self.distilling)]
        apart = list(task.controls[1::2])
        classes = answers_of(model, rows[:1]).shape[1]
        target = torch.from_numpy((own + np.random.default_rng(0).integers(1, classes, count)) % classes)

        def loss(found: list[torch.Tensor]) -> torch.Tensor:
            aim = target.to(found[0].device)
            chances = [each.softmax(1).gather(1, aim[:, None]) for each in found]
            shared, elsewhere = torch.stack(chances[: len(copies)]), torch.stack(chances[len(copies) :])
            return -((shared + 1e-6).log().sum() + (1 - elsewhere + 1e-6).log().sum())

        return moved([*copies, *apart], rows, loss, ends_of(task), steps=100, rate=0.01, most=0.2), target.numpy()


@dataclass(frozen=True)
class RobustPoints(OwnAnswers):
    """Mixtures of two samples, kept where every one of m networks near this one agrees with it (Pautov, Bogdanov,
    Pyatkin, Rogov, Oseledets: "Probabilistically robust watermarking of neural networks", IJCAI 2024); proxies are the
    network with noise of `spread` of each tensor's deviation. Labels are the model's own.
    """

    spread: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("spread", self.spread)

    def candidates(self, task: Task, model: torch.nn.Module, count: int) -> tuple[Rows, NDArray[np.int64] | None]:
        from wmengine.parts.triggers.crafting import answers_of, neighbours

        rows, _ = self.rows_of(task, 8 * count)
        generator = np.random.default_rng(0)
        others = rows[generator.permutation(len(rows))]
        share = generator.uniform(0.3, 0.7, (len(rows), *[1] * (rows.ndim - 1))).astype(np.float32)
        mixed = share * rows + (1 - share) * others
        own = answers_of(model, mixed).argmax(axis=1)
        near = [answers_of(each, mixed).argmax(axis=1) for each in neighbours(model, _PROXIES, self.spread)]
        kept = (np.stack(near) == own).all(axis=0)
        # Of those that all agree on the most surprising: their answer is neither sample's.
        plain = answers_of(model, rows).argmax(axis=1), answers_of(model, others).argmax(axis=1)
        strange = (own != plain[0]) & (own != plain[1])
        order = np.argsort(~strange[kept], kind="stable")[:count]
        return mixed[kept][order], None


@dataclass(frozen=True)
class FrontierPoints(OwnAnswers):
    """Samples pushed over the network's boundary, and as many that were pushed as far and stay right, all with their
    true labels (Le Merrer, Pérez, Trédan: "Adversarial frontier stitching for remote neural network watermarking",
    2018); the network is then trained to answer them. push: ε, of the value range.
    """

    push: float = 0.05

    takes: ClassVar[tuple[str, ...]] = LABELLED

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("push", self.push)

    def candidates(self, task: Task, model: torch.nn.Module, count: int) -> tuple[Rows, NDArray[np.int64] | None]:
        import torch

        from wmengine.parts.triggers.crafting import answers_of, moved

        rows, truth = self.rows_of(task, 4 * count)
        labels = torch.from_numpy(truth)

        def loss(found: list[torch.Tensor]) -> torch.Tensor:
            return -torch.nn.functional.cross_entropy(found[0], labels.to(found[0].device), reduction="sum")

        pushed = moved([model], rows, loss, ends_of(task), steps=10, rate=self.push / 4, most=self.push)
        wrong = answers_of(model, pushed).argmax(axis=1) != truth
        chosen = [np.flatnonzero(each)[: count // 2] for each in (wrong, ~wrong)]
        both = np.sort(np.concatenate(chosen))
        return pushed[both], truth[both]


def ends_of(task: Task) -> tuple[Rows, Rows]:
    """lo and hi of the value range, [C, 1, …] as an input of the task has them."""
    (given,) = task.inputs.values()
    ends = np.asarray(task.value_range, np.float32).reshape(-1, 2)
    low, high = (ends[:, end].reshape(-1, *[1] * (len(given.shape) - 1)) for end in (0, 1))
    return low, high
