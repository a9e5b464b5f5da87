"""A run: a training, and the folder of its results.

    config.json            the configuration
    data.json              origin of the training data (provenance.py)
    pictures.bin, .json    for a user's folder of pictures: the pictures (pictures.py)
    train.jsonl            a line per --log-every steps, and for the last (log.py)
    samples/               a grid per --save-every steps
    checkpoints/           the newest states, each with its evaluation weights (checkpoint.py)
    weights.safetensors    evaluation weights, once training is done, like everything below
    samples-1.png, -4.png  grids of one-step and four-step samples
    metrics.json           seconds, and for digits, clothes and pictures scores, by number of function evaluations

Everything is written by the first process. Samples are those that sample.py and evaluate.py draw from the run by
default: the same noise, classes, precision.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from imagenet.data.image_files import save_png
from imagenet.data.provenance import Provenance
from imagenet.metrics.own import measure_model, own_metrics
from imagenet.model.parallelize import full_tensor
from imagenet.sampler import Generator
from imagenet.training.checkpoint import Saver, load_newest
from imagenet.training.log import Log
from imagenet.training.step import Training
from imagenet.weights import CONFIG, DATA, WEIGHTS, load_initial, read_config, save_weights
from tvm_ref import OBJECTIVES
from tvm_ref.cli.files import write_atomically

NFES = (1, 4)  # numbers of sampling steps that are drawn and scored at the end


class Run:
    """A training and its folder. All processes take part in every method.

    Args:
        folder: the folder of all files.
        training: the training.
        provenance: origin of the training data.
        keep: number of checkpoints to keep.
        vae: the autoencoder of latents, on the device; None shows latents as they are.
    """

    def __init__(
        self, folder: Path, training: Training, provenance: Provenance, keep: int, vae: nn.Module | None = None
    ):
        self.folder, self.training, self.provenance, self.vae = folder, training, provenance, vae
        self.world = training.world
        self.log = Log(folder, training)
        self.saver = Saver(folder, keep, self.world)

    def create(self) -> None:
        """Make the folder, and write the configuration; weights of a run that now takes more steps are renamed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = self.folder / WEIGHTS
        if weights.exists() and (steps := read_config(self.folder).steps) < self.training.config.steps:
            weights.rename(weights.with_stem(f"{weights.stem}-{steps:08d}"))
        if self.training.step == 0:  # left by a run that failed before it saved
            shutil.rmtree(self.folder / "samples", ignore_errors=True)
        write_atomically(self.folder / DATA, self.provenance.to_json() + "\n")
        write_atomically(self.folder / CONFIG, self.training.config.to_json() + "\n")

    def start(self) -> None:
        """Start from the newest undamaged checkpoint if there is one, else from given weights or from new ones.

        Raises:
            UserError: no checkpoint can be read; weights that do not fit.
        """
        config = self.training.config
        state = load_newest(self.folder, self.training.slot, self.world)
        if state is not None:
            self.training.load_state_dict(state)
            self.log.load_state_dict(state)
        elif config.init is not None:
            weights = self.world.on_first(lambda: load_initial(config))  # the first process names what is wrong
            self.training.load_initial(load_initial(config) if weights is None else weights)

    def save(self) -> None:
        """Save a checkpoint; on a GPU it is written while training continues.

        Raises:
            OSError: in every process, if this one or the one before could not be written; older ones are untouched.
        """
        write = self._weights_writer()
        state = self.training.state_dict() | self.log.state_dict()
        self.saver.save(state, self.training.step, lambda folder: write(folder / WEIGHTS))

    def _weights_writer(self) -> Callable[[Path], None]:
        """Gather the evaluation weights as they are now; returns what writes them into a file."""
        training = self.training
        weights = {}
        for name, a in training.ema.module.network.state_dict().items():
            whole = full_tensor(a).cpu()  # all processes take part, and the first one keeps it
            if self.world.first:
                weights[name] = whole
        about = {"ema": f"{training.config.ema:g}", "step": str(training.step), "data": self.provenance.to_json()}
        return lambda path: save_weights(path, weights, training.config, **about)

    def generator(self) -> Generator:
        """Return the sampler of the evaluation weights, as sample.py loads it by default."""
        training = self.training
        generator = Generator(training.ema.module, training.config, self.world.device)
        if self.vae is None:
            return generator
        return replace(generator, vae=self.vae, normalisation=self.provenance.normalisation)

    def draw_grid(self, name: str, steps: int = 1) -> None:
        """Write a grid of samples 0, 1, ..., a class per column; ten classes, evenly spaced, if there are more."""
        generator = self.generator()
        image = (generator if self.world.first else replace(generator, vae=None)).grid(steps)  # decoded once
        if self.world.first:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(path, image)

    def write_report(self, total_seconds: float) -> dict[str, Any]:
        """Write weights, grids and metrics.json of a training that is done; returns the metrics.

        Args:
            total_seconds: taken by this program, in addition to what earlier ones trained.

        Raises:
            OSError: a file could not be written.
        """
        training, config = self.training, self.training.config
        write = self._weights_writer()
        self.world.on_first(lambda: write(self.folder / WEIGHTS))
        nfes = NFES[:1] if OBJECTIVES[config.objective].one_step_only else NFES
        for nfe in nfes:
            self.draw_grid(f"samples-{nfe}.png", nfe)
        metrics: dict[str, Any] = {}
        if (own := own_metrics(config, self.folder)) is not None:
            scores = measure_model(self.generator(), nfes, own)
            metrics["nfe"] = {str(nfe): values for nfe, values in scores.items()}
        metrics["seconds"] = {
            "training": round(self.log.seconds, 2),
            "total": round(total_seconds + self.log.before, 2),
        }
        metrics["steps"] = {"done": training.step, "planned": config.steps}
        if self.world.first:
            write_atomically(self.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        return metrics
