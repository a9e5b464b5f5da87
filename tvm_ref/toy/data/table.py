"""Read points in 2D from two columns of a .npy file or of text, with or without a header.

Text is UTF-8, UTF-16 with a byte order mark, or else Windows-1252. Its columns are separated by commas, semicolons,
tabs or blanks.
"""

import codecs
import csv
import math
import re
from collections.abc import Sequence
from itertools import dropwhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tvm_ref.cli.errors import UserError, require, user_errors

TEXT = (".csv", ".tsv", ".txt", ".dat")
GAPS = {"", "-", "na", "n/a", "#n/a", "#nv", "null", "none"}  # besides nan; #NV is #N/A in a German Excel
DECIMAL_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+(e[+-]?\d+)?", re.IGNORECASE)  # 1234,5 or 1.234,5
COMMENT = re.compile(r"\s*#(?!(N/A|NV)\b)")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}([.,])\d{3}(\1\d{3})*")  # 1,234 or 1.234: it may mean 1234


def read_table(path: Path, wanted: Sequence[str] | None = None) -> tuple[Tensor, tuple[str, ...], int]:
    """Read points [N, 2] (float64), the names of their columns, and how many rows with gaps were left out.

    Args:
        path: the file.
        wanted: the two columns, by their names in the header or by number from 1; None: the only two.

    Raises:
        UserError: another kind of file, other columns, text, infinite values, fewer than 10 points.
        OSError: a file that is missing or cannot be read.
    """
    kind = path.suffix.lower()
    if kind not in (*TEXT, ".npy"):
        raise UserError(f"{path}: points come as {' '.join(TEXT)} or .npy, not '{kind or 'a file without extension'}'")
    columns: tuple[str, ...] = ("x", "y")
    with user_errors(f"{path} cannot be used", ValueError, TypeError, EOFError, csv.Error):
        if kind == ".npy":
            table = np.load(path, allow_pickle=False)
            require(table.dtype.kind in "fiu", f"not a table of numbers: its type is {table.dtype}")
            require(table.ndim == 2, f"points must be N x 2, got {' x '.join(map(str, table.shape))}")
            points = table[:, choose(wanted, (), table.shape[1])].astype(np.float64)
        else:
            points, columns = parse(decode(path.read_bytes()), wanted)
    gaps = np.isnan(points).any(1)
    points = points[~gaps]
    check(path, points, f", besides {gaps.sum()} with gaps" if gaps.any() else "")
    return torch.from_numpy(points), columns, int(gaps.sum())


def decode(raw: bytes) -> str:
    """Decode UTF-16 with a byte order mark, UTF-8 with or without one, or else Windows-1252."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252")


def parse(text: str, wanted: Sequence[str] | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read two columns [N, 2], NaN in their gaps, and their names, x and y if there is no header.

    Lines that begin with # are left out. Decimal commas are read where some number of the file cannot be meant
    otherwise: 1,5 or 1.234,50, but not 1,234.

    Raises:
        UserError: no lines, no such columns, or text where numbers belong, with the number of the line.
    """
    rows = list(dropwhile(lambda row: not any(row[1]), _split(text)))
    require(bool(rows), "the file is empty")
    head, width = rows[0][1], len(rows[:2][-1][1])  # a header that is not asked for may have blanks in its names
    chosen = choose(wanted, head, width)
    cells = [row[k] for _, row in rows if len(row) == width for k in chosen]
    comma = any(DECIMAL_COMMA.fullmatch(cell) and not THOUSANDS.fullmatch(cell) for cell in cells)
    first = [head[k] for k in chosen] if len(head) == width else head
    has_header = None in [_number(cell, comma) for cell in first]
    # pandas numbers columns that have no names: "0,1" above numbers with points is a header, too
    has_header |= head == ["0", "1"] and "." in text
    points = []
    for i, row in rows[has_header:]:
        if len(row) != width:
            raise UserError(f"line {i} has {len(row)} column{'s' * (len(row) > 1)}, and others have {width}")
        pair = [_number(row[k], comma) for k in chosen]
        if None in pair:
            cell = row[chosen[pair.index(None)]]
            hint = "; write decimal points, and nothing between thousands" if re.search(r"\d[.,]\d", cell) else ""
            raise UserError(f"line {i}: no number in {cell!r:.60}{hint}")
        points.append(pair)
    require(bool(points), "nothing but a header")
    return np.array(points, float), tuple(first) if has_header and len(head) == width else ("x", "y")


def choose(wanted: Sequence[str] | None, header: Sequence[str], width: int) -> list[int]:
    """Find two of a table's columns by name or by number from 1: their indices.

    Raises:
        UserError: no such columns; none asked for of a table that has not just two.
    """
    if wanted is None:
        require(width != 1, "one column only; columns are separated by commas, semicolons, tabs or blanks")
        advice = "choose two with --columns, by name or number, or train on all in your own loop (README.md)"
        require(width == 2, f"{width} columns, and this command draws in 2D: {advice}")
        return [0, 1]
    names = {name: k for k, name in enumerate(header) if len(header) == width}
    names |= {str(k + 1): k for k in range(width)}
    there = f"; the first line has {len(header)}: {', '.join(header)}" if header else ""
    for name in wanted:
        require(name in names, f"no column {name!r:.40} among {width}{there}")
    chosen = [names[name] for name in wanted]
    require(len(chosen) == len({*chosen}) == 2, "--columns takes two different columns")
    return chosen


def check(path: Path, points: np.ndarray, besides: str = "") -> None:
    """Raise UserError for numbers [N, 2] that are too few, infinite, or all equal on an axis."""
    require(len(points) >= 10, f"{path}: at least 10 points are needed, got {len(points)}{besides}")
    infinite = (~np.isfinite(points)).any(1).sum()
    require(infinite == 0, f"{path}: points that are infinite: {infinite}")
    for axis, spread in enumerate(np.ptp(points, axis=0), 1):
        require(bool(spread > 0), f"{path}: column {axis} of the two is constant")


def _split(text: str) -> list[tuple[int, list[str]]]:
    """Split text into numbered lines of cells."""
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    lines = [(i, line) for i, line in lines if not COMMENT.match(line)]
    decimals = sum(" " in line.strip() and all(map(DECIMAL_COMMA.fullmatch, line.split())) for _, line in lines)
    marks = ";\t" if 2 * decimals > len(lines) else ";\t,"  # 1,5 2,5 are two columns
    common = (mark for mark in marks if 2 * sum(mark in line for _, line in lines) >= len(lines))
    separator = next(common, " ")
    texts = [" ".join(line.split()) if separator == " " else line for _, line in lines]
    rows = [next(csv.reader([text], delimiter=separator, skipinitialspace=True)) for text in texts]
    return [(i, [cell.strip() for cell in row]) for (i, _), row in zip(lines, rows, strict=True)]


def _number(cell: str, comma: bool) -> float | None:
    """Read a number, NaN for a gap, None for other text; `comma`: the file has decimal commas."""
    if comma and DECIMAL_COMMA.fullmatch(cell):
        cell = cell.replace(".", "").replace(",", ".")
    elif comma and THOUSANDS.fullmatch(cell):  # 1.234 in such a file
        return None
    try:
        return math.nan if cell.lower() in GAPS else float(cell)
    except ValueError:
        return None
