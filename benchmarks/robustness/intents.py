"""CLINC150 (Larson et al. 2019): 22,500 short requests to an assistant, each one of 150 intents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.robustness.training import Recipe
from wmengine.demo import Data

RECIPE = Recipe(15, 64, 3e-3)
FILE, CLASSES = "data_full.json", 150
LENGTH, TOKENS = 16, 2048  # a row's tokens, 0 where it has ended and 1 for a rare word


def load(folder: Path | None) -> Data:
    """Rows of tokens int64 [n, 16] and labels: half each of the 18,000 of training and validation for owner and thief,
    and the 4,500 of the test. A token is one of the 2,046 words that the owner's rows have most often.

    The folder holds data_full.json as the authors give it out. Raises ValueError where it does not.
    """
    file = None if folder is None else folder / FILE
    if file is None or not file.exists():
        raise ValueError(f"intents needs --data DIR (or WMENGINE_DATA), a folder with {FILE} of CLINC150")
    held = json.loads(file.read_text(encoding="utf-8"))
    known = [(_words(text), intent) for text, intent in (*held["train"], *held["val"])]
    order = np.random.default_rng(0).permutation(len(known))
    halves = [[known[at] for at in part] for part in np.array_split(order, 2)]
    counted: dict[str, int] = {}
    for word in (word for words, _ in halves[0] for word in words):
        counted[word] = counted.get(word, 0) + 1
    common = sorted(counted, key=lambda word: (-counted[word], word))[: TOKENS - 2]
    places = {word: 2 + place for place, word in enumerate(common)}
    intents = sorted({intent for _, intent in known})

    def rows(part: Iterable[tuple[list[str], str]]) -> tuple[torch.Tensor, torch.Tensor]:
        texts, labels = zip(*part, strict=True)
        x = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
        for row, words in zip(x, texts, strict=True):
            kept = words[:LENGTH]
            row[: len(kept)] = torch.tensor([places.get(word, 1) for word in kept])
        return x, torch.tensor([intents.index(intent) for intent in labels])

    return Data(*map(rows, (*halves, [(_words(text), intent) for text, intent in held["test"]])))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]+", text.lower())


class _Averaged(nn.Module):
    """The mean of a row's embedded tokens and of its pairs of neighbours, then two linear layers."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.tokens, self.pairs = nn.Embedding(TOKENS, width, padding_idx=0), nn.Conv1d(width, width, 2, padding=1)
        self.hidden, self.answer = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        seen = self.tokens(tokens)
        there = (tokens > 0).sum(1, keepdim=True).clamp(min=1)
        paired = torch.relu(self.pairs(seen.transpose(1, 2))).amax(2)
        found: torch.Tensor = self.answer(torch.relu(self.hidden(torch.cat([seen.sum(1) / there, paired], 1))))
        return found


class _Attentive(nn.Module):
    """A transformer layer over embedded tokens and places, and the greatest of what it makes of each."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, width), nn.Embedding(LENGTH, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.answer = nn.Linear(width, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        seen = self.tokens(tokens) + self.places(torch.arange(LENGTH, device=tokens.device))
        found: torch.Tensor = self.answer(self.layer(seen).amax(1))
        return found


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return _Averaged()


def other_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return _Attentive()
