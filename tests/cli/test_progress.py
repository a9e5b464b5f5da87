"""Progress on a terminal, and in a log file."""

import io

import pytest
import tqdm.std

from tvm_ref.cli.progress import LOG_INTERVAL, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told."""
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


def work(file, clock, steps: int = 1000, **options) -> str:
    """Do a second of work per step."""
    with progress(total=steps, desc="work", file=file, mininterval=0, miniters=1, **options) as bar:
        for _ in range(steps):
            clock[0] += 1
            bar.update()
    return file.getvalue()


def test_a_log_file_gets_a_line_every_half_minute_and_one_at_the_end(clock):
    lines = work(io.StringIO(), clock, 100).splitlines()
    done = [int(line.split("|")[2].split("/")[0]) for line in lines if "|" in line]
    assert done == [0, 30, 60, 90, 100]
    assert LOG_INTERVAL == 30
    assert all(line.isascii() for line in lines)
    assert work(io.StringIO(), clock, leave=False) == work(io.StringIO(), clock, disable=True) == ""


def test_a_terminal_gets_a_bar_that_is_redrawn(clock):
    text = work(Terminal(), clock, 20)
    assert text.count("\r") >= 20
    assert text.count("\n") == 1
