"Windows and caches: random replay lengths, SIGKILL at random moments, any number of workers, damaged files."
import os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from tmlab.core.runs import write_json
from tmlab.replays.cache import META, PARTIAL, STAT, build_cache, check_cache, open_cache
from tmlab.replays.frames import FrameWindows, batches, shuffled, windows
from tmlab.replays.manifest import write_replay
from tmlab.replays.split import split_replays, take_hours
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

def coded_root(root, lengths, tracks):
    "Frames of two flat blocks, which a JPEG keeps: 8 times the number of the replay, 8 times the number of the frame."
    for k, n in enumerate(lengths):
        frames = np.zeros((n, 8, 16), np.uint8)
        frames[:, :, :8], frames[:, :, 8:] = 8 * k, 8 * np.arange(n)[:, None, None]
        write_replay(root / f"t{tracks[k]}" / f"r{k:02}", frames, dict(time_ms=np.arange(n) * 50), dict(frame_source="rendered"))
    return root

def windows_of(data, rng):
    "(replay, frame) (N, n_stack) read from the pixels of every window, in the order of their indices; through the loader, shuffled."
    chunks = shuffled(len(data), rng.randint(1, 20), seed=rng.randint(0, 99), epoch=rng.randint(0, 9))
    loaded = np.concatenate([b.numpy() for b in list(batches(data, chunks, workers=rng.randint(0, 3)))])
    read = np.rint(loaded[np.argsort(np.concatenate(chunks)), :, 0, 4].astype(float) / 8)
    return read[:, :, 4], read[:, :, 12]

@pytest.mark.parametrize("seed", range(60))
@pytest.mark.filterwarnings("ignore:.*shorter than n_stack", "ignore:.*hours in all")
def test_no_window_crosses_a_replay_and_no_track_a_split(tmp_path, seed):
    "Random sets of replays, splits, amounts, layouts: what the pixels say of every window is what the index says, and nothing is lost or doubled."
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 3, 4, 6, 11]) for _ in range(rng.randint(1, 14))] + [11] * 3
    tracks, n_stack, fraction = [rng.randint(0, 4) for _ in lengths], rng.randint(1, 5), rng.choice([0, 0.2, 0.5])
    hours = rng.choice([None, sum(lengths) / 72_000 * rng.uniform(0.3, 1.2)])
    root = coded_root(tmp_path / "img", lengths, tracks)
    store, options = ReplayStore(root), dict(seed=rng.randint(0, 9), max_hours=hours)
    splits, fmt = split_replays(store, fraction, **options), rng.choice(["frames_uint8", "stacked_float32"])
    if any(max(map(len, rs)) < n_stack for rs in splits.values()): n_stack = 1
    build_cache(root, tmp_path / "c", (8, 16), n_stack, fraction, cache_format=fmt, workers=rng.randint(1, 3), **options)
    cache, seen = open_cache(tmp_path / "c"), {}
    assert (cache.val is None) == ("val" not in splits)
    for split, replays in splits.items():
        data = FrameWindows(getattr(cache, split))
        replay, frame = windows_of(data, rng)
        assert (replay == replay[:, :1]).all() and (np.diff(frame, axis=1) == 1).all()
        assert [f"r{int(k):02}" for k in replay[:, 0]] == [data.replays[k][1] for k in data.replay_of] and (frame[:, -1] == data.frame_of).all()
        assert {k for k, _ in zip(replay[:, 0], frame)} == {float(r.name[1:]) for r in replays if len(r) >= n_stack}
        assert len(data) == sum(max(len(r) - n_stack + 1, 0) for r in replays) == len(set(zip(replay[:, 0], frame[:, -1])))
        seen[split] = {t for t, _ in data.replays}
    assert not seen["train"] & seen.get("val", set())

