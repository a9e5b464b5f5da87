"""A run's folder: what it holds, how it is made and resumed, what is logged and drawn while training.

    config.json            the configuration
    train.jsonl            a line per --log-every steps
    samples/               grids while training
    checkpoints/           the newest states
    weights.safetensors    evaluation weights, once training is done
    samples-1.png, -4.png  one-step and four-step samples, once training is done
    metrics.json           seconds, and for digits how good they are, by number of function evaluations

Everything is written by the first process.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from imagenet import checkpoints
from imagenet.data import Data
from imagenet.parallel import World
from imagenet.pictures import save_grid
from imagenet.presets import RESUMABLE, Config
from imagenet.training import Step, Training, learning_rate
from tvm_ref import Condition, sample
from tvm_ref.command_line import flag, write_atomically
from tvm_ref.objectives import TERMS

COLUMNS, ROWS = 10, 8  # of a grid: a class per column
NFES = (1, 4)  # numbers of steps that are drawn and judged at the end
SAMPLE_SEED = 2**41  # of the noise that samples start from: apart from training's


def stored_config(folder: Path, given: dict[str, Any]) -> Config:
    """The configuration of the run in a folder, with what of `given` may change when it is resumed.

    Raises:
        ValueError: no run there, or a given option that would make it another run.
    """
    stored = checkpoints.read_config(folder)
    for name, value in given.items():
        if name not in RESUMABLE and getattr(stored, name) != value:
            raise ValueError(f"--resume keeps a run's options: {folder} has {flag(name)} {getattr(stored, name)}")
    return Config(**{**json.loads(stored.to_json()), **{k: v for k, v in given.items() if k in RESUMABLE}})


def check_new(folder: Path) -> None:
    """Raise ValueError unless a folder is free for a new run."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder")
    if (folder / checkpoints.CONFIG).exists():
        raise ValueError(f"{folder} already holds a run: --resume, or another --out")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something that is no run: choose another --out")


