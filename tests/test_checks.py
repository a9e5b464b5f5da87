"""checks.py checks each call once, keeps tracebacks, and changes nothing else."""

import traceback

import pytest
import torch
from torch import Tensor, nn

from tests.networks import Waves, some_times
from tests.processes import python
from tvm_ref import TVM, Condition, FlowMap, checks
from tvm_ref.time_samplers import Times

IMPORT = """
import signal, warnings
import numpy, torch
def state():
    return list(warnings.filters), [signal.getsignal(s) for s in signal.valid_signals()]
before = state()
import tvm_ref, jvp_attention
assert state() == before
warnings.simplefilter("error")  # and PyTorch's first JVP warns of nothing
tvm_ref.flow_map.jvp(torch.sin, (torch.ones(2),), (torch.ones(2),))
"""


def test_importing_the_library_changes_nothing_in_the_process():
    done = python("-c", IMPORT)
    assert done.returncode == 0, done.stderr


def test_a_step_is_checked_once(monkeypatch):
    """None of five checked calls inside a guided loss checks again; after it, the next call does."""
    looked = []
    for name in ("check_data", "check_condition", "check_times"):
        check = getattr(checks, name)
        monkeypatch.setattr(checks, name, lambda *a, name=name, check=check: (looked.append(name), check(*a)))
    x0, x1 = torch.randn(2, 5, 4, dtype=torch.float64)
    t, s = some_times(5)
    condition = Condition(torch.arange(5), torch.full((5,), 0.5, dtype=torch.float64))
    model = FlowMap(Waves())
    TVM(model, null_label=5)(x0, x1, Times(t, s, s), condition)
    assert sorted(looked) == ["check_condition", "check_data", "check_times", "check_times"]  # (t, s) and s'
    looked.clear()
    model.jump(x1, t, s)
    assert looked == ["check_condition", "check_times"]


class Broken(nn.Module):
    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
        self.calls = torch.zeros(1, dtype=torch.float64)
        y: Tensor = x @ torch.ones(3, 3, dtype=torch.float64)  # the mistake
        return y


def test_an_error_of_the_network_keeps_its_traceback_and_the_next_call_is_checked():
    t, s = some_times(5)
    x, model = torch.randn(5, 4, dtype=torch.float64), FlowMap(Broken())
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        TVM(model)(x, x, Times(t, s, s))
    lines = traceback.format_exception(caught.value)
    assert any("# the mistake" in line for line in lines)
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(ValueError, match="must not exceed"):
        model.jump(x, s, t)
