"""Training on a toy distribution (paper, algorithm 1): one step, and a state from which it resumes bit for bit."""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tvm_ref.ema import EMA
from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition, drop_labels
from tvm_ref.objectives import TERMS, LossTerms
from tvm_ref.sampling import Jump
from tvm_ref.seeding import generator as generator_of
from tvm_ref.seeding import uniform_numbers
from tvm_ref.time_samplers import Times
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.network import ToyNetwork

BLOCK = 50  # steps whose data are drawn at once, to save small calls
WARMUP = 200  # steps of linear warm-up
CLIP = 1.0  # largest norm of the gradient
LABEL_DROPOUT = 0.1  # fraction of labels replaced by "no class"


class Batch(NamedTuple):
    """Data of one step, or of a block of steps: data x0, noise x1, times and condition, each [B, ...]."""

    x0: Tensor
    x1: Tensor
    times: Times
    condition: Condition | None

    def rows(self, part: slice) -> "Batch":
        """Return some samples."""
        condition = None if self.condition is None else Condition(*(a[part] for a in self.condition))
        return Batch(self.x0[part], self.x1[part], Times(*(a[part] for a in self.times)), condition)


def draw_block(config: ToyConfig, distribution: GaussianMixture, block: int) -> list[Batch]:
    """Draw the batches of steps block * BLOCK, ..., (block + 1) * BLOCK - 1: a function of configuration and block.

    One Sobol point per sample decides its noise, its data and its times, so that all three fill their space evenly.
    """
    n, dim = BLOCK * config.batch_size, distribution.dim
    u = uniform_numbers(n, 5 + 2 * dim, config.seed, block)  # dim for noise, dim + 1 for data, 4 for times
    x1 = torch.special.ndtri(u[:, :dim]).float()
    x0, label = distribution.from_uniform(u[:, dim : 2 * dim + 1])
    x0 = x0.float()
    times = config.sampler().from_uniform(u[:, 2 * dim + 1 :].T)
    condition = None
    if config.conditional:
        condition = Condition(label, torch.full((n,), 1 / config.w))
        generator = generator_of(config.seed, block)
        condition = drop_labels(condition, distribution.num_classes, LABEL_DROPOUT, generator=generator)

    whole = Batch(x0, x1, times, condition)
    return [whole.rows(slice(i, i + config.batch_size)) for i in range(0, n, config.batch_size)]


def learning_rate(config: ToyConfig, step: int) -> float:
    """Warm up linearly, then follow a cosine that would reach zero one step after the last."""
    warmup = min(1.0, (step + 1) / WARMUP)
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def make_network(config: ToyConfig, dim: int, num_classes: int) -> ToyNetwork:
    """Make the untrained network of data [B, dim] with classes 0 to num_classes - 1, which only --conditional reads."""
    return ToyNetwork(dim, num_classes if config.conditional else 0, config.width, config.depth)


class Training:
    """A model being trained: network, target EMA, evaluation EMA, optimizer, and number of steps."""

    def __init__(self, config: ToyConfig, distribution: GaussianMixture):
        from pytorch_optimizer import SOAP  # slow to import: not for --help

        self.config = config
        self.distribution = distribution
        torch.manual_seed(config.seed)
        network = make_network(config, distribution.dim, distribution.num_classes)
        self.model = FlowMap(network, scaled=config.guided)
        self.objective = config.make_objective(self.model, distribution.num_classes if config.guided else None)
        self.weight = self.objective.learned_weight
        decay = self.objective.default_target_ema if config.target_ema is None else config.target_ema
        self.target = EMA(self.model, decay)
        self.ema = EMA(self.model, config.ema)
        self.optimizer = SOAP(
            self.objective.parameters(), config.lr, (0.95, 0.95), weight_decay=0, precondition_frequency=10
        )
        self._parameters = list(self.objective.parameters())  # the model's, and those of a learned weight
        self.step = 0
        self.seconds = 0.0
        self.gradient_norm = 0.0  # of the last step, before clipping
        self._block: tuple[int, list[Batch]] = (-1, [])

    def batch(self, step: int) -> Batch:
        """Return the data of a step."""
        block, index = divmod(step, BLOCK)
        if self._block[0] != block:
            self._block = block, draw_block(self.config, self.distribution, block)
        return self._block[1][index]

    def train_step(self) -> Tensor:
        """Take one step of algorithm 1; return the mean of each of TERMS [2].

        Raises:
            FloatingPointError: a loss that is NaN or infinite, with the step; the weights are those before it.
        """
        # data x0, noise x1, and times t >= s and s' from the sampler (sec. 7.3); classes, some dropped (sec. 3)
        batch = self.batch(self.step)
        self.objective.set_progress(self.step / self.config.steps)  # for methods with a curriculum
        # TVM.forward, unless --objective says otherwise: both terms of eq. 12 (with classes eq. 15), where the target
        # network theta* takes no gradient
        terms = self.objective(batch.x0, batch.x1, batch.times, batch.condition, self.target.module)
        self._require_finite(terms)
        # the gradient in theta, through d/ds f as well: backward through a forward JVP (eq. 17)
        self.optimizer.zero_grad()
        terms.total.mean().backward()
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, CLIP))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.step()
        # theta* follows theta closely, for the loss; theta** slowly, for evaluation
        self.target.update(self.model)
        self.ema.update(self.model)
        self.step += 1
        return torch.stack([getattr(terms, name).detach().mean() for name in TERMS])

    def _require_finite(self, terms: LossTerms) -> None:
        try:
            terms.check_finite()
        except FloatingPointError as error:
            raise FloatingPointError(f"training diverged at step {self.step}: {error}; a smaller lr may help") from None

    def state_dict(self) -> dict[str, Any]:
        """Gather everything that continues this training bit for bit, as tensors and plain numbers."""
        return {
            "model": self.model.state_dict(),
            "weight": self.weight.state_dict(),
            "target": self.target.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore everything from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.weight.load_state_dict(state.get("weight", {}))
        self.target.load_state_dict(state["target"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    @property
    def evaluated(self) -> Jump:
        """A step with a copy of the evaluation weights: a jump, or an Euler step for flow matching."""
        return type(self.objective).stepper(copy.deepcopy(self.ema.module))
