"""Embed marks while a model trains: `mix` adds trigger rows to a batch, `loss` adds their loss and the white-box terms.

    emb = Embedder(model, key, schemes=["sketch", "adi"], num_classes=10, sample=x[:64], name="detector-v3")
    for x, y in loader:
        x, y = emb.mix(x, y)
        loss = emb.loss(model(x), y)
        loss.backward(); optimizer.step(); optimizer.zero_grad()
    marks = emb.watermarks()

The two calls share no state: a trigger row of the mark numbered g carries its label + g · num_classes, and `loss`
reads the group from that. So rows may be shuffled, split over micro-batches or devices, and the loop compiled. (Only a
scheme that runs the model a second time, such as `deepipr_v2`, goes by the batch that `mix` saw last.)
Nothing is hooked into the model, which stays the plain module it was.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wmengine.identity.key import Key
from wmengine.judging.answering import members_of
from wmengine.judging.asking import Terms
from wmengine.judging.judge import Finding, judge_suspect
from wmengine.judging.looks import looks_of_bits
from wmengine.judging.verdict import PROVING
from wmengine.marking.batches import Batches, check_logits, checked_labels, shares_of, split
from wmengine.marking.fitting import fit
from wmengine.marking.power import warn_of_power
from wmengine.marking.rows_loss import rows_loss
from wmengine.marks.catalogue import scheme
from wmengine.marks.preset import Preset
from wmengine.marks.watermark import Watermark
from wmengine.parts.base import Course, Finishes, Need, Offsets, Setting, Task, Watches
from wmengine.parts.statistics.tails import binomial_log10_tail
from wmengine.parts.training.offset import Offset
from wmengine.parts.triggers.readings import ReadTriggers
from wmengine.suspects.computed import check_whole, low_rank_pair
from wmengine.suspects.module import ModuleSuspect
from wmengine.suspects.outputs import logits_of
from wmengine.suspects.weights import module_tensors, normalised_places, trained_places, unwrap

ALPHA = 1e-9

ValueRange = tuple[float, float] | Sequence[tuple[float, float]]
Sample = torch.Tensor | Mapping[str, torch.Tensor]


@dataclass
class _Mark:
    """A mark under way. group: what its rows' labels are raised by, in units of num_classes; 0 without rows."""

    watermark: Watermark
    course: Course
    group: int


