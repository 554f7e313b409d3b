"Replay folders and the store under bad input and SIGKILL."
import gc, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from tmlab.core.state import SHAPES, make_state
from tmlab.replays.actions import nearest_action
from tmlab.replays.manifest import check_replay, check_root, frame_name, read_manifest, write_replay
from tmlab.replays.store import QUANTILES, ImageStats, ReplayStore, RunningStats

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

def make_driven(folder, n=6, seed=0, known=("position", "velocity", "rotation", "wheel_contact", "gear", "rpm", "brake")):
    "A replay whose states know the fields `known`."
    rng = np.random.default_rng(seed)
    states = make_state(n, **{k: rng.integers(0, 2, (n, *SHAPES[k])) if k in ("wheel_contact", "gear") else rng.normal(size=(n, *SHAPES[k])).round(5) for k in known})
    entries = dict(time_ms=100 + np.arange(n) * 50, action_idx=rng.integers(0, 12, n), states=states, interpolated=np.arange(n) % 2 == 1)
    return write_replay(folder, rng.integers(0, 256, (n, 16, 16), np.uint8), entries, dict(frame_source="rendered"))

def test_frames_hold_what_the_manifests_hold(tmp_path):
    make_driven(tmp_path / "t/a"); make(tmp_path / "t/b"); make_driven(tmp_path / "u/a", seed=2, known=("position", "gear"))
    store = ReplayStore(tmp_path)
    f = store.frames
    assert len(f) == store.replays.n_frames.sum() and f.groupby("episode_index").size().tolist() == store.replays.n_frames.tolist() == [6, 5, 6]
    for r, rows in zip(store, (rows for _, rows in f.groupby("episode_index"))):
        m = r.manifest
        assert (rows.track_id == r.track_id).all() and (rows.replay == r.name).all() and rows.frame_index.tolist() == list(range(len(r)))
        assert rows.file.tolist() == m.files and np.array_equal(rows.time_ms, m.time_ms) and np.allclose(rows.timestamp, (m.time_ms - m.time_ms[0]) / 1000)
        assert np.array_equal(rows.action_idx.astype(int), m.action_idx)
        states = m.states or make_state(len(r))
        for field, columns in dict(position=["position_x", "position_y", "position_z"], rotation=[f"rotation_{a}{b}" for a in "xyz" for b in "xyz"], gear=["gear"],
                                   wheel_contact=[f"wheel_contact_{w}" for w in ("fl", "fr", "rr", "rl")], rpm=["rpm"], brake=["brake_pedal"]).items():
            if field in states.known: assert np.array_equal(rows[columns].to_numpy(float), getattr(states, field).reshape(len(r), -1).astype(float)), field
            else: assert rows[columns].isna().all(axis=None), field
    assert f.interpolated.isna().sum() == 5 and f.interpolated.sum() == 6 and "steer" not in f and f.gear.dtype == "Int64"

def test_every_broken_folder_is_named_once(tmp_path):
    for name in ("a", "b", "c", "d"): make(tmp_path / f"t/{name}")
    (tmp_path / "t/b/manifest.json").write_text("{")
    entry(2, time_ms=0)(tmp_path / "t/c")
    edited(lambda d: d["entries"].pop() and None)(tmp_path / "t/d")
    store = ReplayStore(tmp_path)
    assert store.problems == [] and len(store) == 4
    for use in (lambda: store.frames, store.stats):
        with pytest.raises(ValueError) as e: use()
        text = str(e.value)
        assert "3 broken" in text and all(text.count(f"t/{x}/") == 1 for x in "bcd") and "t/a" not in text
    (tmp_path / "t/a/metadata.json").write_text('{"total_frames": "5"}'); (tmp_path / "t/empty").mkdir(); shutil.copytree(tmp_path / "t/b", tmp_path / "loose")
    store = ReplayStore(tmp_path)
    assert len(store) == 3 and len(store.problems) == 3 and [sum(w in p for p in store.problems) for w in ("t/a", "t/empty", "loose")] == [1, 1, 1]
    with pytest.raises(ValueError, match="3 broken"): store.require_sound()
    assert "3 broken folders" in repr(store)

def test_numbers_that_the_fast_parser_refuses_are_read(tmp_path):
    "NaN is no JSON, but Python writes it."
    folder = make(tmp_path / "t/r")
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"meta": null', '"meta": [{"time_ms": 7, "of_their_own": NaN}]'))
    store = ReplayStore(tmp_path)
    assert len(store.frames) == 5 and len(store.replay("t", "r").labels_sha256()) == 64

