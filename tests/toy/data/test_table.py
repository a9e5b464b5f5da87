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
    table, columns, gaps = read_table(path)
    assert gaps == 0
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
    "decimal commas": ('"a, b";c\n1,5;-2\n3;400,000', ("a, b", "c")),
    "decimal commas between blanks": ("1,5  -2,0\n3,0 400,0", ()),
    "a header with blanks in it": ("petal length;petal width\n1.5;-2\n3;400", ("petal length", "petal width")),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_understood_as_people_have_them(name):
    text, columns = TABLES[name]
    numbers, found = parse(text)
    np.testing.assert_array_equal(numbers, [[1.5, -2], [3, 400]])
    assert found == (columns or ("x", "y"))


TRACK = "time,lat,lon,ele\n" + "".join(f"2024-05-01T10:00:{i}Z,{48 + i},{11 - i / 8},500\n" for i in range(10, 30))


@pytest.mark.parametrize("wanted", [("lat", "lon"), ("2", "3"), ("lon", "lat"), ("3", "lat")])
def test_columns_are_chosen_by_name_or_number(tmp_path, wanted):
    (tmp_path / "track.csv").write_text(TRACK)
    points, columns, _ = read_table(tmp_path / "track.csv", wanted)
    expected = np.stack([48 + np.arange(10, 30), 11 - np.arange(10, 30) / 8], 1)
    swapped = wanted[1] == "lat"
    np.testing.assert_array_equal(points, expected[:, ::-1] if swapped else expected)
    assert columns == (("lon", "lat") if swapped else ("lat", "lon"))
    bare = TRACK.split("\n", 1)[1]
    np.testing.assert_array_equal(parse(bare, ("2", "3"))[0], expected)  # without a header


def test_rows_with_gaps_in_the_chosen_columns_are_left_out_and_counted(tmp_path):
    (tmp_path / "track.csv").write_text(TRACK + "x,,11,500\nx,NaN,11,5\nx,48,NA,5\nx,71,12,\n")
    points, _, gaps = read_table(tmp_path / "track.csv", ("lat", "lon"))
    assert (len(points), gaps) == (21, 3)
    assert np.isnan(parse("x;y\n#NV;2\n# a comment\n1;2")[0]).tolist() == [[True, False], [False, False]]
    np.save(tmp_path / "track.npy", np.concatenate([points, [[np.nan, 1]]]))
    again, _, gaps = read_table(tmp_path / "track.npy")
    assert torch.equal(again, points)
    assert gaps == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_text_is_decoded(tmp_path, encoding):
    text = "L\xe4nge;Gr\xf6\xdfe\n" + "".join(f"{i},5;{1 + i % 3}.250,75\n" for i in range(1, 20))
    (tmp_path / "points.csv").write_bytes(text.encode(encoding))
    points, columns, _ = read_table(tmp_path / "points.csv")
    assert columns == ("L\xe4nge", "Gr\xf6\xdfe")
    np.testing.assert_array_equal(points, [[i + 0.5, (1 + i % 3) * 1000 + 250.75] for i in range(1, 20)])


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("x;y\n1,234;5\n", "1,234"),
        ("x;y\n1,5;1.234\n", "1.234"),
        ('x,y\n"1,234.50",5\n', "1,234.50"),
        ("x;y\n1.234,5.6;5\n", "1.234,5.6"),
    ],
)
def test_a_number_that_is_not_clear_is_shown_as_it_is_in_the_file(text, cell):
    with pytest.raises(ValueError, match=f"line 2: no number in '{cell}'; write decimal points, and nothing between"):
        parse(text)


def test_whole_numbers_may_begin_with_0_and_1():
    """Then "0,1" is a point, not pandas's header."""
    assert len(parse("0,1\n5,7\n3,4")[0]) == 3


def bad_files():
    yield "points.xlsx", "1,2\n" * 20, "points come as .csv .tsv .txt .dat or .npy, not '.xlsx'"
    yield (
        "three.csv",
        "1,2,3\n" * 20,
        "3 columns, and this command draws in 2D: choose two with --columns, .* your own loop",
    )
    yield "three.npy", np.ones((20, 3)), "3 columns, and this command draws in 2D"
    yield "cube.npy", np.ones((20, 2, 2)), "points must be N x 2, got 20 x 2 x 2"
    yield "one.csv", "1\n" * 20, "one column only; columns are separated by"
    yield "header.csv", "x,y\n", "nothing but a header"
    yield "text.csv", "x,y\n1,2\n\n" + "1,a\n" * 20, "cannot be used: line 4: no number in 'a'"
    yield "ragged.csv", "1,2\n" * 20 + "1\n", "line 21 has 1 column, and others have 2"
    yield "inf.csv", "1,2\n" * 20 + "inf,1\n", "points that are infinite: 1"
    yield "few.csv", "1,2\n2,3\n,3\n", "at least 10 points are needed, got 2, besides 1 with gaps"
    yield "empty.csv", "", "empty"
    yield "flat.csv", "".join(f"{i},5\n" for i in range(20)), "column 2 of the two is constant"
    yield "pickle.npy", np.array([{"a": 1}], dtype=object), "cannot be used: Object arrays"


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


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (("lat", "long"), "no column 'long' among 4; the first line has 4: time, lat, lon, ele"),
        (("2", "5"), "no column '5' among 4"),
        (("lat", "2"), "takes two different columns"),
        (("time", "lat"), "line 2: no number in '2024-05-01T10:00:10Z'"),
    ],
)
def test_columns_that_cannot_be_used_are_named(tmp_path, wanted, message):
    (tmp_path / "track.csv").write_text(TRACK)
    with pytest.raises(ValueError, match=message):
        load_points(tmp_path / "track.csv", columns=wanted)
