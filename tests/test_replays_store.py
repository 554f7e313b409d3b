"Replay folders and the store under bad input and SIGKILL."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from tmlab.replays.actions import nearest_action
from tmlab.replays.manifest import check_replay, check_root, frame_name, read_manifest, write_replay
from tmlab.replays.store import ReplayStore

def make(folder, n=5, seed=0, size=32):
    rng = np.random.default_rng(seed)
    keys = rng.random((n, 4)) < 0.5
    entries = dict(time_ms=np.arange(n) * 50, action_idx=nearest_action(keys), inputs=keys)
    return write_replay(folder, rng.integers(0, 256, (n, size, size), np.uint8), entries, dict(frame_source="rendered"))

def contents(folder): return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}

def edited(change):
    "A function that applies `change` to the parsed manifest of a folder."
    def f(folder):
        path = folder / "manifest.json"
        data = json.loads(path.read_text())
        path.write_text(json.dumps(change(data) or data))
    return f

def entry(i, **kw): return edited(lambda d: d["entries"][i].update(kw))

@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    (lambda f: (f / "manifest.json").write_text('{"entries": ['), "not valid JSON"),
    (lambda f: (f / "manifest.json").write_text("3"), "expected an object or a list"),
    (edited(lambda d: d.pop("entries") and None), "no 'entries'"),
    (edited(lambda d: d.update(entries=[])), "at least one entry"),
    (edited(lambda d: d.update(format_version=99)), "format_version 99"),
    (edited(lambda d: d["entries"][1].pop("time_ms") and None), "entry 1: no time_ms"),
    (entry(2, time_ms="100"), "entry 2: time_ms is '100'"),
    (entry(2, time_ms=50), "entry 2: time_ms 50 does not come after 50"),
    (entry(3, step=7), "listed as step 7"),
    (entry(1, action_idx=12), "entry 1: action_idx is 12"),
    (entry(1, inputs=dict(accelerate=1)), "entry 1: inputs"),
    (entry(1, file="../x.jpeg"), "entry 1: file is '../x.jpeg'"),
    (entry(1, state=dict(gear=1)), "have no state"),
    (edited(lambda d: [e.update(state=dict(position=[0, 1])) for e in d["entries"]] and None), "state.position"),
    (edited(lambda d: d.update(actions=[0, 99])), "actions"),
    (edited(lambda d: d.update(meta=[dict(position=[1, 2])])), "meta 0: position"),
    (lambda f: (f / "metadata.json").write_text("[]"), "metadata.json: expected an object"),
    (lambda f: (f / "metadata.json").unlink(), "incomplete"),
])
def test_a_bad_manifest_is_one_error_that_names_file_and_cause(tmp_path, damage, words):
    folder = make(tmp_path / "t/r")
    damage(folder)
    with pytest.raises(ValueError) as e: read_manifest(folder)
    assert words in str(e.value) and str(folder) in str(e.value) and "\n" not in str(e.value)
    assert any(words in p for p in check_replay(folder))

@pytest.mark.parametrize("data, words", [(b"", "empty file"), (b"not a picture", "not a JPEG"), (None, "cut off")])
def test_an_unreadable_jpeg_is_named(tmp_path, data, words):
    folder = make(tmp_path / "t/r")
    path = folder / frame_name(2, 100)
    path.write_bytes(path.read_bytes()[:-30] if data is None else data)
    for use in (lambda r: r.frame(2), lambda r: r.images(16), lambda r: r.load()):
        with pytest.raises(ValueError, match=words) as e: use(ReplayStore(tmp_path).replay("t", "r"))
        assert str(path) in str(e.value)
    assert [p for p in check_root(tmp_path) if str(path) in p and words in p]

def test_frames_of_two_sizes_are_refused(tmp_path):
    folder = make(tmp_path / "t/r")
    shutil.copy(make(tmp_path / "u/r", size=16) / frame_name(3, 150), folder / frame_name(3, 150))
    with pytest.raises(ValueError, match="16x16"): ReplayStore(tmp_path).replay("t", "r").images()
    assert ReplayStore(tmp_path).replay("t", "r").images(8).shape == (5, 8, 8)

def test_every_writer_error_leaves_nothing(tmp_path):
    frames, time_ms = np.zeros((3, 8, 8), np.uint8), np.arange(3) * 50
    for args in ((frames[:2], dict(time_ms=time_ms), dict(frame_source="game")), (frames.astype(float), dict(time_ms=time_ms), dict(frame_source="game")),
                 (frames, dict(time_ms=time_ms * 0), dict(frame_source="game")), (frames, dict(time_ms=time_ms, colour=1), dict(frame_source="game")),
                 (frames, dict(time_ms=time_ms), dict(frame_source="drawn")), (frames, dict(time_ms=time_ms), dict(frame_source="game", width=9))):
        with pytest.raises(ValueError, match="t/r"): write_replay(tmp_path / "t/r", *args)
        assert not (tmp_path / "t").exists() or not list((tmp_path / "t").iterdir())

WRITER = """
import sys; sys.path.insert(0, {here!r})
from test_replays_store import make
i = 0
while True: make({root!r} + f"/t/r{{i}}", n=60, seed=i, size=64); i += 1; print(i, flush=True)
"""

def test_sigkill_while_writing_leaves_only_whole_replays(tmp_path):
    code = WRITER.format(here=str(Path(__file__).parent), root=str(tmp_path))
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    p.stdout.readline(); time.sleep(0.02)
    os.kill(p.pid, signal.SIGKILL); p.wait(); p.stdout.close()
    assert check_root(tmp_path) == []
    store = ReplayStore(tmp_path)
    assert len(store) >= 1 and not store.problems
    for r in store: assert contents(r.folder) == contents(make(tmp_path.parent / f"{tmp_path.name}-again/t/{r.name}", n=60, seed=int(r.name[1:]), size=64))

def test_opening_a_store_reads_no_manifest_and_no_frame(tmp_path):
    for i in range(3): make(tmp_path / f"t{i}/r")
    for p in tmp_path.rglob("frame_*"): p.unlink()
    for p in tmp_path.rglob("manifest.json"): p.write_text("broken")
    store = ReplayStore(tmp_path)
    assert store.replays.n_frames.tolist() == [5, 5, 5] and len(store.tracks) == 3
    with pytest.raises(ValueError, match="not valid JSON"): store.frames
