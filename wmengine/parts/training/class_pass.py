"""A pass of triggers and of samples of the class that these triggers are to be taken for, a class a step."""

from __future__ import annotations

import torch

from wmengine.parts.base import Setting, inputs_of
from wmengine.parts.training.second_pass import ROWS, SecondPass, keeping, last_layers, logits_of
from wmengine.suspects.adapters import to_input


class ClassPass(SecondPass):
    """Raises ValueError where no class has both triggers and samples that are known to be of it."""

    def __init__(self, layers: int, setting: Setting) -> None:
        super().__init__(setting)
        self._paths = last_layers(setting, layers)
        arrays, parameters = setting.mark.arrays, setting.mark.parameters
        (self._name,) = inputs_of(parameters)
        labels = self._labels
        if "clean" in arrays:  # of the one class that all triggers are to be taken for
            samples, truth = arrays["clean"], labels[:1].expand(len(arrays["clean"]))
        else:
            samples, truth = arrays["samples"], torch.from_numpy(arrays["truth"].copy())
        self._samples = torch.from_numpy(to_input(samples, parameters["value_range"]))
        classes = sorted(set(labels.tolist()))
        every = ((torch.where(labels == each)[0], torch.where(truth == each)[0]) for each in classes)
        self._classes = [each for each in every if len(each[1]) > 1]
        if not self._classes:
            raise ValueError(
                f"scheme {setting.preset_name!r} brings triggers near samples of their classes, and there are none: "
                "give some of each class, samples=(inputs, labels)"
            )

    def features(self, model: torch.nn.Module, device: torch.device) -> tuple[list[torch.Tensor], int]:
        """What goes into the last layers, [n, F] each, and how many of the rows are triggers, which come first."""
        at = int(torch.randint(len(self._classes), (), generator=self._generator))
        triggers, samples = (self.some(ROWS, each) for each in self._classes[at])
        inputs, _ = self.trigger_rows(triggers, device)
        own = self._on(self._samples, device, self._dtypes[self._name])[samples.to(device, non_blocking=True)]
        with keeping(model, self._paths) as features:
            logits_of(model, {self._name: torch.cat([inputs[self._name], own])})
        return features, len(triggers)
