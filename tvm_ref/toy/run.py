"""A run and its folder: train with a progress bar, stop and resume, measure and draw.

config.json                     the options
train.jsonl                     a line per 50 steps, written as it goes
data.json, points.npy           of own points: scale, bandwidth, outliers; the points that were learned
checkpoint.pt                   what --resume goes on from
weights.safetensors             the evaluation weights, and the units of the data
snapshots.safetensors           what they were after 0, 1, 3, 10 and 30 % of the steps
metrics.json                    figures by number of function evaluations (NFE), seconds, steps
samples.csv                     of own points: samples in their units; samples-N.csv, by --sample
samples, trajectories, map, losses.png
"""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_of

from tvm_ref.cli.errors import UserError, first_line
from tvm_ref.cli.files import write_atomically
from tvm_ref.cli.progress import progress
from tvm_ref.cli.stopping import Interruption
from tvm_ref.flow_map import FlowMap
from tvm_ref.interpolant import interpolate
from tvm_ref.objectives import OBJECTIVES, TERMS, ResidualObjective
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.data.points import OwnPoints, load_points
from tvm_ref.toy.data.units import Units
from tvm_ref.toy.report.metrics import NFES, PARTS, evaluate, make_reference
from tvm_ref.toy.report.progress import Parts
from tvm_ref.toy.report.samples import EULER_STEPS, samples_table
from tvm_ref.toy.snapshots import SNAPSHOTS, add_snapshot, load_snapshots, snapshot_steps
from tvm_ref.toy.training import Training, draw_block, make_network

LOG_EVERY = 50  # steps per line of train.jsonl, and between updates of the progress bar
SAVE_EVERY = 2000  # steps per checkpoint
MARKS = ("config.json", "train.jsonl")  # a folder that has both holds a run
WEIGHTS, PICTURES = "weights.safetensors", ("samples.png", "trajectories.png", "map.png", "losses.png")
RESULTS = (WEIGHTS, "metrics.json", *PICTURES)
DATA, LEARNED, SAMPLES = "data.json", "points.npy", "samples.csv"
OWN_FILES = (  # what --overwrite removes: also what other commands write into the folder
    *MARKS, DATA, LEARNED, "checkpoint.pt", SNAPSHOTS, *RESULTS, SAMPLES, "bound.json", "bound.png", "page.html",
    "animation.gif",
)  # fmt: skip


def distribution_of(config: ToyConfig) -> GaussianMixture:
    """Make the distribution that a configuration names.

    Raises:
        ValueError, OSError: points that cannot be used, or classes asked of data without.
    """
    distribution = (
        make_distribution(config.dist) if config.data is None else load_points(Path(config.data), config.bandwidth)
    )
    if config.conditional and not distribution.num_classes:
        raise UserError(f"--conditional needs classes, and {config.dist} has none (moons, circles, eight_gaussians do)")
    return distribution


def distribution_of_run(folder: Path, config: ToyConfig) -> GaussianMixture:
    """Make the distribution that a run was trained on; its own points are those in its folder.

    Raises:
        ValueError, OSError: a damaged copy of the points; see distribution_of.
    """
    if config.data is None or not (folder / LEARNED).is_file():
        return distribution_of(config)
    try:
        known = json.loads((folder / DATA).read_text())
        points = torch.from_numpy(np.load(folder / LEARNED, allow_pickle=False))
        return OwnPoints(points, known["bandwidth"], tuple(known["columns"]))
    except (ValueError, KeyError, TypeError, EOFError, RuntimeError, IndexError) as error:
        raise UserError(f"{folder / LEARNED} and {DATA} cannot be used: {first_line(error)}") from None


def fingerprint(distribution: GaussianMixture) -> str:
    """Hash a distribution, so that a run is not continued on other data."""
    parts = (distribution.centres, distribution.log_weights, torch.tensor(distribution.sigma, dtype=torch.float64))
    return hashlib.sha256(b"".join(a.numpy().tobytes() for a in parts)).hexdigest()


