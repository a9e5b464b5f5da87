"""A network of one's own, with classes and guidance: waves of three shapes, generated in one step.

python tutorials/examples/own_network.py [STEPS]    trains some two minutes on a CPU, and draws own_network.png
"""

import math
import sys

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from tvm_ref import EMA, TVM, Condition, FlowMap, TimeSampler, check_network, draw_beta, drop_labels, sample

NAMES, LENGTH, BATCH = ("sine", "square", "sawtooth"), 64, 64
CLASSES, W = len(NAMES), 1.5  # W: weight of guidance; 1 is none


def waves(label: Tensor) -> Tensor:
    """Draw data [B, 1, LENGTH]: two periods of a wave of the class label [B], with a phase and a height of its own."""
    turns = torch.rand(len(label), 1) + 2 * torch.arange(LENGTH) / LENGTH
    shapes = torch.stack([(2 * math.pi * turns).sin(), (turns % 1 < 0.5) * 2.0 - 1, turns % 1 * 2 - 1])
    height = 0.7 + 0.6 * torch.rand(len(label), 1)
    return (height * shapes[label, torch.arange(len(label))])[:, None]


class Network(nn.Module):
    """F(x, t, s) of waves [B, 1, LENGTH], with blocks of convolutions that times and class scale and shift."""

    def __init__(self, width: int = 32, blocks: int = 3):
        super().__init__()
        self.classes = nn.Embedding(CLASSES + 1, width)  # the last one is "no class"
        self.times = nn.Sequential(nn.Linear(13, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv1d(1, width, 5, padding="same", padding_mode="circular")
        self.blocks = nn.ModuleList(
            nn.Conv1d(width, width, 9, padding="same", padding_mode="circular", dilation=2**i) for i in range(blocks)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(blocks))
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.last = nn.Conv1d(width, 1, 5, padding="same", padding_mode="circular")

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """Return F of the shape of x; t, s, condition.label and condition.beta (1 / w) are [B]."""
        angles = math.pi * torch.stack([k * time for k in (0.5, 1, 2) for time in (t, t - s)], dim=1)  # [B, 6]
        times = torch.cat([angles.sin(), angles.cos(), condition.beta[:, None]], dim=1)
        c = nn.functional.silu(self.times(times) + self.classes(condition.label))
        h = self.first(x)
        for block, norm, modulation in zip(self.blocks, self.norms, self.modulations, strict=True):
            scale, shift = modulation(c)[..., None].chunk(2, dim=1)
            h = h + block(nn.functional.silu(norm(h) * (1 + scale) + shift))
        return self.last(h)


def main(steps: int = 1000) -> None:
    """Train, and draw six waves of each class from one step."""
    torch.manual_seed(0)
    network = Network()
    ones = torch.ones(4)
    print(check_network(network, torch.randn(4, 1, LENGTH), condition=Condition(torch.arange(4), ones)))
    model = FlowMap(network, scaled=True)
    target = EMA(model, decay=0.99)
    objective = TVM(model, null_label=CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0)
    for step in range(1, steps + 1):
        label = torch.randint(CLASSES, (BATCH,))
        condition = drop_labels(Condition(label, draw_beta(BATCH, W, W)), CLASSES)
        x0 = waves(label)
        terms = objective(x0, torch.randn_like(x0), TimeSampler().draw(BATCH), condition, target=target.module)
        optimizer.zero_grad()
        terms.total.mean().backward()
        optimizer.step()
        target.update(model)
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {float(terms.total.detach().mean()):.3f}", flush=True)
    label = torch.arange(CLASSES).repeat_interleave(6)
    generated = sample(target.module, torch.randn(18, 1, LENGTH), 1, Condition(label, torch.full((18,), 1 / W)))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for ax, name, rows in zip(figure.subplots(1, 3, sharey=True), NAMES, generated.chunk(3), strict=True):
        ax.plot(rows[:, 0].T)
        ax.set_title(f"{name}, one step")
    figure.savefig("own_network.png", dpi=120)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
