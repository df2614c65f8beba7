"""Embed marks while a model trains: `mix` adds trigger rows to a batch, `loss` adds their loss and the white-box term.

    emb = Embedder(model, key, schemes=["sketch", "adi"], num_classes=10, sample=x[:64], name="detector-v3")
    for x, y in loader:
        x, y = emb.mix(x, y)
        loss = emb.loss(model(x), y)
        loss.backward(); optimizer.step(); optimizer.zero_grad()
    marks = emb.watermarks()

The two calls share no state: a trigger row of the mark numbered g carries its label + g · num_classes, and `loss`
reads the group from that. So rows may be shuffled, split over micro-batches or devices, and the loop compiled.
Nothing is hooked into the model, which stays the plain module it was.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wmengine import ops, stats
from wmengine.carriers import ModuleTensor, evaluating, module_tensors, unwrap
from wmengine.key import Key
from wmengine.ops.reference import padded_buckets
from wmengine.schemes import BlackBox, Scheme, WhiteBox, black_box_parameters, scheme, white_box_parameters
from wmengine.triggers import to_input
from wmengine.watermark import Watermark

ALPHA = 1e-9
IGNORE_INDEX = -100
_CHUNK = 64

ValueRange = tuple[float, float] | Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _WeightMark:
    """A white-box mark under way: its carriers in the model, and the numbers that `embedding_loss` takes."""

    preset: WhiteBox
    watermark: Watermark
    carriers: tuple[ModuleTensor, ...]
    keys: tuple[int, ...]
    bits: torch.Tensor
    scale: float


@dataclass(frozen=True)
class _TriggerMark:
    """A black-box mark under way; `group` is what its rows' labels are raised by, in units of num_classes."""

    watermark: Watermark
    group: int
    inputs: torch.Tensor
    labels: torch.Tensor


