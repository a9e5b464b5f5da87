"""The folder of a run: train in it, stop and resume, and load what is finished.

config.json                     the options
train.jsonl                     a line per 50 steps, written as it goes
data.json, points.npy           for own points: scale, bandwidth, outliers; the points that were learned
checkpoint.pt                   the state that --resume continues from
weights.safetensors             the evaluation weights, and the units of the data
snapshots.safetensors           the evaluation weights after 0, 1, 3, 10 and 30 % of the steps
metrics.json                    metrics by number of function evaluations (NFE), seconds, steps
samples.csv                     for own points: samples in their units
samples, trajectories, map, losses.png

report/report.py writes the last three; other commands add their results to the folder, which --overwrite keeps.
"""

import dataclasses
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from tvm_ref.cli.errors import require, user_errors
from tvm_ref.cli.files import find, write_atomically
from tvm_ref.cli.progress import progress
from tvm_ref.cli.stopping import Interruption
from tvm_ref.flow_map import FlowMap
from tvm_ref.objectives import TERMS
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.data.points import OwnPoints, Units, units_of
from tvm_ref.toy.training import Training, make_network

# Version of config.json and weights.safetensors. A new field has a default that keeps earlier runs readable and
# unchanged; a change that cannot be read this way raises the number.
FORMAT = 1
LOG_EVERY = 50  # steps per line of train.jsonl, and between updates of the progress bar
SAVE_EVERY = 2000  # steps per checkpoint
SNAPSHOT_AT = (0.0, 0.01, 0.03, 0.1, 0.3)  # fractions of the steps; the end is weights.safetensors
CONFIG, LOG, CHECKPOINT = "config.json", "train.jsonl", "checkpoint.pt"
DATA, POINTS = "data.json", "points.npy"
WEIGHTS, SNAPSHOTS = "weights.safetensors", "snapshots.safetensors"
METRICS, SAMPLES = "metrics.json", "samples.csv"
PICTURES = ("samples.png", "trajectories.png", "map.png", "losses.png")
PRETRAINED = Path(__file__).parent / "pretrained"  # runs that come along, known by their names
MARKS = (CONFIG, LOG)  # a folder that has both holds a run
OWN_FILES = (*MARKS, CHECKPOINT, DATA, POINTS, WEIGHTS, SNAPSHOTS, METRICS, SAMPLES, *PICTURES)  # --overwrite removes


