"Captures in every form, every kind of damage by its own line, and the known defects of rulka's captures: recognised, corrected, stated."
import json, os, shutil
import numpy as np
import pandas as pd
import pytest
from tmlab import cli
from tmlab.core.runs import read_json, write_json
from tmlab.core.state import make_state
from tmlab.replays.actions import ACTIONS, COAST, KEYS, hard_labels, nearest_action, soft_labels
from tmlab.replays.floats import FLOAT_SLICES, capture_floats
from tmlab.replays.gbx import Ghost, ghost_keys, ghost_states, read_gbx
from tmlab.replays.manifest import (check_replay, check_root, encode_jpeg, frame_name, meta_entries, meta_states, notes_of, read_manifest, relabelled, wrong_frames,
                                    write_replay)
from tmlab.replays.store import ReplayStore
from tmlab.tracks.generate import FAMILIES, generate_track
from tmlab.world.record import record_replays

STAMP = dict(capture_timestamp_utc="2026-03-01T12:00:00+00:00")
NAME = "pos10_pacov_50020ms.replay"


def inputs_of(action): return dict(zip(KEYS, ACTIONS[action].tolist()))


def capture(folder, time_ms, labels=None, actions=None, meta=None, inputs=True, bare=False, stamp=STAMP, **metadata):
    "A capture as rulka's script writes it; `labels` (T,) action indices as stored."
    folder.mkdir(parents=True)
    rows = []
    for i, t in enumerate(time_ms):
        rows.append(dict(file=frame_name(i, int(t)), step=i, time_ms=int(t), **stamp))
        if labels is not None: rows[-1] |= dict(action_idx=int(labels[i])) | (dict(inputs=inputs_of(labels[i])) if inputs else {})
        (folder / rows[-1]["file"]).write_bytes(encode_jpeg(np.full((16, 16), i % 250, np.uint8)))
    parts = dict(entries=rows) | (dict(actions=[int(a) for a in actions]) if actions is not None else {}) | (dict(meta=meta) if meta is not None else {})
    write_json(folder / "manifest.json", rows if bare else parts)
    if not bare: write_json(folder / "metadata.json", dict(track_id="2233", replay_name=folder.name, width=16, height=16, step_ms=10, total_frames=len(rows), tmi_script_used=True) | metadata)
    return folder


