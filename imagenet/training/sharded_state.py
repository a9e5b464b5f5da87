"""States on disk by torch.distributed.checkpoint: each process writes its part, while training goes on.

    __0_0.distcp, __1_0.distcp, ...    tensors, a file per process
    state.json                         all that is no tensor, and where each tensor lies
    checkpoint.json                    the step, and size and SHA-256 of every other file; written last

torch.distributed.checkpoint itself keeps the second in a pickle. Here nothing is pickled but tensors, which are read
with weights_only=True.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.logger import _dcp_logger
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from imagenet.training.disk import SUMMARY, flush_folder
from tvm_ref.cli.errors import UserError

ALONE = "torch.distributed is disabled"  # how a warning begins that says what is so: no other process takes part
STATE = "state.json"
_dcp_logger.setLevel(logging.WARNING)  # else it describes every tensor of every state

Place = Callable[[str, torch.Size, torch.dtype], Tensor]  # where a tensor is to be read to, by its name


# Nested states ------------------------------------------------------------------------------------------------------


def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take the tensors out of a nested state: returns what is left, as JSON has it, and the tensors by path."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            tensors["/".join(path)] = value.detach()
            return {"tensor": "/".join(path)}
        if isinstance(value, Mapping):
            return {"dict": [[key, walk(item, (*path, str(key)))] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"list": [walk(item, (*path, str(i))) for i, item in enumerate(value)]}
        return value

    return walk(state, ()), tensors


def unflatten(left: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put tensors back where flatten took them; of those that are not there, nothing is left."""
    if not isinstance(left, dict):
        return left
    if "tensor" in left:
        return tensors.get(left["tensor"])
    if "list" in left:
        return [unflatten(item, tensors) for item in left["list"]]
    return {key: unflatten(item, tensors) for key, item in left["dict"]}


