"""Batches when things go wrong: runners killed, units that fail, two runners, no room, wrong files; and a cluster that loses a node."""
import errno, os, signal, subprocess, sys, time
from pathlib import Path
import nbformat
import pandas as pd
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from tmlab.cli import run_command
from tmlab.core.runs import lock_file, read_json
from tmlab.evidence import runner
from tmlab.evidence.design import read_batch
from tmlab.evidence.ledger import read_ledger, unit_folder
from tmlab.evidence.runner import LocalPool, gather, run_batch

BATCH = """
title: Does it matter?
question: Is b better than a?
notebook: toy.ipynb
arms: {a: {gain: 0}, b: {gain: 3}}
seeds: [1, 2]
presets: {cpu: {minutes: 0.1, memory_gb: 0.2}}
compare: [{score: metres, control: a, unit: m, primary: true}]
"""
PARAMETERS = "gain = 0  # of the arm\nseed = 1  # of everything\nunit_dir = 'unit'  # where the result goes"
CODE = """import os, pathlib, time
from tmlab.evidence.ledger import write_result
with open('ran', 'a') as f: f.write(f'{gain}{seed} ')
while pathlib.Path('wait').exists(): time.sleep(0.05)
assert gain >= 0, 'gain is below zero'
if gain == 9: os.kill(os.getppid(), 9)
write_result(unit_dir, dict(metres=100 + gain + seed / 8), [dict(track='flat-1', spec='flat:1:6', role='trained', n=4, finish_rate=0.0, time_s=None, metres=100.0)],
             [dict(metric='metres', decisions=d, gradient_steps=d, active_s=d, value=d * gain) for d in (0, 10)])"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder with the batch `toy.yaml`, made the working directory; its units wait while a file called `wait` lies there."
    monkeypatch.chdir(tmp_path)
    nbformat.write(new_notebook(cells=[new_code_cell(PARAMETERS, metadata=dict(tags=["parameters"])), new_code_cell(CODE)]), "toy.ipynb")
    Path("toy.yaml").write_text(BATCH)
    return tmp_path


def begin(*args):
    "`tmlab run toy.yaml` in a process of its own, one that hears Ctrl-C though this one may have been started in the background."
    return subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from tmlab.cli import main; main()", "run", "toy.yaml", *args], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def ran(): return sorted(Path("ran").read_text().split()) if Path("ran").exists() else []


def test_a_killed_runner_loses_the_units_at_work_alone(folder):
    assert run_command("run", "toy.yaml", "--jobs", "1", "--seeds", "1", "--arms", "a") == 0
    Path("wait").touch()
    p = begin("--jobs", "1")
    wait_until(lambda: len(ran()) == 2)
    family = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]
    for q in family: q.kill()  # as the machine's power does
    p.wait()
    psutil.wait_procs(family)
    Path("wait").unlink()
    assert list(read_ledger().status.sort_values()) == ["finished", "interrupted"]
    assert run_command("run", "toy.yaml") == 0
    assert ran() == ["01", "02", "31", "31", "32"] and set(read_ledger().status) == {"finished"}  # only the interrupted one ran again
    rows = pd.read_csv("reports/toy/rows.csv")
    assert len(rows) == 4 and Path("reports/toy/index.html").exists() and not list(Path("output").rglob(".tmp-*"))


def test_ctrl_c_ends_the_workers_and_keeps_the_rest(folder):
    assert run_command("run", "toy.yaml", "--seeds", "1", "--arms", "a") == 0
    Path("wait").touch()
    p = begin("--jobs", "1")
    wait_until(lambda: len(ran()) == 2)
    children = psutil.Process(p.pid).children(recursive=True)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "the same command goes on" in err and "Traceback" not in err
    assert not psutil.wait_procs(children, timeout=10)[1]  # nobody is left behind
    assert len(pd.read_csv("reports/toy/rows.csv")) == 1


def test_two_runners_share_the_work(folder):
    first, second = begin("--jobs", "1"), begin("--jobs", "1")
    errors = [p.communicate(timeout=180)[1] for p in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], errors
    assert ran() == ["01", "02", "31", "32"] and len(pd.read_csv("reports/toy/rows.csv")) == 4


def test_a_failed_arm_is_kept_and_the_batch_goes_on(folder, capsys):
    Path("toy.yaml").write_text(BATCH.replace("b: {gain: 3}", "b: {gain: -1}"))
    assert run_command("run", "toy.yaml") == 1
    out, err = capsys.readouterr()
    assert "gain is below zero" in err and "reports/toy/index.html" in out
    ledger = read_ledger().set_index(["arm", "seed"])
    assert list(ledger.status[["a"]]) == ["finished"] * 2 and list(ledger.status[["b"]]) == ["failed"] * 2
    assert any(o.output_type == "error" for c in nbformat.read(Path(ledger.dir[("b", 1)]) / "unit.ipynb", 4).cells if c.cell_type == "code" for o in c.outputs)
    assert [f["seed"] for f in read_json("reports/toy/batch.json")["failed"]] == [1, 2] and "gain is below zero" in Path("reports/toy/index.html").read_text()


def test_a_killed_worker_is_named(folder):
    Path("toy.yaml").write_text(BATCH.replace("b: {gain: 3}", "b: {gain: 9}"))
    board = run_batch(read_batch("toy.yaml", seeds=[1]), LocalPool(1))
    assert [(str(u), r["status"], r["error"]) for u, r in board.failures] == [("b seed 1", "interrupted", "killed by signal 9 (out of memory?)")]


def test_the_disk_fills_up(folder, monkeypatch, capsys):
    monkeypatch.setattr(runner, "LEAST_FREE_GB", 1e9)
    assert run_command("run", "toy.yaml") == 2
    assert "GB of disk left" in capsys.readouterr().err and not ran()


def test_no_space_for_the_tables(folder, monkeypatch, capsys):
    def full(*_, **__): raise OSError(errno.ENOSPC, "No space left on device", "rows.csv")
    monkeypatch.setattr(runner, "atomic_path", full)
    assert run_command("run", "toy.yaml", "--seeds", "1") == 2
    assert "No space left on device" in capsys.readouterr().err and not Path("reports/toy/rows.csv").exists() and set(read_ledger().status) == {"finished"}


def test_output_that_cannot_be_written(folder, capsys):
    Path("output").write_text("a file")
    assert run_command("run", "toy.yaml") == 2
    assert "error: " in capsys.readouterr().err and Path("output").read_text() == "a file"


def test_time_is_up(folder, capsys):
    assert run_command("run", "toy.yaml", "--max-hours", "0.0001") == 0
    err = capsys.readouterr().err
    assert "4 of 4 units are left" in err and "none begins that would end after 0.0001 h" in err and not ran()


def test_a_dry_run_writes_nothing(folder, capsys):
    assert run_command("run", "toy.yaml", "--dry-run") == 0
    assert "toy: 4 units, 0 finished before" in capsys.readouterr().err and sorted(p.name for p in folder.iterdir()) == ["toy.ipynb", "toy.yaml"]


@pytest.mark.parametrize("old, new, args, cause", [
    ("gain: 3", "gian: 3", [], "arm 'b': toy.ipynb has no parameter 'gian'; did you mean 'gain'?"), ("toy.ipynb", "none.ipynb", [], "none.ipynb: no such notebook"), ("title", "titel", [], "unknown key 'titel'"),
    ("", "", ["--preset", "cqu"], "no preset 'cqu'; did you mean 'cpu'?"), ("", "", ["--param", "gain", "3"], "--param is for a notebook"), ("", "", ["--memory-gb-per-unit", "100000"], "a unit needs 100000 GB")])
def test_wrong_input_is_one_error(folder, capsys, old, new, args, cause):
    Path("toy.yaml").write_text(BATCH.replace(old, new, 1))
    assert run_command("run", "toy.yaml", *args) == 2
    err = capsys.readouterr().err.strip()
    assert cause in err and "\n" not in err and not Path("output").exists()


def test_a_missing_tag(folder, capsys):
    nb = nbformat.read("toy.ipynb", 4)
    nb.cells[0].metadata.tags = []
    nbformat.write(nb, "toy.ipynb")
    assert run_command("run", "toy.yaml") == 2 and "no cell tagged 'parameters'" in capsys.readouterr().err


def test_twice_the_same_verdicts(folder):
    for where in ("one", "two"): assert run_command("run", "toy.yaml", "--output", f"{where}/output", "--reports", f"{where}/reports") == 0
    assert Path("one/reports/toy/verdicts.csv").read_bytes() == Path("two/reports/toy/verdicts.csv").read_bytes()


def test_runs_lists_filters_and_compares(folder, capsys):
    assert run_command("runs") == 2 and "no such folder" in capsys.readouterr().err
    assert run_command("run", "toy.yaml") == 0
    capsys.readouterr()
    assert run_command("runs", "--batch", "toy", "--where", "gain=3", "seed=2") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2 and "103.2" in out
    assert run_command("runs", "--compare", "metres", "--by", "gain") == 0 and len(capsys.readouterr().out.splitlines()) == 3
    assert run_command("runs", "--where", "gian=3") == 2 and "did you mean 'gain'" in capsys.readouterr().err


def test_a_cluster_of_two_nodes_loses_one(folder, monkeypatch):
    "Real nodes on the loopback address: the unit that ran on the lost one runs again on the other."
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    from tmlab.evidence.cluster import RayPool
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(runner.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0))
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        Path("wait").touch()
        b, lost = read_batch("toy.yaml"), []

        class Losing(RayPool):
            "A pool during whose work one node dies."
            def finished(self):
                if len(ran()) == 2 and not lost:
                    lost.append(nodes[0])
                    cluster.remove_node(nodes[0], allow_graceful=False)
                if lost and self.jobs == 1: Path("wait").unlink(missing_ok=True)  # the loss is noticed
                return super().finished()

        pool = Losing(cluster.address)
        assert pool.jobs == 2
        board = run_batch(b, pool)
    finally: cluster.shutdown()
    assert lost and not board.failures and board.left == 0
    assert len(ran()) >= 5 and len(pd.read_csv(gather(b) / "rows.csv")) == 4  # four units, one of them begun twice
