"""The command that measures central differences on trained models."""

import json

import torch

from imagenet.config import Config, build_model
from imagenet.experiments import differences
from imagenet.weights import save_weights
from tests.imagenet.workers import randomise


def test_errors_are_printed_for_each_model(tmp_path, capsys):
    """A difference has its bias, which falls with the step's square, and in bfloat16 rounding, which rises with 1/h."""
    config, paths = Config(hidden_size=32, depth=1, heads=1), []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(str(tmp_path / f"{seed}.safetensors"))
        save_weights(tmp_path / f"{seed}.safetensors", randomise(build_model(config).network).state_dict(), config)
    assert differences.main([*paths, "--batch-size", "8", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 2
    for row in found:
        assert row["float32"]["JVP"] < 1e-5 < row["bfloat16"]["JVP"] < row["bfloat16"]["0.001"]
        assert 5 < row["float32"]["0.1"] / row["float32"]["0.03"] < 15  # (10/3)^2 is 11