def part_of_rank(tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """Return what a process writes: of sharded tensors its shards, of others, which all have, about 1 / size."""
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


# Writing ------------------------------------------------------------------------------------------------------------


class _HashingStream:
    """A file that computes size and SHA-256 of what is written to it, so that nothing is read again for them."""

    def __init__(self, stream: Any):
        self._stream, self._size, self._sha256 = stream, 0, hashlib.sha256()

    def write(self, content: Any) -> int:
        """Write bytes, after one another: torch.save never goes back."""
        self._sha256.update(content)
        self._size += memoryview(content).nbytes
        return self._stream.write(content)

    def summary(self) -> dict[str, Any]:
        """Return what checkpoint.json says of the file."""
        return {"bytes": self._size, "sha256": self._sha256.hexdigest()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # tell, flush, fileno, close


class _HashingFiles(filesystem.FileSystem):
    """Files of which size and hash are known once they are written: summaries, by name."""

    def __init__(self) -> None:
        self.summaries: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            hashing = _HashingStream(stream)
            yield hashing
        self.summaries[Path(path).name] = hashing.summary()


class _Writer(filesystem.FileSystemWriter):
    """Writes a state into a folder of its own; the first process then hands it to `commit`.

    Args:
        path: the folder.
        step: of the state.
        left: what of the state is no tensor.
        prepare: called by the first process before anything is written.
        commit: called by the first process once everything is.
    """

    def __init__(self, path: Path, step: int, left: Any, prepare: Callable[[], None], commit: Callable[[], None]):
        super().__init__(path)
        self.fs: Any = _HashingFiles()
        self._folder, self._step, self._left, self._prepare, self._commit = path, step, left, prepare, commit

    def prepare_local_plan(self, plan: Any) -> Any:
        """Leave it to the first process to make the folder."""
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        """Make the folder; only the first process is asked."""
        self._prepare()
        self._folder.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this process's file; the first one learns of its hash beside what it learns of its tensors."""
        try:
            results = super().write_data(plan, planner).value()
        except RuntimeError as error:  # torch.save hides what the disk said
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        done: Future[Any] = Future()
        done.set_result([*results, self.fs.summaries])
        return done

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Write what is no tensor, then the summary; only the first process is asked, when all have written."""
        files: dict[str, Any] = {}
        for *_, summaries in results:
            files |= summaries
        places = {item.index: item.storage_data for rank in results for item in rank[:-1]}
        self._write_json(STATE, {"state": self._left, "tensors": _index_of(metadata, places)})
        files |= self.fs.summaries
        self._write_json(SUMMARY, {"step": self._step, "torch": torch.__version__, "files": files})
        flush_folder(self._folder)
        self._commit()

    def _write_json(self, name: str, content: Any) -> None:
        """Write a file of JSON to the disk."""
        with self.fs.create_stream(self._folder / name, "wb") as stream:
            stream.write(json.dumps(content).encode())
            stream.flush()
            os.fsync(stream.fileno())


def _index_of(metadata: Metadata, places: Mapping[MetadataIndex, Any]) -> dict[str, Any]:
    """Say in JSON of every tensor its type and size, and of each part of it where it belongs and where it lies."""
    index = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        parts = []
        for chunk in tensor.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            parts.append([list(chunk.offsets), list(chunk.sizes), place.relative_path, place.offset, place.length])
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        index[name] = {"dtype": dtype, "size": list(tensor.size), "parts": parts}
    return index


def start_writing(
    path: Path,
    state: Any,
    step: int,
    *,
    prepare: Callable[[], None],
    commit: Callable[[], None],
    rank: int = 0,
    size: int = 1,
    group: Any = None,
) -> Any:
    """Copy this process's part of a state to host memory, and start to write it. All processes take part.

    Args:
        path: a folder that is not there yet.
        state: nested, of tensors, which may be sharded, and of what JSON has; the same in all processes.
        step: its step.
        prepare: see _Writer.
        commit: see _Writer.
        rank: this process.
        size: number of processes.
        group: of gloo, for nothing else meanwhile; None is the default group, if there is one.

    Returns:
        a concurrent.futures.Future of the writing; cause_of says what its exception means.
    """
    left, tensors = flatten(state)
    warnings.filterwarnings("ignore", ALONE)  # of the thread that writes: it outlives any context
    return dcp.async_save(
        cast("dict[str, Any]", part_of_rank(tensors, rank, size)),
        storage_writer=_Writer(path, step, left, prepare, commit),
        planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=group,
        no_dist=not distributed.is_initialized(),
    )


def write_one_file(path: Path, state: Any) -> None:
    """Write a state as one file, hashed, to the disk: what start_writing is compared with."""
    with _HashingFiles().create_stream(path, "wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())


def cause_of(error: BaseException) -> BaseException:
    """Return what went wrong in writing or reading, in the first process where something did."""
    if isinstance(error, dcp.api.CheckpointException):
        return next((cause for cause, _ in error.failures.values()), error)
    return error


# Reading ------------------------------------------------------------------------------------------------------------


class _Reader(filesystem.FileSystemReader):
    """Reads tensors by an index of JSON in place of DCP's pickle."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return where everything lies."""
        return self._metadata


def on_cpu(_: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Make a place on the CPU for a tensor."""
    return torch.empty(size, dtype=dtype)


def read_state(path: Path, place: Place = on_cpu, prefix: str = "") -> dict[str, Any]:
    """Read a state, or what of it begins with a prefix; sharded tensors are read shard by shard.

    Args:
        path: folder of the state.
        place: returns a tensor for each tensor to be read into, which may be sharded, or lie on a device.
        prefix: of the paths of tensors; others are None.

    Raises:
        ValueError: it cannot be read, or is not what it should be.
    """
    try:
        stored = json.loads((path / STATE).read_text())
        metadata = _metadata_of(stored["tensors"])
        known = {name: a for name, a in metadata.state_dict_metadata.items() if name.startswith(prefix)}
        tensors = {name: place(name, a.size, a.properties.dtype) for name, a in known.items()}  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ALONE)
            dcp.load(
                cast("dict[str, Any]", tensors),
                storage_reader=_Reader(path, metadata),
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,  # each process for itself: nothing has to be agreed on
            )
        return unflatten(stored["state"], tensors)
    except dcp.api.CheckpointException as error:
        reason = cause_of(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        reason = error
    raise UserError(f"{path} cannot be read: {(str(reason).splitlines() or [type(reason).__name__])[0]}")


def _metadata_of(index: Mapping[str, Any]) -> Metadata:
    """Read what _index_of wrote.

    Raises:
        ValueError: it says what cannot be.
    """
    tensors: dict[str, Any] = {}
    places = {}
    for name, about in index.items():
        dtype, size = getattr(torch, about["dtype"]), torch.Size(about["size"])
        chunks = []
        for i, (offsets, sizes, file, start, length) in enumerate(about["parts"]):
            if Path(file).name != file or length < math.prod(sizes) * dtype.itemsize:
                raise UserError(f"{STATE} is damaged")
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            places[MetadataIndex(name, offsets, i)] = filesystem._StorageInfo(file, start, length)
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
            raise UserError(f"{STATE} is damaged")
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype), size, chunks)
    return Metadata(tensors, storage_data=places)
