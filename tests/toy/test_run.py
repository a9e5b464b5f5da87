import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.run import FORMAT, SNAPSHOTS, Run, load_run, load_snapshots, read_config, snapshot_steps

SMALL = ToyConfig(batch_size=16, width=8, depth=2, steps=100)


def fresh(folder) -> Run:
    run = Run(folder, SMALL)
    run.create()
    return run


@pytest.mark.slow
def test_snapshots_are_the_evaluation_weights_of_their_steps(tmp_path):
    run, seen = fresh(tmp_path / "run"), fresh(tmp_path / "seen")
    assert run.train()
    snapshots = load_snapshots(run.folder)
    assert list(snapshots) == [0, 1, 3, 10, 30] == sorted(snapshot_steps(100))
    for step, weights in snapshots.items():
        while seen.training.step < step:
            seen.training.train_step()
        expected = seen.training.ema.module.network.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_damaged_file_of_snapshots_is_named_on_resume(tmp_path):
    run = fresh(tmp_path)
    assert run.train()
    (tmp_path / SNAPSHOTS).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"snapshots.safetensors is damaged; without that file"):
        Run(tmp_path, SMALL).load()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ToyConfig)])
def test_a_configuration_from_before_a_field_was_added_is_read(tmp_path, name):
    """Its default changes nothing; what is not known is refused."""
    fresh(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["format"] == FORMAT
    del stored[name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert read_config(tmp_path) == dataclasses.replace(SMALL, **{name: getattr(ToyConfig(), name)})
    (tmp_path / "config.json").write_text(json.dumps(stored | {"colour": "red"}))
    with pytest.raises(ValueError, match="colour"):
        read_config(tmp_path)


def test_weights_say_which_format_they_have(tmp_path):
    run = fresh(tmp_path)
    run.write_weights()
    written = (tmp_path / "weights.safetensors").read_bytes()
    run.write_weights()
    assert (tmp_path / "weights.safetensors").read_bytes() == written
    assert load_run(tmp_path)[0] == SMALL
    weights = run.training.ema.module.network.state_dict()
    save_file(weights, tmp_path / "weights.safetensors", {"toy": json.dumps({"format": FORMAT + 1})})
    with pytest.raises(ValueError, match="later version"):
        load_run(tmp_path)
    save_file(weights, tmp_path / "weights.safetensors")  # from before they did
    assert load_run(tmp_path)[0] == SMALL
