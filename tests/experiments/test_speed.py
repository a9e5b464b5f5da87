import json

import pytest

from tvm_ref.experiments import methods, speed
from tvm_ref.toy import training as training_module
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.training import draw_block


@pytest.mark.slow
def test_benchmark_draws_no_data_while_it_times_gradients(monkeypatch):
    """Gradients once asked for step 0's batch, so that they and the steps drew each other's block anew every round."""
    drawn = []

    def counted(config, distribution, block):
        drawn.append(block)
        return draw_block(config, distribution, block)

    monkeypatch.setattr(training_module, "draw_block", counted)
    config = ToyConfig(batch_size=4, width=4, depth=1)
    training = training_module.Training(config, make_distribution("moons"))
    speed.step_times({"TVM": training}, rounds=3, repeats=20)
    assert drawn == [0, 1]  # 80 steps, 50 to a block


@pytest.mark.slow
def test_benchmark_prints_ratios(tmp_path, capsys):
    options = ["--batch-size", "16", "--width", "8", "--depth", "2", "--rounds", "2", "--repeats", "2"]
    assert speed.main([*options, "--out", str(tmp_path / "benchmark.json")]) == 0
    times = json.loads((tmp_path / "benchmark.json").read_text())["milliseconds"]
    assert set(times) == set(methods.METHODS)
    ratio = times["TVM"]["step"] / times["flow matching"]["step"]
    assert f"{ratio:.2f}" in capsys.readouterr().out
