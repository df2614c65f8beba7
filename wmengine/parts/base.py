"""The contracts of parts: what a source, symbols and training must do for a preset to be one entry of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wmengine.facts import Fact
from wmengine.suspects.adapters import Adapter
from wmengine.suspects.base import Answers, Inputs, InputSpec, Signature, Suspect

if TYPE_CHECKING:
    import torch

Parameters = dict[str, Any]
Arrays = Mapping[str, NDArray[Any]]
Layout = dict[str, tuple[str, tuple[int, ...]]]  # of each array its dtype and shape
Draw = Callable[..., bytes]  # (purpose, place="") -> 32 bytes of the geometry


class Need(Flag):
    """What a source asks of a suspect."""

    TENSORS = auto()
    ANSWERS = auto()
    ACTIVATIONS = auto()


class Drawn(Protocol):
    """What parts read of a mark: a Watermark."""

    @property
    def parameters(self) -> Parameters: ...

    @property
    def arrays(self) -> Arrays: ...

    @property
    def names(self) -> Sequence[str] | None: ...


@dataclass(frozen=True, eq=False)
class Integers:
    """A weight that is stored as integers: its place in the order of execution; of each value [O, ...] what it stands
    for, what one step is worth there, and whether it can be moved a step either way."""

    place: int
    values: NDArray[np.float32]
    steps: NDArray[np.float32]
    free: NDArray[np.bool_]


@dataclass(frozen=True)
class Task:
    """What marking knows of a model before there is a mark: parts describe their parameters from it.

    inputs: by name. num_classes: None where nothing says it. value_range: (lo, hi) per channel, or one pair of integers
    for inputs that are such. weights: runs the model; the shapes of all its weights in order of execution, filters on
    axis 0, and the places among them that may be marked. normalised: runs it too; those of these places whose output
    goes right into a normalisation of its own. integers: a quantised file's weights. samples: the owner's own inputs by
    name, as his loop feeds them, and what they are, where he said so: sample_labels int64, or a regression's targets.
    model: the network itself, a torch.nn.Module; controls: networks of the same task that were made without it.
    """

    inputs: Signature
    num_classes: int | None = None
    value_range: Sequence[Sequence[float]] | None = None
    class_names: Sequence[str] | None = None
    weights: Callable[[], tuple[list[list[int]], list[int]]] = lambda: ([], [])
    normalised: Callable[[], list[int]] = lambda: []
    integers: Sequence[Integers] = ()
    samples: Arrays = field(default_factory=dict)
    sample_labels: NDArray[np.int64] | None = None
    targets: NDArray[np.float64] | None = None
    model: torch.nn.Module | None = None
    controls: Sequence[torch.nn.Module] = ()


@dataclass(frozen=True, eq=False)
class Observation:
    """All symbols as one hypothesis shows them: y [T], whose sign is the bit and whose size says how clearly.

    share: of the evidence, fixed before anything was read; the shares of a mark's observations sum to at most 1.
    """

    y: NDArray[np.float64]
    share: float = 1.0


@dataclass
class Observations:
    """What a source found in a suspect: one observation for each hypothesis, and facts. None: there was nothing."""

    found: list[Observation] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)


class Source(Protocol):
    """Where a mark lives. A frozen dataclass, its fields the preset's options.

    fields: the parameters that are its own. `describe` gives them (Python lists, dicts, str and int only) and raises
    ValueError where the task does not fit; `check` raises ValueError unless they are complete and canonical. `layout`
    and `draw` are of its arrays; `draw` reads the key and the parameters, and nothing else. total: the mark's symbols.
    A source, or a training, that needs more of an owner than a loop with `mix` and `loss` names it in `takes`, a tuple
    of the words that `Preset.needs` explains.
    """

    @property
    def needs(self) -> Need: ...

    @property
    def fields(self) -> tuple[str, ...]: ...

    def describe(self, task: Task, total: int) -> Parameters: ...

    def check(self, parameters: Parameters, total: int) -> None: ...

    def layout(self, parameters: Parameters, total: int) -> Layout: ...

    def draw(self, subkey: Draw, parameters: Parameters, total: int) -> dict[str, NDArray[Any]]: ...


class Reads(Source, Protocol):
    """A source of bits that are all there at once: in tensors, or in activations."""

    def observe(self, mark: Drawn, suspect: Suspect, total: int) -> Observations: ...


class Asks(Source, Protocol):
    """A source that asks one question for each symbol, in the order in which the key drew them.

    ways: how the suspect's declared inputs leave it open to put them, with shares of the evidence; every=False leaves
    out the unlikely ones. inputs: those from start to stop, put that way; examples: as the model's own training loop
    feeds them.
    """

    def ways(self, mark: Drawn, suspect: Suspect, every: bool) -> list[Adapter]: ...

    def inputs(self, mark: Drawn, way: Adapter, start: int, stop: int) -> Inputs: ...

    def examples(self, mark: Drawn) -> Inputs: ...


@runtime_checkable
class Gathers(Protocol):
    """A source some of whose arrays are material: the owner's, not the key's.

    gather: these arrays, before there is a symbol; their digests become parameters, so that choosing them is choosing
    another mark (and its `describe` finds them in place of a task's samples). draw: gets them, gives the others.
    """

    @property
    def needs(self) -> Need: ...

    @property
    def fields(self) -> tuple[str, ...]: ...

    def gather(self, task: Task, total: int) -> dict[str, NDArray[Any]]: ...

    def describe(self, task: Task, total: int, material: Arrays) -> Parameters: ...

    def check(self, parameters: Parameters, total: int) -> None: ...

    def layout(self, parameters: Parameters, total: int) -> Layout: ...

    def draw(self, subkey: Draw, parameters: Parameters, total: int, material: Arrays) -> dict[str, NDArray[Any]]: ...


@runtime_checkable
class Interprets(Protocol):
    """A source of questions whose answers are not yet the symbols'.

    members: inputs for each symbol, one after another; `inputs` from start to stop gives so many times more rows.
    width: of the scores that the suspect is asked for. interpret: answers to these symbols (their numbers, int64 [n]),
    [n * members] → [n], of kind "scores" [n, classes of the symbols], or labels.
    """

    def members(self, parameters: Parameters) -> int: ...

    def width(self, parameters: Parameters) -> int: ...

    def interpret(self, mark: Drawn, symbols: NDArray[np.int64], answers: Answers) -> Answers: ...


@runtime_checkable
class Pools(Protocol):
    """A source that asks a pool of inputs and reads all bits from all answers at once.

    pool: equal for marks that are asked the same; size: of it; ways, inputs: as of a source that asks. known: scores
    [N, C] of a network of the task; likely: the classes int64 [N] that it names. observed: y [T] of what a suspect says
    of every class, float64 [n, C], asked the inputs at these places [n]. explored: a mark's parameters and arrays with
    these samples, by name, as its pool, and what these networks make of them, its base first; ValueError for what does
    not fit.
    """

    def pool(self, mark: Drawn) -> str: ...

    def size(self, mark: Drawn) -> int: ...

    def ways(self, mark: Drawn, suspect: Suspect, every: bool) -> list[Adapter]: ...

    def inputs(self, mark: Drawn, way: Adapter, start: int, stop: int) -> Inputs: ...

    def known(self, mark: Drawn) -> NDArray[np.float32]: ...

    def likely(self, mark: Drawn) -> NDArray[np.int64]: ...

    def observed(self, mark: Drawn, asked: NDArray[np.int64], said: NDArray[np.float64]) -> NDArray[np.float64]: ...

    def explored(self, mark: Drawn, samples: Arrays, controls: Sequence[Any]) -> tuple[Parameters, Arrays]: ...


class Symbols(Protocol):
    """The keyed symbols. name: of their array. classes: their values are below it; alphabet: how many values each can
    have, all as likely; nulls: what a p-value of theirs may be. draw: arrays are all others of the mark."""

    @property
    def name(self) -> str: ...

    @property
    def nulls(self) -> tuple[str, ...]: ...

    @property
    def fields(self) -> tuple[str, ...]: ...

    def describe(self, task: Task) -> Parameters: ...

    def check(self, parameters: Parameters) -> None: ...

    def total(self, parameters: Parameters) -> int: ...

    def classes(self, parameters: Parameters) -> int: ...

    def alphabet(self, parameters: Parameters) -> int: ...

    def layout(self, parameters: Parameters) -> Layout: ...

    def draw(self, subkey: bytes, parameters: Parameters, arrays: Arrays) -> NDArray[Any]: ...


@runtime_checkable
class Offsets(Protocol):
    """A course that is learned on the task's own rows: `loss` is that of the logits less its offset.

    features: of inputs [n, ...] by name, float32 [n, D]; offset: of features, [n, C]. It may have `smoothing`, of
    labels where the loop says nothing of it.
    """

    def features(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor: ...

    def offset(self, features: torch.Tensor) -> torch.Tensor: ...


class Course(Protocol):
    """One mark under way in one model. The order in which it draws trigger rows is its only state.

    rows: the next `count` trigger rows (inputs by name, labels int64), or None where it has none; term: what is added
    to the loss, or None. projected: y [T] of the last term, for metrics.
    """

    projected: torch.Tensor | None

    def rows(self, count: int, like: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any] | None: ...

    def term(self, model: torch.nn.Module) -> torch.Tensor | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Watches(Protocol):
    """A course that trains on the batch itself: `mix` shows it each one, with trigger rows behind the task's.

    inputs: by name; labels: int64 [n], no trigger's raised; task_rows: how many come first that are the task's own.
    """

    def watch(self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor, task_rows: int) -> None: ...


@runtime_checkable
class Finishes(Course, Protocol):
    """A course whose mark is put into the weights when their training is over, once: again it changes nothing."""

    def finish(self, model: torch.nn.Module) -> None: ...


class Training(Protocol):
    """How a mark gets into a model. Its options steer training only: they are no part of the parameters, where a forger
    could turn them for free."""

    def begin(self, setting: Setting) -> Course: ...


@dataclass(frozen=True)
class Setting:
    """What a course begins with. model: unwrapped; seed: of the order of its rows, another one for each process;
    controls: unmarked networks of the task, where the owner gave some."""

    preset_name: str
    mark: Drawn
    source: Any
    symbols: Symbols
    model: torch.nn.Module
    example: Mapping[str, torch.Tensor]
    seed: int
    controls: Sequence[torch.nn.Module] = ()


def described_inputs(inputs: Signature) -> list[Parameters]:
    """A model's inputs as parameters hold them: a list, because names may differ in a copy, and then order counts."""
    return [{"name": name, "dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in inputs.items()]


def inputs_of(parameters: Parameters) -> dict[str, InputSpec]:
    """The inputs of a mark's model, in its order."""
    return {each["name"]: InputSpec(tuple(each["shape"]), each["dtype"]) for each in parameters["inputs"]}


def options_of(parts: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Every option of some parts, with the part that has it."""
    for part in parts:
        for each in fields(part) if is_dataclass(part) else ():
            yield each.name, part
