"""One step of training (paper, algorithm 1) on one screen, and the state that continues it bit for bit."""

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imagenet.config import Config, build_model
from imagenet.data.batches import Batch
from imagenet.model import parallelize
from imagenet.model.distributed import World
from tvm_ref import EMA, FlowMap
from tvm_ref.objectives import TERMS


class StepMetrics(NamedTuple):
    """The metrics of one step, over all processes.

    Attributes:
        losses: mean of each of TERMS.
        gradient_norm: before clipping.
    """

    losses: tuple[float, float]
    gradient_norm: float


def learning_rate(config: Config, step: int) -> float:
    """Return the rate: linear warm-up, then constant, or a cosine that would reach zero one step after the last."""
    warmup = min(1.0, (step + 1) / (config.warmup + 1))
    decay = 0.5 * (1 + math.cos(math.pi * step / config.steps)) if config.schedule == "cosine" else 1.0
    return config.lr * warmup * decay


def make_optimizer(config: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer, without weight decay."""
    if config.optimizer == "soap":
        from pytorch_optimizer import SOAP

        return SOAP(parameters, config.lr, (0.95, config.beta2), weight_decay=0, precondition_frequency=10)
    return torch.optim.AdamW(parameters, config.lr, (0.9, config.beta2), weight_decay=0, fused=True)


class Training:
    """A model being trained: weights, their two averages, optimizer, and the number of steps taken.

    Attributes:
        model: the weights theta.
        weight: a learned weight of the loss, with --settings learned_weight=true; else it holds nothing.
        target: average theta* of the model's weights, the target of the loss.
        ema: slower average theta** of them, which is evaluated.
    """

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        torch.manual_seed(config.seed)
        self.model: FlowMap = build_model(config).to(world.device)
        self.target = EMA(self.model, config.target_ema)
        self.ema = EMA(self.model, config.ema)
        objective = config.make_objective(self.model).to(world.device)
        self.weight = objective.learned_weight
        self._set_progress = objective.set_progress  # kept now, as a wrapper hides the method
        if config.compile:
            objective.compile(dynamic=False)
        self.objective = parallelize.wrap(objective, [self.target, self.ema], world, config.parallel)
        self._parameters = [*self.model.parameters(), *self.weight.parameters()]
        self.optimizer = make_optimizer(config, self._parameters)
        self.step = 0

    def train_step(self, batch: Batch) -> StepMetrics:
        """Take one step of algorithm 1 on this process's part of a batch.

        Raises:
            FloatingPointError: in every process, if a loss or gradient of any is NaN or infinite; the weights are those
                before the step.
        """
        config, device = self.config, self.world.device
        n = len(batch.x0) // config.accumulate
        losses = torch.zeros(len(TERMS), device=device)
        self._set_progress(self.step / config.steps)  # for objectives with a curriculum
        self.optimizer.zero_grad()
        for i in range(config.accumulate):  # micro-batches, whose gradients add up to that of the batch
            # data x0, noise x1, times t, s, s' and the condition (class, beta), drawn by Batches
            x0, x1, times, condition = batch.slice(i * n, (i + 1) * n).to(device)
            # gradients are averaged over processes once, in the last backward
            last = i == config.accumulate - 1
            with contextlib.nullcontext() if last else parallelize.no_sync(self.objective):
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    # TVM: both terms of eq. 15 per sample; the target theta* gives u*, without a gradient (eq. 12)
                    terms = self.objective(x0, x1, times, condition, self.target.module)
                # the expectation over samples and times is the mean of the batch
                (terms.total.mean() / config.accumulate).backward()
            losses += torch.stack([getattr(terms, name).detach().mean() for name in TERMS]) / config.accumulate
        norm = self._clip()
        metrics = self._gather_metrics(losses, norm)  # NaN anywhere raises here, before the weights move
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()  # theta
        self.target.update(self.model)  # theta*, the target of the loss: EMA of a short memory
        self.ema.update(self.model)  # theta**, the weights that are sampled from: EMA of a long one
        self.step += 1
        return metrics

    def _clip(self) -> Tensor:
        """Clip the gradient's norm, and return what it was."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip or float("inf"), foreach=True)
        return parallelize.full_tensor(norm)

    def _gather_metrics(self, losses: Tensor, norm: Tensor) -> StepMetrics:
        """Average losses and the gradient's norm over all processes.

        Raises:
            FloatingPointError: in every process, if any holds a number that is not finite.
        """
        rows = self.world.all_gather([*losses.tolist(), float(norm)])
        for name, column in zip((*(f"{name} loss" for name in TERMS), "gradient"), rows.T, strict=True):
            bad = (~torch.isfinite(column)).nonzero().flatten().tolist()
            if bad:
                ranks = f"rank{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}"
                raise FloatingPointError(f"step {self.step}: the {name} is NaN or infinite on {ranks}")
        jump, flow_matching, gradient_norm = rows.mean(0).tolist()
        return StepMetrics((jump, flow_matching), gradient_norm)

    def load_initial(self, weights: dict[str, Tensor]) -> None:
        """Start from weights, the state dict of a FlowMap: the model and both averages."""
        for model in (self.model, self.target.module, self.ema.module):
            model.load_state_dict(parallelize.reshard(weights, model.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that continues this training: its own tensors, not copies, sharded where they are."""
        return {
            "model": self.model.state_dict(),
            "weight": self.weight.state_dict(),
            "target": self.target.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def slot(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the tensor that a checkpoint's entry is read into: a weight itself, or a new tensor for a moment.

        Raises:
            KeyError: this training has no such tensor.
        """
        kind, *path = name.split("/")
        if kind == "optimizer":
            like = self._parameters[int(path[1])]
            return torch.empty_like(like, dtype=dtype) if like.shape == size else torch.empty(size, dtype=dtype)
        modules = {"model": self.model, "weight": self.weight, "target": self.target.module, "ema": self.ema.module}
        weights: dict[str, Tensor] = modules[kind].state_dict()
        return weights[path[-1]]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave; its tensors are sharded as this training's own are (see slot)."""
        self.model.load_state_dict(state["model"])
        self.weight.load_state_dict(state["weight"])
        self.target.load_state_dict(state["target"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
