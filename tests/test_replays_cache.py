"Windows and caches: random replay lengths, SIGKILL at random moments, any number of workers, damaged files."
import os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from tmlab.replays.cache import META, PARTIAL, STAT, build_cache, check_cache, open_cache
from tmlab.replays.frames import FrameWindows, windows
from tmlab.replays.manifest import write_replay
from tmlab.replays.store import ReplayStore

def make_root(root, lengths, seed=0, size=16):
    "Replays in which every frame shows its replay and its number: half a frame of each."
    for k, n in enumerate(lengths):
        frames = np.zeros((n, size, size), np.uint8)
        frames[:, :size // 2] = 10 * k % 250
        frames[:, size // 2:] = (np.arange(n) * 4 % 250)[:, None, None]
        write_replay(root / f"t{k % 5}" / f"r{k:03}", frames, dict(time_ms=np.arange(n) * 50), dict(frame_source="rendered"))
    return root

def contents(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != STAT}

@pytest.mark.parametrize("seed", range(30))
def test_windows_are_all_full_runs_of_one_replay(seed):
    rng = random.Random(seed)
    lengths, n_stack = [rng.choice([0, 1, 2, 3, 7, 20]) for _ in range(rng.randint(0, 12))], rng.randint(1, 6)
    replay, last = windows(lengths, n_stack)
    expected = [(r, end) for r, n in enumerate(lengths) for end in range(n_stack - 1, n)]
    assert list(zip(replay.tolist(), last.tolist())) == expected

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore:.*shorter than n_stack")
def test_jpeg_and_both_caches_agree_and_never_cross_a_replay(tmp_path, seed):
    rng = random.Random(seed)
    lengths, n_stack = [rng.choice([1, 2, 3, 5, 9]) for _ in range(9)] + [9], rng.randint(1, 4)
    store = ReplayStore(make_root(tmp_path / "img", lengths))
    tracks = sorted(store.tracks.track_id)
    sources = [FrameWindows(store, n_stack, 16)]
    for fmt in ("frames_uint8", "stacked_float32"):
        build_cache(tmp_path / "img", tmp_path / fmt, 16, n_stack, cache_format=fmt, workers=2)
        sources.append(FrameWindows(open_cache(tmp_path / fmt, ram=seed % 2 == 0).train))
    assert len(tracks) == 5 and len({len(s) for s in sources}) == 1
    batches = [s.batch(np.arange(len(s))) for s in sources]
    assert all(np.array_equal(batches[0], b) for b in batches[1:]) and batches[0].dtype == np.uint8
    upper = batches[0][:, :, 0, 3, 8].astype(int)
    assert (np.abs(upper - upper[:, :1]) <= 3).all()  # one replay per window; replays are 10 levels apart
    lower = batches[0][:, :, 0, 12, 8].astype(int)
    assert n_stack == 1 or (np.abs(np.diff(lower, axis=1) - 4) <= 3).all()  # consecutive frames, oldest first
    for i in range(0, len(sources[0]), 7):
        s = sources[2]
        frames = store.replay(*s.replays[s.replay_of[i]]).images()
        assert np.array_equal(s.batch([i])[0, :, 0], frames[s.frame_of[i] - n_stack + 1:s.frame_of[i] + 1])

def test_short_replays_warn_and_give_no_window(tmp_path):
    make_root(tmp_path / "img", [2, 9])
    with pytest.warns(UserWarning, match="shorter than n_stack 4"): info = build_cache(tmp_path / "img", tmp_path / "c", 16, 4)
    assert info.n_train == 6 and info.meta["source_signature"]["n_frame_files"] == 11
    with pytest.raises(ValueError, match="every replay is shorter"): build_cache(tmp_path / "img", tmp_path / "d", 16, 40)
    assert not (tmp_path / "d").exists()

@pytest.mark.parametrize("fmt", ["frames_uint8", "stacked_float32"])
def test_same_bytes_for_any_number_of_workers(tmp_path, fmt):
    make_root(tmp_path / "img", [12] * 10)
    for w in (1, 2, 5): build_cache(tmp_path / "img", tmp_path / f"w{w}", 12, 3, 0.3, cache_format=fmt, workers=w)
    assert contents(tmp_path / "w1") == contents(tmp_path / "w2") == contents(tmp_path / "w5") and "val.npy" in contents(tmp_path / "w1")

BUILD = """
import time
from tmlab.replays.cache import build_cache
from tmlab.replays.store import Replay
load = Replay.load
def slow(*a): time.sleep({seconds}); return load(*a)
Replay.load = slow
build_cache({root!r}, {out!r}, 48, 2, 0.3, cache_format={fmt!r}, workers={workers})
"""

@pytest.mark.parametrize("fmt, workers", [("frames_uint8", 1), ("stacked_float32", 2)])
def test_killed_builds_finish_with_the_same_bytes_and_never_validate(tmp_path, fmt, workers):
    root, out = make_root(tmp_path / "img", [40] * 20, size=128), tmp_path / "cache"
    build_cache(root, tmp_path / "whole", 48, 2, 0.3, cache_format=fmt, workers=1)
    code, kept, rng = BUILD.format(root=str(root), out=str(out), fmt=fmt, workers=workers, seconds=0.02), [], random.Random(0)
    for _ in range(4):
        p = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        journal, start = out / PARTIAL / "journal.jsonl", len(kept and kept[-1])
        while p.poll() is None and (not journal.exists() or len(journal.read_bytes().splitlines()) < start + 2): time.sleep(0.0005)
        time.sleep(rng.random() * 0.02)
        if p.poll() is not None: break
        os.kill(p.pid, signal.SIGKILL); p.wait()
        if (out / META).exists(): break
        kept.append(journal.read_bytes().splitlines() if journal.exists() else [])
        with pytest.raises(ValueError, match="half built"): open_cache(out)
    assert len(kept) >= 2 and len(kept[-1]) >= 2, "the build was never caught half done"
    assert all(set(a) <= set(b) for a, b in zip(kept, kept[1:])), "work that was done was done again"
    info = build_cache(root, out, 48, 2, 0.3, cache_format=fmt, workers=workers)
    assert contents(out) == contents(tmp_path / "whole") and check_cache(out) == [] and not (out / PARTIAL).exists() and info.n_train > 0
    assert not build_cache(root, out, 48, 2, 0.3, cache_format=fmt).built

def test_a_kill_between_the_last_moves_is_rolled_forward(tmp_path):
    root = make_root(tmp_path / "img", [6] * 6)
    build_cache(root, tmp_path / "whole", 16, 2, 0.3)
    whole, names = contents(tmp_path / "whole"), [p.name for p in (tmp_path / "whole").iterdir()]
    for moved in (["train.npy"], ["train.npy", "val.npy", STAT], [n for n in names if n != META]):
        out = tmp_path / f"cache{len(moved)}"
        shutil.copytree(tmp_path / "whole", out / PARTIAL)
        for n in moved: os.replace(out / PARTIAL / n, out / n)
        with pytest.raises(ValueError, match="half built"): open_cache(out)
        assert not build_cache(root, out, 16, 2, 0.3).built and contents(out) == whole

def test_a_source_changed_between_kill_and_restart_is_read_again(tmp_path, monkeypatch):
    from tmlab.replays import cache
    root, out = make_root(tmp_path / "img", [6] * 6), tmp_path / "cache"
    def killed(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(cache, "complete_partial", killed)
        with pytest.raises(KeyboardInterrupt): build_cache(root, out, 16)
    write_replay(root / "t0/r000", np.full((6, 16, 16), 77, np.uint8), dict(time_ms=np.arange(6) * 50), dict(frame_source="rendered"))
    build_cache(root, out, 16)
    build_cache(root, tmp_path / "whole", 16)
    assert contents(out) == contents(tmp_path / "whole") and (open_cache(out).train.batch([0]) == 77).all()

def test_an_edit_of_the_same_size_and_time_rebuilds(tmp_path):
    root = make_root(tmp_path / "img", [6] * 4)
    build_cache(root, tmp_path / "c", 16)
    frame = next((root / "t1/r001").glob("frame_00002*"))
    stat, data = frame.stat(), bytearray(frame.read_bytes())
    data[-10] ^= 0x10
    frame.write_bytes(data); os.utime(frame, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert frame.stat().st_size == stat.st_size and frame.stat().st_mtime_ns == stat.st_mtime_ns
    with pytest.warns(UserWarning, match="t1/r001: the frames changed"): info = build_cache(root, tmp_path / "c", 16)
    assert info.built and "t1/r001" in info.reason

def test_an_invalid_source_leaves_no_cache(tmp_path):
    root = make_root(tmp_path / "img", [6] * 4)
    (root / "t0/r000/manifest.json").unlink()
    with pytest.raises(ValueError, match="t0/r000: no manifest.json"): build_cache(root, tmp_path / "c", 16)
    shutil.rmtree(root)
    with pytest.raises(ValueError, match="no such folder"): build_cache(root, tmp_path / "c", 16)
    root.mkdir()
    with pytest.raises(ValueError, match="no replays"): build_cache(root, tmp_path / "c", 16)
    assert not (tmp_path / "c").exists()

def test_two_processes_build_one_cache(tmp_path):
    root, out = make_root(tmp_path / "img", [30] * 12, size=64), tmp_path / "cache"
    code = BUILD.format(root=str(root), out=str(out), fmt="frames_uint8", workers=1, seconds=0.01)
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0] and check_cache(out) == []

def test_importing_the_rooms_loads_no_torch():
    code = "import sys, tmlab.replays.card, tmlab.replays.cache; assert 'torch' not in sys.modules, 'torch was imported'"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
