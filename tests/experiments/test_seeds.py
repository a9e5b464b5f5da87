import json

import pytest

from tvm_ref.experiments import seeds

SMALL = ["--steps", "60", "--batch-size", "16", "--width", "8", "--depth", "2", "--points", "60"]


@pytest.mark.slow
def test_seeds_reports_median_and_worst(tmp_path, capsys):
    options = [*SMALL, "--dist", "moons", "circles", "--seeds", "3", "--jobs", "1"]
    options += ["--out", str(tmp_path / "seeds.json")]
    assert seeds.main(options) == 0
    results = json.loads((tmp_path / "seeds.json").read_text())
    assert [(r["dist"], r["seed"]) for r in results] == [(d, s) for d in ("moons", "circles") for s in range(3)]
    values = sorted(r["figures"]["paired_rmse"] for r in results[:3])
    assert f"{values[1]:.3f} ({values[2]:.3f})" in capsys.readouterr().out


def test_seeds_counts_what_diverged():
    ok = {"dist": "moons", "diverged": False, "figures": dict.fromkeys(seeds.COLUMNS, 0.5)}
    lines = seeds.table([ok, ok, {"dist": "moons", "diverged": True, "figures": {}}]).splitlines()
    assert lines[1].endswith("1 of 3")
    assert "0.500 (inf)" in lines[1]
