"""How good a model is while it trains: FID of its evaluation weights against a reference, or the scores of digits."""

from collections.abc import Callable
from pathlib import Path

import torch

from imagenet.config import Config
from imagenet.distributed import World
from imagenet.metrics.frechet import Gaussian, frechet_distance
from imagenet.metrics.inception import Extractor, Inception
from imagenet.metrics.references import Reference, check_reference, from_sums, read_reference
from imagenet.sampler import Generator
from tvm_ref.cli.errors import UserError

Judge = Callable[[Generator, int, World], dict[str, float]]  # figures of a model at a number of steps, by name


def judge_digits(generator: Generator, steps: int, world: World) -> dict[str, float]:
    """Measure a model of digits by their own metrics (digits.py)."""
    from imagenet.metrics.digits import measure_model

    return measure_model(generator, [steps])[steps]


class Fid:
    """The Frechet distance of a model's images to a reference, made and looked at by all processes together.

    Args:
        reference: statistics of real images.
        extractor: of features.
        count: images, a multiple of the number of processes.
    """

    def __init__(self, reference: Reference, extractor: Extractor, count: int):
        if reference.pool is None:
            raise UserError(f"{reference.name} holds no mu and sigma, which --evaluate-every needs")
        self.reference, self.real, self.extractor, self.count = reference, reference.pool, extractor, count

    def __call__(self, generator: Generator, steps: int, world: World) -> dict[str, float]:
        """Measure a model; all processes take part."""
        return {"fid": frechet_distance(*self.statistics(generator, steps, world), *self.real)}

    def statistics(self, generator: Generator, steps: int, world: World) -> Gaussian:
        """Compute mean and covariance of the features of samples 0 to count - 1.

        Raises:
            ValueError: features of another size than the reference's.
        """
        size = len(self.real.mean)
        total, squares = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
        for pixels in generator.batches(world.partition(self.count), steps):
            features = self.extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
            check_reference(Reference(self.reference.name, self.real), features)
            x = features.pool.double()  # [B, D]
            total += x.sum(0)
            squares += x.T @ x
        return from_sums(world.sum(total).numpy(), world.sum(squares).numpy(), self.count)


def make_judge(config: Config, reference: Path | None, inception: Path | None, count: int, world: World) -> Judge:
    """Prepare to measure a run, so that all that could be missing is noticed before training.

    Args:
        config: of the run.
        reference: statistics of real images; digits need none.
        inception: file of Inception's weights; None is where torch.hub keeps it.
        count: images to measure.
        world: the processes.

    Raises:
        ValueError, OSError: a reference without mu and sigma, no Inception, a count that processes cannot share.
    """
    if reference is None:
        if config.data != "digits":
            raise UserError("--evaluate-every needs --reference: mu and sigma of real images (.npz, .pkl)")
        return judge_digits
    if count % world.size:  # else sharded weights would be asked for by some processes alone
        raise UserError(f"--evaluate-count {count} is no multiple of {world.size} processes")
    return Fid(read_reference(reference), Inception(inception, world.device), count)
