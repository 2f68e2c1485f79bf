"""Which box of which Hugging Face tensor each Megatron rank holds, and where in which local parameter.

Pure functions of numbers: no process group, no model, no tensor. Loading a checkpoint, exporting weights and
checking a layout all walk the same list of pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dppo.architecture import Architecture
from megatron_dppo.weights.mapping import Entry, Run, entries

Index = tuple[int, ...]


@dataclass(frozen=True)
class Parallel:
    """How `ranks` processes split a model: Megatron's degrees of parallelism.

    Experts are split over their own grid of the same ranks: `expert` x `expert_tensor` x expert-data replicas. With
    `virtual` > 1 each pipeline rank holds as many chunks of layers, chunk v of rank p being number v x pipeline + p in
    the depth of the model. `chunk_layers`: layers of each chunk in that order (0 allowed); None: all alike.
    """

    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    pipeline: int = 1
    ranks: int = 1
    virtual: int = 1
    chunk_layers: tuple[int, ...] | None = None
    context: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor", "expert", "expert_tensor", "pipeline", "ranks", "virtual", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}: got {getattr(self, name)}, expected at least 1")
        for name, size in (
            ("tensor x context x pipeline", self.tensor * self.context * self.pipeline),
            ("expert x expert_tensor x pipeline", self.expert * self.expert_tensor * self.pipeline),
        ):
            if self.ranks % size:
                raise ValueError(f"parallel: {name} = {size}, expected a divisor of ranks = {self.ranks}")
        if self.chunk_layers is not None and len(self.chunk_layers) != self.pipeline * self.virtual:
            raise ValueError(
                f"parallel.chunk_layers: got {len(self.chunk_layers)} numbers, expected pipeline x virtual = "
                f"{self.pipeline * self.virtual}"
            )
        if self.chunk_layers is not None:
            if min(self.chunk_layers) < 0:
                raise ValueError(f"parallel.chunk_layers: got {min(self.chunk_layers)} layers, expected at least 0")
            for rank in range(1, self.pipeline - 1):  # the first has the embedding, the last the head
                if not any(self.chunk_layers[rank :: self.pipeline]):
                    raise ValueError(f"parallel.chunk_layers: got no layer for pipeline rank {rank}, expected one")
        if self.virtual > 1 and self.pipeline == 1:
            raise ValueError(f"parallel.virtual: got {self.virtual}, expected 1 with one pipeline stage")

    @property
    def data(self) -> int:
        """Data-parallel replicas of the dense part."""
        return self.ranks // (self.tensor * self.context * self.pipeline)

    @property
    def sequence_multiple(self) -> int:
        """Of the tokens in a packed sequence: each context rank has two chunks of it."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def length_multiple(self) -> int:
        """Of the tokens in a micro-batch: besides, each tensor rank has an equal share under sequence parallelism."""
        return self.tensor * self.sequence_multiple


@dataclass(frozen=True)
class Coordinates:
    """A rank's place in the dense grid (tensor, context, data, pipeline) and in the experts' grid."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert_tensor: int
    expert: int
    expert_data: int


def coordinates(parallel: Parallel, rank: int) -> Coordinates:
    """Megatron's default rank order: tensor fastest, then context, data and pipeline; likewise in the experts' grid."""
    if not 0 <= rank < parallel.ranks:
        raise ValueError(f"rank: got {rank}, expected 0..{parallel.ranks - 1}")
    pipeline, within = divmod(rank, parallel.ranks // parallel.pipeline)
    replica, tensor = divmod(within, parallel.tensor)
    data, context = divmod(replica, parallel.context)
    rest, expert_tensor = divmod(within, parallel.expert_tensor)
    expert_data, expert = divmod(rest, parallel.expert)
    return Coordinates(tensor, context, data, pipeline, expert_tensor, expert, expert_data)


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding and the head: the vocabulary rounded up to a multiple of 128 x TP (Megatron's rule).

    A vocabulary smaller than that is rounded up to a multiple of TP, so that every rank has its share.
    """
    multiple = 128 * tensor if vocab_size >= 128 * tensor else tensor
    return (vocab_size + multiple - 1) // multiple * multiple


