"""A run: a training and the folder that keeps it.

    config.json            the configuration
    data.json              what it is trained on (provenance.py)
    train.jsonl            a line per --log-every steps (training_log.py)
    samples/               grids while training
    snapshots/             evaluation weights of every --snapshot-every steps, all kept (report.py)
    checkpoints/           the newest states (checkpoints.py)
    weights.safetensors    evaluation weights, once training is done (report.py, as all below)
    samples-1.png, -4.png  one-step and four-step samples
    metrics.json           seconds, and for digits how good they are, by number of function evaluations

Everything is written by the first process.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from imagenet import checkpoints
from imagenet.presets import RESUMABLE, Config
from imagenet.provenance import Provenance
from imagenet.training import Training
from imagenet.training_log import Log
from tvm_ref.command_line import flag, write_atomically


def stored_config(folder: Path, given: dict[str, Any]) -> Config:
    """Read the configuration of the run in a folder, with what of `given` may change when it is resumed.

    Raises:
        ValueError: no run there, or a given option that would make it another run.
    """
    stored = checkpoints.read_config(folder)
    if "steps" in given:
        _check_steps(folder, stored, given["steps"])
        stored = replace(stored, steps=given["steps"])
    for name, value in given.items():
        if name not in RESUMABLE and getattr(stored, name) != value:
            raise ValueError(f"--resume keeps a run's options: {folder} has {flag(name)} {getattr(stored, name)}")
    return Config(**{**json.loads(stored.to_json()), **{k: v for k, v in given.items() if k in RESUMABLE}})


def _check_steps(folder: Path, stored: Config, steps: int) -> None:
    """Raise ValueError unless a run may go on to `steps`: to more under a constant learning rate, else to its own."""
    if steps != stored.steps and stored.schedule != "constant":
        reason = f"its --schedule {stored.schedule} was shaped by them"
        raise ValueError(f"--resume keeps a run's options: {folder} has --steps {stored.steps}, as {reason}")
    if steps < stored.steps:
        raise ValueError(f"--resume can raise a run's --steps, not lower them: {folder} has --steps {stored.steps}")


def saved_nothing(folder: Path) -> bool:
    """Tell whether a run's folder holds nothing to go on from, as after a failure in its first step."""
    kept = (*checkpoints.checkpoints(folder / "checkpoints"), *(folder / "snapshots").glob("*.safetensors"))
    return not kept and not (folder / checkpoints.WEIGHTS).exists()


class Run:
    """A training and its folder.

    Args:
        folder: where everything goes.
        training: the training.
        keep: how many checkpoints.
        provenance: what it is trained on.
    """

    def __init__(self, folder: Path, training: Training, keep: int, provenance: Provenance):
        self.folder, self.training, self.keep, self.provenance = folder, training, keep, provenance
        self.world = training.world
        self.log = Log(folder, training)

    @property
    def checkpoints(self) -> Path:
        """The folder of states."""
        return self.folder / "checkpoints"

    def snapshot(self, step: int) -> Path:
        """Name the file of the evaluation weights of a step."""
        return self.folder / "snapshots" / f"{step:08d}.safetensors"

    def create(self) -> None:
        """Make the folder, and write the configuration; weights of a run that now goes on further become a snapshot."""
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = self.folder / checkpoints.WEIGHTS
        if weights.is_file() and (steps := checkpoints.read_config(self.folder).steps) < self.training.config.steps:
            self.snapshot(steps).parent.mkdir(exist_ok=True)
            os.replace(weights, self.snapshot(steps))
        if self.training.step == 0:  # of a run that failed before it saved
            shutil.rmtree(self.folder / "samples", ignore_errors=True)
        write_atomically(self.folder / checkpoints.DATA, self.provenance.to_json() + "\n")
        write_atomically(self.folder / checkpoints.CONFIG, self.training.config.to_json() + "\n")

    def start(self) -> None:
        """Start from the newest undamaged checkpoint if there is one, else from --init or from new weights.

        Raises:
            ValueError: see load; weights that do not fit.
        """
        config = self.training.config
        if self.load() or config.init is None:
            return
        weights = self.world.on_first(lambda: checkpoints.load_initial(config))
        self.training.load_initial(checkpoints.load_initial(config) if weights is None else weights)

    def load(self) -> bool:
        """Restore the newest undamaged checkpoint; returns whether there is one.

        Raises:
            ValueError: no undamaged checkpoint is left, or it does not fit.
        """
        found = self.world.broadcast(self.world.on_first(lambda: checkpoints.find_checkpoint(self.checkpoints)))
        path, complaints = found
        for complaint in complaints if self.world.first else ():
            print(f"{complaint}: going on from {path}", file=sys.stderr, flush=True)
        if path is None:
            return False
        state = checkpoints.read_checkpoint(path)
        try:
            self.training.load_state_dict(state)
            self.log.load_state_dict(state)
        except (RuntimeError, KeyError, ValueError) as fault:
            raise ValueError(f"{path} does not fit its run: {str(fault).splitlines()[0]}") from None
        return True

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            OSError: in every process, if it could not be written; older checkpoints are untouched.
        """
        state: dict[str, Any] = {}
        if self.training.config.parallel == "fsdp" or self.world.first:  # sharded weights are gathered from all
            state = self.training.state_dict() | self.log.state_dict()
        step = self.training.step
        self.world.on_first(lambda: checkpoints.save_checkpoint(self.checkpoints, state, step, self.keep))
