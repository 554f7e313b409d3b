"""Recorded laps and imported ghosts: same bytes however made, whole or not at all, bad files refused one by one."""
import hashlib, os, shutil, signal, subprocess, sys, time
import numpy as np
import pytest
from tmlab.core.runs import real_data
from tmlab.replays.manifest import check_replay, read_manifest
from tmlab.tracks.generate import generate_track
from tmlab.world.env import thread_count
from tmlab.world.record import import_replays, record_replays

needs_real = pytest.mark.skipif(real_data("replays/stadium") is None, reason="no real replays (TMLAB_REAL_DATA)")
JOB = "from tmlab.tracks.generate import generate_track as g; from tmlab.world.record import record_replays as r; r([g(k, 'hilly', 6) for k in range(3)], {out!r}, per_track=2, seed=3, threads=1)"


def bytes_of(root): return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def record(root, threads=1, **kw):
    return record_replays([generate_track(k, "hilly", 6) for k in range(3)], root / "img", per_track=2, seed=3, threads=threads, quiet=True, **kw)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded")
    record(root)
    return root


def test_bytes_do_not_depend_on_threads(recorded, tmp_path):
    record(tmp_path, thread_count(None))
    assert bytes_of(tmp_path) == bytes_of(recorded) and len(list((tmp_path / "img").glob("*/*/manifest.json"))) == 6


def test_killed_and_run_again(recorded, tmp_path):
    "SIGKILL while it records; the rerun ends with the same bytes and no leftovers."
    job = subprocess.Popen([sys.executable, "-c", JOB.format(out=str(tmp_path / "img"))], stderr=subprocess.DEVNULL)
    until = time.time() + 180
    while job.poll() is None and len(list(tmp_path.glob("img/*/*/metadata.json"))) < 2 and time.time() < until: time.sleep(0.01)
    job.send_signal(signal.SIGKILL); job.wait()
    left = [p for p in (tmp_path / "img").glob("*/expert_*") if not (p / "metadata.json").exists()]
    assert not left and list((tmp_path / "img").glob("*/*/metadata.json"))
    record(tmp_path)
    assert bytes_of(tmp_path) == bytes_of(recorded)


def test_other_settings_and_tracks_are_refused(recorded):
    before = bytes_of(recorded)
    with pytest.raises(ValueError, match="other settings"): record(recorded, image_size=(32, 32))
    track = generate_track(0, "hilly", 6)
    track.road.half_width[:] = 9.0
    with pytest.raises(ValueError, match="another track"): record_replays(track, recorded / "img", quiet=True)
    assert bytes_of(recorded) == before


@needs_real
def test_bad_files_do_not_stop_the_others(tmp_path):
    src = tmp_path / "src"; src.mkdir()
    good = real_data("replays/stadium/TAS_Training_Map1_9270_catasystgma.Replay.Gbx")
    shutil.copy(good, src)
    (src / "cut.Replay.Gbx").write_bytes(good.read_bytes()[:3000])
    (src / "empty.Replay.Gbx").write_bytes(b"")
    shutil.copy(real_data("replays/not_forever/G-6_na_x.Replay.Gbx"), src)
    result = import_replays(src, tmp_path / "img", threads=1, quiet=True)
    assert [f.name for f in result.written] == [good.stem] and not check_replay(result.written[0])
    assert sorted(p.name for p, _ in result.refused) == ["G-6_na_x.Replay.Gbx", "cut.Replay.Gbx", "empty.Replay.Gbx"]
    assert all(p.name in reason for p, reason in result.refused)
    before = bytes_of(tmp_path)
    again = import_replays(src, tmp_path / "img", threads=thread_count(None), quiet=True)
    assert again.skipped == result.written and not again.written and bytes_of(tmp_path) == before
    with pytest.raises(ValueError, match="no such file"): import_replays(tmp_path / "nothing", tmp_path / "img")


@needs_real
def test_the_line_is_the_best_run_and_stays(tmp_path):
    names = ["TAS_Training_Map1_9310_drunkfinn.Replay.Gbx", "TAS_Training_Map1_9290_drunkfinn.Replay.Gbx", "TAS_Training_Map1_9270_catasystgma.Replay.Gbx"]
    files = [real_data("replays/stadium", n) for n in names]
    import_replays(files[:2], tmp_path / "a/img", threads=1, quiet=True)
    import_replays(files[:2][::-1], tmp_path / "b/img", threads=1, quiet=True)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    line = bytes_of(tmp_path / "a/vcp")
    assert b"9290" in next(tmp_path.glob("a/tracks/*/track.json")).read_bytes()
    import_replays(files, tmp_path / "a/img", threads=1, quiet=True)
    assert bytes_of(tmp_path / "a/vcp") == line and len(list(tmp_path.glob("a/img/*/*/manifest.json"))) == 3


@needs_real
def test_ghosts_without_inputs_and_several_in_a_file(tmp_path):
    edge = real_data("replays/edge")
    result = import_replays([p for p in sorted(edge.iterdir()) if not p.name.startswith("Canopus")], tmp_path / "img", threads=1, quiet=True)
    manifests = {f.name: read_manifest(f) for f in result.written}
    assert not result.refused and len(manifests) == 3 and sum("_ghost2" in n for n in manifests) == 1
    unfinished = next(m for n, m in manifests.items() if n.startswith("Oach"))
    assert unfinished.metadata["race_finished"] is False and unfinished.metadata["race_time_ms"] is None
    assert not unfinished.has_actions and unfinished.actions is None and np.isfinite(unfinished.states.position).all()


@needs_real
def test_other_files_of_the_same_name(tmp_path):
    "Two files of one map and one name: the second folder gets a piece of the file's hash, in one call or in two, and each is found again."
    names = ["TAS_Training_Map1_9310_drunkfinn.Replay.Gbx", "TAS_Training_Map1_9290_drunkfinn.Replay.Gbx"]
    files = [tmp_path / d / "mine.Replay.Gbx" for d in "ab"]
    for f, n in zip(files, names):
        f.parent.mkdir()
        shutil.copy(real_data("replays/stadium", n), f)
    first, second = (import_replays(f, tmp_path / "img", threads=1, quiet=True) for f in files)
    assert not first.refused + second.refused and [f.name for f in first.written] == ["mine.Replay"]
    (folder,) = second.written
    assert folder.name == f"mine.Replay-{hashlib.sha256(files[1].read_bytes()).hexdigest()[:8]}" and not check_replay(folder)
    assert [read_manifest(f).metadata["race_time_ms"] for f in first.written + second.written] == [9310, 9290]
    before = bytes_of(tmp_path)
    again = import_replays(files[::-1], tmp_path / "img", threads=1, quiet=True)
    assert sorted(again.skipped) == sorted(first.written + second.written) and not again.written + again.refused and bytes_of(tmp_path) == before
    assert len({f.name for f in import_replays(files, tmp_path / "together/img", threads=1, quiet=True).written}) == 2