def chunk_layers(num_layers: int, parallel: Parallel, pipeline_rank: int, chunk: int = 0) -> range:
    """Global indices of the layers in one chunk of one pipeline rank.

    Raises ValueError where the layers do not divide evenly, or `parallel.chunk_layers` are not that many.
    """
    number = chunk * parallel.pipeline + pipeline_rank
    chunks = parallel.pipeline * parallel.virtual
    if parallel.chunk_layers is not None:
        if sum(parallel.chunk_layers) != num_layers:
            total = sum(parallel.chunk_layers)
            raise ValueError(f"parallel.chunk_layers: got {total} layers in all, expected the model's {num_layers}")
        start = sum(parallel.chunk_layers[:number])
        return range(start, start + parallel.chunk_layers[number])
    each, rest = divmod(num_layers, chunks)
    if rest:
        name = "pipeline" if parallel.virtual == 1 else "pipeline x virtual"
        fault = f"parallel.{name}: got {chunks}, expected a divisor of {num_layers} layers"
        if num_layers >= chunks:
            fault += f" or parallel.chunk_layers, such as [{','.join(map(str, uneven_chunks(num_layers, chunks)))}]"
        raise ValueError(fault)
    return range(number * each, (number + 1) * each)


def uneven_chunks(num_layers: int, chunks: int) -> tuple[int, ...]:
    """Layers of each chunk, as even as can be: fewer at the ends, which have the embedding and the head."""
    each, rest = divmod(num_layers, chunks)
    longer = [*range(1, chunks - 1), 0, chunks - 1][:rest]
    return tuple(each + (chunk in longer) for chunk in range(chunks))


def chunk_prefix(parallel: Parallel, chunk: int) -> str:
    """What stands in front of the names of a chunk's parameters: nothing where a rank has one chunk."""
    return f"chunk{chunk}." if parallel.virtual > 1 else ""


@dataclass(frozen=True)
class Box:
    """A box of a hub tensor: rows (and columns) `start` up to, without, `stop`."""

    tensor: str
    start: Index
    stop: Index

    def as_json(self) -> list[Any]:
        """[tensor, start, stop], for a message."""
        return [self.tensor, list(self.start), list(self.stop)]

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> Box:
        """What `as_json` made."""
        tensor, start, stop = fields
        return cls(tensor, tuple(start), tuple(stop))

    @property
    def numel(self) -> int:
        """Elements in it."""
        return math.prod(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def hub_index(self) -> tuple[slice, ...]:
        """Index of the box in the hub tensor."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))


@dataclass(frozen=True)
class Piece(Box):
    """A box of a hub tensor and its place in a local parameter; both have the shape `stop - start`.

    `replica` counts the ranks that hold the same box: over all ranks, the pieces of replica 0 tile every tensor
    exactly once, and they are what is exported. A copy made for computing only (the tied head of the last stage)
    has replica -1.
    """

    param: str
    offset: tuple[int, ...]
    replica: int

    @property
    def local_index(self) -> tuple[slice, ...]:
        """Index of the box in the local parameter."""
        return tuple(slice(o, o + b - a) for o, a, b in zip(self.offset, self.start, self.stop, strict=True))


def megatron_layout(
    arch: Architecture,
    parallel: Parallel,
    rank: int,
    transformer_engine: bool = False,
    grouped_experts: bool = False,
) -> Iterator[Piece]:
    """The pieces of one rank's parameters, in the order of the mapping table.

    Names are relative to the stage's GPTModel (`decoder.layers.0...` is the stage's first layer); with several chunks
    `chunk<v>.` stands in front. The two flags choose between Megatron's spellings (`mapping.entries`). Padding of the
    vocabulary belongs to no piece. Raises ValueError where a degree of parallelism does not divide the model.
    """
    at = coordinates(parallel, rank)
    experts = range(0)
    if arch.is_moe:
        share = _divide(arch.num_experts, parallel.expert, "experts", "expert")
        experts = range(at.expert * share, (at.expert + 1) * share)
    padded_vocab = padded_vocab_size(arch.vocab_size, parallel.tensor)
    for chunk in range(parallel.virtual):
        prefix = chunk_prefix(parallel, chunk)
        layers = chunk_layers(arch.num_layers, parallel, at.pipeline, chunk)
        for entry in entries(arch, padded_vocab, transformer_engine, layers, experts, grouped_experts):
            number = chunk * parallel.pipeline + at.pipeline
            if _is_in_chunk(entry, arch, number, parallel.pipeline * parallel.virtual - 1):
                expert = 0 if entry.expert is None else entry.expert - experts.start
                name = entry.param.format(layer=(entry.layer or 0) - layers.start, expert=expert)
                yield from _pieces(entry, prefix + name, parallel, at, computing_copy=_is_tied_head(entry, arch))


def parameter_shapes(pieces: Iterable[Piece]) -> dict[str, tuple[int, ...]]:
    """Name -> shape just large enough for its pieces: that of the parameter, but for padding behind the last."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        ends = tuple(index.stop for index in piece.local_index)
        shapes[piece.param] = tuple(map(max, shapes.get(piece.param, ends), ends))
    return shapes


