"""check_network names what is wrong with a network under Terminal Velocity Matching, and passes what is right."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.networks import Applied, Net, PointData, Sine, Waves
from tvm_ref import Condition, FlowMap, check_network
from tvm_ref.network_check import measure

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class WrongSine(Sine):
    """A sine whose jvp is twice the right one."""

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return 2 * Sine.jvp(ctx, tangent)


class SlightlyWrongSine(Sine):
    """A sine whose jvp is off by 1 %."""

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return 1.01 * Sine.jvp(ctx, tangent)


class ComplexLinear(nn.Module):
    """A layer with complex weights, and one more tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
        self.mixing = torch.randn(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(x @ self.mixing) @ self.weight).abs()


class Twice(nn.Module):
    """A network that calls one embedding for t, which has no tangent, and for s."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.wrong = nn.Linear(1, 4), Applied(SlightlyWrongSine.apply)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        return x + self.wrong(self.embed(t[:, None])) + self.wrong(self.embed(s[:, None]))


class Averaged(nn.Module):
    """A moving average without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Counted:
    """A result that is no tensor."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Standardised(nn.Module):
    """A layer norm between the lines of a forward, in no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(self.inner(x), (8,))


def norms() -> list[nn.Module]:
    return [nn.LayerNorm(8), nn.SiLU(), nn.LayerNorm(8)]


def encoder(dropout: float = 0.0) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 8, dropout)


PYTORCHS = {"jvp": torch.func.jvp}
WRONG = {  # layers, options, what is said of which
    "layer norms without the mode": (norms, PYTORCHS, r"layers\.0, layers\.2 \(LayerNorm\): .*gradient.*jvp_ready"),
    "layer norm in a forward": (lambda: [Standardised()], PYTORCHS, r"layers\.0 \(Standardised\): value and tangent"),
    "attention without the mode": (lambda: [encoder()], PYTORCHS, r"self_attn \(MultiheadAttention\): refused: Not"),
    "batch norm": (
        lambda: [nn.BatchNorm1d(8)],
        {},
        r"layers\.0 \(BatchNorm1d\): refused: it updates running statistics",
    ),
    "a wrong jvp": (
        lambda: [nn.Tanh(), Applied(WrongSine.apply)],
        {},
        r"layers\.1 \(Applied\): its tangent is wrong; does an autograd",
    ),
    "1 % behind layers that are right": (
        lambda: [
            *(
                nn.Linear(8, 8),
                nn.ReLU(inplace=True),
                nn.Dropout(0.1, inplace=True),
                Applied(torch.fft.fft),
                Applied(torch.real),
            ),
            *(Applied(lambda x: Counted(x.sin())), Applied(lambda x: x.value)),
            Applied(SlightlyWrongSine.apply),
        ],
        {},
        r"errors.*\nlayers\.7 \(Applied\): its tangent is wrong; does an autograd.Function in it have a wrong jvp\?$",
    ),
    "in place on what the backward needs": (
        lambda: [nn.Tanh(), nn.ReLU(inplace=True), Applied(SlightlyWrongSine.apply)],
        {},
        r"layers\.2 .*tangent is wrong(.|\n)*the network: RuntimeError.*modified by an inplace",
    ),
    "buffers that change": (lambda: [Averaged()], {}, r"value.* does its forward change a buffer\?"),
}
RIGHT = {
    "noise": lambda: [Applied(lambda x: nn.functional.dropout(x, 0.3)), Applied(nn.functional.gumbel_softmax)],
    "complex weights, and tensors that are no buffers": lambda: [ComplexLinear()],
    "recurrent": lambda: [nn.GRUCell(8, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))],
    "layer norms": norms,
    "attention, with dropout": lambda: [encoder(0.1), nn.Dropout(0.5)],
    "kinks": lambda: [nn.ReLU(), nn.Linear(8, 8), nn.LeakyReLU()],
    "batch norm without statistics": lambda: [nn.BatchNorm1d(8, track_running_stats=False)],
    "batch norm evaluated": lambda: [nn.BatchNorm1d(8).eval()],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    layers, options, words = WRONG[name]
    with pytest.warns(UserWarning, match=words):
        check = check_network(Net(*layers()), X, **options)
    assert not check.ok


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name):
    assert check_network(Net(*RIGHT[name]()), X).ok


def test_a_layer_that_first_meets_no_tangent_is_named():
    with pytest.warns(UserWarning, match=r"\nwrong \(Applied\): its tangent is wrong"):
        check_network(Twice(), X)


def test_a_network_that_ignores_s_is_named():
    with pytest.warns(UserWarning, match="does not depend on s"):
        check_network(PointData(torch.ones(4)), X)


def test_nothing_of_the_network_changes_and_the_result_is_read_at_a_glance():
    network = Net(nn.LayerNorm(8))
    nn.init.zeros_(network.out.weight)
    before = {name: p.clone() for name, p in network.state_dict().items()}
    check = check_network(FlowMap(network), X, Condition(torch.arange(6), torch.full((6,), 0.5)))
    assert str(check) == "right: value, tangent and gradient agree with differences"
    assert check.errors is not None
    assert max(check.errors) < 1e-7
    assert all(torch.equal(p, before[name]) for name, p in network.state_dict().items())
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_a_closed_form_is_right():
    assert check_network(Waves(), X).ok


def test_an_error_is_measured_in_size():
    """A tangent that is twice the right one is off by 1, a value that is right by 0."""
    x = torch.randn(5, dtype=torch.float64)
    errors = measure(WrongSine.apply, [x], [torch.ones_like(x)], [], lambda y, dy: dy.square().sum(), torch.func.jvp)
    assert errors.value == 0
    assert errors.tangent == pytest.approx(1, abs=1e-6)
    assert errors.wrong == "tangent"


def test_a_network_that_fails_by_itself_keeps_its_error():
    class Failing(nn.Module):
        def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
            raise RuntimeError("its own words")

    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="its own words"):
        check_network(Failing(), X)
