"""The page to play with: one file that loads nothing; in a browser, its numbers are PyTorch's and its controls work."""

import json
import re

import numpy as np
import pytest
import torch

from tests.commands import one_line
from tutorials.playground import page as command
from tvm_ref.flow_map import FlowMap
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.sampling import EulerStep, sample_path
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.run import Run, add_snapshot, load_snapshots, snapshot_steps

OWN_POINTS = "x,y\n" + "".join(f"{np.cos(a):.4f},{np.sin(2 * a):.4f}\n" for a in np.linspace(0, 6, 40))


def make_run(folder, **options):
    """A run's folder with random weights, as if trained: the last layer and the biases are not zero."""
    run = Run(folder, ToyConfig(**({"steps": 100} | options)))
    run.create()
    network = run.training.ema.module.network
    torch.manual_seed(len(folder.name))
    for step in sorted(snapshot_steps(100)):
        add_snapshot(folder, step, network.state_dict())
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.1 + 0.9 / p.shape[-1] ** 0.5)
    run.write_weights()
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs on moons: TVM of the default size, flow matching, and MeanFlow of an odd size."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        make_run(folder / "tvm"),
        make_run(folder / "fm", objective="fm", width=32),
        make_run(folder / "meanflow", objective="meanflow", width=17, depth=3),
    ]


def flow_map(run, step: int | None = None) -> FlowMap:
    """The model of a folder, at the end or after `step`, in float64."""
    _, _, model = command.load_run(run)
    if step is not None:
        model.network.load_state_dict(load_snapshots(run)[step])
    return model.double()


