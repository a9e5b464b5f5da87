"""Processes that tests start: whatever happens to one, nobody waits for it longer than some minutes.

python -m tests.processes MODULE.FUNCTION STORE ARGUMENTS ...     # function(rank, *arguments) in two of one group
"""

import contextlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
LIMIT = 800  # seconds, less than pytest waits for a test: pyproject.toml's faulthandler_timeout
PATIENCE = timedelta(minutes=2)  # of one process with another


@contextlib.contextmanager
def started(*arguments: object, cwd: Path = ROOT, **environment: str) -> Iterator[subprocess.Popen]:
    """Start Python, by default in the checkout, with kernels that are not interpreted unless the environment says so.

    Whatever happens, nothing that it started is left at the end.
    """
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=inherited | environment, cwd=cwd,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:  # a torchrun's processes have sessions of their own
            for member in (*psutil.Process(process.pid).children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        process.communicate(timeout=60)


def python(*arguments: object, limit: float = LIMIT, **options: Any) -> subprocess.CompletedProcess:
    """Run Python; see started."""
    with started(*arguments, **options) as process:
        out, error = process.communicate(timeout=limit)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def in_two_processes(function: str, store: Path, *arguments: str) -> None:
    """Call "module.function" with (rank, *arguments) in two processes, on the CPU with gloo; fail if it fails."""
    command = ["-W", "ignore", "-m", "tests.processes", function, str(store), *arguments]
    done = python(*command, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-2000:]


def _join(rank: int, function: Callable[..., None], store: str, arguments: list[str]) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=PATIENCE)
    torch.manual_seed(0)
    function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    name, store, *arguments = sys.argv[1:]
    # forked, so that PyTorch is imported once
    torch.multiprocessing.start_processes(
        _join, (pkgutil.resolve_name(name), store, arguments), nprocs=2, start_method="fork"
    )