def test_labels_hash_the_same_by_both_parsers(tmp_path):
    folder = make_driven(tmp_path / "t/r")
    fast = ReplayStore(tmp_path).replay("t", "r").labels_sha256()
    (folder / "manifest.json").write_text(json.dumps(json.loads((folder / "manifest.json").read_text()), indent=1))
    assert ReplayStore(tmp_path).replay("t", "r").labels_sha256() == fast
    entry(3, step=3, time_ms=251)(folder)
    assert ReplayStore(tmp_path).replay("t", "r").labels_sha256() != fast

def test_reading_tables_keeps_no_manifest_and_leaves_the_collector_on(tmp_path):
    for i in range(3): make(tmp_path / f"t/r{i}")
    store = ReplayStore(tmp_path)
    store.frames, store.stats()
    assert not any("manifest" in vars(r) for r in store) and gc.isenabled()
    next(store.columns())  # abandoned halfway
    assert gc.isenabled()

@pytest.mark.parametrize("seed", range(6))
def test_running_statistics_are_those_of_all_rows(seed):
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(1, 3000)), int(rng.integers(1, 5))
    x = rng.normal(rng.normal(0, 1e3, d), rng.lognormal(0, 2, d), (n, d)) if seed % 2 else rng.integers(0, 3, (n, d)).astype(float)
    stats, cuts = RunningStats(), np.sort(rng.integers(0, n + 1, rng.integers(0, 20)))
    for part in np.split(x, cuts): stats.update(part)
    got = stats.result()
    assert got["count"] == [n] and np.array_equal(got["min"], x.min(0)) and np.array_equal(got["max"], x.max(0))
    np.testing.assert_allclose(got["mean"], x.mean(0), rtol=1e-9, atol=1e-12); np.testing.assert_allclose(got["std"], x.std(0), rtol=1e-9, atol=1e-9)
    assert np.array_equal([got[k] for k in QUANTILES], np.quantile(x, list(QUANTILES.values()), axis=0, method="inverted_cdf"))

@pytest.mark.parametrize("order", ["random", "sorted", "reversed", "sawtooth"])
def test_a_long_stream_keeps_few_rows_and_near_quantiles(order):
    x = np.random.default_rng(0).normal(size=60_000)
    x = dict(random=x, sorted=np.sort(x), reversed=-np.sort(-x), sawtooth=np.sort(x).reshape(100, -1).T.ravel())[order]
    stats = RunningStats(keep=512)
    for part in np.array_split(x, 131): stats.update(part)
    assert sum(len(r) for level in stats.levels for r in level) < 10 * 512
    assert sum(len(r) * 2 ** i for i, level in enumerate(stats.levels) for r in level) == len(x)  # every row is stood for
    for (k, q), v in zip(QUANTILES.items(), stats.quantiles()[:, 0]): assert abs((x <= v).mean() - q) < 0.014, k

def test_statistics_refuse_what_would_spoil_them():
    with pytest.raises(AssertionError): RunningStats().update([1.0, np.nan])
    with pytest.raises(ValueError, match="no values"): RunningStats().result()
    with pytest.raises(ValueError, match="3 channels among frames of 1"): ImageStats().update(np.zeros((4, 4, 3), np.uint8))

def test_statistics_of_a_store_are_those_of_its_table_and_pixels(tmp_path):
    make_driven(tmp_path / "t/a"); make(tmp_path / "t/b", size=16); make_driven(tmp_path / "u/a", seed=2, known=("position",))
    store = ReplayStore(tmp_path)
    stats, f = store.stats(), store.frames
    assert set(f) - set(stats.index) == {"track_id", "replay", "episode_index", "frame_index", "file", "step", "capture_timestamp_utc"}
    for k in stats.index.drop("image"):
        x = f[k].dropna().to_numpy(float)
        assert stats.loc[k, "count"] == len(x) and np.allclose(stats.loc[k, ["min", "max", "mean", "std", "q50"]].astype(float),
                                                               [x.min(), x.max(), x.mean(), x.std(), np.quantile(x, 0.5, method="inverted_cdf")]), k
    pixels = np.concatenate([r.images().ravel() for r in store]) / 255
    assert np.allclose(stats.loc["image", ["min", "max", "mean", "std", "q90"]].astype(float), [pixels.min(), pixels.max(), pixels.mean(), pixels.std(), np.quantile(pixels, 0.9, method="inverted_cdf")])
    assert "image" not in store.stats(images=False).index and isinstance(stats, pd.DataFrame)
