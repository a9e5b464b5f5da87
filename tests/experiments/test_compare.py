"""The comparison: what is swept, who wins, what is written."""

import itertools
import json
import math

import pytest

from tvm_ref.experiments import compare, family_plots, methods, sweep

TINY = ["--batch-size", "16", "--width", "8", "--depth", "2", "--points", "60", "--jobs", "1", "--steps", "10"]


@pytest.mark.slow
@pytest.mark.parametrize("budget", compare.BUDGETS)
def test_compare_writes_results_table_and_figure(tmp_path, capsys, monkeypatch, budget):
    monkeypatch.setattr(compare, "EXTRA", 1)
    monkeypatch.setattr(compare, "ROUNDS", 3)
    monkeypatch.setattr(compare, "REPEATS", 5)
    chosen = ["TVM", "sCT", "flow matching"]
    options = [*TINY, "--seeds", "2", "--rates", "1e-3", "1e-2", "--out", str(tmp_path)]
    options += ["--budget", budget, "--methods", *chosen]
    assert compare.main(options) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert list(report["methods"]) == chosen
    for name, method in report["methods"].items():
        assert [r["seed"] for r in method["runs"]] == ([0, 1] if name == "flow matching" else [0, 1, 2, 3])
        assert all(r["lr"] == method["lr"] and r["setting"] == method["setting"] for r in method["runs"])
        settings, swept = methods.SETTINGS.get(name, ({},)), report["sweeps"][name]
        planned = [(s, lr) for s in settings for lr in (1e-3, 1e-2)]
        assert [(r["setting"], r["lr"]) for r in swept[: len(planned)]] == planned
        assert len(swept) == len(planned) + 1  # of two rates one is the best, and at the edge
        winner = swept[compare.best(swept)]
        assert (winner["setting"], winner["lr"]) == (method["setting"], method["lr"])
        rates = [r["lr"] for r in swept if r["setting"] == method["setting"]]
        assert method["at_edge"] == (method["lr"] in (min(rates), max(rates)))
        nfes = compare.NFES[:1] if name == "sCT" else compare.NFES
        assert set(method["runs"][0]["figures"]) == {str(n) for n in nfes}
        per_step = report[{"products": "step_products", "time": "step_milliseconds"}[budget]]
        spent = 10 * per_step[compare.UNIT] / per_step[methods.named(name, method["setting"])]
        assert method["steps"] == pytest.approx(spent, abs=0.6)
    assert (tmp_path / "error.png").read_bytes()[:4] == b"\x89PNG"
    output = capsys.readouterr().out
    assert "flow matching" in output
    assert "16 trainings, and more" in output  # 10 to sweep, 6 on seeds
    with pytest.raises(SystemExit) as stop:
        compare.main(options)
    assert stop.value.code == 2


def test_an_interrupted_comparison_continues_and_overwriting_starts_anew(tmp_path, monkeypatch):
    """By equal time, where step times are measured with another result each time."""
    factors, trained, train = itertools.count(1), [], sweep._trained
    monkeypatch.setattr(
        compare, "step_seconds", lambda configs, n=factors: dict.fromkeys(configs, next(n)) | {compare.UNIT: 1}
    )
    monkeypatch.setattr(sweep, "_trained", lambda config, *others: trained.append(config) or train(config, *others))
    monkeypatch.setattr(compare, "draw", lambda report, path: path.touch())
    options = [*TINY, "--seeds", "1", "--rates", "0.01", "--out", str(tmp_path), "--budget", "time", "--methods", "TVM"]
    for extra, steps, trainings in (([], 10, 5), ([], 10, 5), (["--overwrite"], 5, 10)):
        if not extra:
            (tmp_path / "results.json").unlink(missing_ok=True)  # as if it had been interrupted
        assert compare.main([*options, *extra]) == 0
        report = json.loads((tmp_path / "results.json").read_text())
        assert (report["methods"]["TVM"]["steps"], len(trained)) == (steps, trainings)


def test_the_picture_puts_the_best_at_one_step_on_top_and_gives_each_family_a_colour():
    rows = {name: (3.0, {n: [0.1, 0.2 + i / 1e3, 0.3] for n in (1, 4, 64)}) for i, name in enumerate(methods.METHODS)}
    rows["sCT"][1][4] = [float("nan")] * 3
    rows["shortcut"] = (3.0, {n: [0.1, float("inf"), 0.01] for n in (1, 4, 64)})  # a seed diverged: its median is 0.1
    families = methods.family_of(rows)
    figure = family_plots.plot_comparison(rows, families, "")
    figure.draw_without_rendering()
    left, right = figure.axes
    names = [text.get_text() for text in left.get_yticklabels()]
    assert names[-1] == "shortcut"
    assert [name for name in reversed(names) if name != "shortcut"] == [name for name in rows if name != "shortcut"]
    colours = dict(zip(names, (bar.get_facecolor() for bar in left.patches), strict=True))
    assert all((colours[a] == colours[b]) == (families[a] == families[b]) for a in names for b in names)
    dots = [c.get_offsets()[0] for c in right.collections if len(c.get_offsets()) == 1]
    assert [float(x) for x, y in dots if y == len(names) - 1] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize(
    ("errors", "rate"),
    [
        ({0.003: 0.3, 0.01: 0.1, 0.03: 0.2}, None),
        ({0.003: 0.1, 0.01: 0.2, 0.03: 0.3}, 0.001),
        ({0.003: 0.3, 0.01: 0.2, 0.03: 0.1}, 0.1),
        ({0.003: float("inf"), 0.01: float("inf")}, 0.001),
        ({0.002: float("nan"), 0.005: 0.1}, 0.01),
        ({0.01: 0.1}, None),
    ],
)
def test_a_sweep_goes_on_beyond_a_best_rate_at_its_edge(errors, rate):
    def result(lr, error, setting):
        return {"objective": "tvm", "lr": lr, "setting": setting, "figures": {} if error == math.inf else {"1": error}}

    results = [result(lr, error, {}) for lr, error in errors.items()]
    assert compare.beyond(results) == rate
    other = [
        result(lr, math.inf, {"time_sampler": "trunc"}) for lr in (1e-4, 1.0)
    ]  # another setting has edges of its own
    assert compare.beyond([*results, *other]) == rate


def test_best_rate_judges_each_method_at_the_nfe_that_it_is_for():
    def result(objective, lr, one, many):
        return {"objective": objective, "lr": lr, "figures": {"1": one, "64": many}}

    for objective, best in (("tvm", 0.2), ("fm", 0.1)):
        diverged = {"objective": objective, "lr": 0.3, "figures": {}}
        results = [result(objective, 0.1, 2.0, 0.5), result(objective, 0.2, 1.0, 0.6), diverged]
        assert results[compare.best(results)]["lr"] == best
