"""Weights inside an engine's worker process, whichever engine it is: they come in from a file or over a group.

An update has two phases. *Staging* (`receive` of a file) checks that the file is there, that it holds every tensor of
the checkpoint with the right shape, and its checksums: the model is not touched, so a refused or abandoned update
leaves a working engine. *Applying* (`finish`) copies the boxes that this worker keeps into the model; should it fail
half-way, the weights are marked unusable (version -1) until a full update succeeds. Weights sent over a group go
straight into the model: there is no memory to stage them.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_dppo.control import connect_store
from megatron_dppo.weights.fingerprint import MODULUS, box_fingerprint
from megatron_dppo.weights.hub_files import HubFiles, TensorInfo
from megatron_dppo.weights.image import checked_tensors
from megatron_dppo.weights.layout import Box, Index
from megatron_dppo.weights.transfer import Receiver, check_share, join_as_worker, published_share
from megatron_dppo.weights.update import UNUSABLE, FileUpdate, GroupUpdate

Method = Callable[..., dict[str, Any]]


def answering(method: Method) -> Method:
    """Its error becomes its answer: {"error": what}. An engine does not survive an error in a worker, or loses count
    of the others' answers."""

    @functools.wraps(method)
    def answer(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            logging.getLogger(__name__).exception(method.__name__)
            return {"error": f"{type(error).__name__}: {error}"}

    return answer


class Reload(Protocol):
    """What a worker's model takes of the hub tensors, and the taking."""

    boxes: list[Box]  # what it keeps, each element once
    whole: dict[str, str]  # tensors that it needs whole, and why: all of them in `boxes`
    unreached: list[str]  # parameters that no tensor reaches

    def begin(self) -> None:
        """Starts an update; the model cannot compute until `finish`. May follow an update that was not finished."""
        ...

    def place(self, tensor: str, start: Index, stop: Index, part: torch.Tensor) -> None:
        """Takes the numbers of a part of one of `boxes` (contiguous, not kept)."""
        ...

    def finish(self) -> None:
        """Ends the update. Raises RuntimeError where parts are missing; the model cannot compute then."""
        ...


@dataclass
class Staged:
    """An update that waits for the end; `tensors`, in a mapped file, still have to be taken."""

    version: int
    tensors: dict[str, torch.Tensor]


class WorkerWeights:
    """One worker's weights; methods raise what their callers turn into answers."""

    def __init__(
        self,
        worker: int,
        model_dir: Path,
        device: torch.device,
        make_reload: Callable[[Mapping[str, TensorInfo]], Reload],
    ) -> None:
        """`worker`: its number in its engine. `model_dir`: what the engine was started from. `make_reload` is called
        with the tensors found there, when it is first asked what the worker keeps (0.2 ms a tensor)."""
        self.worker, self._model_dir, self._device, self._make_reload = worker, model_dir, device, make_reload
        self.version = 0  # the weights that the engine was started with
        self.updates = 0  # that were applied
        self.fingerprints: Counter[str] | None = None  # of what the last update brought to this worker, where asked for
        self.staged: Staged | None = None
        self._members: tuple[tuple[Any, ...], Receiver] | None = None

    @functools.cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """What the engine was started with."""
        return checkpoint_tensors(self._model_dir)

    @functools.cached_property
    def reload(self) -> Reload:
        """Where this worker's weights come from and go."""
        reload = self._make_reload(self.tensors)
        for name, why in reload.whole.items():
            logging.getLogger(__name__).warning("%s: this worker takes all of it at every update: %s", name, why)
        return reload

    def receive(
        self, version: int, *, file: Mapping[str, Any] | None = None, group: Mapping[str, Any] | None = None
    ) -> None:
        """Stages an update from a file, or takes one from a group (the fields of `weights.update.Update`).

        Raises ValueError, with the model untouched, if it is incomplete or damaged; TransferError if bytes of a
        group do not come or are damaged, with the weights unusable.
        """
        if self.staged is not None:
            raise ValueError(f"weight update: got a second payload for version {self.staged.version}, expected one")
        if file is not None:
            update = FileUpdate.from_json(file)
            self.staged = self._stage(update)
            self.fingerprints = Counter() if update.fingerprints else None
        elif group is not None:
            sent = GroupUpdate(**group)
            self.fingerprints = Counter() if sent.fingerprints else None
            self._take(sent)
            self.staged = Staged(version, {})
        else:
            raise ValueError(f"weight update: got neither file nor group for version {version}")

    def finish(self) -> None:
        """Puts the update in use. Raises RuntimeError if there is none, or parts of it are missing."""
        if self.staged is None:
            raise RuntimeError("weight update: nothing is staged, send an update first")
        staged, self.staged = self.staged, None
        if staged.tensors:
            self.version = UNUSABLE  # until the last layer is in place
            self.reload.begin()
            for box in self.reload.boxes:
                self._place(box.tensor, box.start, box.stop, staged.tensors[box.tensor][box.hub_index].contiguous())
        self.reload.finish()
        self.version, self.updates = staged.version, self.updates + 1

    def discard(self) -> None:
        """Forgets a staged update; the model keeps its weights."""
        self.staged = None

    def layout(self) -> dict[str, Any]:
        """What this worker (`worker`, its number) keeps: `boxes`, as JSON; `unread`, other tensors;
        `unreached`, parameters that none of them fills."""
        reload = self.reload
        unread = self.tensors.keys() - {box.tensor for box in reload.boxes}
        return {
            "worker": self.worker,
            "boxes": [box.as_json() for box in reload.boxes],
            "unread": sorted(unread),
            "unreached": reload.unreached,
        }

    def state(self) -> dict[str, int]:
        """Version of the weights in use (0: those of the start, -1: unusable after a failed update); updates so far."""
        return {"version": self.version, "updates": self.updates}

    def received(self) -> dict[str, Any]:
        """Of what came in the last update: `worker` (its number), `fingerprints` by tensor. Raises ValueError."""
        if self.fingerprints is None:
            raise ValueError("checksum: the last update did not ask for fingerprints")
        of_tensors = {name: value % MODULUS for name, value in self.fingerprints.items()}
        return {"worker": self.worker, "fingerprints": of_tensors}

    def _stage(self, update: FileUpdate) -> Staged:
        shapes = {name: info.shape for name, info in self.tensors.items()}
        needed = {box.tensor for box in self.reload.boxes}
        return Staged(update.version, checked_tensors(update, shapes, needed=needed))

    def _take(self, update: GroupUpdate) -> None:
        """Receives everything into the model, layer by layer: there is no memory to keep it elsewhere."""
        receiver = self._receiver(update)
        self.version = UNUSABLE  # until the last layer is in place
        self.reload.begin()
        receiver.receive(self._place)

    def _place(self, tensor: str, start: Index, stop: Index, part: torch.Tensor) -> None:
        """`start`, `stop`: of two axes; a tensor of one counts as a column."""
        shape = self.tensors[tensor].shape
        if self.fingerprints is not None:
            columns = shape[1] if len(shape) > 1 else 1
            self.fingerprints[tensor] += box_fingerprint(part, start, columns)
        self.reload.place(tensor, start[: len(shape)], stop[: len(shape)], part)

    def _receiver(self, update: GroupUpdate) -> Receiver:
        """Meets the trainer, and the instances before and behind, once a generation."""
        key = (update.store, update.generation, update.digest, update.instance)
        if self._members is None or self._members[0] != key:
            self._members = None
            store = connect_store(update.store, update.timeout_s)
            plan = published_share(store, update.digest, self.worker)
            check_share(plan, self.reload.boxes)
            channels = join_as_worker(store, update, self.worker, len(plan.kept_bytes), self._device)
            self._members = (key, Receiver(plan, self.worker, update.instance, *channels))
        return self._members[1]


def checkpoint_tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """Every tensor in the directory's safetensors files: what the engine loaded at start.

    Raises ValueError for a directory that is not there or has none.
    """
    try:
        return dict(HubFiles(model_dir).tensors)
    except FileNotFoundError:
        raise ValueError(
            f"weight update: got {model_dir} without *.safetensors, expected the local checkpoint directory "
            "that the engine was started from (it says which tensors make a complete update)"
        ) from None