class Run:
    """A run in its folder.

    Args:
        folder: the folder of all files.
        config: the options; stored as config.json.
        distribution: the data; None: as the configuration says. For a resumed run give load_distribution's.
    """

    def __init__(self, folder: Path, config: ToyConfig, distribution: GaussianMixture | None = None):
        self.folder = folder
        self.config = config
        self.distribution = config.make_distribution() if distribution is None else distribution
        self.training = Training(config, self.distribution)
        self.log: list[dict[str, float]] = []

    def create(self) -> None:
        """Make the folder, or clear it of an earlier run, and write config.json.

        Raises:
            OSError: files that cannot be written or removed.
        """
        for name in OWN_FILES:
            (self.folder / name).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        options = {"format": FORMAT} | dataclasses.asdict(self.config)
        if isinstance(self.distribution, OwnPoints):
            del options["dist"]  # has no say
            write_atomically(self.folder / DATA, json.dumps(self.distribution.summary, indent=2) + "\n")
            array = io.BytesIO()
            np.save(array, self.distribution.points.numpy())
            write_atomically(self.folder / POINTS, array.getvalue())
        write_atomically(self.folder / CONFIG, json.dumps(options, indent=2) + "\n")
        write_atomically(self.folder / LOG, "")

    def save(self, sums: Tensor) -> None:
        """Write checkpoint.pt; `sums` are the losses since the last line of the log."""
        file = io.BytesIO()
        torch.save(self.training.state_dict() | {"sums": sums}, file)
        write_atomically(self.folder / CHECKPOINT, file.getvalue())

    def load(self) -> Tensor:
        """Read checkpoint.pt, drop later lines of the log, and return the losses since the log's last line.

        Raises:
            UserError: a checkpoint that is damaged, or of another network; a damaged log or file of snapshots.
        """
        path, log = self.folder / CHECKPOINT, self.folder / LOG
        with user_errors(f"{path} cannot be used", Exception):  # bytes that are not a checkpoint raise almost anything
            state = torch.load(path, weights_only=True)
        # the weights of another network, or something else
        with user_errors(f"{path} cannot be used", RuntimeError, KeyError, TypeError):
            self.training.load_state_dict(state)
            sums: Tensor = state["sums"]
        load_snapshots(self.folder)  # a damaged file is named now rather than in the middle of training
        with user_errors(f"{log} is damaged; without that file the log starts again", ValueError, KeyError, TypeError):
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            self.log = [line for line in lines if line["step"] <= self.training.step]
        write_atomically(log, "".join(json.dumps(line) + "\n" for line in self.log))
        return sums

    def train(self, sums: Tensor | None = None) -> bool:
        """Train to the end, or until a signal; return whether it reached the end. Saves either way.

        Args:
            sums: the losses since the last line of the log, from `load`.

        Raises:
            FloatingPointError: a loss that is NaN or infinite; the last checkpoint stays.
        """
        training, sums = self.training, torch.zeros(2) if sums is None else sums
        before, started, steps = training.seconds, time.perf_counter(), self.config.steps
        bar = progress(
            total=steps, initial=training.step, unit="step", desc="training", file=sys.stdout, mininterval=0.5
        )
        with Interruption() as interruption, (self.folder / LOG).open("a", buffering=1) as log, bar:
            while training.step < steps and not interruption.requested:
                if training.step in snapshot_steps(steps):
                    add_snapshot(self.folder, training.step, training.ema.module.network.state_dict())
                sums += training.train_step()
                training.seconds = before + time.perf_counter() - started
                if training.step % LOG_EVERY == 0:
                    terms = dict(zip(TERMS, (sums / LOG_EVERY).tolist(), strict=True))
                    self.log.append({"step": training.step, **terms, "seconds": round(training.seconds, 3)})
                    log.write(json.dumps(self.log[-1]) + "\n")
                    sums.zero_()
                    bar.set_postfix({name: f"{value:.4f}" for name, value in terms.items() if value}, refresh=False)
                    bar.update(training.step - bar.n)
                if training.step % SAVE_EVERY == 0:
                    self.save(sums)
            bar.update(training.step - bar.n)
        self.save(sums)
        return training.step == steps

    def write_weights(self) -> None:
        """Write the evaluation weights, and the units of the data, as weights.safetensors."""
        weights = {name: a.contiguous() for name, a in self.training.ema.module.network.state_dict().items()}
        known = {"format": FORMAT, "units": dataclasses.asdict(units_of(self.distribution))}
        # one entry: safetensors writes several in random order, and equal runs must give equal files
        write_atomically(self.folder / WEIGHTS, save(weights, {"toy": json.dumps(known)}))


def read_config(folder: Path) -> ToyConfig:
    """Read the configuration stored in a run's folder; missing fields have their defaults.

    Raises:
        UserError: no run there, or a config.json with unknown keys, bad values, or of a later version.
    """
    path = folder / CONFIG
    require(path.is_file(), f"{folder} holds no run (no {CONFIG}); train one first")
    with user_errors(f"{path} is not a configuration of this program", TypeError, ValueError, AttributeError):
        stored = json.loads(path.read_text())
        require_known_format(path, stored.pop("format", 0))
        stored.pop("device", None)  # earlier runs had a choice
        return ToyConfig(**stored)


def require_known_format(path: Path, version: int) -> None:
    """Raise UserError for a file of a later version than this program's."""
    require(version <= FORMAT, f"{path}: format {version} is of a later version of this program, which reads {FORMAT}")