class Run:
    """A training and its folder. Only the first process writes.

    Args:
        folder: where everything goes.
        training: what is trained.
        data: what on.
        keep: how many checkpoints.
    """

    def __init__(self, folder: Path, training: Training, data: Data, keep: int):
        self.folder, self.training, self.data, self.keep = folder, training, data, keep
        self.world: World = training.world
        self.seconds = 0.0  # of training, in all programs that worked on it
        self.before = 0.0  # what of that was before this program
        self.sums = [0.0] * len(TERMS)  # losses since the last line of the log,
        self.summed = 0  # and their number
        self._log: Any = None
        self._board: Any = None

    @property
    def checkpoints(self) -> Path:
        """Where states are kept."""
        return self.folder / "checkpoints"

    def create(self) -> None:
        """Make the folder, and write the configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / checkpoints.CONFIG, self.training.config.to_json() + "\n")

    def load(self) -> None:
        """Go on where the newest whole checkpoint is, or at the beginning if there is none.

        Raises:
            ValueError: no whole checkpoint is left, or it does not fit.
        """
        path, error = None, None
        complaints: list[str] = []
        if self.world.first:
            try:
                path, complaints = checkpoints.find_checkpoint(self.checkpoints)
            except ValueError as fault:
                error = fault
        self.world.agree(error)
        for complaint in complaints:
            print(f"{complaint}: going on from {path}", file=sys.stderr, flush=True)
        path = self.world.tell(path)
        if path is None:
            return
        state = checkpoints.read_checkpoint(path)
        try:
            self.training.load_state_dict(state)
            self.seconds, self.sums, self.summed = state["seconds"], state["sums"], state["summed"]
            self.before = self.seconds
        except (RuntimeError, KeyError, ValueError) as fault:
            raise ValueError(f"{path} does not fit its run: {str(fault).splitlines()[0]}") from None

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            OSError: in every process, if it could not be written; older checkpoints are whole.
        """
        step = self.training.step
        if self.training.config.parallel == "fsdp" or self.world.first:  # spread weights are gathered from all
            state = self.training.state_dict()
            state |= {"seconds": self.seconds, "sums": self.sums, "summed": self.summed}
        error = None
        if self.world.first:
            try:
                checkpoints.save_checkpoint(self.checkpoints, state, step, self.keep)
            except OSError as fault:
                error = fault
        self.world.agree(error)

    # The log --------------------------------------------------------------------------------------------------------

    def open_log(self) -> None:
        """Open train.jsonl, without the lines beyond the training's step, and TensorBoard's log if it is installed."""
        if not self.world.first:
            return
        path, step = self.folder / "train.jsonl", self.training.step
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomically(path, "".join(kept))
        self._log = path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def note(self, told: Step, seconds: float) -> None:
        """Remember a step's losses for the next line of the log, and how long training has taken."""
        self.sums = [a + b for a, b in zip(self.sums, told.losses, strict=True)]
        self.summed += 1
        self.seconds = seconds

    def log(self, told: Step, images_per_second: float) -> dict[str, float]:
        """Add a line to the log, with the mean losses since the last one; returns it."""
        cuda = self.world.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.world.device) if cuda else psutil.Process().memory_info().rss
        line = {
            "step": self.training.step,
            **{name: a / self.summed for name, a in zip(TERMS, self.sums, strict=True)},
            "gradient_norm": told.gradient_norm,
            "lr": learning_rate(self.training.config, self.training.step - 1),
            "images_per_second": round(images_per_second, 1),
            "gib": round(memory / 2**30, 3),
            "seconds": round(self.seconds, 3),
        }
        self.sums, self.summed = [0.0] * len(TERMS), 0
        if self._log is not None:
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        for name, value in line.items():
            if self._board is not None and name != "step":
                self._board.add_scalar(name, value, self.training.step)
        return line

    def close_log(self) -> None:
        """Close what open_log opened."""
        for log in (self._log, self._board):
            if log is not None:
                log.close()
        self._log = self._board = None

    # Samples --------------------------------------------------------------------------------------------------------

    def samples(self, labels: Tensor, nfe: int) -> Tensor:
        """Samples [N, C, H, W] of labels [N] in `nfe` steps, always from the same noise. All processes take part."""
        generator = torch.Generator().manual_seed(SAMPLE_SEED + self.training.config.seed)
        x1 = torch.randn(len(labels), *self.data.shape, generator=generator).to(self.world.device)
        labels = labels.to(self.world.device)
        condition = Condition(labels, torch.full_like(labels, 1 / self.training.config.w, dtype=torch.float32))
        with torch.autocast(x1.device.type, torch.bfloat16, enabled=self.training.config.precision == "bfloat16"):
            return sample(self.training.evaluated(), x1, nfe, condition)

    def draw(self, name: str, nfe: int) -> None:
        """Write a grid of samples; its columns are classes, spread evenly if there are many."""
        classes = self.training.config.classes
        labels = torch.linspace(0, classes - 1, min(COLUMNS, classes)).round().long()
        x = self.samples(labels.repeat(ROWS), nfe)
        if self.world.first:
            save_grid(self.folder / name, x, len(labels))

    def report(self, started: float) -> dict[str, Any]:
        """Write weights, grids and metrics.json of what there is; returns the metrics. All processes take part."""
        training, config = self.training, self.training.config
        for nfe in NFES:
            self.draw(f"samples-{nfe}.png", nfe)
        metrics: dict[str, Any] = {"nfe": self._judge()} if config.data == "digits" else {}
        metrics["seconds"] = {
            "training": round(self.seconds, 2),
            "total": round(time.time() - started + self.before, 2),
        }
        metrics["steps"] = {"done": training.step, "planned": config.steps}
        weights = training.ema.state_dict()["module"]
        if config.parallel == "fsdp":
            from imagenet.parallel import whole

            weights = whole(weights)
        if self.world.first:
            names = {name.removeprefix("network."): a for name, a in weights.items()}
            checkpoints.save_weights(self.folder / checkpoints.WEIGHTS, names, config)
            write_atomically(self.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        return metrics

    def _judge(self) -> dict[str, dict[str, float]]:
        """Figures of digits by number of steps."""
        from imagenet.digits import Judges

        judges = Judges()
        return {str(nfe): judges.judge(self.samples(judges.labels, nfe)) for nfe in NFES}