class Embedder:
    """Embeds one or several marks into a classifier during its training.

    model: any torch module; wrappers of torch.compile and data parallelism are looked through. schemes: names, or
    presets with options as `wmengine.scheme("sketch", bits=128)` gives them. num_classes: the width C of the model's
    logits [N, C]. sample: a floating batch [n, ...] as the loop feeds it; its shape is the triggers', its range per
    channel (axis 1) theirs too, unless `value_range=` gives (lo, hi) or one pair per channel. name: the model's; it
    is part of every derivation, so that two models of one owner share nothing.

    Every mark is also measured on the model as it is now, the base: that is its control. Raises ValueError or
    TypeError for arguments that cannot work, and for a model whose weights cannot hold the bits.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        key: Key,
        schemes: Sequence[str | Scheme],
        *,
        num_classes: int,
        sample: torch.Tensor,
        name: str,
        value_range: ValueRange | None = None,
    ) -> None:
        presets = _presets(schemes)
        _check_sample(sample)
        self.num_classes = operator.index(num_classes)
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, and it is {num_classes}")
        self._model = unwrap(model)
        self._input_shape = tuple(sample.shape[1:])
        self._marks: list[_WeightMark | _TriggerMark] = []
        for preset in presets:
            if isinstance(preset, WhiteBox):
                self._marks.append(_weight_mark(preset, key, self._model, sample, name))
            else:
                group = 1 + sum(isinstance(mark, _TriggerMark) for mark in self._marks)
                ranges = _ranges(sample, value_range)
                self._marks.append(_trigger_mark(preset, key, group, self.num_classes, sample, ranges, name))
        self._weight_marks = [mark for mark in self._marks if isinstance(mark, _WeightMark)]
        self._trigger_marks = [mark for mark in self._marks if isinstance(mark, _TriggerMark)]
        # Its own generator: the user's random numbers stay what they would be without the marks.
        self._generator = torch.Generator().manual_seed(_order_seed(key, name))
        self._queues = [torch.empty(0, dtype=torch.int64) for _ in self._trigger_marks]
        self._placed: dict[tuple[str, str, torch.device, torch.dtype], torch.Tensor] = {}
        # Hits and rows [2, groups] of each group's last loss with rows; of fixed size, as torch.compile guards it.
        self._seen = torch.zeros(2, 1 + len(self._trigger_marks), dtype=torch.int64)
        self._projected: list[torch.Tensor] = []
        self._controls = [self._measure(mark) for mark in self._marks]

    def mix(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch with max(2, batch // 8) trigger rows of each black-box mark appended; unchanged if there is none.

        inputs: floating [n, ...] shaped like the sample; labels: int64 [n] in [0, num_classes), or -100 for rows that
        the loss ignores. Every trigger is drawn once before any is drawn again. Raises ValueError or TypeError for
        other shapes and types, and for soft labels (apply mixup or cutmix to the batch before, keeping hard labels,
        or not at all).
        """
        if not self._trigger_marks:
            return inputs, labels
        self._check_batch(inputs, labels)
        xs, ys = [inputs], [labels]
        memory_format = _memory_format(inputs)
        wanted = max(2, len(labels) // 8)
        for mark in self._trigger_marks:
            rows = min(wanted, mark.watermark.total)
            chosen = self._draw(mark, rows, inputs.device)
            trigger_inputs, trigger_labels = self._on(inputs.device, mark, inputs.dtype)
            xs.append(trigger_inputs[chosen].contiguous(memory_format=memory_format))
            ys.append(trigger_labels[chosen] + mark.group * self.num_classes)
        return torch.cat(xs), torch.cat(ys)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Mean cross-entropy over task and trigger rows alike, plus `regulariser()`; a scalar to call backward() on.

        logits: [n, num_classes] of any floating type (float16 and bfloat16 are summed in float32); labels: int64 [n]
        as `mix` returns them, in any order. A batch without trigger rows is fine.
        """
        self._check_logits(logits, labels)
        group = (labels // self.num_classes).clamp(min=0)  # 0 for task rows, ignored ones among them
        groups = 1 + len(self._trigger_marks)
        result = ops.marked_cross_entropy(
            logits,
            torch.sub(labels, group, alpha=self.num_classes),
            None,
            group,
            groups=groups,
            label_smoothing=label_smoothing,
            ignore_index=IGNORE_INDEX,
        )
        if self._trigger_marks and torch.is_grad_enabled():
            rows = (group == torch.arange(groups, device=group.device)[:, None]).sum(dim=1)
            counts = torch.stack([result.group_hits.detach(), rows])
            self._seen = torch.where(rows > 0, counts, self._seen.to(counts.device, non_blocking=True))
        loss: torch.Tensor = result.loss
        return loss + self.regulariser() if self._weight_marks else loss

    def regulariser(self) -> torch.Tensor:
        """The white-box marks' term alone, for a task loss of your own: strength × embedding loss, of the live weights.

        A scalar on the weights' device; 0 without white-box marks.
        """
        terms, projected = [], []
        for mark in self._weight_marks:
            weights = [self._filters(carrier) for carrier in mark.carriers]
            term, y = ops.embedding_loss(
                weights,
                mark.keys,
                self._resident(mark.preset.name, "bits", mark.bits, weights[0].device, torch.uint8),
                carrier=mark.preset.carrier,
                projection=mark.preset.projection,
                link=mark.preset.link,
                margin=mark.preset.margin,
                scale=mark.scale,
            )
            terms.append(mark.preset.strength * term)
            projected.append(y.detach())
        self._projected = projected
        return sum(terms[1:], terms[0]) if terms else torch.zeros(())

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """How far each mark is, by scheme. Only reading this waits for the device; the loop itself never does.

        A white-box mark: `bit_errors` of `total` bits at the last loss, and their `log10_p`. A black-box mark:
        `matches` of `total` trigger rows of the last loss that held any; no p-value, because these are few of its
        triggers and some perhaps twice. `watermarks()` asks all of them. Empty for marks that no loss has seen yet.
        """
        found: dict[str, dict[str, float]] = {}
        for weight_mark, y in zip(self._weight_marks, self._projected, strict=False):
            matched = _count_bits(y.cpu().numpy(), weight_mark.watermark)
            total = weight_mark.watermark.total
            found[weight_mark.preset.name] = {
                "bit_errors": total - matched,
                "total": total,
                "log10_p": stats.binomial_log10_tail(matched, total, 0.5),
            }
        hits, rows = self._seen.tolist()
        for mark in self._trigger_marks:
            if rows[mark.group]:
                found[mark.watermark.scheme] = {"matches": hits[mark.group], "total": rows[mark.group]}
        return found

    def watermarks(self) -> list[Watermark]:
        """One watermark per scheme, to be saved and registered, each with its control.

        Each is measured on the model as it is now, in eval mode (the training flags come back), and a mark that would
        not be `owned` at alpha = 1e-9 is warned about: it needs longer training, or more trigger rows.
        """
        registered = []
        for mark, (control, total, control_log10_p) in zip(self._marks, self._controls, strict=True):
            matched, _, log10_p = self._measure(mark)
            if log10_p > math.log10(ALPHA):
                warnings.warn(
                    f"the mark {mark.watermark.scheme!r} does not prove itself on this model: {matched} of {total} "
                    f"symbols match, log10 p = {log10_p:.1f} where {math.log10(ALPHA):.0f} is needed; train longer",
                    stacklevel=2,
                )
            measured = {"matched": control, "total": total, "log10_p": f"{control_log10_p:.4f}"}
            registered.append(replace(mark.watermark, control=measured))
        return registered

    def _measure(self, mark: _WeightMark | _TriggerMark) -> tuple[int, int, float]:
        """(matched symbols, total, log10 p) of a mark on the model as it is now."""
        total = mark.watermark.total
        if isinstance(mark, _WeightMark):
            matched = self._matching_bits(mark)
            return matched, total, stats.binomial_log10_tail(matched, total, 0.5)
        matched = self._matching_triggers(mark)
        return matched, total, stats.binomial_log10_tail(matched, total, 1 / self.num_classes)

    def _matching_bits(self, mark: _WeightMark) -> int:
        y = np.zeros(mark.watermark.total)
        for carrier, key in zip(mark.carriers, mark.keys, strict=True):
            weight = self._filters(carrier).detach().float().cpu().numpy()
            y += ops.carrier_projection(weight, key, mark.watermark.total, mark.preset.carrier, mark.preset.projection)
        return _count_bits(y, mark.watermark)

    def _matching_triggers(self, mark: _TriggerMark) -> int:
        parameter = next((p for p in self._model.parameters() if p.is_floating_point()), torch.zeros(()))
        inputs, _ = self._on(parameter.device, mark, parameter.dtype)
        with evaluating(self._model):
            parts = [self._model(inputs[at : at + _CHUNK]) for at in range(0, len(inputs), _CHUNK)]
        if not isinstance(parts[0], torch.Tensor):
            raise TypeError(
                f"the model answers with {type(parts[0]).__name__}; a black-box mark needs logits, so wrap the model "
                "in a module that returns them"
            )
        answers = torch.cat(parts)
        if answers.ndim != 2 or answers.shape[1] != self.num_classes:
            raise ValueError(
                f"the model answers {list(inputs.shape)} inputs with {list(answers.shape)} and not with "
                f"[{len(inputs)}, {self.num_classes}] logits; is num_classes right?"
            )
        return int(ops.match_counts(answers.float().cpu().numpy(), mark.watermark.arrays["labels"]).hits[0])

    def _filters(self, carrier: ModuleTensor) -> torch.Tensor:
        """A carrier's weight as it is now, looked up anew: the parameter may have been replaced, or be computed."""
        weight: torch.Tensor = self._model.get_submodule(carrier.path).weight  # type: ignore[assignment]
        return carrier.filters(weight)

    def _on(self, device: torch.device, mark: _TriggerMark, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        scheme_name = mark.watermark.scheme
        inputs = self._resident(scheme_name, "inputs", mark.inputs, device, dtype)
        return inputs, self._resident(scheme_name, "labels", mark.labels, device, torch.int64)

    def _resident(
        self, scheme_name: str, what: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """A mark's tensor on a device, copied there the first time only: a copy in every step would stall a GPU."""
        place = (scheme_name, what, device, dtype)
        if place not in self._placed:
            self._placed[place] = tensor.to(device, dtype)
        return self._placed[place]

    def _draw(self, mark: _TriggerMark, count: int, device: torch.device) -> torch.Tensor:
        """The next `count` trigger indices of an endless shuffle, on the device; it is copied there once a pass."""
        queue = self._queues[mark.group - 1].to(device)
        while len(queue) < count:
            shuffled = torch.randperm(mark.watermark.total, generator=self._generator)
            queue = torch.cat([queue, shuffled.to(device, non_blocking=True)])
        self._queues[mark.group - 1] = queue[count:]
        return queue[:count]

    def _check_batch(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        _check_hard(labels)
        if tuple(inputs.shape[1:]) != self._input_shape or len(inputs) != len(labels):
            raise ValueError(
                f"a batch must be [n, {', '.join(map(str, self._input_shape))}] with n labels, as the sample was, and "
                f"it is {list(inputs.shape)} with {len(labels)} labels"
            )
        if not inputs.is_floating_point():
            raise TypeError(f"inputs must be floating, as the sample was, and they are {inputs.dtype}")
        if labels.device != inputs.device:
            raise ValueError(f"inputs are on {inputs.device} and labels on {labels.device}; move both to one device")
        in_range = ((labels >= 0) & (labels < self.num_classes)) | (labels == IGNORE_INDEX)
        if labels.device.type == "cpu":
            if not bool(in_range.all()):
                wrong = labels[~in_range][0].item()
                raise ValueError(f"labels must be from 0 to {self.num_classes - 1}, and one is {wrong}")
        else:
            # As torch's own cross-entropy on a GPU: the device stops, and the host does not wait to see.
            torch._assert_async(in_range.all(), f"labels must be from 0 to {self.num_classes - 1}")

    def _check_logits(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        _check_hard(labels)
        if logits.ndim != 2 or tuple(logits.shape) != (len(labels), self.num_classes):
            raise ValueError(
                f"logits must be [{len(labels)}, {self.num_classes}], a row for each label, and they are "
                f"{list(logits.shape)}"
            )


def _count_bits(projected: NDArray[np.floating[Any]], watermark: Watermark) -> int:
    """Bits that y [T] shows with the right sign; y = 0, NaN and Inf show none, as in verification."""
    signed = np.where(watermark.arrays["bits"] > 0, projected, -projected)
    return int((np.isfinite(signed) & (signed > 0)).sum())


def _presets(schemes: Sequence[str | Scheme]) -> list[Scheme]:
    if isinstance(schemes, str) or not schemes:
        raise ValueError(f'schemes must be a list such as ["sketch", "adi"], and it is {schemes!r}')
    presets = [scheme(given) if isinstance(given, str) else given for given in schemes]
    for preset in presets:
        if not isinstance(preset, WhiteBox | BlackBox):
            raise TypeError(f"schemes must hold names or wmengine.scheme(...), and one is {preset!r}")
    names = [preset.name for preset in presets]
    if len(set(names)) != len(names):
        raise ValueError(f"each scheme can be embedded once by an Embedder, and the schemes are {', '.join(names)}")
    return presets


def _weight_mark(preset: WhiteBox, key: Key, model: torch.nn.Module, sample: torch.Tensor, name: str) -> _WeightMark:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    every = module_tensors(model, sample[:1].to(device))
    trainable = [index for index, tensor in enumerate(every) if tensor.weight.requires_grad]
    if not trainable:
        raise ValueError(
            f"scheme {preset.name!r} marks the weights of convolutions and linear layers, and the model trains none"
        )
    shapes = [list(tensor.filters(tensor.weight).shape) for tensor in every]
    parameters = white_box_parameters(preset, shapes, list(sample.shape[1:]), name, trainable=trainable)
    _check_capacity(preset, parameters["carriers"])
    watermark = Watermark.create(key, preset.name, parameters)
    return _WeightMark(
        preset=preset,
        watermark=watermark,
        carriers=tuple(every[index] for index in parameters["carrier_indices"]),
        keys=tuple(int(carrier_key) for carrier_key in watermark.arrays["carrier_keys"]),
        bits=torch.from_numpy(watermark.arrays["bits"].copy()),
        scale=_standard_scale(preset, parameters["carriers"]),
    )


def _trigger_mark(
    preset: BlackBox,
    key: Key,
    group: int,
    num_classes: int,
    sample: torch.Tensor,
    ranges: list[tuple[float, float]],
    name: str,
) -> _TriggerMark:
    parameters = black_box_parameters(preset, list(sample.shape[1:]), num_classes, ranges, name)
    watermark = Watermark.create(key, preset.name, parameters)
    inputs = to_input(watermark.arrays["triggers"], parameters["value_range"])
    return _TriggerMark(watermark, group, torch.from_numpy(inputs), torch.from_numpy(watermark.arrays["labels"].copy()))


def _check_capacity(preset: WhiteBox, shapes: Sequence[Sequence[int]]) -> None:
    """Raises ValueError where no weights could carry the bits.

    T projections of M values can all be set only if M >= T. For unit filters a bucket's y is at most √(M/T) standard
    deviations (all of its weights agreeing), so that a margin of m needs M >= m²·T; at equality nothing is left for
    the task.
    """
    sums_filters = preset.carrier in ("filter_mean", "unit_filter_mean")
    values = sum(math.prod(shape[1:] if sums_filters else shape) for shape in shapes)
    margin = max(1.0, preset.margin) if preset.carrier == "unit_filters" and preset.link in ("hinge", "mse") else 1.0
    needed = math.ceil(preset.bits * margin**2)
    if values < needed:
        raise ValueError(
            f"scheme {preset.name!r} needs at least {needed} carrier values for {preset.bits} bits, and the model's "
            f"{len(shapes)} carriers hold {values}; ask for fewer with wmengine.scheme({preset.name!r}, bits=...)"
        )


def _standard_scale(preset: WhiteBox, shapes: Sequence[Sequence[int]]) -> float:
    """What makes y of an unmarked model have standard deviation 1, so that the margin is in those units.

    A keyed sign (or standard normal) projection of v has variance Σv², spread over the P buckets of a sketch; Σv² is
    R for R unit filters and about Σ 1/O for their means. Weights that are not normalised keep their paper's y = X·w.
    """
    if preset.carrier not in ("unit_filters", "unit_filter_mean"):
        return 1.0
    energy = sum(shape[0] if preset.carrier == "unit_filters" else 1.0 / shape[0] for shape in shapes)
    buckets = padded_buckets(preset.bits) if preset.projection == "sketch" else 1
    return math.sqrt(buckets / energy)


def _check_sample(sample: torch.Tensor) -> None:
    if not isinstance(sample, torch.Tensor) or not sample.is_floating_point():
        kind = sample.dtype if isinstance(sample, torch.Tensor) else type(sample).__name__
        raise TypeError(f"sample must be a floating tensor, a batch as the loop feeds it, and it is {kind}")
    if sample.ndim < 2 or sample.numel() == 0:
        raise ValueError(
            f"sample must be a batch [n, ...] with at least one row, and its shape is {list(sample.shape)}"
        )
    if not bool(torch.isfinite(sample).all()):
        raise ValueError("sample holds NaN or Inf; give clean inputs")


def _check_hard(labels: torch.Tensor) -> None:
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise TypeError(
            f"labels must be int64 class numbers [n], and they are {labels.dtype} {list(labels.shape)}; soft labels "
            "have no room for a trigger's group"
        )


def _ranges(sample: torch.Tensor, value_range: ValueRange | None) -> list[tuple[float, float]]:
    """[lo, hi] of every channel (axis 1), from the caller or from the sample."""
    channels = sample.shape[1]
    if value_range is None:
        rows = sample.detach().float().transpose(0, 1).reshape(channels, -1)
        return list(zip(rows.amin(dim=1).tolist(), rows.amax(dim=1).tolist(), strict=True))
    ends = np.asarray(value_range, dtype=np.float32)
    if ends.shape not in ((2,), (channels, 2)):
        raise ValueError(f"value_range must be (lo, hi) or one pair for each of the {channels} channels")
    return [(float(low), float(high)) for low, high in np.broadcast_to(ends, (channels, 2))]


def _memory_format(inputs: torch.Tensor) -> torch.memory_format:
    if inputs.ndim == 4 and not inputs.is_contiguous() and inputs.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _order_seed(key: Key, name: str) -> int:
    """The seed of the order in which triggers are drawn; each process of a distributed run draws its own order."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    subkey = key.subkey("order", "", {"name": name}, str(rank))
    return int.from_bytes(subkey[:8], "little") >> 1
