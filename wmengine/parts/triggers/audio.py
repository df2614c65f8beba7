"""Audio triggers: short tunes of gliding tones, drawn from the key in integer arithmetic.

The same idea as abstract pictures (Adi et al. 2018) for waveforms: four tones, each with a pitch, a glide and a rhythm
of its own. Noise, which inputs without a picture get else, has nothing that a network of convolutions could hold on to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from wmengine.parts.base import Parameters, Task, inputs_of
from wmengine.parts.triggers.abstract import AbstractTriggers
from wmengine.parts.triggers.pictures import noise_inputs

_TONES, _WORDS, _BEATS = 4, 4, 8
_LONGEST = 6  # log2 of the samples in the slowest wave of the lowest octave
_MOST = 1 << 24  # samples: beyond these the phase of a glide leaves 64 bits

Int64 = NDArray[np.int64]


def tunes(philox_key: int, count: int, shape: Sequence[int]) -> NDArray[np.uint8]:
    """`count` waveforms of `shape`, [channels, L] or [L], uint8[count, *shape], each channel spanning 0 … 255.

    A tone takes four 32-bit words of the trigger generator's noise: where its phase begins; its pitch, one of four
    octaves from 64 to 4 samples a wave; by what share of the pitch it glides over the whole length, 1/4 at most, up or
    down; and which of 8 beats it sounds in.
    """
    length, channels = shape[-1], math.prod(shape[:-1])
    noise = noise_inputs(philox_key, count, (channels, _TONES, 4 * _WORDS))
    phase, pitch, glide, beats = np.moveaxis(noise.view("<u4").astype(np.int64), -1, 0)[..., None]
    time = np.arange(length, dtype=np.int64)
    waves = np.empty((count, channels, length), np.uint8)
    for number in range(count):  # one at a time: a set of long ones would fill the memory
        octave, fraction = pitch[number] >> 30, pitch[number] & 0xFFFFFF
        step = ((1 << 24) + fraction) << (octave + 8 - _LONGEST)  # 2^32 is once around
        change = (step * ((glide[number] >> 16) - (1 << 15)) >> 17) * time // length
        turn = ((phase[number] + (step + change // 2) * time) >> 16) & 0xFFFF
        sounds = (beats[number] >> (time * _BEATS // length)) & 1
        waves[number] = _stretched((_arc(turn) * sounds).sum(axis=1))
    return waves.reshape(count, *shape)


def _arc(turn: Int64) -> Int64:
    """A wave of parabolas, −2^14 … 2^14, nearly a sine: a sine's last digit depends on the machine's library."""
    half = turn & 0x7FFF
    arc = (half * (0x8000 - half)) >> 14
    return np.where(turn < 0x8000, arc, -arc)


def _stretched(values: Int64) -> NDArray[np.uint8]:
    """Each channel [channels, L] moved to span 0 … 255; silence becomes 0."""
    low = values.min(axis=-1, keepdims=True)
    span = np.maximum(1, values.max(axis=-1, keepdims=True) - low)
    return np.asarray((values - low) * 255 // span, np.uint8)


class AudioTriggers(AbstractTriggers):
    """For one floating waveform [channels, L] or [L]; of the latter every sample has the widest range of all."""

    drawn = staticmethod(tunes)

    def describe(self, task: Task, total: int) -> Parameters:
        ranges = task.value_range or ()
        if len(next(iter(task.inputs.values())).shape) == 1 and ranges:
            low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
            task = replace(task, value_range=[(low, high)] * len(ranges))
        return super().describe(task, total)

    def check(self, parameters: Parameters, total: int) -> None:
        super().check(parameters, total)
        (given,) = inputs_of(parameters).values()
        if len(given.shape) > 2 or not _BEATS <= given.shape[-1] <= _MOST:
            raise ValueError(
                f"audio triggers are for waveforms [channels, L] or [L] of {_BEATS} to {_MOST} samples, and this model "
                f"takes {list(given.shape)}"
            )
