"""Every experiment runs: all units at the scale `smoke`, tables, page and verdict table; what one batch has run another does not run again."""
from pathlib import Path
import pandas as pd
import pytest
from tmlab.cli import run_command
from tmlab.core.runs import read_json
from tmlab.evidence.design import read_batch
from tmlab.evidence.report import report_info

BATCHES = sorted(Path(__file__).parent.parent.glob("nbs/experiments/[0-9]*.yaml"))


@pytest.fixture(scope="module")
def root(tmp_path_factory): return tmp_path_factory.mktemp("experiments")


@pytest.mark.parametrize("path", BATCHES, ids=lambda p: p.stem)
def test_it_runs(path, root):
    b = read_batch(path, "smoke")
    assert run_command("run", str(path), "--preset", "smoke", "--output", str(root / "output"), "--reports", str(root / "reports")) == 0
    rows, plan = pd.read_csv(root / "reports" / b.folder / "rows.csv", dtype=dict(group=str)), read_json(root / "reports" / b.folder / "batch.json")
    assert len(rows) == len(b.design) == plan["finished"] == plan["planned"] and not plan["failed"]
    assert all(rows[c.score].notna().all() or c.score in ("time_s", "first_finish_decisions") for c in b.file.compare)
    verdicts = pd.read_csv(root / "reports" / b.folder / "verdicts.csv")
    assert set(verdicts.verdict) <= {"no verdict"} and len(verdicts)  # one seed proves nothing
    info = report_info(root / "reports" / b.folder / "index.html")
    assert info["preset"] == "smoke" and "no verdict" in info["answer"]


@pytest.mark.parametrize("path", BATCHES, ids=lambda p: p.stem)
def test_it_is_an_experiment(path):
    "Eight seeds, a control in every comparison, one primary score, controls and limits in words."
    b = read_batch(path, "cpu")
    assert len(b.seeds) >= 8 and b.file.controls and b.file.limits and b.file.title.endswith("?")
    assert [c.primary for c in b.file.compare].count(True) == 1 and all(c.smallest for c in b.file.compare)


def test_equal_units_are_one():
    "The baseline of the matrix, of the first and of the third experiment is the same eight runs."
    of = lambda name, arm: {u.hash for u in read_batch(next(p for p in BATCHES if p.stem == name), "cpu").units if u.arm == arm}
    assert len(of("00_levels", "A_scratch")) == 8 and of("00_levels", "A_scratch") < of("01_pretrain", "scratch") == of("03_objective", "scratch")
