"""Tables of points as people have them, and one clear line for those that cannot be used."""

import numpy as np
import pytest
import torch

from tvm_ref.toy.data.distributions import standardise
from tvm_ref.toy.data.points import load_points
from tvm_ref.toy.data.table import parse, read_table


@pytest.fixture
def points():
    return np.random.default_rng(0).normal([3, 10], [0.2, 2], (100, 2))


@pytest.mark.parametrize("form", ["npy", "csv", "csv with header", "csv with byte order mark", "CSV", "tsv", "txt"])
def test_points_are_read_back(tmp_path, points, form):
    path = tmp_path / f"points.{form[:3]}"
    if form == "npy":
        np.save(path, points)
    else:
        delimiter = {"tsv": "\t", "txt": "  "}.get(form, ",")
        np.savetxt(path, points, delimiter=delimiter, header="a,b" if "header" in form else "", comments="")
        if "mark" in form:
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    table, columns = read_table(path)
    torch.testing.assert_close(table, torch.from_numpy(points))
    assert columns == (("a", "b") if "header" in form else ("x", "y"))
    torch.testing.assert_close(load_points(path, 0.2).centres, standardise(torch.from_numpy(points), 0.2))


TABLES = {  # of the points (1.5, -2), (3, 400)
    "commas": ("1.5,-2\n3,400\n", ()),
    "blanks": ("  1.5   -2\n3 4e2", ()),
    "semicolons": ("1.5;-2\n3;400", ()),
    "tabs": ("x\ty\n1.5\t-2\n3\t400", ("x", "y")),
    "quotes and blank lines": ('"length", "width"\n\n"1.5", "-2"\n"3","400"\n\n', ("length", "width")),
    "a comment, as np.savetxt heads a table": ("# x y\n1.5 -2\n3 400", ()),
    "a header of numbers, as pandas heads unnamed columns": ("0,1\n1.5,-2.0\n3.0,400.0", ("0", "1")),
    "a header with blanks in it": ("petal length;petal width\n1.5;-2\n3;400", ("petal length", "petal width")),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_understood_as_people_have_them(name):
    text, columns = TABLES[name]
    numbers, found = parse(text)
    np.testing.assert_array_equal(numbers, [[1.5, -2], [3, 400]])
    assert found == columns


def test_whole_numbers_may_begin_with_0_and_1():
    """Then "0,1" is a point, not pandas's header."""
    assert len(parse("0,1\n5,7\n3,4")[0]) == 3


def bad_files():
    yield "points.xlsx", "1,2\n" * 20, "points come as .csv .tsv .txt .dat or .npy, not '.xlsx'"
    yield "three.csv", "1,2,3\n" * 20, "N x 2, got 20 x 3; .* TVM in your own loop, which takes any shape"
    yield "index.csv", "".join(f"{i},5,{i}\n" for i in range(20)), "got 20 x 3; the first column counts the rows"
    yield "one.csv", "1\n" * 20, "got 20 x 1; columns are separated by"
    yield "header.csv", "x,y\n", "nothing but a header"
    yield "text.csv", "x,y\n1,2\n\n" + "1,a\n" * 20, "not a table of numbers: line 4: no numbers in '1,a'"
    yield "hole.csv", "1,2\n" * 20 + "1,\n", "line 21: no numbers in '1,'"
    yield "commas.csv", "x;y\n" + "1,5;2\n" * 20, "line 2: no numbers in '1,5;2'; write decimal points, not commas"
    yield "ragged.csv", "1,2\n" * 20 + "1\n", "line 21 has 1 column, and others have 2"
    yield "nan.csv", "1,2\n" * 20 + "nan,1\n", "points that are NaN or infinite: 1, first point 21"
    yield "few.csv", "1,2\n2,3\n", "at least 10 points are needed, got 2"
    yield "empty.csv", "", "empty"
    yield "flat.csv", "".join(f"{i},5\n" for i in range(20)), "column 2 is constant"
    yield "pickle.npy", np.array([{"a": 1}], dtype=object), "not a table of numbers"


@pytest.mark.parametrize(("name", "content", "message"), [pytest.param(*c, id=c[0]) for c in bad_files()])
def test_unusable_points_raise_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(ValueError, match=message) as error:
        load_points(path)
    assert "\n" not in str(error.value)
