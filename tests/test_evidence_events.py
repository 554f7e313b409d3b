"TensorBoard logs that are cut off, damaged, written by torch, spread over folders."
import warnings
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto import event_pb2
from torch.utils.tensorboard import SummaryWriter
from tmlab.evidence.events import ScalarWriter, canonical_tag, find_run, read_events, read_records
from tmlab.evidence.kpi import compare, load_runs, print_compare, races

def write(folder, steps, tag="loss", start=1000.0):
    w = ScalarWriter(folder)
    for s in steps: w.add(tag, s / 2, s, start + s)
    w.close()
    return w.path

def test_cut_anywhere(tmp_path):
    "Every prefix of a file reads without an exception; the events read never become fewer, and a cut inside a record is reported."
    file = write(tmp_path / "r", range(1, 6))
    data, last = file.read_bytes(), 0
    ends = set()
    for n in range(len(data) + 1):
        file.write_bytes(data[:n])
        events, problem = read_records(file)
        assert len(events) >= last
        if problem is None: ends.add(n)
        last = len(events)
    assert last == 6 and len(ends) == 7  # the empty file and the end of each record

def test_every_damaged_byte_is_noticed(tmp_path):
    file = write(tmp_path / "r", range(1, 4))
    data = bytearray(file.read_bytes())
    for i in range(len(data)):
        data[i] ^= 0x55
        file.write_bytes(data)
        assert read_records(file)[1] is not None, i
        data[i] ^= 0x55

def test_random_bytes(tmp_path):
    (tmp_path / "x.tfevents.1").write_bytes(bytes(range(256)) * 20)
    with pytest.warns(UserWarning, match="damaged after 0 events"): assert len(read_events(tmp_path)) == 0

def test_torch_writer_and_both_families(tmp_path):
    with SummaryWriter(tmp_path / "r") as w:
        for s in range(3): w.add_scalar("Training/loss", s, s); w.add_scalar("loss", s, s); w.add_scalar("loss_test", s, s, new_style=True)
        w.add_text("times_summary", "not a number", 1)
    df = read_events(tmp_path / "r")
    assert sorted(df.tag) == ["Training/loss"] * 3 + ["Training/loss_test"] * 3
    assert set(df[df.tag == "Training/loss"].original) == {"Training/loss"}

def test_tensorboard_reads_ours(tmp_path):
    write(tmp_path / "r", [1, 2, 3])
    ea = EventAccumulator(str(tmp_path / "r")).Reload()
    assert [(e.step, e.value, e.wall_time) for e in ea.Scalars("loss")] == [(s, s / 2, 1000 + s) for s in (1, 2, 3)]

def test_restart_voids_later_points(tmp_path):
    write(tmp_path / "r", [1, 2, 3, 4])
    w = ScalarWriter(tmp_path / "r")
    w._write(event_pb2.Event(step=3, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)))
    w.add("loss", 99, 3)
    w.close()
    assert list(read_events(tmp_path / "r").value) == [0.5, 1, 99]

def test_ten_folders_of_one_run(tmp_path):
    for k in range(1, 12): write(tmp_path / ("uni" if k == 1 else f"uni_{k}"), [k], start=1000 * k)
    write(tmp_path / "uni_long", [100])
    assert [p.name for p in find_run("uni", tmp_path)] == ["uni", *(f"uni_{k}" for k in range(2, 11))]
    assert list(read_events(find_run("uni", tmp_path)).step) == list(range(1, 11))
    assert set(load_runs(["uni", "uni_2"], tmp_path)["uni"].step) == {1, *range(3, 11)}

def test_file_instead_of_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match="no such folder"): read_events(tmp_path / "f")
    with pytest.raises(ValueError, match="it holds nothing"): (tmp_path / "e").mkdir(); read_events(tmp_path / "e")

def test_several_races_at_one_step(tmp_path):
    w = ScalarWriter(tmp_path / "r")
    for time_s, finished in ((10, 1), (300, 0), (12, 1)):
        w.add("eval_race_time_trained_x", time_s, 5, 1000); w.add("eval_race_finished_trained_x", finished, 5, 1000)
    w.close()
    r = races(load_runs(["r"], tmp_path)["r"], "Race/eval_race_time_trained_x")
    assert list(r.time_s) == [10, 300, 12] and list(r.finished) == [True, False, True]

def test_short_runs_and_names(tmp_path, capsys):
    "One point only: a table at its step, none over time; run directories are named by their folder; equal names are refused."
    for k in "ab": write(tmp_path / k / "A/tensorboard", [100])
    write(tmp_path / "a/B/tensorboard", [100])
    tables = compare([tmp_path / "a/A", tmp_path / "a/B"])
    assert list(tables) == ["Training/loss by environment steps"] and list(tables["Training/loss by environment steps"].columns) == ["A", "B"]
    print_compare(tables); assert "100\t50\t50" in capsys.readouterr().out
    with pytest.raises(ValueError, match="equal names"): compare([tmp_path / "a/A", tmp_path / "b/A"])
    with pytest.raises(ValueError, match="positive"): compare([tmp_path / "a/A"], interval_min=0)

def test_clock_active_ignores_a_pause(tmp_path):
    w = ScalarWriter(tmp_path / "r")
    for step, wall, active in ((100, 0, 60), (200, 5000, 120)): w.add("Performance/active_seconds", active, step, wall); w.add("Training/loss", 1, step, wall)
    w.close()
    assert list(load_runs(["r"], tmp_path)["r"].minutes.unique()) == [1, 2]
    assert load_runs(["r"], tmp_path, clock="wall")["r"].minutes.max() == 5000 / 60

@pytest.mark.parametrize("tag", ["loss", "memory_size", "time_to_grab_frame", "explo_race_time_finished_trained_A01", "lay_mono", "cumul_training_hours"])
def test_canonical_is_idempotent(tag): assert canonical_tag(canonical_tag(tag)) == canonical_tag(tag)
