"""The mesh and what lies on it: one `Layout` says where every parameter, batch and result is, on one device or a pod.

Parameters carry logical axis names (models/layers.py), the table of the config maps those to mesh axes. Who the other
processes are and whether they are well is the business of processes.py.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from flax.linen import spmd
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from iqe_jax import processes
from iqe_jax.config import MeshConfig

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
ON_CPUS = 16  # images at once: half of them already reach the rate of products there, see docs/performance.md
ON_A_DEVICE = 64  # images at once, at most, on a GPU or TPU: all files of a batch are read before it runs


@dataclass(frozen=True)
class Layout:
    """A mesh with axes data, fsdp and tensor, and the rules that lay logical axes over it. Hashable.

    Every array of a batch is split along its axis of images by the rule for `batch`. A process makes only the rows that
    its own devices hold (`rows`), and `place` turns them into arrays of the whole batch.
    """

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Trace and run under this mesh and these rules; programs compiled here are keyed by the Layout they get."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
            yield

    @contextmanager
    def traced(self) -> Iterator[None]:
        """As `active` for what is traced and not run, inside `jit` as well, where a mesh cannot be made active."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh), nn.logical_axis_rules(self.rules):
            yield

    @property
    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @cached_property
    def batch(self) -> NamedSharding:
        """Split along the first axis by the rule for `batch`."""
        return self.batch_at(0)

    def batch_at(self, axis: int) -> NamedSharding:
        """Split along `axis` by the rule for `batch`: 1 for arrays of levels of images."""
        axes = dict(self.rules)["batch"]
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, axes or None))

    @cached_property
    def batch_shards(self) -> int:
        """Into how many parts a batch is split."""
        return math.prod(self.mesh.shape[axis] for axis in dict(self.rules)["batch"])

    def padded(self, batch_size: int) -> int:
        """The smallest batch from `batch_size` images up that splits evenly; what is added has weight 0."""
        return -(-batch_size // self.batch_shards) * self.batch_shards

    @cached_property
    def memory(self) -> int:
        """Bytes that the smallest device has for arrays; 0 where they do not say, as CPUs. All processes must ask."""
        said = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in self.mesh.local_devices]
        return processes.least(min(said, default=0))

    @property
    def budget(self) -> int:
        """Bytes of each device for images at work, and as many for kept features: a quarter of `memory`.

        The rest is for weights, training's state and batches that wait.
        """
        return self.memory // 4

    def at_once(self, asked: int | None, bytes_each: int) -> int:
        """How many images to run at once without gradients, padded: `asked`, or as many as memory suggests.

        That is a power of two on each device, of images that take `bytes_each` of its `budget`. All processes must ask,
        and get the same.
        """
        if asked is not None or not self.memory:
            return self.padded(asked or ON_CPUS)
        fit = max(1, min(self.budget // bytes_each, ON_A_DEVICE))
        return self.batch_shards << (fit.bit_length() - 1)

    def gathered_at_once(self, size: int, bytes_each: int) -> int:
        """As many of `size` images as every device can hold together, `bytes_each`, where `whole` puts them on all.

        Two batches may be there at a time, each before and after it is put together.
        """
        if jax.process_count() == 1 or not self.memory:
            return size
        return min(size, self.padded(max(1, self.budget // (4 * bytes_each))))

    def rows(self, batch_size: int) -> Int[np.ndarray, " rows"]:
        """The rows, in order, of a batch of `batch_size` that devices of this process hold."""
        held = self.batch.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index or slice(None)] for index in held]))

    def place(self, local: T, batch_size: int, axis: int = 0) -> T:
        """Arrays of whole batches from a tree of host arrays with this process's `rows` of them along `axis`."""
        rows, sharding, before = self.rows(batch_size), self.batch_at(axis), (slice(None),) * axis

        def array(x: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                start, stop, _ = index[axis].indices(batch_size)
                first = int(np.searchsorted(rows, start))
                return x[(*before, slice(first, first + stop - start))]

            shape = (*x.shape[:axis], batch_size, *x.shape[axis + 1 :])
            return jax.make_array_from_callback(shape, sharding, part)

        return jax.tree.map(array, local)

    def local(self, x: jax.Array) -> np.ndarray:
        """The rows of a batch that this process holds, in order, on the host: what `place` was given."""
        parts = {shard.index[0].indices(x.shape[0])[0]: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    def gather(self, tree: T) -> T:
        """A tree of arrays, whole, as NumPy arrays on every process. All processes have to call it."""
        return jax.tree.map(np.asarray, self.whole(tree))

    def whole(self, tree: T) -> T:
        """A tree of arrays of which every process has all, if only on all its devices together."""
        leaves, structure = jax.tree.flatten(tree)
        spread = [i for i, x in enumerate(leaves) if not (x.is_fully_addressable or x.is_fully_replicated)]
        if spread:
            whole = jax.jit(_same, out_shardings=self.replicated)([leaves[i] for i in spread])
            for i, x in zip(spread, whole, strict=True):
                leaves[i] = x
        return jax.tree.unflatten(structure, leaves)

    def shardings(self, boxed: Any) -> Any:
        """Where each array of a tree lies by the rules, for boxed arrays or shapes as `IqeClip.init` makes them.

        Raises ValueError listing all whose size does not divide by the devices that a rule splits it over.
        """
        problems: list[str] = []

        def split(path: Any, spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
            for size, axes in zip(shape, spec, strict=False):
                names = (axes,) if isinstance(axes, str) else axes or ()
                parts = math.prod(self.mesh.shape[name] for name in names)
                if size % parts:
                    name = jax.tree_util.keystr(path, simple=True, separator="/")
                    problems.append(f"{name}: {size} does not divide by {parts} ({' × '.join(names)})")
            return NamedSharding(self.mesh, spec)

        def sharding(path: Any, x: Any) -> Any:
            if not isinstance(x, meta.AxisMetadata):
                return self.replicated
            spec = spmd.logical_to_mesh_axes(x.names, self.rules) or PartitionSpec()  # pyright: ignore
            # A map over the box, as optax leaves some of them empty.
            return jax.tree.map(lambda leaf: split(path, spec, leaf.shape), meta.unbox(x))

        found = jax.tree.map_with_path(sharding, boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))
        if problems:
            raise ValueError(
                "the mesh does not fit the model; use fewer devices on these axes (--mesh.…) or leave the logical axis "
                "whole (--mesh.rules.…):\n  " + "\n  ".join(problems)
            )
        return found

    def put(self, tree: Mapping[str, Any], shardings: Any) -> dict[str, Any]:
        """Host arrays, the same on every process, laid out as `shardings` say."""

        def array(x: Any, sharding: NamedSharding) -> jax.Array:
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(array, dict(tree), shardings)


def _same(arrays: list[jax.Array]) -> list[jax.Array]:
    """By name, as `jit` would compile a lambda anew at each call."""
    return arrays


def behind(trees: Iterable[T]) -> Iterator[T]:
    """Trees of arrays, each given out once the next is under way: it gets to the host while the devices work on."""
    before = None
    for tree in trees:
        for x in jax.tree.leaves(processes.in_turn(tree)):
            x.copy_to_host_async()
        if before is not None:
            yield before
        before = tree
    if before is not None:
        yield before


def laid_out(boxed: Any, shardings: Any) -> Any:
    """The shapes of a tree of arrays or shapes, out of their boxes, each with where `shardings` say that it lies."""

    def shape(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(shape, meta.unbox(boxed), shardings)


def make_layout(config: MeshConfig, devices: Any = None) -> Layout:
    """The Layout of `config` on all devices of all processes, or on the given ones.

    Raises ValueError when the axes do not multiply to the number of devices, or when processes would hold parts of a
    batch that overlap without being the same.
    """
    chosen = list(jax.devices() if devices is None else devices)
    rest = config.fsdp * config.tensor
    data = len(chosen) // rest if config.data == -1 else config.data
    if data * rest != len(chosen):
        raise ValueError(
            f"mesh.data {config.data}, mesh.fsdp {config.fsdp} and mesh.tensor {config.tensor} do not make the "
            f"{len(chosen)} devices that are here"
        )
    # make_mesh itself splits no axis of a TPU's torus in two but on v5e, and raises where a small axis needs it.
    placed = create_device_mesh((data, config.fsdp, config.tensor), chosen, allow_split_physical_axes=True)
    mesh = Mesh(placed, AXES, (AxisType.Auto,) * len(AXES))
    rules = tuple((name, tuple(axes)) for name, axes in vars(config.rules).items())
    for name, axes in rules:
        if len(set(axes)) < len(axes):
            raise ValueError(f"mesh.rules.{name} is {axes}; it names an axis twice")
    layout = Layout(mesh, rules)
    reader_groups(layout)
    return layout


def reader_groups(layout: Layout) -> list[list[int]]:
    """Processes by the part of a batch they hold; those of a group hold the same, and groups hold equal parts.

    More than one process in a group means that the tensor axis runs across processes. Raises ValueError for a mesh on
    which parts overlap or differ in size, since each would be read by nobody knows whom.
    """
    size = layout.batch_shards
    held: dict[int, set[int]] = {}
    for device, index in layout.batch.devices_indices_map((size,)).items():
        held.setdefault(device.process_index, set()).update(np.arange(size)[index or slice(None)].tolist())
    groups: dict[tuple[int, ...], list[int]] = {}
    for process, rows in sorted(held.items()):
        groups.setdefault(tuple(sorted(rows)), []).append(process)
    if sum(map(len, groups)) != size or len({len(rows) for rows in groups}) != 1:
        raise ValueError(
            f"on a mesh of {dict(layout.mesh.shape)} processes would hold overlapping parts of a batch; choose "
            "mesh.tensor so that it divides, or is a multiple of, the devices of one process"
        )
    return list(groups.values())
