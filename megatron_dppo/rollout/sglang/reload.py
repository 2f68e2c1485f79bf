"""New numbers for a model in an SGLang worker, box by box: only what it keeps, in any cut, without its weight loaders.

The loaders are followed once (`weights.recording`), while the engine is idle: what a recorded loader would write into
live parameters is put back. SGLang prepares the parameters before and after an update itself, where their layout is not
the loaders' (`/begin_weight_update`, `/end_weight_update`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dppo.weights.hub_files import TensorInfo
from megatron_dppo.weights.recording import Recording, Step, apply_step, record, steps, storage_of
from megatron_dppo.weights.transfer import Index

Box = tuple[str, Index, Index]


class Reload:
    """What one worker's model takes of the hub tensors, and the taking (`worker_weights.Reload`)."""

    def __init__(self, model: Any, tensors: Mapping[str, TensorInfo]) -> None:
        """Follows the loaders; the model is left as it is. `tensors`: all of the checkpoint, under the hub's names."""
        self._model = model
        parameters = dict(model.named_parameters())
        device = next(iter(parameters.values())).device
        with torch.no_grad(), torch.device(device), _undone(parameters.values()):
            recording = record(model.load_weights, tensors)
        names = {storage_of(parameter.data): name for name, parameter in parameters.items()}
        self.unreached = _unreached(recording, names)
        self.whole = recording.whole
        self.boxes: list[Box] = list(recording.boxes())
        self._copies = {name: copies for name, copies in recording.copies.items() if name not in self.whole}
        self._names = names
        self._steps: dict[Box, list[Step]] = {}
        self._expected = sum(
            math.prod(step.size)
            for name, start, stop in self.boxes
            for step in steps(self._copies[name], start, stop)
        )  # fmt: skip
        self.boxes += [(name, (0,) * len(tensors[name].shape), tensors[name].shape) for name in self.whole]
        self._whole: dict[str, Tensor] = {}
        self._left = 0
        self._parameters: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Starts an update; may follow an update that was not finished."""
        self._left, self._whole = self._expected, {}
        self._parameters = {name: parameter.data for name, parameter in self._model.named_parameters()}

    @torch.no_grad()
    def place(self, tensor: str, start: Index, stop: Index, part: Tensor) -> None:
        """Takes the numbers of a part of one of `boxes` (contiguous; not kept, unless the tensor is in `whole`)."""
        if tensor in self.whole:
            self._whole[tensor] = part.clone()
            return
        key = (tensor, start, stop)
        if key not in self._steps:
            self._steps[key] = list(steps(self._copies[tensor], start, stop))
        for step in self._steps[key]:
            apply_step(step, part, self._parameters[self._names[step.target]])
            self._left -= math.prod(step.size)

    def finish(self) -> None:
        """Ends the update. Raises RuntimeError where parts are missing; the weights are a mixture then."""
        missing = len(self.whole) - len(self._whole)
        if self._left or missing:
            raise RuntimeError(
                f"weight update: {self._left} elements of {self._expected} and {missing} whole tensors did not arrive"
            )
        if self._whole:  # together: a loader may wait for several to make one parameter of them
            self._model.load_weights(list(self._whole.items()))
            self._whole = {}
        # What SGLang's loaders do at their end, for the models that compute further tensors from their parameters.
        if after := getattr(self._model, "post_load_weights", None):
            after()


def _unreached(recording: Recording, names: Mapping[int, str]) -> list[str]:
    """SGLang leaves a parameter that it finds no tensor for as it happens to be, and says nothing."""
    if recording.whole:
        return []  # where loaders compute, what they reach cannot be told
    reached = {copy.target for copies in recording.copies.values() for copy in copies}
    return sorted(name for storage, name in names.items() if storage not in reached)


class _PutBack(TorchDispatchMode):
    """Remembers what live parameters were before anything is written into them."""

    def __init__(self, parameters: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._parameters = parameters
        self.before: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = [
            argument
            for argument, declared in zip(args, func._schema.arguments, strict=False)
            if isinstance(argument, Tensor) and declared.alias_info is not None and declared.alias_info.is_write
        ]
        for tensor in written:
            storage = storage_of(tensor)
            if storage in self._parameters and storage not in self.before:
                self.before[storage] = self._parameters[storage].detach().clone()
        return func(*args, **(kwargs or {}))


@contextmanager
def _undone(parameters: Any) -> Iterator[None]:
    """What is written into parameters inside the block is undone at its end."""
    of_storage = {storage_of(parameter.data): parameter for parameter in parameters}
    mode = _PutBack(of_storage)
    try:
        with mode:
            yield
    finally:
        for storage, before in mode.before.items():
            of_storage[storage].data.copy_(before)
