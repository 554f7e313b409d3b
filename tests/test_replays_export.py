"Exports are read back with pyarrow alone: schema, rows, bytes, episodes, statistics, splits; and a killed or refused export leaves nothing that looks finished."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest, yaml
from tmlab.core.runs import read_json
from tmlab.core.state import make_state
from tmlab.replays import export as room
from tmlab.replays.actions import ACTIONS, KEYS
from tmlab.replays.card import front_problems
from tmlab.replays.export import CAMERA, RULKA, export
from tmlab.replays.manifest import write_replay
from tmlab.replays.split import split_tracks
from tmlab.replays.store import QUANTILES, ReplayStore

Q = list(QUANTILES.values())

def drive(folder, n=12, seed=0, step_ms=50, size=(24, 32), states=True, actions=True, **metadata):
    "A replay of random frames, actions and states."
    rng = np.random.default_rng(seed)
    idx, t = rng.integers(0, 12, n), np.arange(n) * step_ms
    entries = dict(time_ms=t)
    if actions: entries |= dict(action_idx=idx, inputs=ACTIONS[idx])
    if states: entries["states"] = make_state(n, time_ms=t, position=rng.normal(size=(n, 3)).round(5), wheel_contact=rng.random((n, 4)) < 0.5, gear=rng.integers(0, 6, n))
    return write_replay(folder, rng.integers(0, 256, (n, *size), np.uint8), entries, dict(frame_source="rendered", player="expert", race_finished=True) | metadata)

def dataset(root, tracks=4, replays=2):
    for t in range(tracks):
        for r in range(replays): drive(root / f"hilly-{t}-30s-v1/drive_{r}", n=9 + t + r, seed=10 * t + r)
    return root

@pytest.fixture(scope="module")
def root(tmp_path_factory): return dataset(tmp_path_factory.mktemp("export") / "img")

@pytest.fixture(scope="module")
def exported(root):
    "Both formats of `root`, in several small files each."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "HF_MEGABYTES", 0.02); patch.setattr(room, "LEROBOT_MEGABYTES", 0.02); patch.setattr(room, "LEROBOT_CHUNK", 2)
        return {f: export(root, root.parent / f, f, val_fraction=0.25, seed=1) for f in room.FORMATS}

def source_bytes(root, track, replay, file): return (root / track / replay / file).read_bytes()

def test_huggingface_rows_are_the_frames_table_with_the_images(root, exported):
    files = sorted((exported["hf"] / "data").iterdir())
    names = [f.name for f in files]
    assert len(files) > 4 and all(n.startswith(("train-", "validation-")) for n in names)
    for split in ("train", "validation"):
        of_split = [n for n in names if n.startswith(split)]
        assert of_split == [f"{split}-{i:05d}-of-{len(of_split):05d}.parquet" for i in range(len(of_split))]
    table = pd.concat([pq.read_table(f).to_pandas() for f in files], ignore_index=True)
    frames = ReplayStore(root).frames.rename(columns=dict(replay="replay_name"))
    assert list(table)[:len(RULKA)] == list(RULKA) and len(table) == len(frames)
    both = table.merge(frames, on=["track_id", "replay_name", "frame_index"], suffixes=("", "_source"))
    for k in (*KEYS, "step", "time_ms", "action_idx", "gear", "wheel_contact_rl"): assert (both[k] == both[f"{k}_source"]).all(), k
    for k in ("position_x", "position_z", "timestamp"): assert np.allclose(both[k], both[f"{k}_source"], atol=1e-6), k
    assert (table.fps == 20).all() and (table.width == 32).all() and (table.height == 24).all() and table.race_finished.all()
    for r in table.itertuples(): assert r.image["bytes"] == source_bytes(root, r.track_id, r.replay_name, r.image["path"])

def test_the_schema_says_which_column_is_an_image(exported):
    for path, image in ((exported["hf"] / "data", "image"), (exported["lerobot"] / "data", CAMERA)):
        for file in path.rglob("*.parquet"):
            schema = pq.read_schema(file)
            features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
            assert list(features) == schema.names and features[image] == {"_type": "Image"}
            assert str(schema.field(image).type) == "struct<bytes: binary, path: string>"