def drive(seed, ms):
    "Action of each 10 ms tick (ms / 10,) of a drive in which keys change every 30 to 400 ms."
    rng = np.random.default_rng(seed)
    out = np.concatenate([np.full(k, a) for a, k in zip(rng.choice([0, 1, 2, 3, 6, 10], 4 * ms // 100), rng.integers(3, 41, 4 * ms // 100))])
    out[0] = 0
    return out[:ms // 10]


def late(driven): return np.append(COAST, driven[:-1])  # as rulka writes them down


def exit_code(root):
    "Of `tmlab check`."
    with pytest.raises(SystemExit) as e: cli.main(["check", str(root)])
    return e.value.code


# forms

@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_every_form_is_read_and_sound(tmp_path, bare, inputs, labelled):
    driven = drive(0, 1000)
    folder = capture(tmp_path / "2233" / NAME, np.arange(0, 1000, 50), late(driven)[::5] if labelled else None, late(driven) if labelled and not bare else None, inputs=inputs, bare=bare)
    man = read_manifest(folder)
    assert check_root(tmp_path) == [] and len(man) == 20 and man.states is None and man.meta is None
    assert man.has_actions == labelled and (man.metadata == {}) == bare
    assert man.entries[list(KEYS)].notna().all(axis=None) == (labelled and inputs)
    store = ReplayStore(tmp_path)
    assert store.problems == [] and store.replay("2233", NAME).images().shape == (20, 16, 16) and store.replays.replay.tolist() == [NAME]
    if labelled: assert np.array_equal(man.action_idx, (driven if not bare else late(driven))[::5])
    else:
        with pytest.raises(ValueError, match="20 of 20 entries have no action_idx"): man.action_idx
        with pytest.raises(ValueError, match="no action for each 10 ms"): man.labels()


def test_only_keys_without_an_action_index(tmp_path):
    driven = drive(1, 500)
    folder = capture(tmp_path / "t/r", np.arange(0, 500, 10), late(driven))
    data = read_json(folder / "manifest.json")
    for r in data["entries"]: del r["action_idx"]
    write_json(folder / "manifest.json", data)
    man = read_manifest(folder)
    assert np.array_equal(man.action_idx[:-1], driven[:-1]) and man.entries.action_idx.isna().all() and len(check_replay(folder)) == 0


# damage

def edit(change):
    def f(folder):
        data = read_json(folder / "manifest.json")
        (folder / "manifest.json").write_text(json.dumps(change(data) or data))
    return f

def entry(i, **kw): return edit(lambda d: d["entries"][i].update(kw))

def about(**kw): return lambda folder: write_json(folder / "metadata.json", read_json(folder / "metadata.json") | kw)

def retimed(i, time_ms):
    "Entry `i` and its file moved to another time."
    def f(folder):
        old = frame_name(i, 50 * i)
        (folder / old).rename(folder / frame_name(i, time_ms))
        entry(i, time_ms=time_ms, file=frame_name(i, time_ms))(folder)
    return f

def rotations(change):
    def f(data):
        for m in data["meta"]: m["orientation_flat"] = change(np.reshape(m["orientation_flat"], (3, 3))).ravel().tolist()
    return edit(f)

def meta(i, **kw): return edit(lambda d: d["meta"][i].update(kw))

def make_unreadable(path):
    path.unlink()
    path.mkdir()

DAMAGE = {
    "truncated JSON": (lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes()[:700]), "manifest.json: not valid JSON"),
    "JSON that is no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json: not valid JSON"),
    "JSON nested without end": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json: not valid JSON"),
    "manifest is a folder": (lambda f: make_unreadable(f / "manifest.json"), "manifest.json: cannot be read"),
    "metadata is a folder": (lambda f: make_unreadable(f / "metadata.json"), "metadata.json: cannot be read"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: no such file"),
    "missing frame": (lambda f: (f / frame_name(3, 150)).unlink(), "frame_00003_150ms.jpeg: missing"),
    "extra frame": (lambda f: shutil.copy(f / frame_name(3, 150), f / "frame_00099_4950ms.JPG"), "frame_00099_4950ms.JPG: not in the manifest"),
    "wrong size": (lambda f: (f / frame_name(3, 150)).write_bytes(encode_jpeg(np.zeros((8, 16), np.uint8))), "frame_00003_150ms.jpeg: 16x8, expected 16x16"),
    "not a JPEG": (lambda f: (f / frame_name(3, 150)).write_bytes(b"\x89PNG\r\n"), "frame_00003_150ms.jpeg: unreadable JPEG (not a JPEG)"),
    "empty frame": (lambda f: (f / frame_name(3, 150)).write_bytes(b""), "frame_00003_150ms.jpeg: unreadable JPEG (empty file)"),
    "frame cut off": (lambda f: (f / frame_name(3, 150)).write_bytes((f / frame_name(3, 150)).read_bytes()[:-20]), "frame_00003_150ms.jpeg: unreadable JPEG (cut off"),
    "frame is a folder": (lambda f: make_unreadable(f / frame_name(3, 150)), "frame_00003_150ms.jpeg: cannot be read"),
    "frame is a dead link": (lambda f: ((f / frame_name(3, 150)).unlink(), (f / frame_name(3, 150)).symlink_to("nowhere")), "frame_00003_150ms.jpeg: cannot be read"),
    "times go back": (retimed(3, 90), "manifest.json: entry 3: time_ms 90 does not come after 100"),
    "a time twice": (retimed(3, 100), "entry 3: time_ms 100 does not come after 100"),
    "a step twice": (lambda f: ((f / frame_name(3, 150)).rename(f / frame_name(2, 150)), entry(3, step=2, file=frame_name(2, 150))(f)), "manifest.json: step 2 comes after step 2"),
    "name and entry differ": (entry(19, step=25), "frame_00019_950ms.jpeg is listed as step 25"),
    "off the grid": (retimed(3, 153), "manifest.json: time_ms is off the 10 ms grid in 1 of 20 entries, first frame_00003_153ms.jpeg at 153 ms"),
    "a gap": (lambda f: (about(capture_interval_ms=50)(f), retimed(19, 1000)(f)), "1 steps in time_ms are not the capture interval of 50 ms, first from 900 to 1000 ms"),
    "action out of range": (entry(3, action_idx=12), "manifest.json: entry 3: action_idx is 12, expected 0…11"),
    "action is no number": (entry(3, action_idx=True), "entry 3: action_idx is True"),
    "actions out of range": (edit(lambda d: d["actions"].__setitem__(3, -1)), "actions: expected a list of indices 0…11"),
    "keys contradict the action": (entry(3, inputs=inputs_of(11)), "frame_00003_150ms.jpeg: action_idx"),
    "a key is no bool": (entry(3, inputs=dict(inputs_of(0), left=1)), "entry 3: inputs is"),
    "the timeline contradicts the entries": (edit(lambda d: d["actions"].__setitem__(15, 8)), "`actions` contradicts action_idx in 1 of 20 entries, first frame_00003_150ms.jpeg"),
    "the timeline is too short": (edit(lambda d: d.update(actions=d["actions"][:80])), "`actions` contradicts action_idx in 4 of 20 entries, first frame_00016_800ms.jpeg"),
    "NaN in meta": (meta(3, position=[1, float("nan"), 2]), "manifest.json: meta 3: position is not finite"),
    "infinity in meta": (meta(3, margin=float("inf")), "meta 3: margin is not finite"),
    "null in meta": (meta(3, velocity=[1, None, 2]), "meta 3: velocity is not finite"),
    "meta of the wrong shape": (meta(3, velocity=[1, 2]), "meta 3: velocity has shape (2,), expected (3,)"),
    "meta without times": (edit(lambda d: [[m.pop(k) for k in ("time_ms", "race_time")] for m in d["meta"]] and None), "meta: no time_ms"),
    "meta lacks a field": (edit(lambda d: d["meta"][3].pop("margin") and None), "meta 3: fields differ from meta 0"),
    "times of meta go back": (meta(3, time_ms=100), "meta 3: time_ms 100 does not come after 100"),
    "orientation is no rotation": (rotations(lambda R: 1.5 * R), "meta rotation is no rotation in 20 of 20, first in meta 0"),
    "orientation is mirrored": (rotations(lambda R: R * [-1, 1, 1]), "meta rotation is no rotation"),
    "wrong number of frames": (about(total_frames=19), "metadata.json: total_frames 19, the manifest lists 20"),
    "metadata of the wrong kind": (about(race_time_ms="a minute"), "metadata.json: race_time_ms is 'a minute'"),
    "metadata is a list": (lambda f: (f / "metadata.json").write_text("[]"), "metadata.json: expected an object"),
}


def circle(n, dt_ms=50):
    "`n` states on a circle of 60 m at 30 m/s."
    t = np.arange(n) * dt_ms
    a = 0.5 * t / 1000 + 1
    R = np.stack([[np.cos(a + np.pi / 2), 0 * a, np.sin(a + np.pi / 2)], [0 * a, 0 * a + 1, 0 * a], [-np.sin(a + np.pi / 2), 0 * a, np.cos(a + np.pi / 2)]]).transpose(2, 0, 1)
    return make_state(n, time_ms=t, position=60 * np.c_[np.sin(a), 0 * t, np.cos(a)], velocity=30 * np.c_[np.cos(a), 0 * t, -np.sin(a)], rotation=R, angular_velocity=np.tile([0, .5, 0], (n, 1)))


def meta_of(states): return meta_entries(states, np.zeros((len(states), 184)), np.zeros(len(states)))


def whole(folder, seed=0, **kw):
    "A sound capture of rulka's with everything in it: 20 frames 50 ms apart."
    driven = drive(seed, 1100)
    driven[90:] = driven[90]
    return capture(folder, np.arange(0, 1000, 50), late(driven)[:100:5], late(driven), meta_of(circle(20)), **kw)


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_each_damage_is_one_line_and_an_exit_code(tmp_path, capsys, damage, words):
    folder, other = whole(tmp_path / "2233" / NAME), whole(tmp_path / "2233/other", seed=1)
    assert check_root(tmp_path) == [] and exit_code(tmp_path) == 0
    before = {p: p.read_bytes() for p in other.iterdir()}
    damage(folder)
    problems = check_root(tmp_path)
    assert len(problems) == 1 and words in problems[0] and problems[0].startswith(str(folder)) and "\n" not in problems[0]
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert exit_code(tmp_path) == 1 and problems[0] in capsys.readouterr().out
    assert after == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} and before == {p: p.read_bytes() for p in other.iterdir()}  # nothing is repaired


def test_several_problems_of_several_folders_are_all_listed(tmp_path):
    a, b = whole(tmp_path / "1/a"), whole(tmp_path / "2/b")
    for name in ("missing frame", "keys contradict the action", "off the grid"): DAMAGE[name][0](a) if name != "off the grid" else retimed(4, 203)(a)
    DAMAGE["truncated JSON"][0](b)
    problems = check_root(tmp_path)
    assert len(problems) == 4 and sum(str(a) in p for p in problems) == 3 and sum(str(b) in p for p in problems) == 1


def test_empty_folders(tmp_path):
    assert check_root(tmp_path / "none") == [f"{tmp_path / 'none'}: no such folder"]
    assert len(check_root(tmp_path)) == 1 and "no replays; expected" in check_root(tmp_path)[0]
    (tmp_path / "track").mkdir()
    assert check_root(tmp_path) == [f"{tmp_path / 'track'}: no replay folder in it"] and exit_code(tmp_path) == 1
    (tmp_path / "track/replay").mkdir()
    assert check_root(tmp_path) == [f"{tmp_path / 'track/replay'}: empty folder"]
    (tmp_path / "track/replay/readme.txt").write_text("x")
    assert check_root(tmp_path) == [f"{tmp_path / 'track/replay/manifest.json'}: no such file"]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    folder, listdir = whole(tmp_path / "t/r"), os.listdir
    for closed in (folder, folder.parent, tmp_path):
        def refuse(path):
            if str(path) == str(closed): raise PermissionError(13, "Permission denied")
            return listdir(path)
        monkeypatch.setattr(os, "listdir", refuse)
        assert check_root(tmp_path) == [f"{closed}: cannot be read: Permission denied"]


def test_a_track_or_a_replay_can_be_checked_alone(tmp_path):
    folder = whole(tmp_path / "2233" / NAME)
    (folder / frame_name(3, 150)).unlink()
    assert check_root(tmp_path) == check_root(tmp_path / "2233") == check_root(folder) != []


@pytest.mark.parametrize("field, words", [("rotation", "state.rotation is world → car"), ("velocity", "state.velocity is in the car's frame"), ("angular_velocity", "state.angular_velocity is in the car's frame")])
def test_states_of_our_own_form_in_another_frame_are_a_problem(tmp_path, field, words):
    s = tilted(circle(40))
    wrong = make_state(40, **{k: getattr(s, k) for k in s.known} | {field: np.swapaxes(s.rotation, 1, 2) if field == "rotation" else s.to_car(getattr(s, field))})
    for k, states in enumerate((s, wrong)):
        write_replay(tmp_path / f"t/{k}", np.zeros((40, 8, 8), np.uint8), dict(time_ms=s.time_ms, states=states), dict(frame_source="rendered"))
        problems = check_replay(tmp_path / f"t/{k}")
        assert len(problems) == k and all(words in p for p in problems) and read_manifest(tmp_path / f"t/{k}").notes == []


def test_nan_in_a_state_is_a_problem(tmp_path):
    s = circle(6)
    folder = write_replay(tmp_path / "t/r", np.zeros((6, 8, 8), np.uint8), dict(time_ms=s.time_ms, states=s), dict(frame_source="rendered"))
    edit(lambda d: d["entries"][4]["state"].update(velocity=[0, float("nan"), 0]))(folder)
    assert check_replay(folder) == [f"{folder / 'manifest.json'}: entry 4: state.velocity is not finite"]
    with pytest.raises(ValueError, match="entry 4: state.velocity is not finite"): read_manifest(folder)


# late labels

def label_notes(man): return [n for n in man.notes if ": labels" in n]


@pytest.mark.parametrize("interval", [10, 20, 50, 100])
def test_late_labels_are_moved_by_the_timeline(tmp_path, interval):
    driven = drive(3, 3000)
    t = np.arange(0, 3000, interval)
    folder = capture(tmp_path / "t/r", t, late(driven)[t // 10], late(driven))
    man, raw = read_manifest(folder), read_manifest(folder, correct=False)
    assert np.array_equal(man.action_idx[:-1], driven[t // 10][:-1]) and np.array_equal(man.inputs, ACTIONS[man.action_idx]) and np.array_equal(man.actions[:-1], driven[:-1])
    assert np.array_equal(raw.action_idx, late(driven)[t // 10]) and raw.notes == [] and raw.actions == late(driven).tolist()
    changed = (man.action_idx != raw.action_idx).sum()
    assert changed > 0 and len(label_notes(man)) == 1 and f"labels are 10 ms late" in label_notes(man)[0] and f"{changed} of {len(t)} frames" in label_notes(man)[0]
    assert np.array_equal(man.labels()[:-1], hard_labels(ACTIONS[np.concatenate([driven[k:k + 5] for k in t[:-1] // 10 if k + 5 <= 300])]) if interval >= 50 else man.labels()[:-1])
    assert man.labels(9, soft=True).shape == (len(t), 9) and check_root(tmp_path) == []
    assert [n for n in notes_of(tmp_path) if ": labels" in n] == [f"{folder}: {label_notes(man)[0]}"]


def test_frames_every_10_ms_are_a_timeline(tmp_path):
    driven = drive(4, 2000)
    man = read_manifest(capture(tmp_path / "t/r", np.arange(0, 2000, 10), late(driven), bare=True))
    assert np.array_equal(man.action_idx[:-1], driven[:-1]) and "corrected: labels are 10 ms late" in label_notes(man)[0] and man.actions is None


def test_without_a_timeline_late_labels_stay_and_are_said(tmp_path):
    driven = drive(5, 2000)
    man = read_manifest(capture(tmp_path / "t/r", np.arange(0, 2000, 50), late(driven)[::5]))
    assert np.array_equal(man.action_idx, late(driven)[::5]) and label_notes(man)[0].startswith("not corrected: labels are those of the tick before")


def test_a_timeline_that_contradicts_the_entries_corrects_nothing(tmp_path):
    driven = drive(6, 2000)
    man = read_manifest(capture(tmp_path / "t/r", np.arange(0, 2000, 50), driven[::5], late(driven)))
    assert np.array_equal(man.action_idx, driven[::5]) and "contradict" in label_notes(man)[0] and man.actions == late(driven).tolist()


def test_the_clock_of_tminterface_in_a_long_capture(tmp_path):
    "70 s: the first 65.5 s of labels are empty, the rest are those of the first seconds."
    driven = drive(7, 70_000)
    stored = np.full(7000, COAST)
    stored[6555:] = driven[:7000 - 6555]
    folder = capture(tmp_path / "t/r", np.arange(0, 70_000, 500), stored[::50], stored)
    man = read_manifest(folder)
    kept = man.entries.action_idx.notna()
    assert kept.sum() == 9 and np.array_equal(man.entries.action_idx[kept], driven[::50][:9]) and man.actions == driven[:445].tolist()
    assert "labels are 65545 ms late" in label_notes(man)[0] and "131 have none now" in label_notes(man)[0] and man.entries.accelerate.isna().sum() == 131
    with pytest.raises(ValueError, match="131 of 140 entries have no action_idx.*65545 ms late"): man.action_idx
    with pytest.raises(ValueError, match="65545 ms late"): man.labels()


@pytest.mark.parametrize("timeline", [False, True])
def test_the_clock_of_tminterface_in_a_short_capture_leaves_no_label(tmp_path, timeline):
    man = read_manifest(capture(tmp_path / "t/r", np.arange(0, 20_000, 200), np.full(100, COAST), np.full(2000, COAST) if timeline else None))
    assert man.entries.action_idx.isna().all() and not man.has_actions and "no key in the first" in label_notes(man)[0] and "100 have none now" in label_notes(man)[0]


def test_a_rest_at_the_start_is_no_shifted_clock(tmp_path):
    driven = np.append(np.full(400, COAST), drive(8, 4000))
    man = read_manifest(capture(tmp_path / "t/r", np.arange(0, 8000, 100), late(driven)[::10], late(driven)))
    assert np.array_equal(man.action_idx[:-1], driven[::10][:-1]) and "labels are 10 ms late" in label_notes(man)[0]


def test_only_captures_of_rulka_are_corrected_by_themselves(tmp_path):
    driven = drive(9, 1000)
    folder = capture(tmp_path / "t/r", np.arange(0, 1000, 10), late(driven), bare=True, stamp={})
    assert np.array_equal(read_manifest(folder).action_idx, late(driven)) and read_manifest(folder).notes == []
    assert np.array_equal(read_manifest(folder, correct=True).action_idx[:-1], driven[:-1])
    ours = write_replay(tmp_path / "u/r", np.zeros((100, 8, 8), np.uint8), dict(time_ms=np.arange(0, 1000, 10), action_idx=driven), dict(frame_source="game"), timestamp=STAMP["capture_timestamp_utc"])
    assert np.array_equal(read_manifest(ours, correct=True).action_idx, driven) and read_manifest(ours).notes == []


def test_what_cannot_be_corrected_is_said(tmp_path):
    folder = capture(tmp_path / "t/r", np.arange(0, 1000, 50), race_finished=True, race_time_ms=1750)
    text = "\n".join(read_manifest(folder).notes)
    assert "later render" in text and "the last 800 ms are missing" in text and "no `meta`" in text and "corrected: labels" not in text


# frames of reference

def tilted(s):
    "The same drive on a plane that is tilted about the z axis by 40°, which makes car and world axes differ for spins too."
    c, d = np.cos(.7), np.sin(.7)
    T = np.array([[c, -d, 0], [d, c, 0], [0, 0, 1.]])
    turn = lambda v: v @ T.T
    return make_state(len(s), time_ms=s.time_ms, position=turn(s.position), velocity=turn(s.velocity), rotation=T @ s.rotation, angular_velocity=turn(s.angular_velocity))


@pytest.mark.parametrize("wrong", [("rotation",), ("velocity",), ("angular_velocity",), ("velocity", "angular_velocity"), ("rotation", "velocity", "angular_velocity")])
def test_meta_in_another_frame_is_turned_and_said(tmp_path, wrong):
    s = tilted(circle(60))
    stored = {k: getattr(s, k) for k in s.known} | {k: s.to_car(getattr(s, k)) for k in wrong if k != "rotation"}
    if "rotation" in wrong: stored["rotation"] = np.swapaxes(s.rotation, 1, 2)
    folder = capture(tmp_path / "t/r", s.time_ms, meta=meta_of(make_state(60, **stored)))
    man = read_manifest(folder)
    back = meta_states(man.meta)
    for k in ("position", "velocity", "rotation", "angular_velocity"): assert np.allclose(getattr(back, k), getattr(s, k)), k
    said = sorted(n.split("meta ")[1].split(" is ")[0] for n in man.notes if n.startswith("corrected: meta"))
    assert said == sorted(wrong) and all("misses the path by" in n and "60 samples" in n for n in man.notes if n.startswith("corrected: meta"))
    assert check_root(tmp_path) == [] and len([n for n in notes_of(tmp_path) if "corrected: meta" in n]) == len(wrong)
    assert np.allclose(meta_states(read_manifest(folder, correct=False).meta).velocity, stored["velocity"])


def test_meta_that_cannot_tell_is_left_alone(tmp_path):
    t = np.arange(0, 2000, 50)
    straight = make_state(40, time_ms=t, position=np.c_[0 * t, 0 * t, .03 * t], velocity=np.tile([0, 0, 30.], (40, 1)), rotation=np.tile(np.eye(3), (40, 1, 1)), angular_velocity=np.zeros((40, 3)))
    man = read_manifest(capture(tmp_path / "t/r", t, meta=meta_of(straight)))
    assert not [n for n in man.notes if n.startswith("corrected: meta")] and np.allclose(meta_states(man.meta).velocity, straight.velocity)


@pytest.fixture(scope="module")
def laps(tmp_path_factory):
    root = tmp_path_factory.mktemp("laps")
    return record_replays([generate_track(k, kind, 8) for k, kind in enumerate(FAMILIES)], root / "img", per_track=1, seed=0, image_size=(16, 16), threads=1, quiet=True)


def test_laps_of_the_world_are_in_their_frames(laps):
    assert len(laps) == len(FAMILIES)
    for folder in laps:
        man = read_manifest(folder)
        assert check_replay(folder) == [] and man.notes == [] and wrong_frames(man.states) == {} and wrong_frames(meta_states(man.meta)) == {}


def as_rulka(folder, to):
    "A lap of the world as rulka would have captured it: no version, no states, labels a tick late, velocities as they stand."
    data = read_json(folder / "manifest.json")
    for r in data["entries"]: r.pop("state"); r |= STAMP
    stored = late(np.array(data["actions"]))
    for r in data["entries"]: r |= dict(action_idx=int(stored[r["time_ms"] // 10]), inputs=inputs_of(stored[r["time_ms"] // 10]))
    shutil.copytree(folder, to)
    write_json(to / "manifest.json", dict(entries=data["entries"], actions=stored.tolist(), meta=data["meta"]))
    write_json(to / "metadata.json", {k: v for k, v in read_json(folder / "metadata.json").items() if k not in ("format_version", "complete", "frames_sha256")} | dict(tmi_script_used=True))
    return to


def test_floats_of_a_capture_are_those_the_agent_would_have_seen(laps, tmp_path):
    "Car-frame velocities and actions 50 ms apart, unlike what rulka's own pretraining makes of the same `meta`."
    for i, folder in enumerate(laps):
        ours, theirs = read_manifest(folder), read_manifest(as_rulka(folder, tmp_path / f"t/{i}"))
        assert np.array_equal(theirs.action_idx, ours.action_idx) and check_root(tmp_path) == []
        for man in (ours, theirs):
            floats, mask, at = capture_floats(man)
            assert mask.all() and np.array_equal(at, ours.time_ms) and np.isfinite(floats).all()
            s = ours.states
            assert np.allclose(floats[:, 56:59], s.to_car(s.velocity), atol=1e-3) and np.allclose(floats[:, 53:56], s.to_car(s.angular_velocity), atol=1e-3)
            assert np.allclose(floats[:, 59:62], s.rotation[:, 1, :], atol=1e-4) and np.allclose(floats[:, 34], s.gear)
            assert np.array_equal(floats[5:, 1:21].reshape(-1, 5, 4), np.stack([ACTIONS[ours.action_idx[k:len(at) - 5 + k]] for k in range(5)], 1))
            assert np.array_equal(floats[0, 1:21], np.tile([1, 0, 0, 0], 5))


def test_floats_of_a_capture_with_less_in_it(tmp_path):
    s = circle(20)
    less = [{k: v for k, v in m.items() if k not in ("gear_and_wheels", "is_freewheeling", "margin")} for m in meta_of(s)]
    floats, mask, at = capture_floats(read_manifest(capture(tmp_path / "t/r", s.time_ms, meta=less)))
    assert not mask[:, 1:53].any() and not mask[:, 182:].any() and mask[:, FLOAT_SLICES["velocity"]].all() and mask[:, FLOAT_SLICES["road_ahead"]].all()
    with pytest.raises(ValueError, match="no `meta`"): capture_floats(read_manifest(capture(tmp_path / "t/none", s.time_ms)))


# real runs

def rulka_labels(ghost, n):
    "Labels of ticks 0 … n − 1 as rulka makes them of this replay: by raw event times, with TMInterface's clock left in."
    return nearest_action(ghost_keys(ghost, 10 * np.arange(n) - 10 - 65_535 * ghost.clock_shifted))


@pytest.mark.real
def test_captures_of_real_runs_get_the_inputs_that_were_driven(real, tmp_path):
    paths = sorted(real("replays", "stadium").glob("*.Gbx"))
    ghosts = [g for g in (read_gbx(p).best for p in paths) if g is not None and g.inputs is not None and g.race_time_ms < 100_000]
    assert len(ghosts) > 20 and 3 < sum(g.clock_shifted for g in ghosts) < len(ghosts)
    for k, g in enumerate(ghosts):
        t, n = np.arange(0, g.race_time_ms - 800, 200), g.race_time_ms // 10 + 1
        stored, driven = rulka_labels(g, n), nearest_action(ghost_keys(g, 10 * np.arange(n)))
        folder = capture(tmp_path / f"t/{k}", t, stored[t // 10], stored)
        man = read_manifest(folder)
        if not g.clock_shifted: assert np.array_equal(man.action_idx, driven[t // 10]) and "10 ms late" in label_notes(man)[0]
        else:
            assert "65545 ms late" in label_notes(man)[0]
            kept = man.entries.action_idx.notna().to_numpy()
            assert np.array_equal(man.entries.action_idx[kept].to_numpy(int), driven[t // 10][kept])
        exact = relabelled(folder, g)
        assert np.array_equal(exact.action_idx, driven[t // 10]) and np.array_equal(exact.labels(), hard_labels(ghost_keys(g, (t[:, None] + 10 * np.arange(5)).ravel())))
        assert len(label_notes(exact)) == 1 and exact.notes[-1].startswith("corrected: labels are those of the replay's inputs")
        if not g.clock_shifted: assert "the stored ones were 10 ms late (at that shift 100.0%" in exact.notes[-1]


@pytest.mark.real
def test_labels_of_another_run_are_refused(real, tmp_path):
    a, b = (read_gbx(real("replays", "stadium", f"A01-Race_{x}.Replay.Gbx")).best for x in ("23850_nici0903", "23860_lackadal"))
    assert not a.clock_shifted
    stored = rulka_labels(a, 2300)
    folder = capture(tmp_path / "t/r", np.arange(0, 23_000, 50), stored[::5], stored)
    with pytest.raises(ValueError, match="is it the replay of this capture"): relabelled(folder, b)


@pytest.mark.real
def test_frames_of_reference_of_real_runs(real):
    "As they are nothing is suspected; with a field in another frame, that field is."
    n = found = 0
    for path in sorted(real("replays", "stadium").glob("*.Gbx")):
        for g in read_gbx(path).ghosts:
            s = ghost_states(g)
            assert wrong_frames(s) == {}, path.name
            for k in ("rotation", "velocity", "angular_velocity"):
                other = np.swapaxes(s.rotation, 1, 2) if k == "rotation" else s.to_car(getattr(s, k))
                suspected = wrong_frames(make_state(len(s), **{f: getattr(s, f) for f in s.known} | {k: other}))
                assert set(suspected) <= {k}, path.name
                n, found = n + 1, found + len(suspected)
    assert n > 75 and found >= 0.95 * n


@pytest.mark.real
def test_real_shots_of_the_game(real, tmp_path):
    "43 shots of a race, about 1.16 s apart, as a bare list without labels."
    source = real("frames", "tmuf_stadium_run1")
    table = pd.read_csv(source / "labels.tsv", sep="\t").query("kind == 'race' and hud_time_ms >= 0").drop_duplicates("hud_time_ms")
    folder = tmp_path / "stadium/run1.replay"
    folder.mkdir(parents=True)
    rows = [dict(file=r.frame, step=i, time_ms=int(r.hud_time_ms)) for i, r in enumerate(table.itertuples())]
    for r in rows: shutil.copy(source / r["file"], folder)
    write_json(folder / "manifest.json", rows)
    man = read_manifest(folder)
    assert len(man) >= 39 and check_root(tmp_path) == [] and man.notes == [] and not man.has_actions and man.metadata == {}
    assert ReplayStore(tmp_path).replay("stadium", "run1.replay").images().shape == (len(man), 256, 256)
    shutil.copy(source / "seq1_44.jpeg", folder)  # a menu
    assert check_root(tmp_path) == [f"{folder / 'seq1_44.jpeg'}: not in the manifest"]


@pytest.mark.real
def test_shots_and_keys_of_another_game(real, tmp_path):
    "282 frames with keys: what a loader can be tested with."
    source = real("frames", "tm2020_keys")
    log = read_json(source / "log.json")
    rows = [dict(file=r["frame"].replace(".jpg", ".jpeg"), step=i, time_ms=40 * i, inputs=dict(zip(("left", "right", "accelerate", "brake"), map(bool, r["keys"])))) for i, r in enumerate(log)]
    folder = tmp_path / "tm2020/keys"
    shutil.copytree(source, folder)
    write_json(folder / "manifest.json", rows)
    man = read_manifest(folder)
    assert len(man) == len(log) and check_root(tmp_path) == [] and np.array_equal(man.action_idx, nearest_action(man.inputs)) and man.notes == []
    assert soft_labels(man.inputs).shape == (-(-len(log) // 5), 12)
