"""What is noted while a suspect is judged, as data; `str(fact)` is the sentence that people read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float

SENTENCES: dict[str, str] = {
    # how it was asked
    "inputs_cast": "inputs were cast to {dtype}",
    "filled": "{count} inputs that the watermark does not have were the same throughout: {inputs}",
    "fixed_batch": "the suspect has a fixed batch of {batch}",
    "one_at_a_time": "the suspect answers only one input at a time",
    "put_otherwise": "triggers were put {adapter}",
    "ways_paid": "{tried} of {possible} ways of putting the triggers were tried, and their shares paid",
    "way_failed": "the suspect cannot be asked with triggers {adapter}: {reason}",
    "room": "there was room for {asked} of {total} triggers, and the test is of those: that was fixed before the first "
    "of them was asked",
    "refused": "{count} triggers were refused or not answered in a readable way: {reason}",
    "unasked": "{count} triggers were not asked: {reason}",
    "abstained": "{count} of {asked} answers hold NaN or Inf or name no class, and count as misses",
    "other_task": "the watermark cannot be looked for, as in a model of another task, or a copy made to look like one: "
    "{reason}",
    "outside": "{count} of {asked} answers name no class of the watermark, which has {classes}: the suspect counts its "
    "classes otherwise, and these are misses",
    "given_up": "given up after {queries} queries: the suspect answers as a stranger does",
    "stopped": "stopped after {queries} queries, as the answer was clear: what was not asked is no miss",
    "asked_whole": "the sequential test was clear after {queries} queries, at log10 p = {log10_p:.1f}; then every "
    "trigger was asked, and that counts",
    "inconstant": "{changed} of {asked} answers change when the batch does, or from one time to the next",
    "not_again": "asked {count} triggers once more, the suspect brings no answers: {reason}",
    "shared": "{marks} watermarks share these triggers or carriers: they were observed once",
    # how its answers were read
    "outputs": "{count} of {of} outputs may be the answer, the first is {name}",
    "output": "answers were read from output {name}, one of {of}",
    "ranks": "output {name} lists the best classes, and the first of them counts",
    "columns": "{count} of {of} outputs, {name} the first of them, hold the scores of a class each",
    "class_more": "output {name} has one class more than the watermark",
    "boxes": "output {name} has scores of several boxes for each input, of which each class's highest counts",
    "one_score": "the suspect gives one score, read as class 1 where it is above {threshold:g}",
    "outputs_paid": "{count} outputs that answer differently were tried and paid for; number {number} counts",
    "from_one": "the suspect's classes are counted from 1, or a class more stands before them, as its answers show",
    "from_one_paid": "the suspect's classes are counted from 1, or a class more stands before them, which was paid for",
    "from_zero_paid": "that the suspect's classes are counted from 0 is one of two readings of its answers, and was "
    "paid for",
    "order_of_clean": "{moved} of {classes} classes stand elsewhere, by {count} clean inputs of which the suspect "
    "names {agreed} rightly; this is free, as long as these and their labels were chosen without the triggers' labels",
    "order_of_names": "{moved} of {classes} classes stand elsewhere, by their names in suspect and watermark",
    "order_of_base": "{moved} of {classes} classes stand elsewhere, by the answers of the mark's unmarked base to the "
    "same inputs, which is free",
    "left_out": "{count} of {asked} answers hold NaN or Inf or name no class, and were left out",
    "controls": "what the answers of the mark's {count} unmarked controls explain was taken out of the suspect's",
    "base_alone": "what the answers of the unmarked model alone explain was taken out of the suspect's: the mark was "
    "made without controls=, and with a student of that model among them more of a copy would show",
    "orders_paid": "all 10^{log10_orders:.1f} orders of the classes were paid for",
    "reordered": "classes stand in another order; all 10^{log10_orders:.1f} orders were paid for",
    "orders_too_many": "{total} triggers can prove no other order of {classes} classes, as there are too many: give "
    "clean labelled data to estimate it",
    "names_paid": "what the classes' names stand for was said at verification: all 10^{log10_orders:.1f} meanings were "
    "paid for; a watermark that holds its class names pays nothing",
    # what was read of its weights
    "carriers": "{found} of {carriers} carriers matched to the suspect's tensors by shape and order",
    "pairings": "{tried} of the {possible} possible orders of tensors of equal shape were tried and paid for",
    "no_carrier": "no tensor of the suspect has the shape of a carrier: nothing to read",
    "stored_as": "{count} of {of} weights are {kind}",
    "unread": "{count} operators have a weight that could not be read: it depends on the input, cannot be computed, or "
    "lies in a way that is not known",
    "no_graph": "the file holds no graph: its weights were paired in its own order and in that of their names",
    "registration_order": "weights were read in order of registration, as {reason}",
    # where it ran
    "gpu_sandbox": "the model ran on the GPU, where its sandbox is a process of its own with a time limit: {missing} "
    "were left out, as CUDA does not work under them",
    "sandbox_without": "this kernel has no {missing}: the sandbox was without",
    # what a verdict leans on
    "learned": "the mark lives in answers to ordinary inputs: a network that was trained on answers of the marked one "
    "holds it, by whoever's hand and whether or not that was allowed",
    "bar_of_dispute": "the bar is 2^-128, as no timestamp of the commitment is looked at",
    "leans_on_date": "p is above 2^-128: in a dispute keys may be said to have been tried until one fitted, which the "
    "date of a commitment alone does not answer; this one was made, by its owner's word, on {created}",
    "chosen_here": "how the suspect was asked (its settings, digest {digest}) was chosen by the claimant after "
    "marking: other settings would have been other tries, unless these were fixed beforehand",
    "leans_on_clean": "the order of the classes rests on the clean data, chosen by the claimant after marking: trying "
    "several sets of them would be several tries",
    "explored": "{probes} probes, and {controls} networks whose answers were taken out of the suspect's, were chosen "
    "by the claimant after marking: whoever knows the bits can choose them to fit any suspect, so that this explores "
    "and convinces nobody else",
    "not_derived": "the watermark was not derived from its key again: its symbols could have been written to fit the "
    "suspect",
    "rank_only": "the null of this scheme is {null}: a p-value that only ranks is never proof",
    "same_bytes": "the same bytes as {original}, judged once",
}


@dataclass(frozen=True)
class Fact:
    """code: one of SENTENCES; values: what its sentence names."""

    code: str
    values: Mapping[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        return SENTENCES[self.code].format(**self.values)

    def __hash__(self) -> int:
        return hash((self.code, frozenset(self.values.items())))


def fact(code: str, **values: Any) -> Fact:
    """A fact; KeyError for a code that has no sentence, or without a value that its sentence names."""
    found = Fact(code, values)
    str(found)
    return found
