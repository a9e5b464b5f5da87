"""The average that a run tracked, found again from its checkpoints."""

import torch

from imagenet import average
from imagenet.weights import load_weights
from tests.imagenet.commands import command


def test_a_runs_own_average_is_found_again(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "own.safetensors"
    assert command(run, "--steps", 20, "--ema", 0.5, "--save-every", 4, "--keep", 5) == 0
    own, _ = load_weights(run)
    assert average.main([str(run), "--decay", "0.5", "--out", str(out)]) == 0
    for a, b in zip(load_weights(out)[0].parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert average.main([str(run), "--width", "0.1", "--out", str(tmp_path / "other.safetensors")]) == 0
    other, _ = load_weights(tmp_path / "other.safetensors")
    assert not torch.allclose(other.network.blocks[0].attn.qkv.weight, own.network.blocks[0].attn.qkv.weight, rtol=1e-3)
    assert "is met to" in capsys.readouterr().out
