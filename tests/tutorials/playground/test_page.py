"""The page to play with: one file that loads nothing; in a browser, its story moves, its controls work, it learns."""

import json
import re
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests.commands import one_line
from tutorials.playground import page as command
from tvm_ref.distances import sampling_floor, wasserstein2
from tvm_ref.flow_map import FlowMap
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.sampling import EulerStep, sample_path
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.data.mixture import GaussianMixture
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
    assert set(re.findall(r"https?://[^\s\"<]+", text)) == {"https://arxiv.org/abs/2511.19797"}  # a link loads nothing
    assert not re.findall(r"\bsrc=|[^.]url\(|@import|\bimport\b|fetch\(|XMLHttp|{{", text)
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
    assert text.count("<script") == text.count("</script>") == 8


def test_an_interrupted_run_shows_how_far_it_came(tmp_path):
    folder = make_run(tmp_path / "run", width=8, depth=1)
    (folder / "metrics.json").write_text(json.dumps({"steps": {"done": 20, "planned": 100}}))
    _, run = command.describe_run(folder, [])
    assert [entry["step"] for entry in run["snapshots"]] == [0, 1, 3, 10, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "nothing is there"),
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


def open_page(new_page, file, address: str = "", **options):
    page, complaints = new_page(**options)
    page.goto(file.as_uri() + address)
    page.wait_for_selector("body[data-drawn]", timeout=120_000)
    return page, complaints


@pytest.fixture(scope="module")
def window(new_page, file):
    page, complaints = open_page(new_page, file, viewport={"width": 1200, "height": 800})
    yield page, complaints
    page.context.close()


@pytest.fixture
def opened(window):
    """The page as at first; nothing may have been written to the console, thrown, or asked of the network."""
    page, complaints = window
    page.evaluate(
        "sweeping = false; set({ ...FIRST, view: 'explore' }); sections.at(-1).scrollIntoView({ behavior: 'instant' })"
    )
    settle(page)
    yield page
    settle(page)
    assert complaints == []


def wait(page, condition: str, seconds: int = 120):
    """Wait until an expression holds. (playwright's own way evaluates text, which the page's policy forbids.)"""
    assert page.evaluate(f"""async () => {{
        const end = performance.now() + {1000 * seconds};
        while (!({condition}) && performance.now() < end) await new Promise(resolve => setTimeout(resolve, 10));
        return Boolean({condition});
    }}"""), f"not within {seconds} s: {condition}"


def settle(page):
    """Wait until the part that explores is shown and stands still."""
    wait(page, "state.view === 'explore' && !asked && data.cloud.solved")


def state(page) -> dict:
    settle(page)
    return page.evaluate("({ ...state })")


def numbers(page, selector: str) -> list[float]:
    """The numbers that an element holds, which may be folded away."""
    settle(page)
    text = page.text_content(selector).replace("\N{MINUS SIGN}", "-")
    return [float(a) for a in re.findall(r"-?\d+\.?\d*", text)]


def check_readout(page, runs):
    """d/ds f, TVM's loss and the distance to the exact landing are those of PyTorch at the page's state."""
    now = state(page)
    model, oracle = flow_map(runs[now["run"]]), make_distribution("moons")
    x = torch.tensor([[now["x"], now["y"]]], dtype=torch.float64)
    t, s = (torch.tensor([now[k]], dtype=torch.float64) for k in ("t", "s"))
    f, df = model.displacement_and_terminal_velocity(x, t, s)
    loss = (df - model.velocity(x + f, s)).square().mean()
    assert numbers(page, "#df") == pytest.approx(df[0].tolist(), rel=1e-3, abs=0.006)
    assert numbers(page, "#loss") == pytest.approx([float(loss)], rel=1e-3, abs=1e-4)
    distance = (x + f - oracle.jump(x, t, s)).norm()
    assert numbers(page, "#off") == pytest.approx([float(distance)], rel=1e-3, abs=1e-3)


