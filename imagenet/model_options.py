"""The options of the commands that draw images from a model: sample.py and evaluate.py."""

import argparse
import sys

from torch import nn

from imagenet.distributed import World
from imagenet.sampler import BATCH, Generator, load_generator, untrained_guidance


def add_model_options(p: argparse._ActionsContainer) -> None:
    """Add the options that decide how a model draws images."""
    p.add_argument("--classes", type=int, nargs="+", help="numbers of classes, in turn (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--w", type=float, help="guidance weight in place of the one that the model was trained with")
    p.add_argument("--batch-size", type=int, default=BATCH, help="images at a time, per process")
    p.add_argument("--vae", help="the autoencoder of latents, by folder or name (default: the one that made them)")
    p.add_argument("--device", help="cpu, cuda, ... (default: a GPU per process where there is one)")


def load_model(options: argparse.Namespace, world: World, vae: nn.Module | None = None) -> Generator:
    """Load the model of the positional argument `source` and the options above; `vae` replaces the one they name.

    Prints a warning, in the first process, for a guidance weight that the model does not know.

    Raises:
        ValueError: see load_generator.
    """
    generator = load_generator(
        options.source,
        device=world.device,
        classes=options.classes,
        w=options.w,
        seed=options.seed,
        vae=options.vae if vae is None else vae,
    )
    warning = untrained_guidance(generator.config, generator.guidance)
    if warning is not None and world.first:
        print(warning, file=sys.stderr)
    return generator
