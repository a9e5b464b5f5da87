"""Progress on a terminal, and in a log file."""

import io
import itertools
import re

import pytest

from tvm_ref.cli import progress as module
from tvm_ref.cli.progress import FIRST, LONGEST, progress
from tvm_ref.experiments.sweep import BAR


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def work(file, clock, steps: int = 1000, **options) -> str:
    """Do a second of work per step."""
    with progress(total=steps, desc="work", file=file, mininterval=0, **options) as bar:
        for _ in range(steps):
            clock[0] += 1
            bar.update()
    return file.getvalue()


def test_a_log_gets_lines_at_doubling_times_then_every_minute_and_the_last_one(clock):
    """Times once doubled without end: work of some minutes was silent for half of them."""
    lines = work(io.StringIO(), clock, 330).splitlines()
    assert [int(line.split("|")[2].split("/")[0]) for line in lines] == [5, 10, 20, 40, 80, 140, 200, 260, 320, 330]
    assert all(line.startswith("work: ") and line.isascii() for line in lines)


def test_a_day_of_work_has_a_line_a_minute(clock):
    text = work(io.StringIO(), clock, 7200)
    assert "\r" not in text
    seen = [int(line.split("|")[2].split("/")[0]) for line in text.splitlines()]
    assert max(after - before for before, after in itertools.pairwise(seen)) == LONGEST
    assert len(seen) < 7200 / LONGEST + 10


@pytest.mark.parametrize("make", [io.StringIO, Terminal])
def test_fractions_that_add_up_to_a_little_more_than_the_total_are_the_total(clock, make):
    """They once drew "3.0/3 [00:05<-00:00]" and warned of it."""
    file = make()
    with progress(total=3, file=file, mininterval=0, bar_format=BAR) as bar:
        for share in [0.1] * 30:
            clock[0] += 1
            bar.update(share * (1 + 1e-9))
        assert bar.n > 3
    last = re.split(r"[\r\n]", file.getvalue().strip())[-1]
    assert "100%" in last
    assert "3.0/3" in last
    assert "-" not in last


def test_the_end_is_told_once(clock):
    """Also where the last step takes long, so that a line would be due."""
    file = io.StringIO()
    with progress(total=2, file=file, mininterval=0) as bar:
        for _ in range(2):
            clock[0] += 100
            bar.update()
    assert [line[:4] for line in file.getvalue().splitlines()] == ["50%|", "100%"]


def test_short_work_has_one_line_and_none_where_the_bar_is_to_vanish(clock):
    assert work(io.StringIO(), clock, int(FIRST) - 1).count("\n") == 1
    assert work(io.StringIO(), clock, int(FIRST) - 1, leave=False) == ""
    assert work(io.StringIO(), clock, disable=True) == ""


def test_a_pause_is_not_made_up_for(clock):
    """After one long step the next line waits for its time again."""
    file = io.StringIO()
    with progress(total=5, file=file, mininterval=0) as bar:
        for seconds in (100, 1, LONGEST - 2):
            clock[0] += seconds
            bar.update()
        assert file.getvalue().count("\n") == 1
        clock[0] += 1
        bar.update()
        assert file.getvalue().count("\n") == 2


def test_a_terminal_gets_a_bar_that_is_redrawn(clock):
    text = work(Terminal(), clock, 20)
    assert text.count("\r") >= 20
    assert text.count("\n") == 1
