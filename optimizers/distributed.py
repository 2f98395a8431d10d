"""The only file that knows ``DTensor``: which part of a tensor lies on which rank.

At a step, what is refused is refused from facts that all ranks share (whole shapes, placements),
because a rank that raises alone leaves the others waiting until the process group's timeout.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


LARGE = 2**16
"""Elements from which on a state tensor of another shape than its parameter is sharded too."""


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a ``DTensor``, which holds a part of a parameter on each rank."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import; without it, no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that lives on this rank, else the tensor itself.

    The returned tensor shares memory, so an in-place update of it updates the parameter.
    """
    if is_sharded(tensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as real pairs, sharded as it is (torch gathers uneven shards)."""
    if is_sharded(tensor):
        shape = torch.Size((*tensor.shape, 2))
        return _from_part(torch.view_as_real(local(tensor)), tensor, tensor.placements, shape)
    return torch.view_as_real(tensor)


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """Return the ranks over which a tensor is spread, ``None`` for an ordinary tensor."""
    return tensor.device_mesh if is_sharded(tensor) else None


def check(p: Tensor, rule: str, whole: bool) -> None:
    """Raise ``ValueError`` if a sharded parameter is placed so that ``rule`` cannot update it.

    Args:
        p: The parameter.
        rule: The rule's name, for messages.
        whole: Whether the rule must see the whole parameter.
    """
    if not is_sharded(p):
        return
    where = f"a parameter of shape {tuple(p.shape)} placed as {p.placements}"
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(
            f"{rule} got {where}: its ranks hold summands, not parts; redistribute it to Shard or "
            "Replicate."
        )
    if not whole:
        return
    if p.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"{rule} got {where} on a mesh of other ranks; give each rank its own parameters."
        )
    if _own_part(p).shape != local(p).shape:
        raise ValueError(  # from another library's placement, or uneven tensor parallelism
            f"{rule} got {where}, whose local shape {tuple(local(p).shape)} is not what these "
            "placements say; use Shard or Replicate, as fully_shard does."
        )
    backends = dist.get_backend_config(p.device_mesh.get_group(0))
    if f"{p.device.type}:" not in backends:
        raise ValueError(
            f"{rule} got {where} on the device {p.device}, which the backend {backends} cannot "
            "move between ranks; for parameters offloaded to the host call "
            "init_process_group('cpu:gloo,cuda:nccl')."
        )


def check_layer(params: Sequence[Tensor], rule: str) -> None:
    """Raise ``ValueError`` unless a layer's parameters lie on the same ranks."""
    if len({mesh_of(p) for p in params}) > 1:
        raise ValueError(
            f"{rule} must see a whole layer, and got one whose parameters lie on different ranks "
            "(some sharded, some not, or on two meshes); shard all of them alike, or put them into "
            "groups of their own."
        )


def aligned(g: Tensor, p: Tensor, rule: str) -> Tensor:
    """Return a gradient laid out like its parameter; sums that are still due are made."""
    if mesh_of(g) != mesh_of(p):
        raise RuntimeError(
            f"{rule} got a gradient of type {type(g).__name__} for a parameter of type "
            f"{type(p).__name__} and shape {tuple(p.shape)}; both must be DTensors on one mesh, or "
            "ordinary tensors."
        )
    if is_sharded(g) and is_sharded(p) and g.placements != p.placements:
        return g.redistribute(placements=p.placements)
    return g


def any_nonzero(gradients: Iterable[Tensor]) -> bool:
    """Whether a gradient is not zero, here or on any rank that holds a part of it."""
    found, meshes = False, {}
    for g in gradients:
        found = found or g.is_sparse or bool(local(g).any())
        if is_sharded(g):
            meshes[g.device_mesh] = g.device
    for mesh, device in meshes.items():
        flag = torch.tensor(float(found), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=mesh_group(mesh))
        found = bool(flag)
    return found


# ---------------------------------------------------------------------- state


def adopt(state: dict[str, Any], p: Tensor, rule: str, whole: bool) -> dict[str, Any]:
    """Return the fresh state of a parameter in the form in which it is kept.

    For a sharded parameter, tensors of its shape are sharded like it, and other large ones by
    rows over the same ranks; a checkpointer can save them and load them on another number of
    ranks. Small ones are ordinary tensors, the same on every rank.
    """
    if not is_sharded(p):
        return state
    for key, value in state.items():
        if isinstance(value, Tensor):
            state[key] = _adopted(value, p, whole)
        elif whole and not isinstance(value, (bool, int, float)):
            raise TypeError(
                f"{rule} keeps {key!r} of a sharded parameter as {type(value).__name__}; only "
                "tensors and numbers can travel between ranks."
            )
    return state


def _adopted(value: Tensor, p: DTensor, whole: bool) -> Tensor:
    from torch.distributed.tensor import Shard

    placements = p.placements
    if value.shape != p.shape:
        if not (whole and value.ndim > 0 and value.numel() >= LARGE):
            return value.full_tensor() if is_sharded(value) else value
        placements = tuple(q if q.is_replicate() else Shard(0) for q in placements)
    if is_sharded(value):
        same = value.device_mesh == p.device_mesh and value.placements == placements
        return value if same else value.redistribute(p.device_mesh, placements)
    own = part_of(value.shape, p.device_mesh.shape, _coordinate(p), placements)
    part = cut(value, own).clone(memory_format=torch.contiguous_format)
    return _from_part(part, p, placements, value.shape)


def _from_part(part: Tensor, p: DTensor, placements: Any, shape: torch.Size) -> Tensor:
    """Return the sharded tensor of a whole ``shape`` whose part on this rank is ``part``."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, p.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )


def copy_(target: Tensor, value: Tensor) -> None:
    """Copy ``value`` into ``target`` of the same shape, however either is laid out.

    All ranks must call it: a differently sharded value is gathered.
    """
    if not is_sharded(target):
        target.copy_(value.full_tensor() if is_sharded(value) else value)
        return
    if is_sharded(value):
        if value.device_mesh == target.device_mesh and value.placements == target.placements:
            local(target).copy_(local(value))
            return
        value = value.full_tensor()
    local(target).copy_(cut(value, _own_part(target)))


# ---------------------------------------------------------------------- who holds what


class Part(NamedTuple):
    """What one rank holds of a tensor."""

    shape: tuple[int, ...]
    boxes: tuple[tuple[tuple[slice, ...], tuple[slice, ...]], ...]  # there in the whole, here
    replica: tuple[int, ...]  # its place among the ranks that hold the same

    @property
    def numel(self) -> int:
        """The number of elements held."""
        return math.prod(self.shape)


_Runs = list[tuple[int, int]]  # indices, as consecutive half-open intervals


def _chunk(runs: _Runs, parts: int, index: int) -> _Runs:
    """Return the indices of one chunk, as ``torch.chunk`` divides them."""
    size = -(-sum(stop - start for start, stop in runs) // parts)
    begin, end, passed, chunk = index * size, (index + 1) * size, 0, []
    for start, stop in runs:
        low, high = max(begin - passed, 0), min(end - passed, stop - start)
        if low < high:
            chunk.append((start + low, start + high))
        passed += stop - start
    return chunk


def part_of(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> Part:
    """Return what the rank at ``coordinate`` of a mesh holds of a tensor of ``shape``."""
    held: list[_Runs] = [[(0, n)] for n in shape]
    replica = []
    for size, index, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if placement.is_replicate():
            replica.append(index)
            continue
        dim: int = placement.dim  # type: ignore[attr-defined]
        # Tensor-parallel parameters are sharded once more inside each of their shards.
        factor = getattr(placement, "split_factor", 1)
        shards = [_chunk(held[dim], factor, k) for k in range(factor)]
        held[dim] = [run for shard in shards for run in _chunk(shard, size, index)]
    spans = []
    for runs in held:
        ends = list(itertools.accumulate((stop - start for start, stop in runs), initial=0))
        heres = itertools.starmap(slice, itertools.pairwise(ends))
        spans.append(list(zip(itertools.starmap(slice, runs), heres, strict=True)))
    boxes = tuple(
        (tuple(there for there, _ in box), tuple(here for _, here in box))
        for box in itertools.product(*spans)
    )
    return Part(tuple(sum(b - a for a, b in runs) for runs in held), boxes, tuple(replica))


def layout(tensor: DTensor) -> tuple[Part, ...]:
    """Return what each rank holds of a tensor, in the order of the ranks in the mesh's group."""
    return _layout_of(tensor.shape, tensor.device_mesh, tensor.placements)


@lru_cache(maxsize=4096)
def _layout_of(shape: torch.Size, mesh: DeviceMesh, placements: Any) -> tuple[Part, ...]:
    positions = itertools.product(*(range(size) for size in mesh.shape))
    coordinates = dict(zip(mesh.mesh.flatten().tolist(), positions, strict=True))
    return tuple(
        part_of(shape, mesh.shape, coordinates[rank], placements)
        for rank in dist.get_process_group_ranks(mesh_group(mesh))
    )


def _own_part(tensor: DTensor) -> Part:
    return part_of(tensor.shape, tensor.device_mesh.shape, _coordinate(tensor), tensor.placements)


def _coordinate(tensor: DTensor) -> Sequence[int]:
    """Return this rank's place on the tensor's mesh, of which it is a member."""
    return tensor.device_mesh.get_coordinate() or ()


def cut(whole: Tensor, part: Part) -> Tensor:
    """Return a rank's part of a whole tensor, a view where it is one box."""
    if len(part.boxes) == 1:
        return whole[part.boxes[0][0]]
    piece = whole.new_empty(part.shape)
    for there, here in part.boxes:
        piece[here] = whole[there]
    return piece


def paste(whole: Tensor, part: Part, piece: Tensor) -> None:
    """Write a rank's part, flat or in its shape, into a whole tensor."""
    piece = piece.view(part.shape)
    for there, here in part.boxes:
        whole[there] = piece[here]


# With the world in which each was made, which may have ended since.
_groups: dict[tuple[int, ...], tuple[Any, dist.ProcessGroup]] = {}


def mesh_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return the process group of all ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    world, ranks = dist.group.WORLD, tuple(sorted(mesh.mesh.flatten().tolist()))
    if ranks == tuple(range(dist.get_world_size())):
        return world  # type: ignore[return-value]
    if ranks not in _groups or _groups[ranks][0] is not world:
        # Ranks outside the mesh take no part, so they need not call it.
        _groups[ranks] = (world, dist.new_group(list(ranks), use_local_synchronization=True))
    return _groups[ranks][1]