def test_the_page_is_one_small_file_that_loads_nothing(runs, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    assert command.main([*map(str, runs), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    text = out.read_text()
    assert len(text.encode()) < 3e6
    assert "default-src 'none'" in text  # the browser itself refuses what is not in the file
    assert not re.findall(r"https?://|\bsrc=|url\(|@import|\bimport\b|fetch\(|XMLHttp|{{", text)
    assert [p.name for p in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_runs_of_every_objective_have_a_page(objective, tmp_path):
    text = command.make_page([make_run(tmp_path / objective, objective=objective, width=8, depth=2)])
    method = OBJECTIVES[objective].method
    assert method.title in text
    assert method.summary in text


def test_a_name_is_text_and_no_markup(tmp_path):
    """Also inside the script, where "<!--<script>" would hide its end."""
    points = tmp_path / "<!--<script>.csv"
    points.write_text(OWN_POINTS)
    folder = make_run(tmp_path / "<!--<script>", data=str(points), width=8, depth=1)
    text = command.make_page([folder, folder])
    assert "<!--" not in text
    assert text.count("<script>") == text.count("</script>") == 1


def test_an_interrupted_run_shows_how_far_it_came(tmp_path):
    folder = make_run(tmp_path / "run", width=8, depth=1)
    (folder / "metrics.json").write_text(json.dumps({"steps": {"done": 20, "planned": 100}}))
    _, run = command.describe_run(folder, [])
    assert [entry["step"] for entry in run["snapshots"]] == [0, 1, 3, 10, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "holds no run"),
        ({"conditional": True}, "conditioned on classes"),
        ({"dist": "circles"}, "different data"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, options, message):
    first, second = make_run(tmp_path / "run", width=8, depth=1), tmp_path / "second"
    if options is not None:
        make_run(second, width=8, depth=1, **options)
    assert message in one_line(capsys, command.main, [str(first), str(second), "--out", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


@pytest.fixture(scope="module")
def file(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(command.make_page(runs))
    return path


def open_page(new_page, file, **options):
    page, complaints = new_page(**options)
    page.goto(file.as_uri())
    page.wait_for_selector("body[data-drawn]", timeout=60_000)
    return page, complaints


@pytest.fixture(scope="module")
def window(new_page, file):
    page, complaints = open_page(new_page, file, viewport={"width": 1200, "height": 1000})
    yield page, complaints, page.evaluate("({ ...state })")
    page.context.close()


@pytest.fixture
def opened(window):
    """The page as at first; nothing may have been written to the console, thrown, or asked of the network."""
    page, complaints, first = window
    page.evaluate("changes => { if (sweeping) play(); set(changes); scrollTo(0, 0); }", first)
    settle(page)
    yield page
    settle(page)
    assert complaints == []


def wait(page, condition: str, seconds: int = 60):
    """Wait until an expression holds. (playwright's own way evaluates text, which the page's policy forbids.)"""
    assert page.evaluate(f"""async () => {{
        const end = performance.now() + {1000 * seconds};
        while (!({condition}) && performance.now() < end) await new Promise(resolve => setTimeout(resolve, 10));
        return Boolean({condition});
    }}"""), f"not within {seconds} s: {condition}"


def settle(page):
    """Wait until every picture shows the present state."""
    wait(page, "!asked && !eulerBusy")


def state(page) -> dict:
    settle(page)
    return page.evaluate("({ ...state })")


def numbers(page, selector: str) -> list[float]:
    """The numbers that an element shows."""
    settle(page)
    text = page.inner_text(selector).replace("\N{MINUS SIGN}", "-")
    return [float(a) for a in re.findall(r"-?\d+\.?\d*", text)]


def some_points(n: int = 40):
    """x, t, s: points of the window, and times in order, with both ends and t = s among them."""
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    s, t = torch.rand(n, 2, generator=generator, dtype=torch.float64).sort(dim=1).values.unbind(1)
    t[0], s[0], t[1], s[1], s[2] = 1, 0, 0, 0, t[2]
    return x, t, s


def ask(page, expression: str, *arrays: torch.Tensor) -> torch.Tensor:
    """An expression in x, y, t, s of the page's own functions, at every sample."""
    rows = torch.cat([a.reshape(len(a), -1) for a in arrays], dim=1).tolist()
    return torch.tensor(page.evaluate(f"rows => rows.map(([x, y, t, s]) => {expression})", rows), dtype=torch.float64)


TIGHT = {"rtol": 1e-4, "atol": 1e-4}
STEPS = [*sorted(snapshot_steps(100)), None]


@pytest.mark.parametrize(("run", "snapshot"), [(r, k) for r in range(3) for k in (0, 3, len(STEPS) - 1)])
@pytest.mark.slow
def test_the_models_numbers_are_pytorchs(opened, runs, run, snapshot):
    """F and dF/ds, the velocity, where the jump lands and d/ds f: to 1e-4 of float64."""
    x, t, s = some_points()
    model = flow_map(runs[run], STEPS[snapshot])
    net = f"models[{run}][{snapshot}]"
    F, dF = torch.func.jvp(lambda s: model.network(x, t, s), (s,), (torch.ones_like(s),))
    scale = F.abs().max()  # random weights give numbers up to 30
    actual = ask(opened, f"{net}.network.at(t, s, true)(x, y)", x, t, s)
    torch.testing.assert_close(actual / scale, torch.cat([F, dF], 1) / scale, **TIGHT)
    torch.testing.assert_close(
        ask(opened, f"{net}.velocity(t)(x, y).slice(0, 2)", x, t, s) / scale, model.velocity(x, t) / scale, **TIGHT
    )
    landing, rate = model.jump(x, t, s), model.displacement_and_terminal_velocity(x, t, s)[1]
    if run == 1:  # flow matching teaches no jumps
        landing, rate = EulerStep(model)(x, t, s), model.velocity(x, t)
    actual = ask(opened, f"{net}.jump(t, s, true)(x, y)", x, t, s)
    torch.testing.assert_close(actual / scale, torch.cat([landing, rate], 1) / scale, **TIGHT)


def test_the_exact_flow_is_the_mixtures(opened):
    x, t, s = some_points()
    oracle = make_distribution("moons")
    torch.testing.assert_close(ask(opened, "mixture.velocity(x, y, t)", x, t, s), oracle.velocity(x, t), **TIGHT)
    torch.testing.assert_close(ask(opened, "mixture.path(x, y, t, s).at(-1)", x, t, s), oracle.jump(x, t, s), **TIGHT)


@pytest.mark.slow
def test_the_cloud_is_the_exact_flow_of_its_noise_at_any_time(opened):
    """Solved with fewer steps and interpolated, for speed: to 1e-3 of a data's standard deviation."""
    oracle, noise = make_distribution("moons"), opened.evaluate("[...noise]")
    x = torch.tensor(noise, dtype=torch.float64).view(-1, 2)
    assert len(x) == command.POINTS
    for time in (1.0, 0.93, 0.5, 0.111, 0.03, 0.0):
        actual = torch.tensor(opened.evaluate(f"[...cloud.at({time})]"), dtype=torch.float64).view(-1, 2)[: len(x)]
        expected = oracle.jump(x, torch.ones(len(x)), torch.full((len(x),), time))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


def expected_readout(runs, now: dict) -> tuple[torch.Tensor, float, float]:
    """d/ds f, TVM's loss and the distance to the exact landing at the page's state, by PyTorch."""
    model, oracle = flow_map(runs[now["run"]]), make_distribution("moons")
    x, t, s = (torch.tensor([now[k]], dtype=torch.float64) for k in ("x", "t", "s"))
    x = torch.stack([x, torch.tensor([now["y"]], dtype=torch.float64)], dim=1)
    f, df = model.displacement_and_terminal_velocity(x, t, s)
    loss = (df - model.velocity(x + f, s)).square().mean()
    return df[0], float(loss), float((x + f - oracle.jump(x, t, s)).norm())


def check_readout(page, runs):
    df, loss, distance = expected_readout(runs, state(page))
    assert numbers(page, "#df") == pytest.approx(df.tolist(), rel=1e-3, abs=0.006)
    assert numbers(page, "#loss") == pytest.approx([loss], rel=1e-3, abs=1e-4)
    assert numbers(page, "#gap") == numbers(page, "#loss")
    assert numbers(page, "#off") == pytest.approx([distance], rel=1e-3, abs=1e-3)


def test_errors_shown_are_those_of_metrics(opened, runs):
    """From the same noise: RMSE and median of the distances to the exact flow, for one jump and for Euler's steps."""
    opened.evaluate("set({ steps: 8 })")
    model, oracle = flow_map(runs[0]), make_distribution("moons")
    x = torch.tensor(opened.evaluate("[...noise]"), dtype=torch.float64).view(-1, 2)
    exact = oracle.jump(x, torch.ones(len(x)), torch.zeros(len(x)))
    for picture, jump, steps in (("#jump", model.jump, 1), ("#euler", EulerStep(model), 8)):
        distances = (sample_path(jump, x, steps)[-1] - exact).norm(dim=1)
        expected = [float(distances.square().mean().sqrt()), float(distances.median())]
        assert numbers(opened, f"{picture} .error") == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_both_handles_move_and_push_each_other(opened, runs):
    """By keyboard; the browser's own sliders take the mouse."""
    opened.evaluate("set({ t: 0.8, s: 0.3 })")
    opened.focus("#t")
    opened.keyboard.press("ArrowRight")  # towards data
    opened.focus("#s")
    opened.keyboard.press("ArrowLeft")
    now = state(opened)
    assert (now["t"], now["s"]) == pytest.approx((0.79, 0.31))
    check_readout(opened, runs)
    opened.keyboard.press("Home")  # past t, which goes along
    now = state(opened)
    assert (now["t"], now["s"]) == (1, 1)
    opened.keyboard.press("End")
    assert state(opened)["s"] == 0
    x = torch.tensor([[now["x"], now["y"]]], dtype=torch.float64)
    opened.evaluate("set({ t: 0.4 })")  # the point goes along with the exact flow
    now, exact = state(opened), make_distribution("moons").jump(x, torch.ones(1), torch.full((1,), 0.4))
    assert [now["x"], now["y"]] == pytest.approx(exact[0].tolist(), abs=1e-4)


@pytest.mark.slow
def test_the_point_is_dragged(opened, runs):
    opened.evaluate("set({ s: 0.25 })")
    box = opened.locator("#jump canvas").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    opened.mouse.move(middle[0] - 40, middle[1])
    opened.mouse.down()
    opened.mouse.move(*middle, steps=4)
    opened.mouse.up()
    now = state(opened)
    assert (now["x"], now["y"]) == pytest.approx((0, 0), abs=0.02)
    check_readout(opened, runs)


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}


@pytest.mark.slow
def test_the_page_fits_a_phone_and_follows_a_finger(new_page, file):
    opened, complaints = open_page(new_page, file, **PHONE)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    opened.locator("#jump canvas").scroll_into_view_if_needed()
    settle(opened)
    opened.locator("#jump canvas").tap()  # in its middle
    assert state(opened)["x"] == pytest.approx(0, abs=0.05)
    opened.context.close()
    assert complaints == []


@pytest.mark.slow
def test_runs_switch_and_training_is_scrubbed(opened, runs):
    opened.evaluate("set({ s: 0.3 })")
    for i, name in enumerate(["TVM", "flow matching", "MeanFlow"]):
        opened.get_by_label(name, exact=True).check()
        assert state(opened)["run"] == i
        if name != "flow matching":
            check_readout(opened, runs)
    shown = set()
    opened.focus("#snapshot")
    for step in sorted(snapshot_steps(100), reverse=True):
        opened.keyboard.press("ArrowLeft")
        settle(opened)
        assert opened.inner_text("#snapshot-label") == f"{step} / 100"
        shown.add(opened.inner_text("#jump .error"))
    assert len(shown) > 1
    opened.focus("#steps")
    opened.keyboard.press("End")
    settle(opened)
    assert opened.inner_text("#euler .cost") == "32 evaluations"


@pytest.mark.slow
def test_suggestions_set_what_they_say_and_play_sweeps_to_the_data(opened):
    for button in opened.locator("#tries button").all():
        button.click()
        asked = json.loads(button.get_attribute("data-set"))
        now = state(opened)
        assert {k: now[k] for k in asked} == asked
    opened.evaluate("set({ t: 0.8, s: 0.2, run: 0 })")
    opened.click("#play")
    wait(opened, "!sweeping && state.s === 0")
