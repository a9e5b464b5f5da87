"""A comparison that is interrupted goes on, and ends as if it had not been."""

import contextlib
import io
import json

import pytest

from tvm_ref.experiments import compare, comparison, sweep

TINY = ["--batch-size", "16", "--width", "8", "--depth", "1", "--points", "20", "--jobs", "1", "--steps", "3"]
OPTIONS = [*TINY, "--methods", "TVM", "sCT", "--seeds", "2", "--rates", "1e-3", "1e-2"]


@pytest.fixture
def trained(monkeypatch):
    """The configurations trained so far; steps cost what they cost here, and one at most is swept beyond."""
    configs = []
    train = sweep._train

    def counted(config, **options):
        result = train(config, **options)
        configs.append(config)
        return result

    monkeypatch.setattr(sweep, "_train", counted)
    monkeypatch.setattr(compare, "EXTRA", 1)
    monkeypatch.setattr(compare, "step_seconds", lambda configs: {name: 1 + len(name) / 100 for name in configs})
    return configs


def run(folder, *options):
    """Status and the printed table's lines."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = compare.main(["--out", str(folder), *options])
    return status, said.getvalue().partition("paired RMSE")[2].splitlines()[:-1]


def stopped_after(monkeypatch, trainings, folder, *options):
    """Status of a run that gets Ctrl-C when so many trainings are done."""
    train, count = sweep._train, iter(range(trainings))

    def pressed(config, **options):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return train(config, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_train", pressed)
        with pytest.raises(SystemExit) as stop:
            run(folder, *options)
    return stop.value.code


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_to_the_same_results(trained, tmp_path, monkeypatch, capsys):
    """It once began anew: an hour of one core, with "trainings that were finished" promised in an empty folder."""
    whole = run(tmp_path / "whole", *OPTIONS)
    needed = list(trained)
    assert len(needed) == 14  # 2 methods with 2 settings at 2 rates, 1 beyond for each, 2 seeds each
    trained.clear()
    folder = tmp_path / "parts"
    again = ["--resume", "--jobs", "1"]
    for options, more in ((OPTIONS, 3), ([*OPTIONS, "--resume"], 9), (again, 1)):  # in the sweep, then twice later
        assert stopped_after(monkeypatch, more, folder, *options) == 130
        assert "stopped; the same command with --resume goes on" in capsys.readouterr().err.splitlines()[-1]
        assert len(json.loads((folder / comparison.FILE).read_text())["trainings"]) == len(trained)
        assert not (folder / "results.json").exists()

    def never(configs):
        raise AssertionError("step times are those of the first time")

    monkeypatch.setattr(compare, "step_seconds", never)
    assert run(folder, *again) == whole
    assert trained == needed  # none twice
    assert (folder / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    assert (folder / "error.png").is_file()
    assert run(folder, "--resume") == whole  # of a finished comparison: its table again
    assert trained == needed


def refused(capsys, folder, *options) -> str:
    """The one line of an error that ends the command with status 2."""
    with pytest.raises(SystemExit) as stop:
        run(folder, *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.slow
def test_what_is_not_the_stored_comparison_is_refused(trained, tmp_path, monkeypatch, capsys):
    points = tmp_path / "points.csv"
    points.write_text("x,y\n" + "".join(f"{i % 7},{i % 5 + i % 3}\n" for i in range(60)))
    own = ["--data", str(points)]
    folder = tmp_path / "out"
    assert "holds no comparison to resume" in refused(capsys, folder, "--resume")
    assert stopped_after(monkeypatch, 1, folder, *OPTIONS, *own) == 130
    capsys.readouterr()
    before = (folder / comparison.FILE).read_bytes()
    assert "already holds a comparison: --resume, --overwrite, or" in refused(capsys, folder, *OPTIONS, *own)
    assert "--steps 3" in refused(capsys, folder, "--resume", "--steps", "4")
    assert "--rates 0.001 0.01" in refused(capsys, folder, "--resume", "--rates", "0.01")
    assert "--methods TVM sCT" in refused(capsys, folder, "--resume", "--methods", "tvm")
    assert "--width 8" in refused(capsys, folder, "--resume", "--width", "16")
    points.write_text(points.read_text() + "3,3\n")
    assert "other data" in refused(capsys, folder, "--resume")
    assert (folder / comparison.FILE).read_bytes() == before
    (folder / comparison.FILE).write_text(before.decode().replace('"TVM', '"RVM'))
    assert "is not a comparison of this program" in refused(capsys, folder, "--resume")
    assert len(trained) == 1


def test_results_come_in_order_though_trainings_end_in_another(monkeypatch):
    monkeypatch.setattr(sweep, "train_as_finished", lambda *_, **__: iter([(2, "c"), (0, "a"), (3, "d"), (1, "b")]))
    assert list(sweep.train_many([], None, jobs=2, points=10, label="")) == ["a", "b", "c", "d"]


@pytest.mark.slow
def test_measuring_step_times_shows_how_far_it_is(monkeypatch, capsys):
    """It once took a minute and a half without a word."""
    monkeypatch.setattr(compare, "ROUNDS", 2)
    monkeypatch.setattr(compare, "REPEATS", 1)
    times = compare.step_seconds(comparison.Plan(methods=("TVM",)).configs(compare.ToyConfig(width=4, depth=1)))
    assert set(times) == {"TVM", "TVM, time_sampler=trunc"}
    assert "measuring step times: 100%" in capsys.readouterr().err
