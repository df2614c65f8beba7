"""The tasks that marked networks learn: data for owner, thief and test, networks, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.robustness import cifar10, intents, letters
from benchmarks.robustness.lessons import Lesson
from benchmarks.robustness.training import Rows
from wmengine._optional import require
from wmengine.demo import Data, build_network, load_digits, train
from wmengine.marking.embedder import Embedder
from wmengine.marks.catalogue import scheme
from wmengine.marks.preset import Preset

Options = Mapping[str, Mapping[str, Any]]
GREYS = 17  # of a digit's pixel; as a token each is one more, as 0 is kept for padding


@dataclass(frozen=True)
class Problem:
    """One task. recipe: how its networks are trained, in words; what was measured under another recipe does not count.

    load: the data's folder → owner, thief and test, [n, ...] inputs and int64 labels. build, other: a network from a
    seed, the owner's and one of another architecture. train: (model, rows, seed=, embedder=) → the model in eval mode.
    elsewhere: inputs that are none of the task's. presets: those that its table has; variants: some of them with other
    options, such as "response strength 0.35", in tables of their own. mark_options, attack_options: by preset and by
    attack, what differs from their defaults. without: patterns of the lines that its table has not;
    planned: by preset, the lines that it is measured on, where these are not all. half: attacks train under autocast to
    bfloat16. tuned: by preset, for how many epochs a finished network is trained on to hold it, or 0 for one that is
    trained from the beginning, with the finished one and students of its labels as controls and the test's inputs,
    unlabelled, as probes. apart: by preset, how many of the owner's rows its triggers are made of, which the marked
    network does not train on. lessons: by preset, how it is put into a finished network where that is not the product's
    way, taught by this one and another seed's.
    """

    name: str
    recipe: str
    load: Callable[[Path | None], Data]
    build: Callable[[int], nn.Module]
    other: Callable[[int], nn.Module]
    train: Callable[..., nn.Module]
    elsewhere: Callable[[], torch.Tensor]
    presets: tuple[str, ...]
    variants: tuple[str, ...] = ()
    value_range: tuple[float, float] = (0.0, 1.0)
    classes: int = 10
    mark_options: Options = field(default_factory=dict)
    attack_options: Options = field(default_factory=dict)
    without: tuple[str, ...] = ()
    planned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    half: bool = False
    tuned: Mapping[str, int] = field(default_factory=dict)
    apart: Mapping[str, int] = field(default_factory=dict)
    lessons: Mapping[str, Lesson] = field(default_factory=dict)

    def preset(self, name: str) -> Preset:
        return scheme(name.split()[0]).with_options(**self.mark_options.get(name, {}))


def _tokens(pictures: torch.Tensor) -> torch.Tensor:
    """[n, 1, 8, 8] in [0, 1] → int64 [n, 64]: the grey levels, row after row."""
    return 1 + (pictures.flatten(1) * (GREYS - 1)).round().long()


def _digits_as_tokens(_: Path | None) -> Data:
    return Data(*((_tokens(pictures), labels) for pictures, labels in load_digits()))


def _small_pictures_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(768, 96), nn.ReLU(), nn.Linear(96, 10)),
    )


class _ChannelsFirst(nn.Module):
    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        return embedded.transpose(1, 2)


def _reader(seed: int) -> nn.Module:
    """Embedded tokens, two convolutions that see the rows above and below, two linear layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Embedding(GREYS + 1, 24), _ChannelsFirst()),
        *(nn.Conv1d(24, 64, 9, padding=4, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(64, 96, 9, padding=4, bias=False), nn.BatchNorm1d(96), nn.ReLU(), nn.MaxPool1d(4), nn.Flatten()),
        *(nn.Linear(768, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


class _Attentive(nn.Module):
    """A transformer of two layers over embedded tokens and places."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(GREYS + 1, 32), nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers, self.answer = nn.TransformerEncoder(layer, 2), nn.Linear(32, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        seen = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        found: torch.Tensor = self.answer(self.layers(seen).mean(dim=1))
        return found


def _attentive(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return _Attentive()


def _train_on_digits(
    model: Any, rows: Rows, seed: int, embedder: Embedder | None = None, tuned: int | None = None
) -> nn.Module:
    return train(model, rows, tuned or 30, seed=seed, embedder=embedder)


def photographs(count: int, size: int, channels: int) -> torch.Tensor:
    """Squares cut from scikit-learn's two photographs (a temple, a flower), float32 [count, channels, size, size]."""
    scenes = [Image.fromarray(each) for each in require("sklearn.datasets", extra="demo").load_sample_images().images]
    random, found = np.random.default_rng(0), []
    for _ in range(count):
        scene = scenes[random.integers(len(scenes))]
        side = int(random.integers(size, min(scene.size) // 2))
        left, top = (int(random.integers(length - side)) for length in scene.size)
        square = scene.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BOX)
        found.append(np.asarray(square.convert("RGB" if channels == 3 else "L")).reshape(size, size, channels))
    return torch.from_numpy(np.stack(found).transpose(0, 3, 1, 2).astype(np.float32) / 255.0)


# What removes a mark, and what makes a copy, once each: for presets that share their parts with one that is measured on
# every line.
_CHOSEN = (
    *("untouched", "ftal", "rtal", "prune 90%", "int8 qdq", "distil", "extract", "extract then wrk"),
    *("stranger 1", "stranger 2"),
)
_WRONG = ("exponential_weighting", "multi_view")  # samples under labels that are not theirs
_TRIGGERS = ("zhang_content", "margin", "ewe_keyed", "class_feature", "mea_defender")
_PICTURES_LINES = (  # of CIFAR-10: networks take minutes there
    *("untouched", "ftll", "ftal", "rtal", "prune 50%", "prune 80%", "prune 90%", "prune filters 25%"),
    *("prune 90% then ftal", "noise 1/700", "noise 0.2", "noise 0.5", "permute rescale flip", "fp16", "rename"),
    *("int8 qdq", "int8 dynamic", "overwrite", "distil", "distil other architecture", "extract", "extract then wrk"),
    *("stranger 1", "stranger 2"),
)
DIGITS = Problem(
    name="digits",
    recipe="897 digits, 30 epochs, Adam, one cycle to 3e-3, batches of 64",
    load=lambda _: load_digits(),
    build=build_network,
    other=_small_pictures_network,
    train=_train_on_digits,
    elsewhere=partial(photographs, 500, 8, 1),
    # Of the passports the private ones: a network must be prepared for deepipr_v1, and without triggers beside it
    # deepipr_v3 trains as deepipr_v2 does.
    presets=(
        *("sketch", "uchida", "deepmarks", "stdm", "riga", "greedy_residuals", "neuralmark", "tattooed"),
        *("deepsigns", "diction", "deepipr_v2", "passport_norm", "adi"),
        *("zhang_content", "zhang_noise", "blind", "margin", "ewe_keyed", "certified", "class_feature", "mea_defender"),
        *("exponential_weighting", "multi_view", "response"),
    ),
    mark_options={"response": {"mixtures": 64, "views": 1}},  # eight pixels moved by one are another picture
    tuned={"response": 30},
    planned=dict.fromkeys((*_TRIGGERS, "zhang_noise", "blind", "certified", *_WRONG, "response"), _CHOSEN),
    apart=dict.fromkeys(_WRONG, 200),
    # A student who learned digits from photographs reads none; those that `distil` and `extract` make are good ones.
    without=("adversarial training", "*elsewhere", "copy by *"),
)
TOKENS = Problem(
    name="digits-tokens",
    recipe="897 digits as 64 tokens each, 30 epochs, Adam, one cycle to 3e-3, batches of 64",
    load=_digits_as_tokens,
    build=_reader,
    other=_attentive,
    train=_train_on_digits,
    elsewhere=lambda: _tokens(photographs(500, 8, 1)),
    presets=("sketch", "adi_tokens"),
    value_range=(0, GREYS),
    mark_options={"adi_tokens": {"special": 1}},
    without=("adversarial training", "*wrk", "copy by *"),  # the first two move inputs by gradients, which tokens lack
)
_COPIES = ("untouched", "copy by labels", "copy by labels to another architecture")
_TUNED: Options = {
    "response strength 0.35": {"strength": 0.35},
    "response bits 256": {"bits": 256},
    "response features 16": {"features": 16},
}
_TRAINED: Options = {"response from scratch strength 0.35": {"strength": 0.35}}
_LESSONS = {
    "response taught": Lesson(taught=0.5),
    "response hinge": Lesson(offset=False, hinge=0.3),
    "response strength 0.35 and hinge": Lesson(hinge=0.3),
}
_SETTINGS: Options = {
    **_TUNED,
    **_TRAINED,
    **{name: {"strength": 0.35} if "0.35" in name else {} for name in _LESSONS},
}
CIFAR10 = Problem(
    name="cifar10",
    recipe=f"25,000 pictures, {cifar10.RECIPE}",
    load=cifar10.load,
    build=cifar10.resnet,
    other=cifar10.plain_network,
    train=cifar10.RECIPE,
    elsewhere=partial(photographs, 10_000, 32, 3),
    presets=("sketch", "adi", "response", "zhang_content", "margin", "ewe_keyed", "class_feature", "mea_defender"),
    variants=tuple(_SETTINGS),
    mark_options=_SETTINGS,
    attack_options={
        **{name: {"batch": cifar10.RECIPE.batch} for name in ("ftll", "ftal", "rtll", "rtal", "wrk", "overwrite")},
        **{name: {"batch": cifar10.RECIPE.batch, "epochs": cifar10.RECIPE.epochs} for name in ("distil", "extract")},
        # Of which a step costs as much as one of training.
        "adversarial": {"batch": cifar10.RECIPE.batch, "steps": 7, "epochs": 2},
    },
    planned={
        "sketch": _PICTURES_LINES,
        "adi": (*_PICTURES_LINES, "copy by labels"),
        **dict.fromkeys(
            _TRIGGERS,
            ("untouched", "ftal", "prune 50%", "noise 0.2", "fp16", "int8 qdq", "copy by labels", "stranger 1"),
        ),
        "response": (
            *("untouched", "ftal", "adversarial training", "prune 50%", "int8 qdq", "overwrite"),
            *("copy by *", "stranger 1", "service*"),
        ),
        **dict.fromkeys(_SETTINGS, _COPIES),
        "response strength 0.35": (*_COPIES, "copy by scores"),
    },
    half=True,
    tuned={**dict.fromkeys(("response", *_TUNED, *_LESSONS), 3), **dict.fromkeys(_TRAINED, 0)},
    lessons=_LESSONS,
)
# Where the mark is read in answers to anything but pictures.
_STUDENTS = ("copy by scores", "copy by labels", "copy by labels to another architecture")
_ANSWERS = ("untouched", "ftal", *_STUDENTS, "stranger 1", "service*")
LETTERS = Problem(
    name="letters",
    recipe=f"8,000 rows of 16 columns, {letters.RECIPE}",
    load=letters.load,
    build=letters.network,
    other=letters.other_network,
    train=letters.RECIPE,
    elsewhere=partial(torch.rand, 8000, letters.COLUMNS),
    presets=("response",),
    variants=("response strength 1",),
    mark_options={"response strength 1": {"strength": 1.0}},
    classes=letters.CLASSES,
    planned={"response": _ANSWERS, "response strength 1": ("untouched", *_STUDENTS, "stranger 1")},
    tuned={"response": 20, "response strength 1": 20},
)
INTENTS = Problem(
    name="intents",
    recipe=f"9,000 requests of 16 tokens, {intents.RECIPE}",
    load=intents.load,
    build=intents.network,
    other=intents.other_network,
    train=intents.RECIPE,
    elsewhere=partial(torch.randint, 1, intents.TOKENS, (9000, intents.LENGTH)),
    presets=("response",),
    variants=("response features 192",),
    mark_options={"response features 192": {"features": 192}},
    value_range=(0, intents.TOKENS - 1),
    classes=intents.CLASSES,
    planned={
        "response": ("untouched", *_STUDENTS[:2], "stranger 1", "service", "service copied by scores softened at T=3"),
        "response features 192": ("untouched", *_STUDENTS[:2], "stranger 1"),
    },
    tuned={"response": 6, "response features 192": 6},
)
PROBLEMS = {problem.name: problem for problem in (DIGITS, TOKENS, CIFAR10, LETTERS, INTENTS)}
