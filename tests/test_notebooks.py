"""Budgets of the notebooks: small, clean, importable, and experiments that papermill can run."""
import ast, copy, re
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.clean import clean_nb
from execnb.nbio import read_nb
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"
PATHS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))
NAMES = [p.relative_to(NBS).as_posix() for p in PATHS]
EXPERIMENTS = [p for p in PATHS if p.parent.name == "experiments"]
MACHINE = re.compile(r"/work\b|/home/\w|/root/|/Users/\w|[A-Z]:\\\\?Users")  # paths of one machine


@pytest.fixture(params=PATHS, ids=NAMES)
def book(request):
    "(path, notebook) of every notebook."
    return request.param, nbformat.read(request.param, 4)


def parse(source):
    "Syntax tree of a cell, its magics taken as the calls that IPython makes of them."
    return ast.parse(TransformerManager().transform_cell(source))


def code_cells(nb): return [c for c in nb.cells if c.cell_type == "code"]


def exports(nb):
    "What the notebook exports, or None."
    hits = [m[1] for c in code_cells(nb) if (m := re.match(r"#\|\s*default_exp\s+(\S+)", c.source))]
    return hits[0] if hits else None


def test_there_are_notebooks(): assert len(PATHS) > 10


def test_size(book):
    path, _ = book
    assert path.stat().st_size <= 300_000, f"{path} has {path.stat().st_size / 1000:.0f} kB; use lighter figures"


def test_no_widget_state(book):
    path, nb = book
    assert "widgets" not in nb.metadata, f"{path} holds the state of its widgets: clear its outputs"
    kinds = {k for c in code_cells(nb) for o in c.outputs for k in o.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" not in kinds, f"{path} shows a widget: clear that output"


def test_imports_stand_alone(book):
    path, nb = book
    for cell in code_cells(nb):
        body = parse(cell.source).body
        is_import = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in body]
        assert all(is_import) or not any(is_import), f"{path}: imports and other code in one cell:\n{cell.source[:200]}"


def test_title(book):
    path, nb = book
    first, room = nb.cells[0], exports(nb)
    assert first.cell_type == "markdown" and first.source.startswith("# "), f"{path} does not begin with a title"
    title = first.source.splitlines()[0]
    if room is None: return
    assert title == f"# {room}" and code_cells(nb)[0].source.startswith("#| default_exp"), f"{path}: title {title!r}, exports {room}"
    assert re.search(r"^> \S", first.source, re.M), f"{path}: no `> one line` below the title"


def test_clean(book):
    "nbdev_clean would change nothing: no execution counts, no metadata of editors and runs."
    path, _ = book
    nb = read_nb(path)
    before = copy.deepcopy(dict(nb))
    clean_nb(nb, clear_all=False, allowed_metadata_keys=[], allowed_cell_metadata_keys=["tags"], clean_ids=True)
    assert strip_indices(dict(nb)) == strip_indices(before), f"{path} is not clean: run nbdev_clean --fname {path}"


def strip_indices(nb):
    "A notebook as plain data without the numbers that execnb adds to its cells."
    return {**nb, "cells": [{k: v for k, v in dict(c).items() if not k.endswith("_")} for c in nb["cells"]]}


def test_no_path_of_one_machine(book):
    path, nb = book
    for cell in nb.cells:
        texts = [cell.source, *(str(o.get("text", o.get("data", o.get("traceback")))) for o in cell.get("outputs", []))]
        for text in texts:
            m = MACHINE.search(text)
            assert not m, f"{path}: {text[max(0, m.start() - 60):m.end() + 60]!r}"


def test_no_error_in_the_outputs(book):
    path, nb = book
    assert not [o for c in code_cells(nb) for o in c.outputs if o.output_type == "error"], f"{path} holds the output of a failed run"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=[p.name for p in EXPERIMENTS])
def test_experiments_are_linear_and_parameterised(path):
    nb = nbformat.read(path, 4)
    cells = code_cells(nb)
    assert exports(nb) is None, f"{path}: experiments export nothing"
    assert len(cells) <= 15, f"{path}: {len(cells)} code cells, at most 15"
    for cell in cells:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        assert not [n for n in ast.walk(parse(cell.source)) if isinstance(n, kinds)], f"{path}: a function in an experiment; move it to a room:\n{cell.source[:200]}"
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{path}: {len(tagged)} cells tagged `parameters`"
    check_parameters(path, tagged[0].source)


def check_parameters(path, source):
    "Every statement is `name = literal  # comment`."
    lines = source.splitlines()
    assert (body := ast.parse(source).body), f"{path}: no parameters"
    for node in body:
        text = lines[node.lineno - 1]
        assert isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name), f"{path}: not a parameter: {text}"
        ast.literal_eval(node.value)  # ValueError for anything but a plain literal
        assert re.search(r"#\s*\S", lines[node.end_lineno - 1][node.end_col_offset:]), f"{path}: no comment: {text}"


def test_the_check_of_parameters_can_fail():
    check_parameters("x", "a = 1  # steps\nb = [1, 2]  # sizes")
    for bad in ("a = 1", "a = f()  # x", "import os  # x", "a, b = 1, 2  # x"):
        with pytest.raises((AssertionError, ValueError)): check_parameters("x", bad)