def load_run(folder: Path | str) -> tuple[ToyConfig, GaussianMixture, FlowMap]:
    """Load configuration, distribution and evaluation model of a run's folder, or of the name of one in PRETRAINED.

    `units_of(distribution).restore` turns the model's samples into the units of own points.

    Raises:
        UserError: a folder that is not a run, has no model yet, or is damaged.
        OSError: files that cannot be read.
    """
    folder = find(folder, PRETRAINED.glob("*/"))
    config, model, units = load_model(folder)
    distribution = load_distribution(folder, config)
    require(units_of(distribution) == units, f"{folder} was trained on other points than its {POINTS} has")
    return config, distribution, model


def load_distribution(folder: Path, config: ToyConfig) -> GaussianMixture:
    """Make the distribution that a run was trained on; its own points are those in its folder.

    Raises:
        UserError, OSError: a damaged copy of the points; see ToyConfig.make_distribution.
    """
    if config.data is None or not (folder / POINTS).is_file():
        return config.make_distribution()
    damaged = (ValueError, KeyError, TypeError, EOFError, RuntimeError, IndexError)
    with user_errors(f"{folder / POINTS} and {DATA} cannot be used", *damaged):
        known = json.loads((folder / DATA).read_text())
        points = torch.from_numpy(np.load(folder / POINTS, allow_pickle=False))
        return OwnPoints(points, known["bandwidth"], tuple(known["columns"]))


def load_model(folder: Path | str) -> tuple[ToyConfig, FlowMap, Units]:
    """Load configuration, evaluation model and units as load_run does; own points themselves are not needed.

    Raises:
        UserError, OSError: see load_run.
    """
    folder = find(folder, PRETRAINED.glob("*/"))
    config = read_config(folder)
    require((folder / WEIGHTS).is_file(), f"{folder} holds no model yet; finish it with --resume")
    network = make_network(config, 2, config.make_distribution().num_classes if config.conditional else 0)
    model = FlowMap(network, scaled=config.guided)
    damaged = (SafetensorError, RuntimeError, TypeError, KeyError, ValueError)
    with user_errors(f"{folder / WEIGHTS} is damaged", *damaged), safe_open(folder / WEIGHTS, "pt") as file:
        model.network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        known = json.loads((file.metadata() or {}).get("toy", "{}"))
        units = Units(**{name: tuple(values) for name, values in known.get("units", {}).items()})
    require_known_format(folder / WEIGHTS, known.get("format", 0))
    return config, model.requires_grad_(False), units


def steps_done(folder: Path) -> int | None:
    """Return the number of steps after which a run was measured; None for a run without metrics.json.

    Raises:
        UserError: a damaged metrics.json.
    """
    path = folder / METRICS
    if not path.exists():
        return None
    with user_errors(f"{path} is damaged", ValueError, KeyError, TypeError):
        return int(json.loads(path.read_text())["steps"]["done"])


def snapshot_steps(steps: int) -> set[int]:
    """List the steps after which a snapshot is kept, of a training of `steps` steps."""
    return {round(fraction * steps) for fraction in SNAPSHOT_AT}


def add_snapshot(folder: Path, step: int, weights: dict[str, Tensor]) -> None:
    """Add a network's weights after `step` to the folder's snapshots, replacing those of that step and later ones.

    Raises:
        UserError: a damaged file.
        OSError: a file that cannot be read or written.
    """
    snapshots = {k: earlier for k, earlier in load_snapshots(folder).items() if k < step} | {step: weights}
    tensors = {f"{k}/{name}": a.contiguous() for k, weights in snapshots.items() for name, a in weights.items()}
    write_atomically(folder / SNAPSHOTS, save(tensors))


def load_snapshots(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Load the networks' weights by step, earliest first; empty if the folder has none.

    Raises:
        UserError: a damaged file.
        OSError: a file that cannot be read.
    """
    path, snapshots = folder / SNAPSHOTS, dict[int, dict[str, Tensor]]()
    with user_errors(f"{path} is damaged; without that file its snapshots start again", SafetensorError, ValueError):
        for key, a in load(path.read_bytes()).items() if path.exists() else ():
            step, name = key.split("/", 1)
            snapshots.setdefault(int(step), {})[name] = a
    return dict(sorted(snapshots.items()))