def test_errors_shown_are_those_of_metrics(opened, runs):
    """From the same noise: RMSE and median of the distances to the exact flow, for jumps and for Euler's steps."""
    model, oracle = flow_map(runs[0]), make_distribution("moons")
    x = torch.tensor(opened.evaluate("[...noise]"), dtype=torch.float64).view(-1, 2)
    exact = oracle.jump(x, torch.ones(len(x)), torch.zeros(len(x)))
    for how, jump, steps in (("jump", model.jump, 1), ("euler", EulerStep(model), 8)):
        opened.evaluate(f"set({{ how: '{how}', steps: {steps} }})")
        distances = (sample_path(jump, x, steps)[-1] - exact).norm(dim=1)
        expected = [float(distances.square().mean().sqrt()), float(distances.median())]
        assert numbers(opened, "#error") == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_both_handles_move_and_push_each_other(opened, runs):
    """By keyboard; the browser's own sliders take the mouse."""
    opened.evaluate("set({ t: 0.8, s: 0.3 })")
    settle(opened)
    opened.focus("#t")
    opened.keyboard.press("ArrowRight")  # towards data
    settle(opened)
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
def test_the_point_is_dragged_and_moved_by_keys(opened, runs):
    opened.evaluate("set({ s: 0.25, x: 0.5, y: 0 })")
    settle(opened)
    box = opened.locator("#canvas").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    opened.mouse.move(middle[0] + 0.5 * box["width"] / 5.4, middle[1])
    opened.mouse.down()
    opened.mouse.move(*middle, steps=4)
    opened.mouse.up()
    now = state(opened)
    assert (now["x"], now["y"]) == pytest.approx((0, 0), abs=0.02)
    opened.focus("#canvas")
    opened.keyboard.press("ArrowUp")
    assert state(opened)["y"] == pytest.approx(now["y"] + 0.08)
    check_readout(opened, runs)


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
        assert opened.inner_text("#snapshot-label") == f"{step} of 100"
        shown.add(opened.text_content("#error"))
    assert len(shown) > 1
    opened.get_by_label("Euler steps").check()
    opened.focus("#steps")
    opened.keyboard.press("End")
    settle(opened)
    assert opened.inner_text("#calls") == "32 calls"
    opened.evaluate("set({ t: 0.8, s: 0.2 })")
    opened.click("#play")  # sweeps s to the data
    wait(opened, "!sweeping && state.s === 0")


@pytest.mark.slow
def test_the_address_keeps_what_is_shown(new_page, file):
    kept = "view=explore&t=0.8&s=0.3&run=2&back=1&how=euler&steps=8&x=0.25&y=-0.5"
    opened, complaints = open_page(new_page, file, f"#{kept}")
    now = state(opened)
    assert [str(now[k]).lower() for k in ("t", "s", "run", "back", "how", "steps", "x", "y")] == [
        a.split("=")[1] for a in kept.split("&")[1:]
    ]
    assert "median" in opened.text_content("#error")  # nothing was moved since the exact flow was solved
    opened.evaluate("set({ run: 1 })")
    wait(opened, "location.hash.includes('run=1')")
    assert set(opened.url.split("#")[1].split("&")) == set(kept.replace("run=2", "run=1").split("&"))
    opened.context.close()
    assert complaints == []


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}


@pytest.mark.slow
def test_the_story_is_told_on_a_phone(new_page, file):
    """It moves when it opens; each tap on "next" brings the next part; the picture stays; nothing is too wide."""
    opened, complaints = open_page(new_page, file, **PHONE)
    before = opened.evaluate("clock")
    wait(opened, f"clock > {before}")
    for view in ("jump", "times", "arrows", "training", "draw", "explore"):
        opened.locator("#next").tap()
        wait(opened, f"state.view === '{view}' && shot.dots.every(Number.isFinite)")
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390
        assert opened.evaluate("$('frame').getBoundingClientRect().top") == pytest.approx(0, abs=1)
    opened.locator("#canvas").tap()  # in its middle
    assert state(opened)["x"] == pytest.approx(0, abs=0.05)
    opened.context.close()
    assert complaints == []


