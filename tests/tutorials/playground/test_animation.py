import pytest
import torch
from PIL import Image

from tests.commands import one_line
from tests.tutorials.playground.test_page import make_run
from tutorials.playground import animation
from tvm_ref.toy.run import load_run


@pytest.mark.slow
def test_both_sides_start_from_one_noise_and_each_frame_is_one_jump(tmp_path):
    folder = make_run(tmp_path / "run", width=8, depth=1, dist="eight_gaussians")
    times, exact, jumps = animation.paths(folder)
    _, oracle, model = load_run(folder)
    assert (times[0], times[-1], len(times)) == (1, 0, animation.STEPS + 1)
    assert torch.equal(exact[0], jumps[0])
    ones = torch.ones(animation.POINTS)
    for i in (10, 40):
        torch.testing.assert_close(exact[i], oracle.jump(exact[0], ones, times[i] * ones), rtol=0, atol=1e-3)
        torch.testing.assert_close(jumps[i], model.jump(exact[0], ones, times[i] * ones))


@pytest.mark.slow
def test_the_file_is_small_and_moves(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(animation, "STEPS", 4)
    folder = make_run(tmp_path / "run", width=8, depth=1, dist="eight_gaussians")
    assert animation.main([str(folder)]) == 0
    with Image.open(folder / "animation.gif") as gif:
        assert gif.n_frames == 5
        assert gif.info["loop"] == 0
        shown = [gif.seek(i) or gif.convert("RGB").tobytes() for i in range(5)]
    assert len(set(shown)) == 5
    assert (folder / "animation.gif").stat().st_size < 2e6 / animation.STEPS
    assert "animation.gif" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "fm"}, "teaches no jumps"),
        ({"conditional": True}, "conditioned on classes"),
        (None, "holds no run"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, options, message):
    folder = tmp_path / "run"
    if options is not None:
        make_run(folder, width=8, depth=1, **options)
    assert message in one_line(capsys, animation.main, [str(folder)])
