"""The results of a run: weights, grids of samples, and for digits their scores.

Samples are those that sample.py and evaluate.py draw from the run by default: the same noise, classes, precision.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from imagenet.data.image_files import save_png
from imagenet.distributed import World
from imagenet.model.parallelize import full_state
from imagenet.sampler import Generator
from imagenet.training import checkpoint
from imagenet.training.run import Run
from tvm_ref import OBJECTIVES
from tvm_ref.cli.files import write_atomically

NFES = (1, 4)  # numbers of steps that are drawn and scored at the end


def draw_grid(path: Path, generator: Generator, world: World, steps: int = 1) -> None:
    """Write a grid of samples 0, 1, ..., a class per column; its classes are evenly spaced if there are many.

    All processes take part, as the weights may be sharded; the first one writes.
    """
    image = (generator if world.first else replace(generator, vae=None)).grid(steps)  # decoded once
    if world.first:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, image)


def write_weights(run: Run, path: Path) -> None:
    """Write the evaluation weights as they stand, and beside them those of other decays. All processes take part.

    Raises:
        OSError: in every process, if the file could not be written.
    """
    training = run.training
    about = {"step": str(training.step), "data": run.provenance.to_json()}
    for i, average in enumerate(training.averages):
        weights = full_state(average.state_dict()["module"])
        names = {name.removeprefix("network."): a for name, a in weights.items()}
        here = path if i == 0 else path.with_stem(f"{path.stem}-ema{average.decay:g}")

        def save(here: Path = here, names: dict[str, Tensor] = names, decay: float = average.decay) -> None:
            here.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save_weights(here, names, training.config, ema=f"{decay:g}", **about)

        run.world.on_first(save)


def write_report(run: Run, total_seconds: float) -> dict[str, Any]:
    """Write weights, grids and metrics.json of a training as it stands; returns the metrics. All processes take part.

    Args:
        run: the run.
        total_seconds: that this program has taken, beside what earlier ones trained.

    Raises:
        OSError: a file could not be written.
    """
    training, config = run.training, run.training.config
    generator = run.generator()
    nfes = NFES[:1] if OBJECTIVES[config.objective].one_step_only else NFES
    for nfe in nfes:
        draw_grid(run.folder / f"samples-{nfe}.png", generator, run.world, nfe)
    metrics: dict[str, Any] = {}
    if config.data == "digits":
        from imagenet.metrics.digits import measure_model

        metrics["nfe"] = {str(nfe): scores for nfe, scores in measure_model(generator, nfes).items()}
    metrics["seconds"] = {
        "training": round(run.log.seconds, 2),
        "total": round(total_seconds + run.log.before, 2),
    }
    metrics["steps"] = {"done": training.step, "planned": config.steps}
    write_weights(run, run.folder / checkpoint.WEIGHTS)
    if run.world.first:
        write_atomically(run.folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics
