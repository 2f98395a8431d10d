"""Whole matrices out of sharded parameters: each is updated on one rank, its owner.

A rule that treats every element alike updates the shards where they lie. For a rule that must see
a whole matrix (or layer), gradient, parameter and sharded state travel to the owner, the rule runs
there on ordinary tensors, and parameter and state travel back. So the arithmetic is that of one
process, each matrix is worked on once, and every rank that holds a copy gets the owner's bits.
What travels is packed: one ``all_to_all_single`` for each dtype, direction and wave.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from optimizers.distributed import Part, cut, is_sharded, layout, local, mesh_group, mesh_of, paste

WAVE_BYTES = 256 * 2**20
"""What an owner handles at a time: it bounds the memory, and the next wave travels meanwhile."""

_PARAM, _GRAD = "<parameter>", "<gradient>"  # beside the names of state


class Batch(NamedTuple):
    """What one call of ``update_foreach`` works on: equal device and dtype throughout."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    group: dict[str, Any]


def local_batches(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield each batch; of sharded parameters, the part on this rank.

    For rules that treat every element alike.
    """
    for batch in batches:
        if not is_sharded(batch.params[0]):
            yield batch
            continue
        before = [
            {k: local(v) if isinstance(v, Tensor) else v for k, v in state.items()}
            for state in batch.states
        ]
        after = [dict(state) for state in before]
        params, grads = [local(p) for p in batch.params], [local(g) for g in batch.grads]
        yield Batch(params, grads, after, batch.group)
        for kept, old, new in zip(batch.states, before, after, strict=True):
            for key, value in new.items():
                if value is old.get(key):
                    continue  # written in place, or not at all
                if is_sharded(kept.get(key)):
                    local(kept[key]).copy_(value)
                else:
                    kept[key] = value


def whole_batches(batches: Iterable[Batch], *, layers: bool) -> Iterator[Batch]:
    """Yield each batch of whole tensors; of sharded parameters, those that this rank owns.

    All ranks must ask for the same batches; results travel back while the next ones are asked for.
    The rule must not raise and must not write its group: others would not notice.

    Args:
        batches: Of each, the parameters lie on one mesh, or on none.
        layers: Whether a batch stays together, because the rule sees all of a layer.
    """
    by_mesh: dict[Any, list[Batch]] = {}
    for batch in batches:
        by_mesh.setdefault(mesh_of(batch.params[0]), []).append(batch)
    yield from by_mesh.pop(None, [])
    for mesh, sharded in by_mesh.items():
        yield from _exchange(sharded, mesh_group(mesh), layers)


def everywhere(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, on every rank; all ranks must call it."""
    if not is_sharded(tensor):
        return tensor
    group, parts = mesh_group(tensor.device_mesh), layout(tensor)
    transfer, own = _Transfer(group, tensor.device), parts[dist.get_rank(group)].replica
    transfer.carry(tensor.dtype)
    whole: dict[str, Tensor] = {}
    for rank, part in enumerate(parts):
        if part.replica == own:
            transfer.send(rank, local(tensor))
            put = partial(_assemble, whole, _PARAM, tensor.shape, part)
            transfer.expect(rank, tensor.dtype, part.numel, put)
    transfer.start()
    transfer.finish()
    return whole[_PARAM]


# ---------------------------------------------------------------------- the plan


def cost(shape: Sequence[int]) -> int:
    """Return the estimated work on a parameter: short side squared times long side.

    Three dimensions count as a stack of matrices, four and more as a flattened kernel.
    """
    if len(shape) < 2:
        return math.prod(shape)
    count, rows = (shape[0], shape[1]) if len(shape) == 3 else (1, shape[0])
    columns = math.prod(shape[2:] if len(shape) == 3 else shape[1:])
    return count * min(rows, columns) ** 2 * max(rows, columns)


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """Return an owner for each piece of work: the largest first, to the least loaded rank.

    The same on every rank; the largest load is at most 4/3 of the best possible one.
    """
    loads = [(0.0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        owners[index] = rank
        heapq.heappush(loads, (load + costs[index], rank))
    return owners


class _Member(NamedTuple):
    """One parameter of a batch."""

    batch: int
    owner: int
    tensors: dict[str, Any]  # what is sharded: parameter, gradient, state
    state: dict[str, Any]  # all of the state, as it is kept on this rank


def _exchange(batches: list[Batch], group: dist.ProcessGroup, layers: bool) -> Iterator[Batch]:
    """Gather, yield and scatter in waves: while one is worked on, the next is under way."""
    units: list[list[_Member]] = []  # what stays together
    for index, batch in enumerate(batches):
        members = []
        for p, g, state in zip(batch.params, batch.grads, batch.states, strict=True):
            own = {key: value for key, value in state.items() if is_sharded(value)}
            members.append(_Member(index, 0, {_PARAM: p, _GRAD: g, **own}, state))
        units += [members] if layers else [[member] for member in members]
    size = dist.get_world_size(group)
    owners = assign([sum(cost(m.tensors[_PARAM].shape) for m in unit) for unit in units], size)
    handled = [0] * size
    waves: dict[int, list[_Member]] = {}
    for unit, owner in zip(units, owners, strict=True):
        members = waves.setdefault(handled[owner] // WAVE_BYTES, [])
        members += [member._replace(owner=owner) for member in unit]
        handled[owner] += sum(_bytes(member, size) for member in unit)
    line = [_Wave(batches, waves[index], group) for index in sorted(waves)]
    line[0].gather()
    for index, wave in enumerate(line):
        if index + 1 < len(line):
            line[index + 1].gather()
        yield from wave.work()
        wave.scatter()
        if index > 0:
            line[index - 1].store()
    line[-1].store()


def _bytes(member: _Member, ranks: int) -> int:
    """Return what the owner handles: whole tensors, as often as it sends them back."""
    total = 0
    for tensor in {**member.state, **member.tensors}.values():
        if is_sharded(tensor):
            copies = len({part.replica for part in layout(tensor)})
            total += tensor.numel() * tensor.itemsize * copies
        elif isinstance(tensor, Tensor):
            total += tensor.numel() * tensor.itemsize * ranks
    return total


# ---------------------------------------------------------------------- travelling


class _Transfer:
    """Pieces on their way between all ranks of a group: one collective for each dtype.

    Every rank must name the same dtypes in the same order (``carry``), and expect from a rank what
    that rank sends to it, in the order in which it is sent.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._outgoing: dict[torch.dtype, list[list[Tensor]]] = {}
        self._incoming: dict[torch.dtype, list[list[tuple[int, Callable[[Tensor], Any]]]]] = {}
        self._under_way: list[tuple[torch.dtype, Any, Tensor, Tensor]] = []

    def carry(self, dtype: torch.dtype) -> None:
        """Take part in the collective of this dtype, also with nothing to send or to receive."""
        for pieces in (self._outgoing, self._incoming):
            pieces.setdefault(dtype, [[] for _ in range(dist.get_world_size(self._group))])

    def send(self, rank: int, piece: Tensor) -> None:
        self._outgoing[piece.dtype][rank].append(piece.to(self._device).reshape(-1))

    def expect(self, rank: int, dtype: torch.dtype, numel: int, put: Callable[..., Any]) -> None:
        """Call ``put(piece)`` with the flat piece of ``numel`` elements from ``rank``."""
        self._incoming[dtype][rank].append((numel, put))

    def start(self) -> None:
        for dtype, outgoing in self._outgoing.items():
            counts = [sum(numel for numel, _ in pieces) for pieces in self._incoming[dtype]]
            received = torch.empty(sum(counts), dtype=dtype, device=self._device)
            flat = [piece for pieces in outgoing for piece in pieces]
            sent = torch.cat(flat) if flat else received.new_empty(0)
            sizes = [sum(piece.numel() for piece in pieces) for pieces in outgoing]
            work = dist.all_to_all_single(
                received, sent, counts, sizes, group=self._group, async_op=True
            )
            self._under_way.append((dtype, work, sent, received))
        self._outgoing.clear()

    def finish(self) -> None:
        for dtype, work, _, received in self._under_way:
            work.wait()
            start = 0
            for numel, put in (entry for pieces in self._incoming[dtype] for entry in pieces):
                put(received[start : start + numel])
                start += numel
        self._under_way.clear()
        self._incoming.clear()


class _Wave:
    """Some parameters on their way to their owners and back."""

    def __init__(
        self, batches: list[Batch], members: list[_Member], group: dist.ProcessGroup
    ) -> None:
        self._batches, self._members, self._group = batches, members, group
        self._me, self._size = dist.get_rank(group), dist.get_world_size(group)
        # For each member that this rank owns: its whole tensors, and the updated ones.
        self._wholes: list[dict[str, Any]] = [{} for _ in members]
        self._results: list[tuple[Tensor, dict[str, Any]] | None] = [None for _ in members]

    def gather(self) -> None:
        """Send the owners the parts of their matrices."""
        self._under_way = transfer = self._transfer()
        for member, whole in zip(self._members, self._wholes, strict=True):
            for key, tensor in member.tensors.items():
                transfer.carry(tensor.dtype)
                parts = layout(tensor)
                # Where several ranks hold the same, the owner asks those of its own replica.
                source = parts[member.owner].replica
                if parts[self._me].replica == source:
                    transfer.send(member.owner, local(tensor))
                if self._me != member.owner:
                    continue
                for rank, part in enumerate(parts):
                    if part.replica == source:
                        put = partial(_assemble, whole, key, tensor.shape, part)
                        transfer.expect(rank, tensor.dtype, part.numel, put)
        transfer.start()

    def work(self) -> Iterator[Batch]:
        """Yield what this rank owns, for the rule to update."""
        self._under_way.finish()
        for index, batch in enumerate(self._batches):
            params, grads, states = [], [], []
            for k, member in enumerate(self._members):
                if (member.batch, member.owner) != (index, self._me):
                    continue
                whole = self._wholes[k]
                state = {key: whole.get(key, value) for key, value in member.state.items()}
                params.append(whole[_PARAM])
                grads.append(whole[_GRAD])
                states.append(state)
                self._results[k] = (whole[_PARAM], state)
            if params:
                yield Batch(params, grads, states, batch.group)
        self._wholes.clear()

    def scatter(self) -> None:
        """Send every rank its part of the results."""
        self._under_way = transfer = self._transfer()
        for member, result in zip(self._members, self._results, strict=True):
            new = {} if result is None else _checked({_PARAM: result[0], **result[1]}, member)
            for key, old in [(_PARAM, member.tensors[_PARAM]), *member.state.items()]:
                if key == "step":  # advanced on every rank
                    continue
                # Numbers travel in double precision.
                dtype = old.dtype if isinstance(old, Tensor) else torch.float64
                transfer.carry(dtype)
                if result is not None:
                    value = torch.as_tensor(new[key], dtype=dtype)
                    parts = layout(old) if is_sharded(old) else None
                    for rank in range(self._size):
                        transfer.send(rank, value if parts is None else cut(value, parts[rank]))
                target = local(old) if isinstance(old, Tensor) else None
                put = partial(_store, member.state, key, target)
                numel = 1 if target is None else target.numel()
                transfer.expect(member.owner, dtype, numel, put)
        self._results.clear()
        transfer.start()

    def store(self) -> None:
        """Put the results where they belong."""
        self._under_way.finish()

    def _transfer(self) -> _Transfer:
        return _Transfer(self._group, self._members[0].tensors[_PARAM].device)


def _assemble(
    whole: dict[str, Any], key: str, shape: torch.Size, part: Part, piece: Tensor
) -> None:
    """Put one rank's part into a whole tensor, which the first part allocates."""
    if key not in whole:
        whole[key] = piece.new_empty(shape)
    paste(whole[key], part, piece)


def _store(state: dict[str, Any], key: str, target: Tensor | None, piece: Tensor) -> None:
    if target is None:
        state[key] = type(state[key])(piece.item())
    else:
        target.copy_(piece.view(target.shape))


def _checked(new: dict[str, Any], member: _Member) -> dict[str, Any]:
    """Return the results of the owner, if the other ranks expect the like.

    An error here is one of the rule's author, and raised by the owner alone.
    """
    old = {_PARAM: member.tensors[_PARAM], **member.state}
    for key in old.keys() | new.keys():
        before, after = old.get(key), new.get(key)
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            fits = before.shape == after.shape
        else:
            fits = type(before) is type(after)
        if not fits:
            raise RuntimeError(
                f"state {key!r} of a sharded parameter became {after!r:.60}; a rule must keep the "
                "names, kinds and shapes that its init_state returned."
            )
    return new
