"""A run and its folder: train with a progress bar, stop and resume, measure, draw, say where things are."""

import dataclasses
import hashlib
import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from tvm_ref.command_line import Interruption, write_atomically
from tvm_ref.flow_map import FlowMap
from tvm_ref.objectives import OBJECTIVES, TERMS, FlowMatching
from tvm_ref.toy import plots
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.distributions import load_points, make_distribution
from tvm_ref.toy.metrics import NFES, evaluate, make_reference, table
from tvm_ref.toy.mixture import GaussianMixture
from tvm_ref.toy.snapshots import add_snapshot, load_snapshots, snapshot_steps
from tvm_ref.toy.training import Training, draw_block

LOG_EVERY = 50  # steps per line of train.jsonl, and between updates of the progress bar
SAVE_EVERY = 2000  # steps per checkpoint


def distribution_of(config: ToyConfig) -> GaussianMixture:
    """The distribution that a configuration names.

    Raises:
        ValueError, OSError: points that cannot be used, or classes asked of data without.
    """
    distribution = (
        make_distribution(config.dist) if config.data is None else load_points(Path(config.data), config.bandwidth)
    )
    if config.conditional and not distribution.num_classes:
        raise ValueError(
            f"--conditional needs classes, and {config.dist} has none (moons, circles, eight_gaussians do)"
        )
    return distribution


def fingerprint(distribution: GaussianMixture) -> str:
    """A hash of a distribution, so that a run is not continued on other data."""
    parts = (distribution.centres, distribution.log_weights, torch.tensor(distribution.sigma, dtype=torch.float64))
    return hashlib.sha256(b"".join(a.numpy().tobytes() for a in parts)).hexdigest()


