"""Modules in pickles are read as their state dict, without loading a class."""

import pickle

import pytest
import torch
from torch import nn

from imagenet.foreign.luma import read_released
from tvm_ref.cli.errors import UserError


@pytest.mark.parametrize("protocol", range(2, 6))
def test_modules_are_read_as_their_state_dict(tmp_path, protocol):
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 2, bias=False)))
    module.register_parameter("tied", module[0].weight)
    module.register_buffer("view", torch.arange(12.0).view(3, 4).T[1:])
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"net": module, "dtype": torch.bfloat16}, protocol))
    found, scaled = read_released(tmp_path / "file.pkl")
    assert scaled is None
    assert found.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(found[name], tensor)
    assert found["tied"].data_ptr() == found["0.weight"].data_ptr()  # no copy is made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_keep_their_type(tmp_path, dtype):
    module = nn.Module()
    module.register_buffer("a", torch.tensor([[1, 0], [3, 4]]).to(dtype))
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(module))
    a = read_released(tmp_path / "file.pkl").tensors["a"]
    assert a.dtype == dtype
    assert torch.equal(a, module.a)


@pytest.mark.parametrize("value", [{"net": {"a": 1}}, {"ema": nn.Identity}, 3])
def test_what_is_no_module_is_named(tmp_path, value):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match=r"file.pkl: .* is not a module"):
        read_released(tmp_path / "file.pkl")