class Run:
    """A run folder.

    Args:
        folder: where everything goes.
        config: what to do; stored as config.json.
        distribution: what to learn; None: what the configuration names.
    """

    def __init__(self, folder: Path, config: ToyConfig, distribution: GaussianMixture | None = None):
        self._begun = time.perf_counter()
        self.folder = folder
        self.config = config
        self.distribution = distribution_of(config) if distribution is None else distribution
        self.training = Training(config, self.distribution)
        self.log: list[dict[str, float]] = []
        self._before = 0.0  # seconds of training in earlier programs

    def path(self, name: str) -> Path:
        """Return the path of one of the folder's files."""
        return self.folder / name

    # Folder and state -------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the folder, or clear it of an earlier run, and write config.json.

        Raises:
            ValueError: a folder in place of one of a run's files; nothing has been removed.
            OSError: files that cannot be written or removed.
        """
        for name in OWN_FILES:
            if self.path(name).is_dir():
                raise UserError(f"{self.path(name)} is a folder, where a run writes a file: choose another --out")
        for path in (*map(self.path, OWN_FILES), *self.folder.glob("samples-[0-9]*.csv")):
            path.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        options = dataclasses.asdict(self.config)
        if isinstance(self.distribution, OwnPoints):
            del options["dist"]  # has no say
            write_atomically(self.path(DATA), json.dumps(self.distribution.summary, indent=2) + "\n")
            write_atomically(self.path(LEARNED), npy(self.distribution.points.numpy()))
        write_atomically(self.path("config.json"), json.dumps(options, indent=2) + "\n")
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
            raise UserError(f"{self.path('checkpoint.pt')} cannot be used: {reason}") from None
        if data != fingerprint(self.distribution):
            raise UserError(
                f"{self.folder} was trained on other points than {self.config.data or self.config.dist} has"
            )
        self._before = self.training.seconds
        load_snapshots(self.folder)  # refuses a damaged file now rather than in the middle of training
        try:
            text = self.path("train.jsonl").read_text() if self.path("train.jsonl").exists() else ""
            lines = [json.loads(line) for line in text.splitlines()]
            self.log = [line for line in lines if line["step"] <= self.training.step]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path('train.jsonl')} is damaged; without that file the log starts anew") from None
        write_atomically(self.path("train.jsonl"), "".join(json.dumps(line) + "\n" for line in self.log))
        return sums

    # Training ---------------------------------------------------------------------------------------------------

    def train(self, sums: torch.Tensor | None = None) -> bool:
        """Train to the end, or until interrupted; returns whether it came to the end. Saves either way.

        Raises:
            FloatingPointError: a loss that is NaN or infinite, with the step and what may help. The last checkpoint
                stays.
        """
        training, sums = self.training, torch.zeros(2) if sums is None else sums
        before, begun = training.seconds, time.perf_counter()
        keep = snapshot_steps(self.config.steps)
        bar = progress(
            total=self.config.steps,
            initial=training.step,
            unit="step",
            desc="training",
            file=sys.stdout,
            mininterval=0.5,
        )
        with Interruption() as interruption, self.path("train.jsonl").open("a", buffering=1) as log, bar:
            while training.step < self.config.steps and not interruption.requested:
                if training.step in keep:
                    add_snapshot(self.folder, training.step, training.ema.module.network)
                try:
                    sums += training.train_step()
                except FloatingPointError as error:  # resumed, it would diverge again
                    raise FloatingPointError(f"{error}; --overwrite begins anew in the same folder") from None
                training.seconds = before + time.perf_counter() - begun
                if training.step % LOG_EVERY == 0:
                    terms = dict(zip(TERMS, (sums / LOG_EVERY).tolist(), strict=True))
                    line = {"step": training.step, **terms, "seconds": round(training.seconds, 3)}
                    self.log.append(line)
                    log.write(json.dumps(line) + "\n")
                    sums.zero_()
                    losses = {name: f"{value:.4f}" for name, value in terms.items() if value}  # some train one alone
                    bar.set_postfix(losses, refresh=False)
                    bar.update(training.step - bar.n)
                if training.step % SAVE_EVERY == 0:
                    self.save(sums)
            bar.update(training.step - bar.n)
        self.save(sums)
        return training.step == self.config.steps

    def least_flow_matching_loss(self) -> float | None:
        """Measure the flow-matching loss of the exact velocity: the mean variance of v given x_t.

        It is surer than a mean of its squared errors. None for objectives whose term is of a share of the samples, or
        weighted.
        """
        if isinstance(self.training.objective, ResidualObjective):
            return None
        variances = []
        for batch in draw_block(dataclasses.replace(self.config, device="cpu"), self.distribution, 0):
            x, label = interpolate(batch.x0, batch.x1, batch.times.s_prime), batch.condition and batch.condition.label
            variances.append(self.distribution.velocity_variance(x, batch.times.s_prime, label).mean())
        return float(torch.stack(variances).mean())

    # Results ----------------------------------------------------------------------------------------------------

    def report(self, points: int) -> dict[str, Any]:
        """Measure and draw with progress; write all results and return the metrics."""
        from tvm_ref.toy.report import plots  # matplotlib, which --help need not wait for
        from tvm_ref.toy.report.map_plot import plot_map

        config, jump, data = self.config, self.training.evaluated, self.distribution
        weights = {name: a.cpu().contiguous() for name, a in self.training.ema.module.network.state_dict().items()}
        for name in ("metrics.json", *PICTURES):  # those of other weights must not stand beside these
            self.path(name).unlink(missing_ok=True)
        write_atomically(self.path(WEIGHTS), safetensors_of(weights, data.units.metadata()))
        if isinstance(data, OwnPoints):
            write_atomically(self.path(SAMPLES), samples_table(config, jump, data.units, points))
        kind = OBJECTIVES[config.objective]
        nfes = NFES[:1] if kind.one_step_only else NFES if kind.learns_jumps else (*NFES, EULER_STEPS)
        with Parts((2 if config.guided else 1) * PARTS + len(nfes) + len(PICTURES)) as parts:
            w = config.w if config.conditional else None
            reference = make_reference(data, w=w, points=points, watch=parts.of)
            nfe = {n: evaluate(jump, reference, n) for n in parts.of(nfes, "distances to the exact flow")}
            draw = {
                "samples.png": lambda: plots.plot_samples(data, jump, reference, nfes if kind.one_step_only else None),
                "trajectories.png": lambda: plots.plot_trajectories(data, jump, reference),
                "map.png": lambda: plot_map(data, jump, reference),
                "losses.png": lambda: plots.plot_losses(self.log, self.least_flow_matching_loss()),
            }
            for name in parts.of(PICTURES, "pictures"):
                plots.save_figure(draw[name](), self.path(name))
        metrics = {
            "nfe": {str(n): figures for n, figures in nfe.items()},
            "seconds": {
                "training": round(self.training.seconds, 2),
                "total": round(time.perf_counter() - self._begun + self._before, 2),
            },
            "steps": {"done": self.training.step, "planned": config.steps},
            "points": points,
        }
        write_atomically(self.path("metrics.json"), json.dumps(metrics, indent=2) + "\n")
        return metrics

    def results(self, points: int) -> dict[str, Any] | None:
        """Return the metrics if the training's end has been measured on so many points, and all is there; else None."""
        if not all(self.path(name).is_file() for name in RESULTS):
            return None
        try:
            metrics: dict[str, Any] = json.loads(self.path("metrics.json").read_text())
            current = metrics["steps"]["done"] == self.training.step and metrics["points"] == points
            return metrics if current and metrics["nfe"] and metrics["seconds"] else None
        except (ValueError, KeyError, TypeError):
            return None