def _is_tied_head(entry: Entry, arch: Architecture) -> bool:
    return entry.param == "output_layer.weight" and arch.tie_word_embeddings


def _is_in_chunk(entry: Entry, arch: Architecture, number: int, last: int) -> bool:
    """Whether chunk `number` holds what is not in a layer: the embedding the first, final norm and head the last."""
    if entry.layer is not None:
        return True
    if entry.param.startswith("embedding."):
        return number == 0
    # With one stage a tied head is the embedding itself, not a parameter of its own.
    return number == last and not (_is_tied_head(entry, arch) and last == 0)


def _divide(size: int, parts: int, what: str, key: str) -> int:
    if size % parts:
        raise ValueError(f"parallel.{key}: got {parts}, expected a divisor of the model's {size} {what}")
    return size // parts


def _pieces(entry: Entry, name: str, parallel: Parallel, at: Coordinates, computing_copy: bool) -> Iterator[Piece]:
    if entry.expert is None:
        parts, part, replicas_before = parallel.tensor, at.tensor, at.data * parallel.context + at.context
    else:
        parts, part, replicas_before = parallel.expert_tensor, at.expert_tensor, at.expert_data
    replica = replicas_before if entry.split != "replicated" else replicas_before * parts + part
    replica = -1 if computing_copy else replica
    size, key = entry.shape[entry.axis], "tensor" if entry.expert is None else "expert_tensor"
    if entry.split == "replicated":
        cuts = _cut(entry.runs, 0, size)
    elif entry.split == "whole":
        share = _divide(size, parts, f"rows of {entry.param}", key)
        cuts = _cut(entry.runs, part * share, (part + 1) * share)
    else:
        cuts, offset = [], 0
        for run in entry.runs:
            share = _divide(run.count, parts, f"rows of {run.tensor}", key)
            cuts.append((Run(run.tensor, run.start + part * share, share), offset))
            offset += share
    for run, offset in cuts:
        yield _box(entry, run, offset, name, replica)


def _cut(runs: tuple[Run, ...], start: int, stop: int) -> list[tuple[Run, int]]:
    """The parts of the concatenated runs within [start, stop), each with its offset from `start`.

    A share that is padding only gets one empty part: its parameter has a place in the layout, and nothing to copy.
    """
    cuts, position = [], 0
    for run in runs:
        low, high = max(start, position), min(stop, position + run.count)
        if low < high:
            cuts.append((Run(run.tensor, run.start + low - position, high - low), low - start))
        position += run.count
    return cuts or [(Run(runs[-1].tensor, runs[-1].start + runs[-1].count, 0), 0)]


def _box(entry: Entry, run: Run, offset: int, name: str, replica: int) -> Piece:
    def along_axis(value: int, other: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(value if axis == entry.axis else n for axis, n in enumerate(other))

    zeros = (0,) * len(entry.shape)
    return Piece(
        tensor=run.tensor,
        start=along_axis(run.start, zeros),
        stop=along_axis(run.start + run.count, entry.shape),
        param=name,
        offset=along_axis(offset, zeros),
        replica=replica,
    )
