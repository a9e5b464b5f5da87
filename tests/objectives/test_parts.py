"""A method of one residual computes jumps only where t != s, and flow matching only where t = s."""

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.objectives.samples import B, guidance, per_sample, setup
from tests.processes import in_two_processes
from tvm_ref.flow_map import FlowMap
from tvm_ref.interpolant import interpolate
from tvm_ref.objectives import OBJECTIVES, Jumps, ResidualObjective, guided_target, mean_square
from tvm_ref.shapes import over
from tvm_ref.time_samplers import Times
from tvm_ref.toy.network import ToyNetwork

KINDS = [kind for kind in OBJECTIVES.values() if issubclass(kind, ResidualObjective)]
EQUAL = {"some": torch.arange(B) % 3 == 0, "none": torch.zeros(B, dtype=torch.bool), "all": torch.ones(B, dtype=bool)}


def batch(equal):
    """A model, a target, data, noise, times of which some are equal, and a condition."""
    model, target, x0, x1, (t, s, s_prime) = setup((B, 3, 2, 2))
    return model, target, x0, x1, Times(t, torch.where(equal, t, s), s_prime), guidance()[0]


@pytest.mark.parametrize("which", EQUAL)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_whole_batch(kind, which):
    """The earlier form: all samples as jumps, with v for the right side where t = s."""
    model, target, x0, x1, times, condition = batch(EQUAL[which])
    if not kind.has_guidance:
        condition = condition._replace(beta=torch.ones_like(condition.beta))
    null_label = 3 if kind.has_guidance else None
    objective = kind(model, null_label=null_label)
    (t, s, _), x = times, interpolate(x0, x1, times.t)
    v = guided_target(x1 - x0, x, t, condition, null_label, model)
    left, right = objective.sides(Jumps(x, v, *times, condition, target))
    whole = objective.weigh(mean_square(left - torch.where(over(t == s, v), v, right)), t, s)
    parts = objective(x0, x1, times, condition, target).total
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(per_sample(parts, model), per_sample(whole, model), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_calls_the_network_only_for_what_there_is(kind):
    calls = {}
    for which, equal in EQUAL.items():
        model, target, x0, x1, times, _ = batch(equal)
        kind(model)(x0, x1, times, target=target)
        calls[which] = model.network.calls + target.network.calls
    assert calls["some"] == calls["none"] + calls["all"]
    assert calls["all"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_processes_call_the_network_alike_whatever_their_times(kind, monkeypatch):
    """FSDP gathers weights in every call, so all processes must make the same; losses do not change by it."""
    calls, losses = set(), {}
    for spread in (False, True):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda spread=spread: spread)
        for which, equal in EQUAL.items():
            model, target, x0, x1, times, _ = batch(equal)
            terms = kind(model)(x0, x1, times, target=target)
            losses[which, spread] = per_sample(terms.total, model)
            if spread:
                calls.add((model.network.calls, target.network.calls))
    assert len(calls) == 1
    for which in EQUAL:
        torch.testing.assert_close(losses[which, True], losses[which, False], rtol=1e-12, atol=0)


def work(rank: int, *keys: str) -> None:
    """One of two processes with sharded weights: the first has no jumps, the second nothing else."""
    for key in keys:
        torch.manual_seed(0)
        model = FlowMap(ToyNetwork(2, 0, 8, 2))
        torch.nn.init.normal_(model.network.output.weight)
        alone, target = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
        x0, x1 = torch.randn(2, 16, 2)
        t = 0.1 + 0.8 * torch.rand(16)
        s = torch.where(torch.arange(16) < 8, t, 0.5 * t)
        OBJECTIVES[key](alone)(x0, x1, Times(t, s, s), target=copy.deepcopy(target)).total.mean().backward()
        for module in (model, target):
            fully_shard(module.network, mesh=init_device_mesh("cpu", (2,)))
        own = [a[8 * rank : 8 * rank + 8] for a in (x0, x1, t, s)]
        OBJECTIVES[key](model)(*own[:2], Times(*own[2:], own[3]), target=target).total.mean().backward()
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="a JVP under FSDP is wrong before PyTorch 2.13")
@pytest.mark.slow
def test_processes_with_sharded_weights_and_different_times_do_not_wait_for_each_other(tmp_path):
    in_two_processes("tests.objectives.test_parts.work", tmp_path / "store", "lsd", "esd", "psd", "soflow")
