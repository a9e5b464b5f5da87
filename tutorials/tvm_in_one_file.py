"""Terminal Velocity Matching (arXiv 2511.19797) in one file: `python tvm_in_one_file.py` draws tvm_in_one_file.png."""

import argparse
import math
import warnings

import torch
from matplotlib.figure import Figure
from torch import nn


def moons(n):
    """Draw data [n, 2]: two interleaved half moons of mean 0."""
    angle, sign = math.pi * torch.rand(n), torch.randint(2, (n, 1)) * 2.0 - 1
    return sign * torch.stack([1.15 * angle.cos() - 0.58, 2 * angle.sin() - 0.5], dim=1) + 0.1 * torch.randn(n, 2)


class Network(nn.Module):
    """F(x, t, s): the average velocity on the way from x at time t (1 is noise) to time s (0 is data)."""

    def __init__(self):
        super().__init__()
        hidden = (m for a in (22, 64, 64, 64) for m in (nn.Linear(a, 64), nn.GELU()))
        self.layers = nn.Sequential(*hidden, nn.Linear(64, 2))

    def forward(self, x, t, s):
        """Return F [B, 2] of points x [B, 2] and times t, s [B]."""
        angles = math.pi * torch.stack([k * time for k in (0.5, 1, 2) for time in (t, t - s)], dim=1)  # [B, 6]
        angles = torch.cat([angles, x, 2 * x], dim=1)  # a liberty: waves in x, for sharp turns between the moons
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], dim=1))


def draw_times(n):
    """Draw t, s and s' [n] by gap* (sec. 7.3). A liberty: t = 1, where one step begins, in a quarter of them."""
    length = torch.sigmoid(torch.randn(n) - 0.8)  # t - s first, then s below 1 - length; s' on its own
    room = torch.special.ndtr(torch.logit(1 - length) + 0.4)  # the probability of s below 1 - length
    s = torch.sigmoid(torch.special.ndtri(torch.rand(n).clamp_min(1e-6) * room) - 0.4)
    return torch.where(torch.rand(n) < 0.25, 1.0, (s + length).clamp_max(1.0)), s, torch.sigmoid(torch.randn(n) - 0.4)


def tvm_loss(net, teacher, x0, x1, t, s, s_prime):
    """Return losses [B] (eq. 12) of data x0 and noise x1 [B, 2] at times t > s and s' [B]."""
    v, duration = x1 - x0, (s - t)[:, None]
    xt, xs = x0 + t[:, None] * v, x0 + s_prime[:, None] * v
    F, dF_ds = torch.func.jvp(lambda s: net(xt, t, s), (s,), (torch.ones_like(s),))
    f, df_ds = duration * F, F + duration * dF_ds  # the displacement (eq. 4) and its terminal velocity (eq. 17)
    target = teacher(xt + f.detach(), s, s)  # the teacher's velocity where the jump lands (eq. 8)
    return (df_ds - target).square().mean(1) + (net(xs, s_prime, s_prime) - v).square().mean(1)


def train(steps, batch=256, rate=1e-2):
    """Train a network; return its teacher, a moving average of its weights."""
    net, teacher = Network(), Network().requires_grad_(False)
    teacher.load_state_dict(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters(), rate, betas=(0.9, 0.95), weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05, cycle_momentum=False)
    for step in range(1, steps + 1):
        loss = tvm_loss(net, teacher, moons(batch), torch.randn(batch, 2), *draw_times(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for average, weight in zip(teacher.parameters(), net.parameters(), strict=True):
            average.lerp_(weight.detach(), 0.01)
        if step % 500 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}")
    return teacher


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # by PyTorch's own first JVP
    parser = argparse.ArgumentParser(description="Learn to carry noise to two moons in one step.")
    parser.add_argument("steps", nargs="?", type=int, default=3000, help="training steps (default: %(default)s)")
    net = train(parser.parse_args().steps)
    noise, one, zero, figure = torch.randn(4000, 2), torch.ones(4000), torch.zeros(4000), Figure(figsize=(8, 4))
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, x in zip(axes, (moons(4000), noise - net(noise, one, zero)), strict=True):
        ax.scatter(*x.T, s=2)  # left the data, right x1 + f(x1, 1, 0): one step from noise
    figure.savefig("tvm_in_one_file.png")