def load_run(folder: Path | str) -> tuple[ToyConfig, GaussianMixture, FlowMap]:
    """Load configuration, distribution and evaluation model of a run's folder.

    `distribution.units.restore` turns the model's samples into the units of own points.

    Raises:
        ValueError: a folder that is no run, one that has written no model, or a damaged one.
        OSError: files that cannot be read.
    """
    config, model, units = load_model(folder)
    distribution = distribution_of_run(Path(folder), config)
    if distribution.units != units:
        raise UserError(f"{folder} was trained on other points than its {LEARNED} has")
    return config, distribution, model


def load_model(folder: Path | str) -> tuple[ToyConfig, FlowMap, Units]:
    """Load configuration, evaluation model and units of a run's folder; own points themselves are not needed.

    Raises:
        ValueError, OSError: see load_run.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} holds no model yet; finish it with --resume")
    network = make_network(config, 2, distribution_of(config).num_classes if config.conditional else 0)
    model = FlowMap(network, scaled=config.guided)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            model.network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            units = Units.from_metadata(file.metadata() or {})
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder / WEIGHTS} is damaged: {str(error).splitlines()[0]}") from None
    return config, model.requires_grad_(False), units


def npy(a: np.ndarray) -> bytes:
    """Return an array as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, a)
    return file.getvalue()


def read_config(folder: Path) -> ToyConfig:
    """Read the configuration stored in a run's folder.

    Raises:
        ValueError: no run there, or a config.json with unknown or missing keys.
    """
    try:
        stored = json.loads((folder / "config.json").read_text())
        return ToyConfig(**stored)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no run (no config.json); train one first") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is not a configuration of this program: {error}") from None