def test_splits_are_by_track_and_one_replay_is_one_row_group(root, exported):
    train, validation = split_tracks(ReplayStore(root).replays.track_id, 0.25, 1)
    for file in (exported["hf"] / "data").iterdir():
        f = pq.ParquetFile(file)
        for g in range(f.num_row_groups): assert len(set(f.read_row_group(g, columns=["episode_index"])[0].to_pylist())) == 1
        assert set(f.read(columns=["track_id"])[0].to_pylist()) <= set(train if file.name.startswith("train") else validation)
    e = pd.read_parquet(exported["lerobot"] / "meta/episodes/chunk-000/file-000.parquet")
    ranges = {k: range(*map(int, v.split(":"))) for k, v in read_json(exported["lerobot"] / "meta/info.json")["splits"].items()}
    assert [e.split[i] for k in ranges for i in ranges[k]] == e.split.tolist() and set(e.track_id[list(ranges["validation"])]) == set(validation)

def test_episodes_lie_where_their_table_says(root, exported):
    out, store = exported["lerobot"], ReplayStore(root)
    info, e = read_json(out / "meta/info.json"), pd.read_parquet(out / "meta/episodes/chunk-000/file-000.parquet")
    tasks = pd.read_parquet(out / "meta/tasks.parquet")
    assert info["codebase_version"] == "v3.0" and info["fps"] == 20 and (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (8, store.replays.n_frames.sum(), 4)
    assert e["data/chunk_index"].nunique() > 1 and e["data/file_index"].max() == 1
    for row in e.to_dict("records"):
        path = out / info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        data = pq.read_table(path, filters=[("episode_index", "=", row["episode_index"])]).to_pandas()
        source = store.replay(row["track_id"], row["replay"])
        assert data["index"].tolist() == list(range(row["dataset_from_index"], row["dataset_to_index"])) and len(data) == row["length"] == len(source)
        assert data.frame_index.tolist() == list(range(len(data))) and np.array_equal(data.timestamp, (np.arange(len(data)) / 20).astype(np.float32))
        assert tasks.iloc[data.task_index.iloc[0]].name == row["tasks"][0] and row["track_id"] in row["tasks"][0]
        assert [b["bytes"] for b in data[CAMERA]] == [(source.folder / f).read_bytes() for f in source.files]
        assert np.array_equal(np.stack(data.action), source.manifest.inputs) and np.array_equal(data.discrete_action, source.manifest.action_idx)
        state = np.stack(data["observation.state"])
        names = info["features"]["observation.state"]["names"]
        assert np.array_equal(state[:, :3], source.manifest.states.position.astype(np.float32)) and np.array_equal(state[:, names.index("gear")], source.manifest.states.gear)

def test_features_and_columns_agree(exported):
    features = read_json(exported["lerobot"] / "meta/info.json")["features"]
    schema = pq.read_schema(next((exported["lerobot"] / "data").rglob("*.parquet")))
    assert list(features) == schema.names and features[CAMERA] == dict(dtype="image", shape=[24, 32, 1], names=["height", "width", "channels"])
    for k, f in features.items():
        if f["shape"] != [1] and k != CAMERA: assert str(schema.field(k).type) == f"fixed_size_list<element: float>[{f['shape'][0]}]" and len(f["names"]) == f["shape"][0]

def close(stats, values):
    "Whether `stats` are those of the rows `values` (n, D)."
    want = dict(min=values.min(0), max=values.max(0), mean=values.mean(0), std=values.std(0), **dict(zip(QUANTILES, np.quantile(values, Q, axis=0, method="inverted_cdf"))))
    for k, v in want.items(): np.testing.assert_allclose(np.ravel(stats[k]).astype(float), v, rtol=1e-6, atol=1e-9, err_msg=k)

def test_statistics_are_those_of_the_data(root, exported):
    out, store = exported["lerobot"], ReplayStore(root)
    data = pd.concat([pq.read_table(f).to_pandas() for f in sorted((out / "data").rglob("*.parquet"))], ignore_index=True)
    stats, e = read_json(out / "meta/stats.json"), pd.read_parquet(out / "meta/episodes/chunk-000/file-000.parquet")
    rows = lambda table, k: np.stack(table[k]).reshape(len(table), -1).astype(float)
    for k in stats:
        if k == CAMERA: continue
        close(stats[k], rows(data, k)); assert stats[k]["count"] == [len(data)]
        for i in (0, 7): close({s: e[f"stats/{k}/{s}"][i] for s in stats[k]}, rows(data[data.episode_index == i], k))
    flat = lambda replays: np.concatenate([r.images().ravel() for r in replays])[:, None] / 255
    close(stats[CAMERA], flat(store)); assert stats[CAMERA]["count"] == [len(data)] and np.shape(stats[CAMERA]["mean"]) == (1, 1, 1)
    third = pq.read_table(out / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[3]
    close({s: third[f"stats/{CAMERA}/{s}"] for s in stats[CAMERA]}, flat([store.replay(third["track_id"], third["replay"])]))
    assert set(stats) == set(read_json(out / "meta/info.json")["features"])

def test_the_card_inside_is_valid_and_its_patterns_find_the_files(exported):
    for f, out in exported.items():
        front = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
        assert front_problems(front) == [] and front["license"] == "unknown"
        files = front["configs"][0]["data_files"]
        patterns = [files] if isinstance(files, str) else [x["path"] for x in files]
        assert sorted(p for x in patterns for p in out.glob(x)) == sorted((out / "data").rglob("*.parquet"))
    info = yaml.safe_load((exported["hf"] / "README.md").read_text().split("---\n")[1])["dataset_info"]
    rows = {s: sum(pq.read_metadata(p).num_rows for p in (exported["hf"] / "data").glob(f"{s}-*")) for s in ("train", "validation")}
    assert {s["name"]: s["num_examples"] for s in info["splits"]} == rows and [f["name"] for f in info["features"]] == pq.read_schema(next((exported["hf"] / "data").iterdir())).names

def test_what_is_not_recorded_is_null_or_refused(tmp_path):
    drive(tmp_path / "img/a/whole"); drive(tmp_path / "img/b/frames_only", states=False, actions=False, player=None, race_finished=None)
    out = export(tmp_path / "img", tmp_path / "hf", val_fraction=0)
    bare = pq.read_table(next((out / "data").iterdir())).to_pandas().query("replay_name == 'frames_only'")
    assert len(bare) == 12 and bare[["action_idx", "accelerate", "position_x", "gear", "player", "race_finished"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="1 of 2 replays do not record every action"): export(tmp_path / "img", tmp_path / "lerobot", "lerobot")
    drive(tmp_path / "img/b/frames_only", states=False)
    out = export(tmp_path / "img", tmp_path / "lerobot", "lerobot")
    assert "observation.state" not in read_json(out / "meta/info.json")["features"] and "Not every replay records position, wheel_contact, gear" in (out / "README.md").read_text()

@pytest.mark.parametrize("format", ["hf", "lerobot"])
def test_metadata_of_another_program_is_taken_as_it_is(tmp_path, format):
    drive(tmp_path / "img/a/r", player=17, race_time_ms=24_000.6, fps="20")
    out = export(tmp_path / "img", tmp_path / "out", format)
    if format == "hf": assert set(pq.read_table(next((out / "data").iterdir()))["player"].to_pylist()) == {"17"}
    else: assert pq.read_table(out / "meta/episodes/chunk-000/file-000.parquet").select(["player", "race_time_ms", "finished"]).to_pylist() == [dict(player="17", race_time_ms=24_001, finished=True)]

def test_colour_frames_keep_their_channels(tmp_path):
    folder = drive(tmp_path / "img/a/red", n=3)
    for p in folder.glob("*.jpeg"): cv2.imwrite(str(p), np.full((24, 32, 3), (0, 0, 200), np.uint8))  # OpenCV writes BGR
    out = export(tmp_path / "img", tmp_path / "lerobot", "lerobot")
    assert read_json(out / "meta/info.json")["features"][CAMERA]["shape"] == [24, 32, 3]
    red, green, blue = np.ravel(read_json(out / "meta/stats.json")[CAMERA]["mean"])
    assert red == pytest.approx(200 / 255, abs=0.02) and green == pytest.approx(0, abs=0.02) == blue

def damage_frame(root): p = next((root / "a/r").glob("*.jpeg")); p.write_bytes(p.read_bytes()[:-30])

@pytest.mark.parametrize("format, damage, words", [
    ("hf", damage_frame, "cut off"),
    ("lerobot", damage_frame, "cut off"),
    ("hf", lambda root: next((root / "a/r").glob("*.jpeg")).unlink(), "missing"),
    ("hf", lambda root: (root / "a/r/manifest.json").write_text("{"), "not valid JSON"),
    ("hf", lambda root: (root / "a/empty").mkdir(), "no manifest.json"),
    ("hf", lambda root: shutil.rmtree(root / "a"), "no replays"),
    ("lerobot", lambda root: drive(root / "a/slow", step_ms=100), "LeRobot needs one rate for all"),
    ("lerobot", lambda root: drive(root / "a/r", step_ms=34), "no whole number of frames a second"),
    ("lerobot", lambda root: write_replay(root / "a/r", np.zeros((3, 8, 8), np.uint8), dict(time_ms=[0, 50, 150], action_idx=[0, 0, 0]), dict(frame_source="game")), "50 to 100 ms"),
    ("lerobot", lambda root: drive(root / "a/small", size=(16, 16)), "LeRobot needs one size"),
    ("zip", lambda root: None, "expected one of"),
])
def test_a_refused_export_names_the_cause_and_leaves_nothing(tmp_path, format, damage, words):
    drive(tmp_path / "img/a/r")
    damage(tmp_path / "img")
    with pytest.raises(ValueError, match=words): export(tmp_path / "img", tmp_path / "out", format)
    assert [p.name for p in tmp_path.iterdir()] == ["img"]

def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    drive(tmp_path / "img/a/r")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: type("Usage", (), dict(free=1000)))
    with pytest.raises(ValueError, match="MB free, the export needs"): export(tmp_path / "img", tmp_path / "deep/out")
    assert not (tmp_path / "deep").exists()

def stamps(out): return {p: p.stat().st_mtime_ns for p in out.rglob("*")}

def test_an_existing_target_is_kept(tmp_path):
    root = dataset(tmp_path / "img", tracks=2, replays=1)
    (tmp_path / "out").mkdir()
    out = export(root, tmp_path / "out", "lerobot")
    before = stamps(out)
    assert export(root, out, "lerobot") == out and stamps(out) == before
    for other in (dict(format="hf"), dict(format="lerobot", seed=7), dict(format="lerobot", val_fraction=0.5)):
        with pytest.raises(ValueError, match="holds another export"): export(root, out, **other)
    drive(root / "hilly-0-30s-v1/one_more")
    with pytest.raises(ValueError, match="fingerprint"): export(root, out, "lerobot")
    (tmp_path / "notes").mkdir(); (tmp_path / "notes/mine.txt").write_text("x")
    with pytest.raises(ValueError, match="no finished export"): export(root, tmp_path / "notes")
    with pytest.raises(ValueError, match="lies in the data set"): export(root, root / "export")
    assert stamps(out) == before and (tmp_path / "notes/mine.txt").read_text() == "x"

SLOW = """
import sys, time
from tmlab.replays import export as room
read = room.read_episode
def slow(replay): print("reading", flush=True); time.sleep(0.05); return read(replay)
room.read_episode = slow
room.export(sys.argv[1], sys.argv[2], sys.argv[3])
"""

@pytest.mark.parametrize("format", ["hf", "lerobot"])
def test_sigkill_leaves_nothing_that_looks_finished(root, tmp_path, format):
    p = subprocess.Popen([sys.executable, "-c", SLOW, str(root), str(tmp_path / "out"), format], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for _ in range(4): p.stdout.readline()
    os.kill(p.pid, signal.SIGKILL); p.wait(); p.stdout.close()
    left = list(tmp_path.iterdir())
    assert [f.name for f in left] == [f".tmp-out-{p.pid}"] and not list(tmp_path.rglob("export.json")) and not list(tmp_path.rglob("README.md"))
    out = export(root, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == [out] and read_json(out / "export.json")["fingerprint"] == ReplayStore(root).fingerprint()