@pytest.mark.slow
def test_no_motion_where_none_is_wanted(new_page, file):
    opened, _ = open_page(new_page, file, reduced_motion="reduce")
    wait(opened, "!asked")
    assert opened.evaluate("[playing, clock]") == [False, opened.evaluate("VIEWS.steps.still")]
    opened.context.close()


@pytest.mark.slow
def test_drawn_points_are_learned_in_a_worker_and_become_the_data(new_page, file):
    opened, complaints = open_page(new_page, file, "#view=draw", viewport={"width": 1200, "height": 800})
    box = opened.locator("#canvas").bounding_box()
    opened.mouse.move(box["x"] + 100, box["y"] + 100)
    opened.mouse.down()
    opened.mouse.move(box["x"] + 400, box["y"] + 300, steps=30)
    opened.mouse.up()
    drawn = opened.evaluate("pad.points.length")
    assert drawn > 24
    opened.click("#learn")
    wait(opened, "data !== original && data.runs[0].snapshots.length > 1")
    opened.click("#learn")  # stops
    assert opened.evaluate("[pad.learning, data.points.length]") == [False, 2 * min(drawn, 256)]
    points = torch.tensor(opened.evaluate("[...data.points]")).view(-1, 2)
    assert float(points.mean().abs()) < 1e-6
    assert float(points.square().mean()) == pytest.approx(1 - 0.07**2)
    wait(opened, "location.hash.includes('points=')")
    opened.evaluate("$('clear').click()")
    assert opened.evaluate("data === original && pad.points.length === 0")
    opened.context.close()
    assert complaints == []


@pytest.mark.slow
def test_damaged_points_in_the_address_are_named(new_page, file):
    opened, complaints = open_page(new_page, file, "#view=draw&points=a")
    assert "address are damaged" in opened.text_content("#status")
    assert opened.evaluate("state.view") == "draw"
    opened.context.close()
    assert complaints == []


def seconds_of_worker() -> float:
    """CPU time of the thread in which a page learns, which unlike its pace does not depend on other programs."""
    threads = [(p.pid, t) for p in psutil.Process().children(recursive=True) for t in p.threads()]
    names = [Path(f"/proc/{pid}/task/{t.id}/comm").read_text() for pid, t in threads]
    return sum(
        t.user_time + t.system_time for name, (_, t) in zip(names, threads, strict=True) if "DedicatedWorker" in name
    )


@pytest.mark.slow
def test_a_heart_is_learned_and_its_pace_printed(new_page, file):
    """W2 to data begins at 4.4 times that of two draws of data. playground/README.md quotes what is printed."""
    opened, complaints = open_page(new_page, file, "#view=draw", viewport={"width": 1200, "height": 800})
    opened.click("[data-preset=heart]")
    wait(opened, "pad.model && !pad.learning")
    steps, sigma, centres, jumped = opened.evaluate(
        "[data.runs[0].steps, SIGMA, pad.points, [...pad.model.jump(noise, 1, 0)]]"
    )
    heart, jumped = GaussianMixture(torch.tensor(centres), sigma), torch.tensor(jumped, dtype=torch.float64).view(-1, 2)
    data = heart.sample(len(jumped), torch.Generator().manual_seed(0))[0]
    floor = sampling_floor(lambda n, generator: heart.sample(n, generator)[0], len(jumped))[0]
    distance = wasserstein2(jumped, data)
    pace = steps / seconds_of_worker()
    print(f"{steps} steps, {pace:.0f} a second of CPU time; W2 {distance:.2f}, of two draws {floor:.2f}")
    opened.context.close()
    assert distance < 2.5 * floor
    assert complaints == []
