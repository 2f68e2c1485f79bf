"""New numbers for a vLLM worker's model, box by box: only what it keeps, in any cut, without its weight loaders.

At the start the loaders are followed once (`weights.recording`). After that an update is: `begin`, `place` for every
part of every box, `finish`; a layer is processed by vLLM (repacked, copied to where its kernels read) as soon as its
last element is there. Layers whose loaders compute go through them: their tensors are needed whole. Runs inside the
workers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

from megatron_dppo.rollout.vllm import cpu as vllm_cpu
from megatron_dppo.weights.hub_files import TensorInfo
from megatron_dppo.weights.recording import Recording, Step, apply_step, record, steps, storage_of

Index = tuple[int, ...]
Box = tuple[str, Index, Index]
NEVER = -(1 << 60)  # elements loaded so far, while recording: no layer is ever complete


class Reload:
    """What one worker's model takes of the hub tensors, and the taking.

    `boxes`: (tensor, start, stop) of what it keeps, each element once; all of a tensor in `whole` (name -> why).
    """

    def __init__(self, model: Any, model_config: Any, tensors: Mapping[str, TensorInfo]) -> None:
        """Follows the loaders; the model is left as it is. `tensors`: all of the checkpoint, under the hub's names."""
        self._model, self._config = model, model_config
        drop_partial_reload(model)
        initialize_layerwise_reload(model)
        try:
            self._record(tensors)
        finally:
            drop_partial_reload(model)
            finalize_layerwise_reload(model, model_config)

    def _record(self, tensors: Mapping[str, TensorInfo]) -> None:
        owners: dict[int, tuple[nn.Module, str]] = {}
        in_use = []  # what vLLM keeps in place during a reload; a loader that computes would write into it
        for module in self._model.modules():
            get_layerwise_info(module).load_numel = NEVER
            for name, tensor in get_layer_tensors(module).items():
                owners.setdefault(storage_of(tensor), (module, name))
                if not tensor.is_meta:
                    in_use.append((tensor, tensor.detach().clone()))
        recording = record(self._model.load_weights, tensors)
        for tensor, before in in_use:
            tensor.data.copy_(before)
        _widen_whole(recording, {target: module for target, (module, _) in owners.items()})
        self.whole = recording.whole
        self.unreached: list[str] = []  # vLLM does not start with such a parameter
        self.boxes: list[Box] = list(recording.boxes())
        self._copies = {name: copies for name, copies in recording.copies.items() if name not in self.whole}
        self._owners = owners
        self._steps: dict[Box, list[Step]] = {}
        expected: Counter[int] = Counter()  # elements that arrive for each parameter
        for name, start, stop in self.boxes:
            for step in steps(self._copies[name], start, stop):
                expected[step.target] += math.prod(step.size)
        self._expected: Counter[nn.Module] = Counter()
        self._padded: dict[nn.Module, list[str]] = {}  # parameters with elements that are in no box: zero
        for target, count in expected.items():
            module, name = owners[target]
            self._expected[module] += count
            if count < getattr(module, name).numel():
                self._padded.setdefault(module, []).append(name)
        self.boxes += [(name, (0,) * len(tensors[name].shape), tensors[name].shape) for name in self.whole]

    def begin(self) -> None:
        """Starts an update; the model cannot compute until `finish`. May follow an update that was not finished."""
        drop_partial_reload(self._model)
        vllm_cpu.before_reload(self._model)
        initialize_layerwise_reload(self._model)
        self._left = Counter(self._expected)
        self._begun: set[nn.Module] = set()

    @torch.no_grad()
    def place(self, tensor: str, start: Index, stop: Index, part: Tensor) -> None:
        """Takes the numbers of a part of one of `boxes` (contiguous; not kept, unless the tensor is in `whole`)."""
        if tensor in self.whole:
            self._model.load_weights([(tensor, part.clone())])
            return
        key = (tensor, start, stop)
        if key not in self._steps:
            self._steps[key] = list(steps(self._copies[tensor], start, stop))
        for step in self._steps[key]:
            module, name = self._owners[step.target]
            if module not in self._begun:
                self._begin_layer(module)
            apply_step(step, part, getattr(module, name).data)
            self._left[module] -= math.prod(step.size)
            if not self._left[module]:
                _layerwise_process(module, get_layerwise_info(module))

    def _begin_layer(self, module: nn.Module) -> None:
        self._begun.add(module)
        materialize_layer(module, get_layerwise_info(module))
        for name in self._padded.get(module, ()):
            getattr(module, name).data.zero_()

    def finish(self) -> None:
        """Ends the update. Raises RuntimeError where parts are missing; the model cannot compute then."""
        if missing := sum(self._left.values()):
            raise RuntimeError(f"weight update: {missing} elements of {sum(self._expected.values())} did not arrive")
        finalize_layerwise_reload(self._model, self._config)
        vllm_cpu.after_reload(self._model)


def drop_partial_reload(model: nn.Module) -> None:
    """Forget what a reload that failed half-way had buffered.

    vLLM counts loaded elements per layer; with the old ones left in, a layer would be finished too early and
    keep stale or missing parts without a word.
    """
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0


def _widen_whole(recording: Recording, modules: Mapping[int, nn.Module]) -> None:
    """A layer is loaded either by copies or by its loaders: all its tensors are needed whole if one is."""
    while True:
        noted: Counter[nn.Module] = Counter()
        for name, copies in recording.copies.items():
            if name not in recording.whole:
                for copy in copies:
                    noted[modules[copy.target]] += math.prod(copy.size)
        by_loader = {
            module
            for module in set(modules.values())
            if get_layerwise_info(module).load_numel - NEVER > noted[module] or is_deferred_attention_layer(module)
        }
        more = {
            name: f"it shares a {type(modules[copy.target]).__name__} with a tensor that its loader computes"
            for name, copies in recording.copies.items()
            for copy in copies
            if name not in recording.whole and modules[copy.target] in by_loader
        }
        if not more:
            return
        recording.whole.update(more)
