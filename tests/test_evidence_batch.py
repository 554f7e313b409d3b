"""Running notebooks when things go wrong: killed, no space, no right to write, wrong parameters."""
import errno, os, signal, subprocess, sys, time
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from tmlab.evidence import batch
from tmlab.evidence.batch import read_stamp, run_notebook


@pytest.fixture
def notebook(tmp_path):
    "A notebook that counts how often it ran and waits while a file called `wait` lies beside it."
    cells = [new_code_cell("n = 1  # a number", metadata=dict(tags=["parameters"])),
             new_code_cell("import pathlib, time\nwith open('ran', 'a') as f: f.write('x')\nwhile pathlib.Path('wait').exists(): time.sleep(0.05)\nprint(n)")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "toy.ipynb")
    return tmp_path / "toy.ipynb"


def test_killed_and_run_again(notebook, tmp_path):
    (tmp_path / "wait").touch()
    code = "import sys; from tmlab.evidence.batch import run_notebook; run_notebook('toy.ipynb', 'runs/out.ipynb', dict(n=2), echo=False)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "ran").exists() and time.monotonic() < end: time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "wait").unlink()
    assert (tmp_path / "ran").exists() and not (tmp_path / "runs/out.ipynb").exists()  # it was running, and nothing looks finished
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and [p.name for p in (tmp_path / "runs").iterdir()] == ["out.ipynb"]
    assert read_stamp(tmp_path / "runs/out.ipynb")["status"] == "finished" and (tmp_path / "ran").read_text() == "xx"


def test_no_space_left(notebook, tmp_path, monkeypatch):
    def full(*_, **__): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(batch, "write_stamp", full)
    with pytest.raises(ValueError, match="cannot write .*out.ipynb: No space left on device"): run_notebook(notebook, tmp_path / "runs/out.ipynb", cwd=tmp_path, echo=False)
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("parameters, cause", [(dict(m=1), "unknown parameter 'm'"), (dict(N=1), "did you mean 'n'|known: n")])
def test_wrong_parameters_run_nothing(notebook, tmp_path, parameters, cause):
    with pytest.raises(ValueError, match=cause): run_notebook(notebook, tmp_path / "runs/out.ipynb", parameters, cwd=tmp_path)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "ran").exists()


def test_the_notebook_is_not_overwritten(notebook):
    with pytest.raises(ValueError, match="is the notebook itself"): run_notebook(notebook, notebook)


def test_two_parameter_cells(notebook):
    nb = nbformat.read(notebook, 4)
    nb.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(nb, notebook)
    with pytest.raises(ValueError, match="toy.ipynb: 2 cells tagged 'parameters'"): run_notebook(notebook, notebook.with_name("out.ipynb"))


def test_a_failed_run_is_run_again(notebook, tmp_path):
    nb = nbformat.read(notebook, 4)
    nb.cells[1].source = "open('ran', 'a').write('x')\nassert n > 5, 'too small'"
    nbformat.write(nb, notebook)
    for _ in range(2):
        with pytest.raises(batch.NotebookFailed, match="AssertionError: too small") as e: run_notebook(notebook, tmp_path / "out.ipynb", cwd=tmp_path, echo=False)
    assert e.value.out_path == tmp_path / "out.ipynb" and (tmp_path / "ran").read_text() == "xx"
    run_notebook(notebook, tmp_path / "out.ipynb", dict(n=6), cwd=tmp_path, echo=False)
    assert read_stamp(tmp_path / "out.ipynb")["status"] == "finished"