@pytest.mark.parametrize("seed", range(100))
@pytest.mark.filterwarnings("ignore:.*hours in all")
def test_amounts_are_nested_balanced_and_reproducible(seed):
    rng = random.Random(seed)
    hours = {(f"t{t}", f"r{k}"): rng.uniform(0.1, 2) for t in range(rng.randint(1, 6)) for k in range(rng.randint(1, 12))}
    longest, shuffled_keys = max(hours.values()), sorted(hours, key=lambda _: rng.random())
    amounts = sorted(rng.uniform(longest, sum(hours.values()) * 1.1) for _ in range(5))
    sets = [take_hours(hours, h, seed) for h in amounts]
    assert all(a <= b for a, b in zip(sets, sets[1:])) and sets == [take_hours({k: hours[k] for k in shuffled_keys}, h, seed) for h in amounts]
    for h, taken in zip(amounts, sets):
        total = sum(hours[k] for k in taken)
        assert total <= h * 1.000001 and (taken == set(hours) or total > h - longest)
        by_track = {t: sum(hours[k] for k in taken if k[0] == t) for t, _ in hours}
        unfinished = [v for t, v in by_track.items() if any(k[0] == t and k not in taken for k in hours)]
        assert not unfinished or min(unfinished) >= max(by_track.values()) - longest  # nobody waits who is further behind than one replay

def test_an_amount_moves_no_track_and_keeps_the_validation(tmp_path):
    root = make_root(tmp_path / "img", [6] * 25)
    every = split_replays(ReplayStore(root), 0.4, 3)
    keys = lambda replays: {(r.track_id, r.name) for r in replays}
    metas = [build_cache(root, tmp_path / "c", 16, 2, 0.4, 3, max_hours=h / 72_000).meta for h in (30, 60, 72)]
    for meta in metas:
        assert {(x["track_id"], x["replay"]) for x in meta["replays"] if x["split"] == "val"} == keys(every["val"])
        assert {(x["track_id"], x["replay"]) for x in meta["replays"] if x["split"] == "train"} < keys(every["train"])
        assert meta["train_hours"] == pytest.approx(meta["max_hours"])
    assert [m["n_train"] for m in metas] == [25, 50, 60]
    with pytest.warns(UserWarning, match="only 0.00 hours in all"): split_replays(ReplayStore(root), 0.4, 3, max_hours=5)

def test_a_track_that_changes_sides_makes_a_cache_stale(tmp_path):
    "The same replays, recorded on the other side, as tracks that an amount leaves out can bring about."
    root = make_root(tmp_path / "img", [6] * 5)
    meta = build_cache(root, tmp_path / "c", 16, 2, 0.5).meta
    for x in meta["replays"]: x["split"] = "val" if x["split"] == "train" else "train"
    write_json(tmp_path / "c" / META, meta)
    again = build_cache(root, tmp_path / "c", 16, 2, 0.5)
    assert again.built and "added" in again.reason and check_cache(tmp_path / "c") == []

@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_that_are_kept_are_never_written_over(tmp_path, workers):
    root = make_root(tmp_path / "img", [30] * 4)
    build_cache(root, tmp_path / "c", 16, 3)
    data, rng, kept = FrameWindows(open_cache(tmp_path / "c").train), random.Random(workers), []
    chunks = [c for epoch in range(20) for c in shuffled(len(data), 16, 1, epoch)]
    for chunk, batch in zip(chunks, batches(data, chunks, workers), strict=True):
        if rng.random() < 0.2: kept.append((chunk, rng.choice([batch, batch[:, 1:], batch.numpy()[2:], batch.view(len(batch), -1)])))
        del batch
    assert len(kept) > 10
    for chunk, part in kept:
        whole = data.batch(chunk)
        assert any(np.array_equal(part, w) for w in (whole, whole[:, 1:], whole[2:], whole.reshape(len(chunk), -1)))

