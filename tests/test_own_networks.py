"""Networks as people write them, inside FlowMap: what others reported of a JVP in PyTorch, tried here."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.differences import randn_like
from tests.networks import Applied, Net, Sine
from tests.processes import in_two_processes
from tvm_ref import TVM, Condition, FlowMap, MeanFlow, Times, check_network

X0, X1 = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TIMES = Times(torch.linspace(0.4, 1, 6).double(), torch.linspace(0, 0.5, 6).double(), torch.linspace(0, 1, 6).double())


def softmax_attention(x: Tensor) -> Tensor:
    tokens = x[..., None]
    return (torch.softmax(tokens @ tokens.mT, -1) @ tokens)[..., 0]


def gradients(network: nn.Module, model: FlowMap | None = None, compiled: bool = False) -> list[Tensor]:
    objective = TVM(model or FlowMap(network))

    def loss() -> Tensor:
        return objective(X0, X1, TIMES).total.mean()

    call = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    return list(torch.autograd.grad(call(), list(network.parameters())))


MIDDLES = {
    "norm": lambda: nn.LayerNorm(8),
    "softmax": lambda: Applied(softmax_attention),
    "function": lambda: Applied(Sine.apply),
}


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of what torch.compile reads before it falls back
@pytest.mark.parametrize("name", MIDDLES)
def test_a_compiled_network_inside_is_that_of_eager_mode(name):
    """The JVP outside, where PyTorch had tangents of None (pytorch 187284); it falls back to eager mode."""
    network = Net(MIDDLES[name]()).double()
    compiled = FlowMap(torch.compile(network, backend="aot_eager"))
    torch.testing.assert_close(gradients(network, compiled), gradients(network))


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch 2.11's own handling of such a function
def test_a_function_with_its_own_jvp_is_refused_by_torch_compile():
    """Which once dropped it without a word (pytorch 192985); in eager mode it is used. PyTorch 2.11 has other words."""
    network = Net(Applied(Sine.apply)).double()
    assert check_network(network, X0).ok
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"custom jvp|setup_context"):
        gradients(network, compiled=True)


def test_a_time_of_no_axes_keeps_float32():
    """A 0-dim dual times a Python float once had a float64 tangent (pytorch 160513)."""

    class PerSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
            return torch.stack([a * (2.0 * self.weight * b + b.sin() / 3.0) for a, b in zip(x, s, strict=True)])

    t, s = TIMES.t.float(), TIMES.s.float()
    f, df_ds = FlowMap(PerSample()).displacement_and_terminal_velocity(X0.float(), t, s)
    assert f.dtype == df_ds.dtype == torch.float32


def test_times_embedded_a_thousandfold_are_right_and_steep():
    """Value, tangent and gradient hold; dF/ds grows with the rate, and with it the loss."""
    assert check_network(Net(nn.SiLU(), rate=1000.0), X0).ok
    slow, fast = Net(nn.SiLU()).double(), Net(nn.SiLU(), rate=1000.0).double()
    fast.load_state_dict(slow.state_dict())
    sizes = [FlowMap(n).displacement_and_terminal_velocity(X0, TIMES.t, TIMES.s)[1].abs().max() for n in (slow, fast)]
    assert sizes[1] > 100 * sizes[0]


def saved_bytes(call) -> int:
    """Bytes that autograd keeps for the backward of a call."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()
    assert result.requires_grad
    return sum(kept.values())


def test_a_stopped_tangent_spares_time_and_not_memory():
    """Activations of the tangent are kept though nothing flows back through it (pytorch 151782)."""
    deep = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.Tanh())))
    model = FlowMap(Net(deep).double())
    x = randn_like(torch.empty(1024, 4, dtype=torch.float64), 0)
    t, s = torch.full((1024,), 0.9).double(), torch.full((1024,), 0.2).double()
    plain = saved_bytes(lambda: model.displacement(x, t, s).sum())
    whole, detached = (
        saved_bytes(lambda d=d: model.displacement_and_terminal_velocity(x, t, s, detach_jvp=d)[1].sum())
        for d in (False, True)
    )
    meanflow = saved_bytes(lambda: MeanFlow(model)(x, x.flip(0), Times(t, s, s)).total.sum())
    assert 2 * plain < detached <= whole < 4 * plain
    assert meanflow > 2 * plain


def test_several_devices_are_told_apart():
    """PyTorch's own message names both."""
    with pytest.raises(RuntimeError, match=r"meta.*cpu|cpu.*meta"):
        FlowMap(Net(nn.SiLU()).double()).jump(X0, TIMES.t.to("meta"), TIMES.s.to("meta"))


def compare_in_ddp(rank: int) -> None:
    """Hold the gradients of FlowMap(DDP(network)) on half a batch, averaged by DDP, to those on the whole batch."""
    network = Net(nn.LayerNorm(8)).double()
    copy = deepcopy(network)
    half = slice(3 * rank, 3 * rank + 3)
    TVM(FlowMap(network))(X0, X1, TIMES).total.mean().backward()
    parts = Times(*(a[half] for a in TIMES))
    objective = TVM(FlowMap(DistributedDataParallel(copy)))  # it must outlive the backward, which it averages
    objective(X0[half], X1[half], parts).total.mean().backward()
    for p, whole in zip(copy.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(p.grad, whole.grad)


@pytest.mark.slow
def test_ddp_inside_a_flow_map_averages_the_gradients_of_processes(tmp_path):
    """DDP may stand inside the JVP, too, and be called three times per loss (pytorch 182661)."""
    in_two_processes("tests.test_own_networks.compare_in_ddp", tmp_path / "store")
