"""The presets are the paper's table 6, and configurations survive JSON and refuse what they do not know."""

import json
from dataclasses import replace

import pytest

from imagenet.config import FORMAT, LABEL_DROPOUT, PRESETS, RESUMABLE, Config, build_model
from tvm_ref import OBJECTIVES, TimeSampler

IMAGENET = ("imagenet256-w2", "imagenet256-w1.75", "imagenet512-w2.5", "imagenet512-w2.25")


@pytest.mark.parametrize(
    ("name", "side", "w", "scaled", "time_init"),
    [
        ("imagenet256-w2", 32, 2.0, True, "spectral"),
        ("imagenet256-w1.75", 32, 1.75, True, "normal"),
        ("imagenet512-w2.5", 64, 2.5, False, "normal"),
        ("imagenet512-w2.25", 64, 2.25, True, "spectral"),
    ],
)
def test_table_6(name, side, w, scaled, time_init):
    c = PRESETS[name]
    assert (c.data, c.input_size, c.in_channels, c.classes) == ("latents", side, 4, 1000)
    assert (c.hidden_size, c.depth, c.heads, c.patch_size) == (1152, 28, 18, 2)
    assert (c.w, c.w_max, c.scaled, c.time_init, LABEL_DROPOUT) == (w, None, scaled, time_init, 0.1)
    assert (c.optimizer, c.lr, c.beta2, c.schedule, c.warmup, c.clip) == ("adamw", 1e-4, 0.95, "constant", 0, 0)
    assert (c.steps, c.batch_size, c.ema, c.target_ema) == (300_000, 2048, 0.9999, 0.99)
    assert c.sampler() == TimeSampler("gap*")
    assert not c.detach_jvp
    assert (c.norms, c.objective, c.network().block_norm) == ("all", "tvm", "rms")
    assert c.network().qk_norm
    assert c.network().modulation_norm
    assert c.precision == "bfloat16"


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_json(name):
    assert Config.from_json(PRESETS[name].to_json()) == PRESETS[name]


def test_times_are_those_of_an_objectives_paper_unless_told():
    for key, kind in OBJECTIVES.items():
        assert Config(objective=key).sampler() == kind.default_times
    assert Config(objective="lsd", time_sampler="gap*").sampler() == TimeSampler("gap*", equal_share=0.75)
    shares = Config(equal_share=0.5, noise_share=0.25).sampler()
    assert shares == TimeSampler("gap*", equal_share=0.5, noise_share=0.25)


def test_a_training_that_would_never_meet_the_data_is_refused():
    with pytest.raises(ValueError, match="PSD meets the data only where t = s: equal_share"):
        Config(objective="psd", equal_share=0.0)


BAD = {
    "an unknown key": {"colour": "red"},
    "text for a number": {"steps": "many"},
    "an unknown choice": {"objective": "gan"},
    "a list": {"w": [1, 2]},
    "a number beyond all floats": {"lr": 10**400},
    "a number beyond all integers": {"steps": 10**400},
    "a number below all integers": {"accumulate": -(10**30)},
    "a fraction of nothing": {"lr": float("nan")},
    "a network beyond all memory": {"hidden_size": 2**40},
    "blocks without end": {"depth": 10**9},
    "settings that are text": {"settings": "power=1"},
    "settings of code": {"objective": "meanflow", "settings": {"power": "print(1)" * 10**5}},
    "settings of a long name": {"settings": {"a" * 10**6: 1}},
    "settings of lists": {"objective": "meanflow", "settings": {"power": [[1]]}},
    "a long text": {"data": "a" * 10**6},
    "an escape sequence": {"\x1b[2J": 1},
}


@pytest.mark.bad_shapes
@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_stored_configurations_are_checked(change):
    stored = json.loads(Config().to_json()) | change
    with pytest.raises(ValueError, match=r".+") as error:
        Config.from_json(json.dumps(stored))
    assert len(str(error.value)) < 200
    assert str(error.value).isprintable()


NONE = ["", "[]", "3", "{}", '{"steps": 3}', '{"format": "1"}', '{"steps": ', "[" * 100_000, '{"a": ' * 100_000]


@pytest.mark.parametrize("text", [*NONE, "9" * 10_000])
def test_what_is_no_configuration(text):
    with pytest.raises(ValueError, match=r".+") as error:
        Config.from_json(text)
    assert len(str(error.value)) < 1500


def test_a_run_of_an_earlier_version_stays_readable():
    """A field that was added later is missing there, and has its neutral value."""
    stored = json.loads(replace(PRESETS["imagenet256-w2"], w=3.0).to_json())
    assert stored["format"] == FORMAT
    for name in ("equal_share", "w_max", "norms", "init"):
        del stored[name]
    assert Config.from_json(json.dumps(stored)) == replace(PRESETS["imagenet256-w2"], w=3.0)


def test_a_run_of_format_1_stays_readable():
    """Its fields keep their names: without a later format none of them may be renamed or removed."""
    names = """data input_size in_channels classes patch_size hidden_size depth heads time_init norms scaled objective
        settings w w_max time_sampler noise_share equal_share init steps batch_size optimizer lr beta2 warmup schedule
        clip target_ema ema seed precision attention compile checkpointing parallel accumulate"""
    assert set(names.split()) <= json.loads(Config().to_json()).keys()


def test_a_later_format_is_refused():
    """Its fields may mean something else."""
    stored = json.loads(Config().to_json()) | {"format": FORMAT + 1}
    with pytest.raises(ValueError, match="of a later version"):
        Config.from_json(json.dumps(stored))


@pytest.mark.parametrize("norms", ["no-block", "no-qk", "no-modulation", "none"])
def test_norms_are_left_out_one_kind_at_a_time(norms):
    network = Config(norms=norms).network()
    left_out = {
        "block": network.block_norm == "layer",
        "qk": not network.qk_norm,
        "modulation": not network.modulation_norm,
    }
    assert left_out == {kind: norms in (f"no-{kind}", "none") for kind in left_out}


def test_what_may_change_on_resuming_changes_no_weights_names():
    """Nothing that decides what is learned is among the fields that --resume may change."""
    assert set(RESUMABLE) == {"precision", "attention", "compile", "checkpointing", "parallel", "accumulate"}
    small = replace(Config(), hidden_size=16, depth=1)
    names = set(build_model(small).state_dict())
    assert names == set(build_model(replace(small, checkpointing=True, precision="bfloat16")).state_dict())