def test_an_epoch_is_taken_up_where_it_was(tmp_path):
    build_cache(make_root(tmp_path / "img", [30] * 4), tmp_path / "c", 16, 3)
    data = FrameWindows(open_cache(tmp_path / "c").train)
    whole = [b.clone() for b in batches(data, shuffled(len(data), 10, 5, 2))]
    rest = [b.clone() for b in batches(data, shuffled(len(data), 10, 5, 2, first=4))]
    assert len(whole) == 12 and len(rest) == 8 and all(map(np.array_equal, whole[4:], rest))

def test_windows_out_of_range_are_refused(tmp_path):
    for fmt in ("frames_uint8", "stacked_float32"):
        build_cache(make_root(tmp_path / "img", [8] * 2), tmp_path / fmt, 16, 2, cache_format=fmt)
        data = open_cache(tmp_path / fmt).train
        assert np.array_equal(data.batch([-1]), data.batch([13])) and np.array_equal(data.batch_float([-14]), data.batch_float([0])) and len(data.batch([])) == 0
        for bad in ([14], [0, -15]):
            with pytest.raises(IndexError, match="of 14"): data.batch(bad)

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

def test_rows_that_the_disk_lost_are_written_again(tmp_path, monkeypatch):
    "After a power cut the journal may be there and the pixels not."
    from tmlab.replays import cache
    root, out = make_root(tmp_path / "img", [6] * 6), tmp_path / "cache"
    def killed(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(cache, "complete_partial", killed)
        with pytest.raises(KeyboardInterrupt): build_cache(root, out, 16)
    array = np.load(out / PARTIAL / "train.npy", mmap_mode="r+")
    array[7:11] = 0
    array.flush()
    read = []
    load = cache.fill_replay
    monkeypatch.setattr(cache, "fill_replay", lambda rows, x, params: read.append(x["row"]) or load(rows, x, params))
    build_cache(root, out, 16)
    build_cache(root, tmp_path / "whole", 16)
    assert contents(out) == contents(tmp_path / "whole") and read[:1] == [6] and len(read) == 1 + 6

def test_an_edit_within_a_tick_of_the_clock_is_seen(tmp_path):
    "Some systems count change times in ticks of up to 10 ms: what is read must be older, or a second edit in the same tick would look like none."
    from tmlab.replays.cache import SETTLE_S, files_stat
    path, frame = tmp_path / "r", tmp_path / "r/a"
    path.mkdir(); frame.write_bytes(b"old")
    before, stat = files_stat(path), frame.stat()
    assert time.time() - stat.st_ctime >= SETTLE_S >= 0.05
    frame.write_bytes(b"new"); os.utime(frame, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files_stat(path) != before and files_stat(frame) == files_stat(frame)

@pytest.mark.parametrize("name, at", [("train.npy", -1), ("train.npy", 200), ("val.npy", -70), ("train_windows.npy", -8)])
def test_a_changed_byte_in_the_cache_is_noticed(tmp_path, name, at):
    root, out = make_root(tmp_path / "img", [6] * 5), tmp_path / "c"
    build_cache(root, out, 16, 2, 0.4)
    assert not build_cache(root, out, 16, 2, 0.4).built
    whole, data, stat = contents(out), bytearray((out / name).read_bytes()), (out / name).stat()
    data[at] ^= 1
    (out / name).write_bytes(data); os.utime(out / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert name in check_cache(out)[0]
    info = build_cache(root, out, 16, 2, 0.4)
    assert info.built and name in info.reason and contents(out) == whole

def test_a_cache_built_anew_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    from tmlab.replays import cache
    root = make_root(tmp_path / "img", [6] * 5)
    build_cache(root, tmp_path / "c", 16, 2, 0.4)
    split = cache.CacheSplit
    def slow(dir, name, ram):
        opened = split(dir, name, ram)
        if name == "train": build_cache(root, tmp_path / "c", 16, 3, 0.4)
        return opened
    monkeypatch.setattr(cache, "CacheSplit", slow)
    with pytest.raises(ValueError, match="built anew"): open_cache(tmp_path / "c")
