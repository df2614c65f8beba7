"""What each statistic is worth: log10 p of one observation by `matches`, by `soft`, and by the half of both.

    python -m benchmarks.power [OUT.json]

Digits, three seeds: a network with the marks sketch, uchida and adi, and what a thief leaves of it. White-box marks are
read from its weights, adi from its scores and from its labels alone. About ten minutes on two cores.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.environment import describe
from wmengine.attacks import run
from wmengine.demo import CLASSES, Data, build_network, load_digits, train
from wmengine.identity.key import Key
from wmengine.judging.looks import looks_of_bits, looks_of_labels, looks_of_scores
from wmengine.marking.embedder import Embedder
from wmengine.marks.watermark import Watermark
from wmengine.parts.statistics.base import Look
from wmengine.parts.statistics.either import Either
from wmengine.parts.statistics.matches import Matches
from wmengine.parts.statistics.soft import Soft
from wmengine.suspects.module import ModuleSuspect

SEEDS = (1, 2, 3)
STATISTICS = {"matches": Matches(), "soft": Soft(), "either": Either()}
PAGE = Path(__file__).parents[1] / "docs" / "schemes.md"
BEGIN, END = "<!-- power:begin -->", "<!-- power:end -->"
OUT = Path(__file__).with_name("results") / "statistics" / "power.json"


def thieves(marked: torch.nn.Sequential, data: Data, seed: int) -> Iterator[tuple[str, torch.nn.Module]]:
    """Copies, from the untouched one to those of which little is left."""
    yield "untouched", marked
    for rate in (1e-3, 3e-3, 1e-2, 3e-2):
        yield (
            f"fine-tuned 30 epochs, lr {rate:g}",
            train(copy.deepcopy(marked), data.thief, 30, seed=seed + 50, rate=rate),
        )
    for share in (0.5, 0.8, 0.9, 0.95):
        yield f"pruned {share:.0%}", run("prune", marked, share=share)
    for sigma in (0.2, 0.5, 1.0):
        yield f"noise of {sigma:g} sd", run("noise", marked, sigma=sigma, seed=seed)
    yield "distilled on the thief's digits", distilled(marked, data.thief[0], seed)
    yield "another network", train(build_network(seed=seed + 90), data.owner, 15, seed=seed + 90)


def distilled(teacher: torch.nn.Sequential, images: torch.Tensor, seed: int) -> torch.nn.Sequential:
    """A fresh network trained on the teacher's probabilities for other images."""
    student = build_network(seed=seed + 70)
    with torch.no_grad():
        targets = teacher(images).softmax(dim=1)
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    student.train()
    for _ in range(150):
        loss = functional.cross_entropy(student(images), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return student.eval()


def looks(model: torch.nn.Module, mark: Watermark) -> Iterator[tuple[str, float, Look]]:
    """How a mark is read, a stranger's chance, and what is seen."""
    suspect, preset = ModuleSuspect(model), mark.preset
    chance = preset.chance(mark.parameters)
    if mark.kind == "white-box":
        source: Any = preset.source
        (observation,) = source.observe(mark, suspect, mark.total).found
        yield "weights", chance, looks_of_bits(observation.y, [mark.symbols])[0]
        return
    asked: Any = preset.source
    scores = suspect.answer(asked.examples(mark), CLASSES).values
    yield "scores", chance, looks_of_scores(scores, [[mark.symbols]])[0].looks[0]
    yield "labels", chance, looks_of_labels(scores.argmax(axis=1).astype(np.int64), [mark.symbols], CLASSES)[0]


def measure(seed: int, data: Data) -> Iterator[dict[str, Any]]:
    key = Key("power", bytes([seed]) * 32)
    marked = build_network(seed=seed)
    embedder = Embedder(
        marked,
        key,
        ["sketch", "uchida", "adi"],
        num_classes=CLASSES,
        sample=data.owner[0][:64],
        name="power",
        value_range=(0.0, 1.0),
    )
    train(marked, data.owner, 30, seed=seed, embedder=embedder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        marks = embedder.watermarks()
    for attack, model in thieves(marked, data, seed):
        with torch.no_grad():
            accuracy = float((model(data.test[0]).argmax(dim=1) == data.test[1]).float().mean())
        for mark in marks:
            for read, chance, look in looks(model, mark):
                row = {"seed": seed, "attack": attack, "accuracy": round(accuracy, 4), "scheme": mark.scheme}
                row |= {"read": read, "matched": look.matched, "total": mark.total}
                for name, statistic in STATISTICS.items():
                    test = statistic.begin(chance, mark.total, 9.0, sequential=False)
                    test.add(look)
                    row[name] = round(test.log10_p, 2)
                yield row
        print(f"seed {seed}: {attack}", file=sys.stderr, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for each copy and mark the log10 p of all seeds by each statistic."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["attack"], row["scheme"], row["read"]), []).append(row)
    lines = ["| copy | mark, read from | matched | matches | soft | either |", "|---|---|---|---|---|---|"]
    for (attack, scheme, read), seeds in found.items():
        matched = " ".join(str(row["matched"]) for row in seeds) + f" of {seeds[0]['total']}"
        shown = (" ".join(f"{row[name]:.1f}" for row in seeds) for name in STATISTICS)
        lines.append(f"| {attack} | {scheme}, {read} | {matched} | {' | '.join(shown)} |".replace("-0.0", "0.0"))
    return "\n".join(lines)


def publish(rows: list[dict[str, Any]]) -> None:
    """Write the table into docs/schemes.md, between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    torch.set_num_threads(1)
    data = load_digits()
    rows = [row for seed in SEEDS for row in measure(seed, data)]
    better = [row["matches"] - row["either"] for row in rows if math.isfinite(row["matches"])]
    print(f"{len(rows)} rows; either is better than matches by {np.mean(better):.2f} on average", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    publish(rows)
    head = json.dumps({"format": "wmengine-power/1", "environment": describe("cpu", 1)})
    out.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