class Embedder:
    """Embeds one or several marks into a model during its training.

    model: any torch module, on any device; wrappers of torch.compile and data parallelism are looked through, weights
    that are computed (weight_norm, prune, peft's LoRA, shards) are read as they are used. It is run once for each new
    mark, in eval mode, to find its weights and to measure what the mark scores before (`baseline`).
    key: the owner's Key, or its file. schemes: names, or presets with options as `wmengine.scheme("sketch", bits=128)`
    gives them. num_classes: the width C of the model's answers [N, C], for marks of triggers: how many logits, labels
    or numbers of an embedding; 2 where one logit says which of two. sample: a batch [n, ...] as the loop feeds it, or a
    dict of several inputs by name. Its shape is the triggers', and without `value_range=`, (lo, hi) or one pair per
    channel (axis 1), its range is theirs too: both are part of the mark, so another sample may make another one.
    samples: for schemes that take something from the task's own inputs: some hundred of these, as the loop feeds them,
    or a pair (inputs, labels int64 [n], or floating targets of a regression); controls: for schemes that only rank:
    networks of the task that were made without this one. Both are bound into the mark. name: the model's, another part
    of every derivation: two models of one owner share nothing. class_names: in the order of the logits, so that answers
    that are names can be read. message: whom this copy is for; symbols follow from it, triggers and projections do not.

    To go on with marks, after an interruption or in the next training, give `marks=` (Watermarks or their files)
    instead of key and name, and `load_state_dict` what `state_dict` gave; a mark does not know how it was trained, so
    options such as strength= are given again, with `schemes=` beside `marks=`.

    Raises ValueError or TypeError for arguments that cannot work, for a model whose weights cannot hold the bits, and
    for one that holds the mark already. Warns of a mark in answers (`response`) that could not prove itself at 1e-9.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        key: Key | str | os.PathLike[str] | None = None,
        schemes: Sequence[str | Preset] | None = None,
        *,
        sample: Sample,
        num_classes: int | None = None,
        name: str | None = None,
        value_range: ValueRange | None = None,
        class_names: Sequence[str] | None = None,
        message: str | None = None,
        samples: Any = None,
        controls: Sequence[torch.nn.Module] = (),
        marks: Sequence[Watermark | str | os.PathLike[str]] | None = None,
    ) -> None:
        self._model = unwrap(model, pieces=True)
        self._batches = Batches(sample, num_classes, value_range)
        registered: list[Watermark] = []
        presets = [] if schemes is None else _presets(schemes)
        self._check_pieces(presets)
        if marks is not None:
            if key is not None or name is not None or message is not None:
                raise ValueError("marks= are whole: leave key, name and message out")
            if isinstance(marks, str | os.PathLike | Watermark):
                marks = [marks]
            for each in marks:
                if not isinstance(each, str | os.PathLike | Watermark):
                    raise TypeError(f"marks= must hold Watermarks or paths of their files, and one is {each!r}")
            registered = [each if isinstance(each, Watermark) else Watermark.load(each) for each in marks]
            self._check_pieces([mark.preset for mark in registered])
            if not registered:
                raise ValueError("marks= is empty: give the marks to go on with")
            strange = {preset.name for preset in presets} - {mark.scheme for mark in registered}
            if strange:
                raise ValueError(f"schemes= beside marks= says how these are trained, and none is of {min(strange)!r}")
        else:
            if key is None or schemes is None or name is None:
                raise ValueError("a new mark needs key, schemes and name; or give marks= to go on with")
            if not isinstance(key, Key):
                if not isinstance(key, str | os.PathLike):
                    raise TypeError(f"key must be a Key or the path of its file, and {type(key).__name__} is neither")
                key = Key.load(key)
            task = self._task(class_names, samples, controls)
            for preset in presets:
                material = preset.gather(task)
                parameters = preset.describe(task, name, material)
                names = self._carrier_names(parameters)
                mark = Watermark.create(key, preset, parameters, message=message, material=material, names=names)
                registered.append(mark)
                if isinstance(preset.training, Offset):
                    warn_of_power(mark, preset.training.strength)
        self._check_classes(registered)
        self._marks: list[_Mark] = []
        groups = 0
        given = {preset.name: preset for preset in presets}
        for watermark in registered:
            course = self._course(watermark, given.get(watermark.scheme, watermark.preset), controls)
            # Some train their triggers in a pass of their own, and a batch has none of these.
            has_rows = course.rows(0, self._batches.example(self._model)) is not None
            groups += has_rows
            self._marks.append(_Mark(watermark, course, groups if has_rows else 0))
        beside = low_rank_pair(self._model)
        if beside is not None and any(each.preset.source.needs == Need.TENSORS for each in registered):
            warnings.warn(
                f"the layers beside {beside!r} look like an adapter (LoRA), in which a mark is lost when it is merged: "
                "merge first and mark the merged weights, or use peft's adapters, which are read as if merged",
                stacklevel=2,
            )
        if marks is None and isinstance(key, Key):
            self._measure_baselines(key)
        self._by_group = [mark for mark in self._marks if mark.group]
        self._watching = [mark.course for mark in self._marks if isinstance(mark.course, Watches)]
        self._offsets = [mark.course for mark in self._marks if isinstance(mark.course, Offsets)]
        self._smoothing = max([getattr(course, "smoothing", 0.0) for course in self._offsets], default=0.0)
        totals = [0, *(mark.watermark.total * members_of(mark.watermark) for mark in self._by_group)]
        # Hits and rows [2, groups] since each mark's triggers began anew, and those of the last full pass; of fixed
        # size and where the model is, as torch.compile guards both.
        device = next(iter(self._batches.example(self._model).values())).device
        self._passes = torch.tensor(totals, device=device)
        self._mixed = False
        read = [each.watermark.scheme for each in self._marks if isinstance(each.watermark.preset.source, ReadTriggers)]
        self._reads = read[0] if read else None
        self._seen, self._full = (torch.zeros(2, len(totals), dtype=torch.int64, device=device) for _ in range(2))

    @property
    def num_classes(self) -> int | None:
        return self._batches.num_classes

    def mix(self, inputs: Any, labels: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The batch with max(2, batch // 8) trigger rows of each mark that has some appended; else as it is.

        inputs: [n, ...] shaped like the sample, or a dict by name; labels: integers [n] in [0, num_classes), or -100
        for rows that the loss ignores, which come back as int64, or, as mixup and cutmix make them, a share of each
        class, floating [n, num_classes], of two classes the second's alone too: such labels come back wider, for `loss`
        and `split` to read. Every trigger is drawn once before any is drawn again. Raises ValueError or TypeError for
        other shapes and types.
        """
        self._mixed = True
        mixed = inputs, labels
        if self._by_group:
            labels = checked_labels(shares_of(labels, self.num_classes), self.num_classes)
            mixed = self._batches.mixed(inputs, labels, [(mark.group, mark.course) for mark in self._by_group])
        elif self._watching:
            self._batches.checked(inputs, labels)
        for course in self._watching:
            course.watch(*self._batches.seen(*mixed), len(labels))
        return mixed

    def split(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(labels, task): labels of `mix` as the task has them, for a loss of your own, and bool [n], its own rows.

        Trigger rows want the cross entropy of theirs: `loss` of them alone, which adds `regulariser()`.
        """
        plain, group = split(checked_labels(shares_of(labels, self.num_classes), self.num_classes), self.num_classes)
        return plain, group == 0

    def loss(
        self,
        logits: Any,
        labels: torch.Tensor,
        *,
        weight: torch.Tensor | None = None,
        label_smoothing: float | None = None,
        inputs: Any = None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy over task and trigger rows alike, plus `regulariser()`; a scalar to call backward() on.

        logits: [n, num_classes] of any floating type (float16 and bfloat16 are summed in float32), of two classes one
        logit [n] or [n, 1] too, or an answer that holds them, as `logits` or as its first output of that shape; labels:
        as `mix` returns them, in any order. A batch without trigger rows is fine. weight: [num_classes], of the task's
        classes; trigger rows have weight 1. Both options mean what torch's cross_entropy means by them; for a mark in
        the answers to inputs (`response` without mixtures=) labels of all rows, shares too, are smoothed by 0.1 if
        nothing else is given, as rows that a network may be sure of teach it little. inputs: those of these logits, for
        such a mark; or features: what `features` makes of them, which may be kept for inputs that come again. Raises
        ValueError where one of both is missing, and for a mark of a task without classes.
        """
        return self.loss_of_rows(logits, labels, weight, label_smoothing, inputs, features) + self.regulariser()

    def loss_of_rows(
        self,
        logits: Any,
        labels: torch.Tensor,
        weight: torch.Tensor | None = None,
        label_smoothing: float | None = None,
        inputs: Any = None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`loss` without `regulariser()`, for a loop that puts a loss of its own beside it."""
        if self._reads is not None:
            raise ValueError(
                f"the mark {self._reads!r} is of a task without classes: add regulariser() to a loss of your own"
            )
        logits, labels = logits_of(logits, self.num_classes), shares_of(labels, self.num_classes)
        classes = check_logits(logits, labels, self.num_classes)
        labels, group = split(checked_labels(labels, classes), classes)
        for course in self._offsets:
            known = self.features(inputs) if features is None else features
            if len(known) != len(logits):
                raise ValueError(f"inputs and features are of these {len(logits)} logits, and there are {len(known)}")
            logits = logits.float() - torch.where(group[:, None] == 0, course.offset(known), 0.0).to(logits.device)
        groups = 1 + len(self._by_group)
        smoothing = self._smoothing if label_smoothing is None else label_smoothing
        loss, hits = rows_loss(logits, labels, group, groups, weight, smoothing)
        if self._by_group and torch.is_grad_enabled():
            if not (self._mixed or torch.compiler.is_compiling()):
                self._mixed = True
                warnings.warn("loss was called before any mix, which is what adds the triggers", stacklevel=3)
            if self._seen.device != group.device:
                kept = (self._passes, self._seen, self._full)
                self._passes, self._seen, self._full = (each.to(group.device) for each in kept)
            rows = (group == torch.arange(groups, device=group.device)[:, None]).sum(dim=1)
            seen = self._seen + torch.stack([hits.detach(), rows])
            full = seen[1] >= self._passes
            self._full = torch.where(full, seen, self._full)
            self._seen = torch.where(full, 0, seen)
        return loss

    def features(self, inputs: Any) -> torch.Tensor:
        """What `response` knows a batch by: float32 [n, D], from one forward pass of its base, the first control.

        inputs: as `mix` returns them. Raises ValueError where no mark has features, or inputs are missing;
        TypeError for other inputs than the sample's.
        """
        if not self._offsets:
            raise ValueError("no mark here goes by features: that is for the scheme 'response'")
        if inputs is None:
            raise ValueError("the mark 'response' is in answers to inputs: loss(logits, labels, inputs=x)")
        batch = self._batches.named(inputs)
        return self._offsets[0].features({name: batch[name] for name in self._batches.signature})

    def fit(
        self,
        loader: Iterable[Any],
        *,
        epochs: int,
        optimizer: torch.optim.Optimizer | None = None,
        rate: float = 1e-3,
        weight: torch.Tensor | None = None,
        label_smoothing: float | None = None,
    ) -> list[Watermark]:
        """Train the model in place by the calls above, for those without a loop of their own; returns `watermarks()`.

        loader: gives batches (inputs, labels), or dicts that hold `labels`, anew for each epoch. Without an optimizer
        it is Adam, its rate in one cycle up to `rate` and down again, which needs len(loader). One process; progress
        goes to a terminal. Raises ValueError or TypeError for other batches, and where the loss is no longer finite.
        """
        loss = functools.partial(self.loss, weight=weight, label_smoothing=label_smoothing)
        fit(self._model, loader, self.mix, loss, lambda: self.metrics, epochs, optimizer, rate)
        return self.watermarks()

    def regulariser(self) -> torch.Tensor:
        """The terms of the marks that are more than trigger rows, for a task loss of your own; of the live weights.

        A scalar on the weights' device; 0 where they add nothing.
        """
        terms = [term for mark in self._marks if (term := mark.course.term(self._model)) is not None]
        return sum(terms[1:], terms[0]) if terms else torch.zeros(())

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """How far each mark is, by scheme: `matched` of `total` symbols, and log10_p, what that is worth; nothing of
        triggers that have a pass of their own, nor of `response`.

        Of bits those at the last loss, of triggers those of the last pass through all of them (the rows as they were
        trained on, in training mode); empty for marks that no loss has seen so far. Only reading this waits for the
        device; the loop itself never does. `watermarks()` judges as verification does.
        """
        found: dict[str, dict[str, float]] = {}
        hits, rows = self._full.cpu().tolist()
        for mark in self._marks:
            watermark = mark.watermark
            chance = watermark.preset.chance(watermark.parameters)
            if mark.group:
                matched, total = (count[mark.group] // members_of(watermark) for count in (hits, rows))
            elif mark.course.projected is not None:
                y = mark.course.projected.double().cpu().numpy()
                matched, total = looks_of_bits(y, [watermark.symbols])[0].matched, watermark.total
            else:
                continue
            if total > watermark.total:  # a pass ends with a whole batch, and some rows of it were the first ones again
                matched, total = matched * watermark.total // total, watermark.total
            if total:
                log10_p = binomial_log10_tail(matched, total, chance)
                found[watermark.scheme] = {"matched": matched, "total": total, "log10_p": log10_p}
        return found

    @property
    def marks(self) -> list[Watermark]:
        """The marks under way, whether or not the model shows them yet: save them before a training that may be
        interrupted, as `state_dict` does not hold them."""
        return [mark.watermark for mark in self._marks]

    def watermarks(self, model: torch.nn.Module | None = None) -> list[Watermark]:
        """One watermark per scheme, to be saved and registered, each with its baseline.

        model: the one that will be shipped, where another one than was trained, such as its moving average. Call it
        before the model is saved: a mark that needs no training (`tattooed`) is added to the weights here, unless they
        show it already.

        Each is judged on the model as it is now, as `verify` does, in eval mode (the training flags come back), and a
        mark that would not be `owned` at alpha = 1e-9 is warned about: it needs longer training, or more trigger rows.
        """
        shipped = self._model if model is None else unwrap(model, pieces=True)
        for mark in self._marks:
            if isinstance(mark.course, Finishes):
                mark.course.finish(shipped)
        marks = self.marks
        for watermark, finding in zip(marks, self._judged(marks, shipped), strict=True):
            if watermark.preset.null in PROVING and finding.log10_p > math.log10(ALPHA):
                warnings.warn(
                    f"the mark {watermark.scheme!r} does not prove itself on this model: {finding.matched} of "
                    f"{watermark.total} symbols match, log10 p = {finding.log10_p:.1f} where {math.log10(ALPHA):.0f} "
                    "is needed; train longer",
                    stacklevel=2,
                )
        return marks

    def state_dict(self) -> dict[str, Any]:
        """Where each mark's triggers stand in their order, for a checkpoint; beside it keep the marks themselves."""
        return {mark.watermark.commitment: mark.course.state_dict() for mark in self._marks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises ValueError for the state of other marks."""
        known = {mark.watermark.commitment for mark in self._marks}
        if not isinstance(state, Mapping) or set(state) != known:
            raise ValueError(
                "this state is of other marks: make the Embedder with marks= and those that it was taken of"
            )
        for mark in self._marks:
            try:
                mark.course.load_state_dict(state[mark.watermark.commitment])
            except (AttributeError, KeyError, TypeError, RuntimeError) as error:
                raise ValueError(f"this is no state of the mark {mark.watermark.scheme!r}: {error!r}") from None

    def _task(self, class_names: Sequence[str] | None, samples: Any, controls: Sequence[torch.nn.Module]) -> Task:
        batches = self._batches
        rows, labels, targets = batches.samples(samples)
        return Task(
            inputs=batches.signature,
            num_classes=batches.num_classes,
            value_range=batches.value_range,
            class_names=class_names,
            weights=self._weights,
            normalised=self._normalised,
            samples=rows,
            sample_labels=labels,
            targets=targets,
            model=self._model,
            controls=[unwrap(control) for control in controls],
        )

    def _weights(self) -> tuple[list[list[int]], list[int]]:
        every = module_tensors(self._model, self._batches.example(self._model))
        return [list(each.filters(each.weight).shape) for each in every], trained_places(self._model, every)

    def _carrier_names(self, parameters: Mapping[str, Any]) -> list[str] | None:
        if "carrier_indices" not in parameters:
            return None
        every = module_tensors(self._model, self._batches.example(self._model))
        return [every[place].path for place in parameters["carrier_indices"]]

    def _normalised(self) -> list[int]:
        return normalised_places(self._model, module_tensors(self._model, self._batches.example(self._model)))

    def _check_pieces(self, presets: Sequence[Preset]) -> None:
        for preset in presets:
            if preset.kind == "white-box" or preset.null not in PROVING or "inputs" in preset.needs:
                check_whole(self._model)

    def _check_classes(self, marks: Sequence[Watermark]) -> None:
        for mark in marks:
            classes = mark.parameters.get("num_classes")
            if classes is not None:
                self._batches.fix_classes(classes, mark.scheme)
        names = [mark.scheme for mark in marks]
        if len(set(names)) != len(names):
            raise ValueError(f"each scheme can be embedded once by an Embedder, and the schemes are {', '.join(names)}")

    def _course(self, watermark: Watermark, preset: Preset, controls: Sequence[torch.nn.Module]) -> Course:
        self._batches.check_mark(watermark)
        setting = Setting(
            preset_name=preset.name,
            mark=watermark,
            source=preset.source,
            symbols=preset.symbols,
            model=self._model,
            example=self._batches.example(self._model),
            seed=_order_seed(watermark),
            controls=[unwrap(control) for control in controls],
        )
        return preset.training.begin(setting)

    def _judged(self, marks: Sequence[Watermark], model: torch.nn.Module) -> list[Finding]:
        terms = Terms(sequential=False, log10_bar=-math.log10(ALPHA))
        findings = judge_suspect(ModuleSuspect(model), marks, terms)
        for mark, finding in zip(marks, findings, strict=True):
            if finding.error is not None:
                raise ValueError(
                    f"the model cannot be judged by its mark {mark.scheme!r}: {finding.error}; is num_classes right, "
                    "and do its answers hold logits?"
                )
        return findings

    def _measure_baselines(self, key: Key) -> None:
        findings = self._judged([each.watermark for each in self._marks], self._model)
        for mark, finding in zip(self._marks, findings, strict=True):
            if finding.log10_p <= math.log10(ALPHA):
                raise ValueError(
                    f"the model holds the mark {mark.watermark.scheme!r} already ({finding.matched} of {finding.total} "
                    "symbols match): give marks= to go on with it"
                )
            baseline = {
                "matched": finding.matched,
                "total": finding.total,
                "log10_p": f"{finding.log10_p:.4f}",
            }
            mark.watermark = mark.watermark.with_baseline(key, baseline)


def _presets(schemes: Sequence[str | Preset]) -> list[Preset]:
    if isinstance(schemes, str) or not isinstance(schemes, Sequence) or not schemes:
        raise ValueError(f'schemes must be a list such as ["sketch", "adi"], and it is {schemes!r}')
    presets = [scheme(given) if isinstance(given, str) else given for given in schemes]
    for preset in presets:
        if not isinstance(preset, Preset):
            raise TypeError(f"schemes must hold names or wmengine.scheme(...), and one is {preset!r}")
    return presets


def _order_seed(watermark: Watermark) -> int:
    """The seed of the order in which triggers are drawn; each process of a distributed run draws its own order, also
    where its launcher has said its rank and the processes do not know each other yet."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    launched = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    rank = torch.distributed.get_rank() if distributed else launched
    digest = hashlib.sha256(f"{watermark.commitment}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