class Run:
    """A run folder.

    Args:
        folder: where everything goes.
        config: what to do; stored as config.json.
        started: when the program began, in seconds since the epoch; for seconds.total.
    """

    def __init__(self, folder: Path, config: ToyConfig, started: float):
        self.folder = folder
        self.config = config
        self.started = started
        self.distribution = distribution_of(config)
        self.training = Training(config, self.distribution)
        self.log: list[dict[str, float]] = []
        self._before = 0.0  # seconds of training before this program started

    def path(self, name: str) -> Path:
        """A file of the folder."""
        return self.folder / name

    # Folder and state -------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the folder, with config.json in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path("config.json"), json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
        write_atomically(self.path("train.jsonl"), "")

    def save(self, sums: torch.Tensor) -> None:
        """Write checkpoint.pt; `sums` are the losses since the last line of the log."""
        partial = self.path("checkpoint.pt.partial")
        torch.save(self.training.state_dict() | {"sums": sums, "data": fingerprint(self.distribution)}, partial)
        os.replace(partial, self.path("checkpoint.pt"))

    def load(self) -> torch.Tensor:
        """Read checkpoint.pt, drop what the log has beyond it, and return the losses since the log's last line.

        Raises:
            ValueError: a checkpoint that is damaged, unreadable, or of another network or other data; a damaged log or
                file of snapshots.
        """
        try:
            state = torch.load(self.path("checkpoint.pt"), weights_only=True)
            self.training.load_state_dict(state)
            sums, data = state["sums"], state["data"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, OSError) as error:
            reason = str(error).splitlines()[0] if isinstance(error, RuntimeError | OSError) else "it is damaged"
            raise ValueError(f"{self.path('checkpoint.pt')} cannot be used: {reason}") from None
        if data != fingerprint(self.distribution):
            raise ValueError(
                f"{self.folder} was trained on other points than {self.config.data or self.config.dist} has"
            )
        self._before = self.training.seconds
        load_snapshots(self.folder)  # refuses a damaged file now rather than in the middle of training
        try:
            text = self.path("train.jsonl").read_text() if self.path("train.jsonl").exists() else ""
            lines = [json.loads(line) for line in text.splitlines()]
            self.log = [line for line in lines if line["step"] <= self.training.step]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path('train.jsonl')} is damaged; without that file the log starts anew") from None
        write_atomically(self.path("train.jsonl"), "".join(json.dumps(line) + "\n" for line in self.log))
        return sums

    # Training ---------------------------------------------------------------------------------------------------

    def train(self, sums: torch.Tensor | None = None) -> bool:
        """Train to the end, or until interrupted; returns whether it came to the end. Saves either way.

        Raises:
            FloatingPointError: a loss that is NaN or infinite, with the step in its message. The last checkpoint stays.
        """
        training, sums = self.training, torch.zeros(2) if sums is None else sums
        before, begun = training.seconds, time.perf_counter()
        keep = snapshot_steps(self.config.steps)
        bar = tqdm(
            total=self.config.steps,
            initial=training.step,
            unit="step",
            desc="training",
            file=sys.stdout,
            mininterval=0.5,
        )
        with Interruption() as interruption, self.path("train.jsonl").open("a") as log, bar:
            while training.step < self.config.steps and not interruption.requested:
                if training.step in keep:
                    add_snapshot(self.folder, training.step, training.ema.module.network)
                try:
                    sums += training.train_step()
                except FloatingPointError as error:
                    raise FloatingPointError(f"step {training.step}: {error}; a smaller --lr may help") from None
                training.seconds = before + time.perf_counter() - begun
                if training.step % LOG_EVERY == 0:
                    terms = dict(zip(TERMS, (sums / LOG_EVERY).tolist(), strict=True))
                    line = {"step": training.step, **terms, "seconds": round(training.seconds, 3)}
                    self.log.append(line)
                    log.write(json.dumps(line) + "\n")
                    sums.zero_()
                    bar.set_postfix({name: f"{value:.4f}" for name, value in terms.items()}, refresh=False)
                    bar.update(LOG_EVERY)
                if training.step % SAVE_EVERY == 0:
                    log.flush()
                    self.save(sums)
            bar.update(training.step - bar.n)
        self.save(sums)
        return training.step == self.config.steps

    def least_flow_matching_loss(self) -> float:
        """The flow-matching loss of the exact velocity, on the data of training's first steps."""
        exact = FlowMatching(self.distribution, null_label=self.training.objective.null_label)
        config = dataclasses.replace(self.config, device="cpu")
        losses = [
            exact(batch.x0, batch.x1, batch.times, batch.condition, self.distribution).flow_matching
            for batch in draw_block(config, self.distribution, 0)
        ]
        return float(torch.cat(losses).mean())

    # Results ----------------------------------------------------------------------------------------------------

    def report(self, points: int) -> dict[str, Any]:
        """Measure and draw; write model.safetensors, metrics.json and the pictures; return the metrics."""
        print("measuring and drawing")
        config, jump = self.config, self.training.evaluated
        weights = {name: a.cpu().contiguous() for name, a in self.training.ema.module.network.state_dict().items()}
        save_file(weights, self.path("model.safetensors"))
        reference = make_reference(
            self.distribution, guidance=config.guidance if config.conditional else None, points=points
        )
        nfe = {n: evaluate(jump, reference, n) for n in NFES}
        one_jump = OBJECTIVES[config.objective].learns_jumps
        figures = {
            "samples.png": plots.plot_samples(self.distribution, jump, reference),
            "trajectories.png": plots.plot_trajectories(self.distribution, jump, reference, one_jump=one_jump),
            "map.png": plots.plot_map(self.distribution, jump, reference),
            "losses.png": plots.plot_losses(self.log, self.least_flow_matching_loss()),
        }
        for name, figure in figures.items():
            plots.save_figure(figure, self.path(name))
        metrics = {
            "nfe": {str(n): figures for n, figures in nfe.items()},
            "seconds": {
                "training": round(self.training.seconds, 2),
                "total": round(time.time() - self.started + self._before, 2),
            },
            "steps": {"done": self.training.step, "planned": config.steps},
            "points": points,
        }
        write_atomically(self.path("metrics.json"), json.dumps(metrics, indent=2) + "\n")
        print(table(nfe))
        return metrics


def load_run(folder: Path) -> tuple[ToyConfig, GaussianMixture, FlowMap]:
    """Configuration, distribution and evaluation model of a run's folder.

    Raises:
        ValueError: a folder that is no run, one that has written no model, or a damaged one.
        OSError: files that cannot be read.
    """
    config = read_config(folder)
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} holds no model yet; finish it with --resume")
    distribution = distribution_of(config)
    model = Training(config, distribution).model
    try:
        model.network.load_state_dict(load_file(folder / "model.safetensors"))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} is damaged: {str(error).splitlines()[0]}") from None
    return config, distribution, model.requires_grad_(False)


def read_config(folder: Path) -> ToyConfig:
    """The configuration stored in a run's folder.

    Raises:
        ValueError: no run there, or a config.json with unknown or missing keys.
    """
    try:
        stored = json.loads((folder / "config.json").read_text())
        return ToyConfig(**stored)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no run (no config.json)") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is not a configuration of this program: {error}") from None
