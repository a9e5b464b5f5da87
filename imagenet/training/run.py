"""A run: a training and the folder that keeps it.

    config.json            the configuration
    data.json              what it is trained on (provenance.py)
    train.jsonl            a line per --log-every steps (log.py)
    evaluations.jsonl      a line per --evaluate-every steps (evaluation.py)
    samples/               grids while training
    snapshots/             evaluation weights of every --snapshot-every steps, all kept (report.py)
    checkpoints/           the newest states (checkpoint.py)
    weights.safetensors    evaluation weights, once training is done (report.py, as all below)
    samples-1.png, -4.png  one-step and four-step samples
    metrics.json           seconds, and for digits how good they are, by number of function evaluations

Everything is written by the first process.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from imagenet.config import RESUMABLE, Config
from imagenet.data.provenance import Provenance
from imagenet.metrics.fid import Judge
from imagenet.sampler import Generator
from imagenet.training import checkpoint, log
from imagenet.training.log import Log
from imagenet.training.step import Training
from tvm_ref import OBJECTIVES
from tvm_ref.cli.errors import UserError
from tvm_ref.cli.files import write_atomically
from tvm_ref.cli.options import flag

EVALUATIONS = "evaluations.jsonl"


def stored_config(folder: Path, given: dict[str, Any]) -> Config:
    """Read the configuration of the run in a folder, with what of `given` may change when it is resumed.

    Raises:
        ValueError: no run there, or a given option that would make it another run.
    """
    stored = checkpoint.read_config(folder)
    if "steps" in given:
        _check_steps(folder, stored, given["steps"])
        stored = replace(stored, steps=given["steps"])
    for name, value in given.items():
        if name not in RESUMABLE and getattr(stored, name) != value:
            raise UserError(f"--resume keeps a run's options: {folder} has {flag(name)} {getattr(stored, name)}")
    return Config(**{**json.loads(stored.to_json()), **{k: v for k, v in given.items() if k in RESUMABLE}})


def _check_steps(folder: Path, stored: Config, steps: int) -> None:
    """Raise ValueError unless a run may go on to `steps`: to its own, or to more where nothing was shaped by them."""
    shaped = [f"--schedule {stored.schedule}"] * (stored.schedule != "constant")
    shaped += [f"--objective {stored.objective}"] * OBJECTIVES[stored.objective].has_curriculum
    if steps != stored.steps and shaped:
        reason = f"its {shaped[0]} was shaped by them"
        raise UserError(f"--resume keeps a run's options: {folder} has --steps {stored.steps}, as {reason}")
    if steps < stored.steps:
        raise UserError(f"--resume can raise a run's --steps, not lower them: {folder} has --steps {stored.steps}")


def saved_nothing(folder: Path) -> bool:
    """Tell whether a run's folder holds nothing to go on from, as after a failure in its first step."""
    kept = (*checkpoint.checkpoints(folder / "checkpoints"), *(folder / "snapshots").glob("*.safetensors"))
    return not kept and not (folder / checkpoint.WEIGHTS).exists()


class Run:
    """A training and its folder.

    Args:
        folder: where everything goes.
        training: the training.
        keep: how many checkpoints.
        provenance: what it is trained on.
        vae: the autoencoder of latents, on the device; None shows latents as they are.
        judge: measures the evaluation weights while training.
        wandb: project of Weights & Biases to log to as well.
    """

    def __init__(
        self,
        folder: Path,
        training: Training,
        keep: int,
        provenance: Provenance,
        *,
        vae: nn.Module | None = None,
        judge: Judge | None = None,
        wandb: str | None = None,
    ):
        self.folder, self.training, self.provenance = folder, training, provenance
        self.world = training.world
        self.vae, self.judge = vae, judge
        self.log = Log(folder, training, wandb)
        self.saver = checkpoint.Saver(self.checkpoints, keep, self.world)

    @property
    def checkpoints(self) -> Path:
        """The folder of states."""
        return self.folder / "checkpoints"

    def generator(self) -> Generator:
        """Return the sampler of the evaluation weights, as sample.py has it by default."""
        generator = self.training.generator()
        return (
            generator
            if self.vae is None
            else replace(generator, vae=self.vae, normalisation=self.provenance.normalisation)
        )

    def evaluate(self, steps: Sequence[int]) -> None:
        """Measure the evaluation weights at some numbers of steps; all processes take part, the first one writes."""
        assert self.judge is not None
        figures = {str(n): self.judge(self.generator(), n, self.world) for n in steps}
        if self.world.first:
            line = {"step": self.training.step, "nfe": figures}
            with (self.folder / EVALUATIONS).open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.log.show({f"{name}, {n} NFE": value for n, row in figures.items() for name, value in row.items()})

    def snapshot(self, step: int) -> Path:
        """Name the file of the evaluation weights of a step."""
        return self.folder / "snapshots" / f"{step:08d}.safetensors"

    def create(self) -> None:
        """Make the folder, and write the configuration; weights of a run that now goes on further become a snapshot."""
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = sorted(self.folder.glob(checkpoint.ALL_WEIGHTS))
        if weights and (steps := checkpoint.read_config(self.folder).steps) < self.training.config.steps:
            self.snapshot(steps).parent.mkdir(exist_ok=True)
            for path in weights:
                os.replace(path, self.snapshot(steps).with_stem(path.stem.replace("weights", f"{steps:08d}")))
        if self.training.step == 0:  # of a run that failed before it saved
            shutil.rmtree(self.folder / "samples", ignore_errors=True)
        log.keep_lines(self.folder / EVALUATIONS, self.training.step)
        write_atomically(self.folder / checkpoint.DATA, self.provenance.to_json() + "\n")
        write_atomically(self.folder / checkpoint.CONFIG, self.training.config.to_json() + "\n")

    def start(self) -> None:
        """Start from the newest undamaged checkpoint if there is one, else from --init or from new weights.

        Raises:
            ValueError: see load; weights that do not fit.
        """
        config = self.training.config
        if self.load() or config.init is None:
            return
        weights = self.world.on_first(lambda: checkpoint.load_initial(config))
        self.training.load_initial(checkpoint.load_initial(config) if weights is None else weights)

    def load(self) -> bool:
        """Restore the newest undamaged checkpoint; returns whether there is one.

        Raises:
            ValueError: no undamaged checkpoint is left, or it does not fit.
        """
        found = self.world.broadcast(self.world.on_first(lambda: checkpoint.find_checkpoint(self.checkpoints)))
        path, complaints = found
        for complaint in complaints if self.world.first else ():
            print(f"{complaint}: going on from {path}", file=sys.stderr, flush=True)
        if path is None:
            return False
        state = checkpoint.read_checkpoint(path, self.training.place)
        try:
            self.training.load_state_dict(state)
            self.log.load_state_dict(state)
        except (RuntimeError, KeyError, ValueError) as fault:
            raise UserError(f"{path} does not fit its run: {str(fault).splitlines()[0]}") from None
        return True

    def save(self) -> None:
        """Start to write a checkpoint, once the one before is written.

        Raises:
            OSError: in every process, if the one before could not be written; older checkpoints are untouched.
        """
        self.saver.save(self.training.state_dict() | self.log.state_dict(), self.training.step)
