"""The sampler of a model: images as a function of their numbers, for commands, training and notebooks alike."""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from imagenet.config import Config
from imagenet.data import image_files
from imagenet.data.image_files import Pixels, to_pixels
from imagenet.data.noise import PRIOR, normal
from imagenet.data.provenance import Provenance
from imagenet.data.vae import LATENT_SIDE, NORMALISATION, VAE, Normalisation, decode, load_vae
from imagenet.model.distributed import World
from imagenet.weights import load_weights, read_provenance
from tvm_ref import OBJECTIVES, Condition, FlowMap, sample
from tvm_ref.cli.errors import UserError, require

CPU = torch.device("cpu")
BATCH = 64  # default number of samples at a time
DECODED = 8  # latents that the autoencoder decodes at a time: it needs far more memory per image than the model
COLUMNS, ROWS = 10, 8  # default size of a grid, with a class per column


@dataclass(frozen=True)
class Generator:
    """A model as a function from the numbers of samples to images.

    Sample i has the class number i modulo the number of classes, and noise decided only by (seed, i).

    Attributes:
        flow_map: the model, on the device.
        config: the configuration that it was trained with.
        device: where it runs.
        classes: sample i has class classes[i % len(classes)]; None is all classes in turn.
        w: guidance weight; None is the one of the configuration.
        seed: seed of the noise.
        vae: autoencoder of the latents; None for models of pixels.
        normalisation: of latents.
        names: of the classes, by number, where the weights know them.
    """

    flow_map: FlowMap
    config: Config
    device: torch.device = CPU
    classes: Sequence[int] | None = None
    w: float | None = None
    seed: int = 0
    vae: nn.Module | None = None
    normalisation: Normalisation | None = None
    names: Sequence[str] | None = None

    @property
    def guidance(self) -> float:
        """The guidance weight, in numbers."""
        return self.config.w if self.w is None else self.w

    @torch.no_grad()
    def samples(self, numbers: Sequence[int], steps: int) -> Tensor:
        """Draw samples [B, C, H, W] of the model: latents, or images in [-1, 1]."""
        config = self.config
        shape = (config.in_channels, config.input_size, config.input_size)
        x1 = torch.stack([normal(shape, PRIOR, self.seed, i) for i in numbers]).to(self.device)
        label = torch.tensor(self.labels(numbers), device=self.device)
        condition = Condition(label, torch.full((len(x1),), 1 / self.guidance, device=self.device))
        with self._autocast():
            return sample(OBJECTIVES[config.objective].stepper(self.flow_map), x1, steps, condition).float()

    def images(self, numbers: Sequence[int], steps: int) -> Pixels:
        """Draw images uint8 [B, H, W, 3]."""
        x = self.samples(numbers, steps)
        if self.vae is not None and self.normalisation is not None:
            x = torch.cat([decode(self.vae, part, self.normalisation) for part in x.split(DECODED)])
        return to_pixels(x)

    def batches(self, numbers: Sequence[int], steps: int, size: int = BATCH) -> Iterator[Pixels]:
        """Draw the images of many samples, `size` at a time."""
        for start in range(0, len(numbers), size):
            yield self.images(numbers[start : start + size], steps)

    def with_columns(self) -> "Generator":
        """Return the generator of a grid with a class per column: if all were asked for, at most 10, evenly spaced."""
        if self.classes is not None:
            return self
        classes = self.config.classes
        return replace(self, classes=torch.linspace(0, classes - 1, min(COLUMNS, classes)).round().long().tolist())

    def columns(self, count: int) -> int:
        """Return the number of columns of a grid of samples 0 to count - 1: a class each; one class fills a square."""
        if self.config.classes == 1:
            return math.ceil(math.sqrt(count))
        return min(count, len(self.with_columns().classes or ()))

    def grid_count(self) -> int:
        """Return the default number of samples of a grid."""
        return ROWS * (ROWS if self.config.classes == 1 else len(self.with_columns().classes or ()))

    def grid(self, steps: int = 1, count: int | None = None) -> Pixels:
        """Draw a grid uint8 [H, W, 3] of samples 0 to count - 1, a class per column; None: grid_count() samples."""
        shown = self.with_columns()
        count = self.grid_count() if count is None else count
        images = list(shown.batches(range(count), steps))
        return image_files.grid(np.concatenate(images), shown.columns(count))

    def labels(self, numbers: Sequence[int]) -> list[int]:
        """Return the classes [B] of samples."""
        classes = range(self.config.classes) if self.classes is None else self.classes
        return [classes[i % len(classes)] for i in numbers]

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """Multiply in bfloat16 on a GPU, if the model was trained so; on a CPU float32 is fast enough."""
        half = self.config.precision == "bfloat16" and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext()


