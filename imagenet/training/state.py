"""Nested states in a folder, by torch.distributed.checkpoint (DCP): each process writes its part of the tensors.

    __0_0.distcp, __1_0.distcp, ...    tensors, a file per process
    .metadata                          where each tensor lies

Reading executes nothing. Tensors are read with weights_only=True. DCP unpickles .metadata without restriction; here an
Unpickler reads it that knows only the classes that DCP stores there. BytesStorageMetadata is not among them: DCP would
unpickle what it refers to.
"""

import contextlib
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.logger import _dcp_logger
from torch.distributed.checkpoint.metadata import Metadata

from imagenet.model.distributed import World
from tvm_ref.cli.errors import UserError, first_line

ALONE = "torch.distributed is disabled"  # start of a harmless warning in a single process
PLAN = {"flatten_state_dict": False, "flatten_sharded_tensors": False}  # states arrive flat
METADATA = "ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata"
KNOWN = {
    **dict.fromkeys((*METADATA.split(), "_MEM_FORMAT_ENCODING"), "torch.distributed.checkpoint.metadata"),
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
    "_get_layout": "torch.serialization",
    "Size": "torch",
    "PosixPath": "pathlib",
    "WindowsPath": "pathlib",
}

Slot = Callable[[str, torch.Size, torch.dtype], Tensor]  # name, shape, dtype to the tensor that an entry is read into


def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take the tensors out of a nested state: returns the rest, which JSON can hold, and the tensors by path."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            tensors["/".join(path)] = value.detach()
            # matmuls of SOAP's transposed matrices round differently if they come back contiguous
            stride = {} if value.is_contiguous() else {"stride": value.stride()}
            return {"tensor": "/".join(path), **stride}
        if isinstance(value, Mapping):
            return {"dict": [[key, walk(item, (*path, str(key)))] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"list": [walk(item, (*path, str(i))) for i, item in enumerate(value)]}
        return value

    return walk(state, ()), tensors


def unflatten(rest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put tensors back where flatten took them."""
    if not isinstance(rest, dict):
        return rest
    if "tensor" in rest:
        a = tensors[rest["tensor"]]
        return torch.empty_strided(a.shape, rest["stride"], dtype=a.dtype).copy_(a) if "stride" in rest else a
    if "list" in rest:
        return [unflatten(item, tensors) for item in rest["list"]]
    return {key: unflatten(item, tensors) for key, item in rest["dict"]}


def part_of_rank(tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """Return the part that a process writes: its shards, and about 1 / size of the tensors that all processes have.

    DCP would also write each tensor once, but copy all of them in every process first.
    """
    mine, bytes_of = {}, [0] * size
    for name in sorted(tensors, key=lambda name: -tensors[name].nbytes):
        owner = bytes_of.index(min(bytes_of))
        if hasattr(tensors[name], "full_tensor"):
            mine[name] = tensors[name]
        else:
            bytes_of[owner] += tensors[name].nbytes
            if owner == rank:
                mine[name] = tensors[name]
    return mine


class _Writer(filesystem.FileSystemWriter):
    """Writes tensors into a folder; the first process then calls `finish`, once all have written."""

    def __init__(self, path: Path, finish: Callable[[], None]):
        super().__init__(path)
        self._finish = finish

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this process's file."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch.save hides the disk's error
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Write .metadata and end; called only in rank 0."""
        super().finish(metadata, results)
        self._finish()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], finish: Callable[[], None], world: World, *, asynchronous: bool
) -> Any:
    """Write tensors into the folder `path`. All processes take part.

    Args:
        path: a folder that does not exist yet.
        tensors: by name, maybe sharded; the same names in all processes.
        finish: called in the first process once all have written.
        world: the processes.
        asynchronous: copy this process's part to host memory, and return while a thread writes it; else nothing is
            copied.

    Returns:
        a concurrent.futures.Future of the writing if asynchronous, else None. An exception in any process becomes a
        dcp.CheckpointException in all of them.
    """
    _quiet()
    save = dcp.async_save if asynchronous else dcp.save
    future = save(
        cast("dict[str, Any]", part_of_rank(tensors, world.rank, world.size)),
        storage_writer=_Writer(path, finish),
        planner=dcp.DefaultSavePlanner(**PLAN),
        process_group=world.saving,
        no_dist=not distributed.is_initialized(),
    )
    return future if asynchronous else None


def cause_of(error: BaseException) -> BaseException:
    """Return the error of the first process that failed."""
    if isinstance(error, dcp.CheckpointException):
        return next((cause for cause, _ in error.failures.values()), error)
    return error


class _Unpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata and data types; refuses any other name."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class of a name."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if KNOWN.get(name) != module.replace("pathlib._local", "pathlib"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}"[:80])
        return super().find_class(module, name)


class _Reader(filesystem.FileSystemReader):
    """Reads .metadata by the Unpickler above."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the metadata."""
        with (Path(self.path) / ".metadata").open("rb") as stream:
            return cast("Metadata", _Unpickler(stream).load())


def on_cpu(_: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Allocate a slot on the CPU."""
    return torch.empty(size, dtype=dtype)


def read_tensors(path: Path, slot: Slot = on_cpu) -> dict[str, Tensor]:
    """Read the tensors of a folder into slots; a sharded slot reads its own shard only.

    Raises:
        UserError: a damaged file.
    """
    _quiet()
    reader = _Reader(path)
    with _damage(path):
        known = reader.read_metadata().state_dict_metadata
    tensors = {name: slot(name, a.size, a.properties.dtype) for name, a in known.items()}  # type: ignore[union-attr]
    with _damage(path):
        plan = dcp.DefaultLoadPlanner(**PLAN)
        dcp.load(cast("dict[str, Any]", tensors), storage_reader=reader, planner=plan, no_dist=True)
    return tensors


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Raise UserError for whatever goes wrong: a damaged file can break a reader anywhere."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:
        cause = cause_of(error)
        if not isinstance(cause, Exception):
            raise cause from None
        raise UserError(f"{path} is damaged ({type(cause).__name__}: {first_line(cause)})") from error


def _quiet() -> None:
    """Silence DCP's warnings about every state."""
    _dcp_logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ALONE)  # not in a context: the thread that writes outlives it
