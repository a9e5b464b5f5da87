"""The log of a run: train.jsonl."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from imagenet.data.batches import Batch
from imagenet.training.step import StepMetrics, Training, learning_rate
from tvm_ref.cli.files import write_atomically
from tvm_ref.objectives import TERMS


def peak_memory(device: torch.device) -> int:
    """Return the peak of the bytes allocated on a GPU, or the bytes that this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil  # slow to import, and --help does not need it

    return int(psutil.Process().memory_info().rss)


class Log:
    """Losses averaged between lines, and the time that training took. Only the first process writes.

    Args:
        folder: the run's folder.
        training: what is logged.
    """

    def __init__(self, folder: Path, training: Training):
        self.folder, self.training = folder, training
        self.seconds = 0.0  # of training, in all programs that worked on it
        self.before = 0.0  # the part of that before this program
        self._sums, self._summed = [0.0] * len(TERMS), 0  # losses since the last line, and the number of steps
        self._waited = 0.0  # seconds for data since the last line
        self._lines: Any = None

    def open(self) -> None:
        """Start the clock, and open train.jsonl without lines beyond the training's step, and without damaged ones."""
        self._first, self._started = self.training.step, time.perf_counter()
        self._last_line = self._first, self.seconds  # step and clock at the last line, or at the start
        if not self.training.world.first:
            return
        path = self.folder / "train.jsonl"
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        write_atomically(path, "".join(line for line in lines if _step_of(line) <= self._first))
        self._lines = path.open("a")

    def close(self) -> None:
        """Close what `open` opened."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Iterate over batches, and add up how long each was waited for."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def note(self, metrics: StepMetrics) -> None:
        """Add a step's losses to the means of the next line, and read the clock."""
        self._sums = [a + b for a, b in zip(self._sums, metrics.losses, strict=True)]
        self._summed += 1
        self.seconds = self.before + time.perf_counter() - self._started

    def write(self, metrics: StepMetrics) -> dict[str, float]:
        """Write a line about the steps since the last one, and return it: mean losses, speed, time waited for data."""
        config, step, device = self.training.config, self.training.step, self.training.world.device
        steps, seconds = step - self._last_line[0], self.seconds - self._last_line[1]
        speed = steps * config.batch_size / seconds
        line = {
            "step": step,
            **{name: a / self._summed for name, a in zip(TERMS, self._sums, strict=True)},
            "gradient_norm": metrics.gradient_norm,
            "lr": learning_rate(config, step - 1),
            "images_per_second": float(f"{speed:.4g}"),
            "data_wait": round(self._waited / seconds, 3),
            "gib": round(peak_memory(device) / 2**30, 3),
            "seconds": round(self.seconds, 3),
        }
        self._sums, self._summed = [0.0] * len(TERMS), 0
        self._last_line, self._waited = (step, self.seconds), 0.0
        if self._lines is not None:
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
        return line

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint needs, so that the next line is the same."""
        return {"seconds": self.seconds, "sums": self._sums, "summed": self._summed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        self.seconds = self.before = state["seconds"]
        self._sums, self._summed = state["sums"], state["summed"]


def _step_of(line: str) -> float:
    """Return the step of a line of train.jsonl; infinity if it is damaged, or cut."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf
