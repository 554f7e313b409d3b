"""The README's commands and links exist."""
import re
import pytest


@pytest.fixture(scope="module")
def readme(repo): return (repo / "README.md").read_text()


def test_the_two_commands(readme, repo):
    makefile = (repo / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme and re.search(rf"^{target}:", makefile, re.M)


def code_of(readme):
    "Code of the README: fenced blocks and inline spans, one per line."
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", readme, re.M | re.S)
    return "\n".join(fenced + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", readme, flags=re.M | re.S)))


def test_every_command_exists(readme):
    from tmlab.cli import commands
    named = set(re.findall(r"(?:^|[\s$(])tmlab ([a-z][\w-]*)", code_of(readme), re.M))
    assert len(named) >= 3, "the README shows no commands"
    assert named <= set(commands()), f"in the README, but no command: {sorted(named - set(commands()))}"


def test_every_make_target_exists(readme, repo):
    targets = set(re.findall(r"^([a-z][\w-]*):", (repo / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|[\s$(])make ([a-z][\w-]*)", code_of(readme), re.M))
    assert named <= targets, f"in the README, but not in the Makefile: {sorted(named - targets)}"


def test_links_and_pictures_exist(readme, repo):
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", readme) + re.findall(r"(?:src|href)=\"([^\"]+)\"", readme)
    local = [l.split("#")[0] for l in links if not re.match(r"[a-z]+:|#", l)]
    missing = [l for l in local if not (repo / l).exists()]
    assert not missing, f"links of the README that lead nowhere: {missing}"


def test_anchors_exist(readme):
    anchors = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", readme, re.M)}
    wanted = set(re.findall(r"\]\(#([^)]+)\)", readme))
    assert wanted <= anchors, f"no such heading: {sorted(wanted - anchors)}"


def test_named_files_exist(readme, repo):
    "Paths of the repository that the README names in code (`tmlab/…`, `nbs/…`, `tests/…`) are there."
    paths = set(re.findall(r"(?<![\w./-])((?:nbs|tests|tools|\.ci|data_cards)/[\w./-]*\w)", code_of(readme)))
    missing = [p for p in paths if not (repo / p).exists()]
    assert not missing, f"named in the README, but not there: {missing}"


def test_python_blocks_of_the_world_run(readme, capsys):
    "The README's example of the world runs as it stands and shows what it says."
    blocks = [b for b in re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S) if "RaceVectorEnv(tracks" in b]
    assert len(blocks) == 1
    scope = {}
    exec(blocks[0], scope)
    assert scope["obs"]["image"].shape == (16, 1, 64, 64) and scope["info"]["progress_m"].min() > 20 and "(16, 184)" in capsys.readouterr().out
