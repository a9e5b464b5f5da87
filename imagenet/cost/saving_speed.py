"""How fast the state of a training is saved, and how long training waits for it."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from imagenet.config import PRESETS, Config
from imagenet.cost.memory import state_bytes
from imagenet.distributed import World
from imagenet.model.dit import DiT
from imagenet.training.checkpoint import Saver

REPEATS = 3  # of each way
LARGEST = "imagenet256-w2"  # the preset whose state the paper's training saves


def state_like(config: Config, device: torch.device) -> dict[str, Any]:
    """Make a state of random numbers of the sizes that AdamW's has: weights, two averages, two moments."""
    with torch.device("meta"):
        shapes = {name: a.shape for name, a in DiT(config.network()).state_dict().items()}
    kinds = ("model", "target", "ema", "exp_avg", "exp_avg_sq")
    return {kind: {name: torch.rand(shape, device=device) for name, shape in shapes.items()} for kind in kinds}


def measure_saving(config: Config, folder: Path, world: World) -> dict[str, Any]:
    """Save a state into a new folder, in one file while training waits, and as training does; removes it again.

    Returns:
        bytes and processes; and for each way the seconds that training waits, and those until all is on the disk: the
        least of several.
    """
    state = state_like(config, world.device)
    if world.first:
        folder.mkdir(parents=True)
    world.barrier()
    times = [(at_once(state, folder / "state.pt", world), in_parts(state, folder, world)) for _ in range(REPEATS)]
    if world.first:
        shutil.rmtree(folder)
    ways = zip(("one file", "in parts"), zip(*times, strict=True), strict=True)
    return {
        "bytes": sum(a.nbytes for part in state.values() for a in part.values()),
        "processes": world.size,
        "ways": {name: {"waits": min(t)[0], "seconds": min(a[1] for a in t)} for name, t in ways},
    }


def at_once(state: dict[str, Any], path: Path, world: World) -> tuple[float, float]:
    """Write one file by the first process while all wait; returns the seconds, twice."""
    from imagenet.training.sharded_state import write_one_file

    started = time.perf_counter()
    if world.first:
        write_one_file(path, state)
    world.barrier()
    return (time.perf_counter() - started,) * 2


def in_parts(state: dict[str, Any], folder: Path, world: World) -> tuple[float, float]:
    """Write a checkpoint as training does; returns the seconds that it waits, and those until all is on the disk."""
    world.barrier()
    saver, started = Saver(folder, 1, world), time.perf_counter()
    saver.save(state, 1)
    waited = time.perf_counter() - started
    saver.wait()
    world.barrier()
    return waited, time.perf_counter() - started


def saving_table(report: dict[str, Any]) -> str:
    """Format what measure_saving returns, and what it means for the largest preset."""
    size, ways = report["bytes"] / 1e9, report["ways"]
    lines = [f"a state of {size:.3g} GB; processes: {report['processes']}"]
    lines.append(f"{'training waits':>25}{'on disk':>11}{'GB/s':>8}")
    for name, way in ways.items():
        lines.append(f"{name:<12}{way['waits']:>11.2f} s{way['seconds']:>9.2f} s{size / way['seconds']:>8.2f}")
    largest = state_bytes(PRESETS[LARGEST]) / 1e9
    seconds = largest * ways["in parts"]["seconds"] / size
    lines.append(f"at that rate the {largest:.3g} GB of {LARGEST} take {seconds:.0f} s, SIGTERM to exit, plus one step")
    return "\n".join(lines)