def load_generator(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    classes: Sequence[int | str] | None = None,
    w: float | None = None,
    seed: int = 0,
    vae: str | nn.Module | None = None,
) -> Generator:
    """Load the model of a run's folder or of a .safetensors file.

    Args:
        source: the folder or file, or the name of a model in imagenet/pretrained/, such as digits.
        device: where to run.
        classes: see Generator; a text is a class's name, if the weights know it, or a number.
        w: see Generator; untrained_guidance warns if the model does not know it.
        seed: see Generator.
        vae: the autoencoder of latents, by folder or name, or itself; None is the one that the weights name.

    Raises:
        ValueError: no weights there, or arguments that do not go with them.
    """
    device = torch.device(device)
    flow_map, config = load_weights(source, attention=None if device.type == "cuda" else "plain")
    known = read_provenance(source) or Provenance(config.data)
    numbers = None if classes is None else [_number(k, known.classes or (), config.classes) for k in classes]
    require(w is None or 0 < w < float("inf"), f"w must be positive and finite, got {w}")
    require(seed >= 0, f"seed must be at least 0, got {seed}")
    generator = Generator(flow_map.to(device), config, device, numbers, w, seed, names=known.classes)
    if config.data not in ("latents", "synthetic"):
        return generator
    size = LATENT_SIDE * config.input_size
    normalisation = known.normalisation or NORMALISATION.get(size)
    if normalisation is None:
        raise UserError(f"{source} does not say how its latents, of {size} x {size} images, are normalised")
    name = vae or known.autoencoder or VAE
    here = Provenance(config.data, autoencoder=name if isinstance(name, str) else None, normalisation=normalisation)
    known.check_latents(here, f"{source} was trained on other latents")
    decoder = load_vae(name) if isinstance(name, str) else name
    return replace(generator, vae=decoder.to(device), normalisation=normalisation)


def _number(given: int | str, names: Sequence[str], classes: int) -> int:
    """Return the number of a class that is given by number or by name; names may look like numbers."""
    number = names.index(given) if given in names else int(given) if str(given).isdecimal() else -1
    if not 0 <= number < classes:
        known = f" or be named: {', '.join(names[:10])}{', ...' * (len(names) > 10)}" if names else ""
        raise UserError(f"classes must lie in 0 to {classes - 1}{known}; got {given}")
    return number


def untrained_guidance(config: Config, w: float) -> str | None:
    """Return a warning if a model was not trained with the guidance weight w."""
    if config.w <= w <= (config.w_max or config.w):
        return None
    trained = f"{config.w:g}" if config.w_max is None else f"{config.w:g} to {config.w_max:g}"
    return f"warning: this model was trained with w = {trained}; with w = {w:g} it does not work well"


def add_model_options(p: argparse._ActionsContainer) -> None:
    """Add the options of commands that decide how a model draws images."""
    p.add_argument("--classes", nargs="+", help="names or numbers of the classes to draw, in turn (default: all)")
    p.add_argument("--seed", type=int, default=0, help="seed of the noise")
    p.add_argument("--w", type=float, help="guidance weight (default: the one that the model was trained with)")
    p.add_argument("--batch-size", type=int, default=BATCH, help="number of images at a time, per process")
    p.add_argument("--vae", help="folder or name of the latents' autoencoder (default: the one that made them)")
    p.add_argument("--device", help="cpu, cuda, ... (default: a GPU per process where there is one)")


def load_model(o: argparse.Namespace, world: World, vae: nn.Module | None = None) -> Generator:
    """Load the model of the positional argument `source` and the options above; `vae` replaces the one they name.

    Prints a warning, in the first process, for a guidance weight or several steps if the model does not know them.

    Raises:
        UserError: see load_generator.
    """
    vae_or_name = o.vae if vae is None else vae
    generator = load_generator(o.source, device=world.device, classes=o.classes, w=o.w, seed=o.seed, vae=vae_or_name)
    warnings = [untrained_guidance(generator.config, generator.guidance)]
    if OBJECTIVES[generator.config.objective].one_step_only and o.steps not in (1, [1]):
        warnings.append("warning: this model was trained for one step only; with more it does not work well")
    for warning in filter(None, warnings):
        if world.first:
            print(warning, file=sys.stderr)
    return generator
