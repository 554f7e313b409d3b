"""The order of the rooms: imports point downwards, nothing heavy happens at import, and every module has its notebook and back."""
import ast, configparser, re, subprocess, sys
import nbformat
import pytest

# Bottom to top; inside a layer from left to right. A room imports from lower layers and from rooms to its left.
LAYERS = dict(
    core="config runs compat state",
    evidence="stats events kpi ledger batch design runner cluster report verdict",
    tracks="line geometry track gates lidar graph corridors blocks generate",
    replays="actions gbx scripts maps manifest store floats frames split cache card export generic",
    world="car fidelity camera env racing_line expert record",
    models="encoder augment visual iqn policy multimodal latent_action trajectory track_encoder completion",
    training="artifacts weights pretrain clone dagger buffer iqn_config learner rollout iqn speed survey experiment probe ppo latent trajectories",
    link="protocol client server",
    explore="player frames space tracks runs",
    top="bench demo cli",
)
ORDER = {f"{layer}.{room}".removeprefix("top."): (i, j) for i, (layer, rooms) in enumerate(LAYERS.items()) for j, room in enumerate(rooms.split())}
HEAVY = {"torch", "torchvision", "lightly", "pytorch_lightning", "lightning"}  # seconds to import; only where networks live
MAY_IMPORT_HEAVY = re.compile(r"(models|training)\.")


def modules(repo):
    "{room: path} of every module of tmlab, rooms named as in the table (`core.config`, `cli`)."
    paths = [p for p in (repo / "tmlab").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")]
    return {".".join(p.relative_to(repo / "tmlab").with_suffix("").parts): p for p in paths}


def notebooks(repo):
    "Every notebook of the repository."
    return sorted(p for p in (repo / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(repo).parts))


def exported(repo):
    "{room: notebook} by `#| default_exp`."
    out = {}
    for path in notebooks(repo):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code" and (m := re.match(r"#\|\s*default_exp\s+(\S+)", cell.source)): out.setdefault(m[1], path)
    return out


def imports(room, tree):
    "Rooms of tmlab that the module `room` imports anywhere, also inside functions."
    package = room.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["tmlab", *package][:len(package) + 2 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{a.name}" for a in node.names)]  # `from tmlab.core import runs` names a room too
        else: continue
        for name in names:
            inside = name.removeprefix("tmlab.")
            if name != inside and inside in ORDER: yield inside


def test_the_reader_of_imports_sees_every_form():
    text = "import tmlab.core.runs\nfrom tmlab.core import state\nfrom ..tracks.line import x\ndef f():\n  from .env import y\n  from . import car\n  import numpy"
    assert set(imports("world.expert", ast.parse(text))) == {"core.runs", "core.state", "tracks.line", "world.env", "world.car"}
    assert set(imports("cli", ast.parse("from .core.config import x\nfrom . import demo"))) == {"core.config", "demo"}


def test_every_room_is_in_the_table(repo):
    unknown = set(modules(repo)) - set(ORDER)
    assert not unknown, f"not in the table of layers: {sorted(unknown)}"


def test_imports_point_downwards(repo):
    found, wrong = 0, []
    for room, path in modules(repo).items():
        for other in set(imports(room, ast.parse(path.read_text()))) - {room}:
            found += 1
            if not ORDER[other] < ORDER[room]: wrong.append(f"{room} imports {other}, which stands above it or to its right")
    assert not wrong, "\n".join(wrong)
    assert found > 20


def top_level(tree):
    "Statements that run at import, also those inside `if` and `try`."
    for node in tree.body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)): yield from top_level(ast.Module(body=[*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])], type_ignores=[]))


def test_only_rooms_with_networks_import_torch_at_once(repo):
    for room, path in modules(repo).items():
        if MAY_IMPORT_HEAVY.match(room): continue
        for node in top_level(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not HEAVY & {n.split(".")[0] for n in names}, f"{room} imports {names} at module level"


@pytest.mark.parametrize("name", ["tmlab", "tmlab.core.config", "tmlab.core.runs", "tmlab.cli"])
def test_importing_loads_no_torch(name):
    code = f"import sys, {name}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "[]\n" and not done.stderr, done.stdout + done.stderr


def test_every_module_has_a_notebook_and_back(repo):
    code, books = modules(repo), exported(repo)
    assert code.keys() == books.keys(), f"without a notebook: {sorted(code.keys() - books.keys())}; not exported: {sorted(books.keys() - code.keys())}"
    for room, path in code.items():
        head = path.read_text()[:2000]
        source = re.search(r"AUTOGENERATED! DO NOT EDIT! File to edit: (\S+\.ipynb)", head)
        assert source and (path.parent / source[1]).resolve() == books[room].resolve(), f"{path} was not exported from {books[room]}"
        assert books[room].parent.name == (room.split(".")[0] if "." in room else "nbs"), f"{books[room]} lies in the wrong folder for {room}"
        assert re.fullmatch(rf"\d+_{room.split('.')[-1]}", books[room].stem), f"{books[room].name} should be called NN_{room.split('.')[-1]}.ipynb"


def test_the_index_of_modules_is_current(repo):
    "nbdev's `_modidx.py` lists exactly the modules there are (a renamed room leaves its old entry behind)."
    scope = {}
    exec((repo / "tmlab/_modidx.py").read_text(), scope)
    assert {m.removeprefix("tmlab.") for m in scope["d"]["syms"]} == set(modules(repo))


def test_notebooks_import_the_package(repo):
    for path in notebooks(repo):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code": assert not re.search(r"^\s*(from|import) nbs\b", cell.source, re.M), f"{path}: import from tmlab, not from nbs"


def test_settings_that_keep_notebooks_sound(repo):
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(repo / "settings.ini")
    s = parser["DEFAULT"]
    assert s["allowed_cell_metadata_keys"].split() == ["tags"]  # otherwise nbdev_clean strips papermill's `parameters` tag
    assert s["update_pyproject"] == "False" and s["recursive"] == "True" and s["clear_all"] == "False" and not (repo / "pyproject.toml").exists()
    assert s["nbs_path"] == "nbs" and s["lib_path"] == "tmlab" and "tmlab=tmlab.cli:main" in s["console_scripts"]


def test_no_exported_code_uses_a_name_it_does_not_have(repo):
    "A name imported in a cell that is not exported works in the notebook and fails in the module."
    found = subprocess.run([sys.executable, "-m", "pyflakes", str(repo / "tmlab")], capture_output=True, text=True).stdout
    assert "usage" not in found
    assert not [line for line in found.splitlines() if "undefined name" in line]
