"Labels of 50 ms decisions from 10 ms inputs, and the 184 floats of recorded runs against the truth."
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.transform import Rotation
from tmlab.replays.actions import (ACTIONS, DEAD_ZONE, class_controls, class_keys, class_names, continuous_labels, hard_labels, input_controls, label_ticks,
                                   nearest_action, soft_labels, tick_classes)
from tmlab.replays.floats import FLOAT_MEAN, FLOAT_SLICES, FLOAT_STD, interpolate_states, recorded_floats, set_back
from tmlab.replays.gbx import SAMPLE, Ghost, decode_samples, ghost_keys, ghost_states, ghost_steer, read_gbx
from tmlab.replays.scripts import ghost_ticks, read_script, script_ticks
from tmlab.tracks.generate import generate_track
from tmlab.tracks.line import ReferenceLine
from tmlab.world.car import car_states
from tmlab.world.record import drive_laps


def plain_labels(controls, classes):
    "Hard and soft labels by counting, one decision after the other."
    each, hard, soft = tick_classes(controls, classes).tolist(), [], []
    for k in range(0, len(each), 5):
        part = each[k:k + 5]
        hard.append(max(dict.fromkeys(part), key=part.count))  # the first of equally frequent ones, in order of appearance
        soft.append([part.count(c) / len(part) for c in range(classes)])
    return np.array(hard, int), np.array(soft).reshape(-1, classes)


@pytest.mark.parametrize("classes", [9, 12, 27])
def test_labels_agree_with_counting(classes):
    rng = np.random.default_rng(classes)
    for n in (0, 1, 4, 5, 6, 173):
        for x in (rng.random((n, 4)) < .5, np.c_[rng.uniform(-1, 1, n), rng.choice([0, .4, .6, 1], (n, 2))]):
            hard, soft = plain_labels(x, classes)
            assert np.array_equal(hard_labels(x, classes), hard) and np.allclose(soft_labels(x, classes), soft)
            assert len(continuous_labels(x)) == len(hard) == -(-n // 5)


@pytest.mark.parametrize("classes", [9, 12, 27])
def test_classes_there_and_back(classes):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 100)
    ticks = label_ticks(labels, classes)
    assert np.array_equal(hard_labels(ticks, classes), labels) and np.array_equal(soft_labels(ticks, classes), np.eye(classes)[labels])
    assert np.array_equal(continuous_labels(ticks), class_controls(classes)[labels].astype(np.float32))
    if classes < 27: assert np.array_equal(hard_labels(class_keys(classes)[labels].repeat(5, 0), classes), labels)
    assert len(class_names(classes)) == classes == len(set(class_names(classes)))


def test_each_number_of_classes_begins_with_the_smaller_one():
    assert np.array_equal(class_controls(27)[:12], class_controls(12)) and np.array_equal(class_controls(12)[:9], class_controls(9))
    keys = np.random.default_rng(1).random((400, 4)) < .5
    assert np.array_equal(tick_classes(keys, 27), nearest_action(keys)) and np.array_equal(tick_classes(keys, 12), nearest_action(keys))
    nine = tick_classes(keys, 9)
    assert np.array_equal(nine[~(keys[:, 0] & keys[:, 1])], nearest_action(keys)[~(keys[:, 0] & keys[:, 1])])
    assert (class_keys(9)[nine, 1] == keys[:, 1]).all() and not class_keys(9)[:, :2].all(1).any()


def test_a_dead_zone_and_thirds():
    steer = np.array([-1, -1.01 * DEAD_ZONE, -.99 * DEAD_ZONE, 0, .99 * DEAD_ZONE, 1.01 * DEAD_ZONE])
    for n in (9, 12, 27): assert class_controls(n)[tick_classes(np.c_[steer, steer * 0, steer * 0], n), 0].tolist() == [-1, -1, 0, 0, 0, 1]
    gas = np.array([0, .3, .34, .5, .51, .66, .67, 1])
    assert class_controls(27)[tick_classes(np.c_[gas * 0, gas, gas * 0], 27), 1].tolist() == [0, 0, .5, .5, .5, .5, 1, 1]
    assert class_controls(12)[tick_classes(np.c_[gas * 0, gas * 0, gas], 12), 2].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("bad, words", [(np.zeros((3, 5)), "shape"), (np.zeros(4), "shape"), ([[2, 0, 0.]], "outside"), ([[0, -.5, 0]], "outside"), ([[np.nan, 0, 0]], "not finite")])
def test_what_is_no_input_is_refused(bad, words):
    with pytest.raises(ValueError, match=words): hard_labels(bad)


def test_a_number_of_classes_that_there_is_not():
    with pytest.raises(ValueError, match="8 classes"): hard_labels(ACTIONS, 8)


@pytest.mark.real
@pytest.mark.parametrize("classes", [9, 12, 27])
def test_scripts_and_their_replays_have_the_same_labels(real, classes):
    pair = real("input_scripts", "EddyS999_WHI_24540.inputs"), real("replays", "stadium", "A01-Race_24540_akira.Replay.Gbx")
    ghost = read_gbx(pair[1]).best
    a, b = input_controls(*script_ticks(read_script(pair[0]), ghost.race_time_ms)), input_controls(*ghost_ticks(ghost))
    assert np.array_equal(hard_labels(a, classes), hard_labels(b, classes)) and np.array_equal(continuous_labels(a), continuous_labels(b))
    times = np.arange(0, ghost.race_time_ms, 10)
    assert np.array_equal(tick_classes(b), nearest_action(ghost_keys(ghost, times))) and np.array_equal(b[:, 0], ghost_steer(ghost, times))
    assert np.allclose(soft_labels(a, classes).sum(1), 1) and len(soft_labels(a, classes)) == -(-len(times) // 5)


def as_ghost(lap):
    "A `Ghost` that holds what a replay file would hold of a lap of the world: 61-byte samples every 100 ms and key events."
    s = car_states(lap.rows[::2])
    raw, q = np.zeros(len(s), SAMPLE), Rotation.from_matrix(s.rotation).as_quat(canonical=True)
    angle = np.arccos(np.clip(q[:, 3], -1, 1))
    n = q[:, :3] / np.maximum(np.sin(angle), 1e-9)[:, None]
    raw["position"], raw["angle"] = s.position, np.rint(angle * 65535 / np.pi)
    raw["axis"] = np.rint(np.stack([np.arctan2(n[:, 1], n[:, 0]) / np.pi, np.arcsin(np.clip(n[:, 2], -1, 1)) * 2 / np.pi], 1) * 32767)
    for v, length, direction in ((s.velocity, "speed", "direction"), (s.angular_velocity, "spin", "spin_direction")):
        size = np.linalg.norm(v, axis=1)
        d = v / np.maximum(size, 1e-9)[:, None]
        raw[length] = np.where(size > 1e-9, np.rint(1000 * np.log(np.maximum(size, 1e-9))).clip(-32767, 32767), -32768)
        raw[direction] = np.rint(np.stack([np.arctan2(d[:, 1], d[:, 0]) * 127 / np.pi, np.arcsin(np.clip(d[:, 2], -1, 1)) * 254 / np.pi], 1))
    car = s.to_car(s.velocity)
    raw["forward_speed"], raw["side_speed"] = np.rint((car[:, 2] + 1000) * 65535 / 11000), np.rint((car[:, 0] + 1000) * 65535 / 2000)
    raw["rpm"] = np.rint(s.rpm * 65535 / 30000)
    raw["wheels"][..., 0], raw["wheels"][..., 1] = np.rint((s.wheel_damper + 2) * 255 / 4), s.wheel_material
    raw["engine"] = s.gearbox_state
    raw["flags"] = ((s.wheel_contact * 2 + s.wheel_sliding) << np.array([6, 8, 10, 12])).sum(1)
    keys = ACTIONS[lap.actions]
    changed = np.argwhere(np.diff(np.concatenate([np.zeros((1, 4), bool), keys]).astype(int), axis=0))
    rows = [(50 * k + 10, ("Accelerate", "Brake", "SteerLeft", "SteerRight")[c], int(keys[k, c])) for k, c in changed]
    return Ghost(decode_samples(raw, np.asarray(s.time_ms)), pd.DataFrame(rows, columns=["time_ms", "name", "value"]), lap.time_ms, np.array([lap.time_ms]), 0, "world", "world")


@pytest.fixture(scope="module")
def laps():
    tracks = [generate_track(k, kind, 12) for k, kind in enumerate(("flat", "hilly", "technical", "jump"))]
    return [(t, lap) for t, lap in zip(tracks, drive_laps(tracks, [5, 6, 7, 8])) if lap is not None]


SMOOTH = ("wheel_damper", "rpm", "angular_velocity", "velocity", "up", "road_ahead", "metres_to_finish")
HELD = ("wheel_sliding", "wheel_contact", "wheel_material", "gearbox_state")
UNKNOWN = ("gear", "shift_steps", "freewheeling")


def test_floats_of_a_ghost_against_the_world(laps):
    "What a ghost keeps of a lap, turned into floats, against the floats that the world gave while it was driven; errors in standard deviations."
    assert len(laps) >= 3
    errors = {k: [] for k in SMOOTH}
    for track, lap in laps:
        floats, mask = recorded_floats(as_ghost(lap), track.line)
        n = min(len(floats), len(lap.floats))
        floats, mask, truth = floats[:n], mask[:n], lap.floats[:n]
        assert n >= lap.time_ms // 50 - 2 and np.isfinite(floats).all() and (mask == mask[0]).all()
        part = lambda x, k: x[:, FLOAT_SLICES[k]]
        assert np.array_equal(part(floats, "previous_actions"), part(truth, "previous_actions")) and part(mask, "previous_actions").all()
        for k in UNKNOWN: assert not part(mask, k).any() and (part(floats, k) == FLOAT_MEAN[FLOAT_SLICES[k]]).all()
        for k in HELD:
            assert np.array_equal(part(floats, k)[::2], part(truth, k)[::2]) and np.array_equal(part(floats, k)[1::2], part(truth, k)[:-1:2][:n // 2])
        for k in SMOOTH: errors[k].append(np.abs(part(floats, k) - part(truth, k)) / FLOAT_STD[FLOAT_SLICES[k]])
    for k in SMOOTH:
        at, between = np.concatenate([e[::2] for e in errors[k]]), np.concatenate([e[1::2] for e in errors[k]])
        print(f"{k:18} n {len(at) + len(between)}, in std: samples median {np.median(at):.5f} worst {at.max():.4f}; between median {np.median(between):.5f} p95 {np.quantile(between, .95):.4f} worst {between.max():.4f}")
        assert at.max() < .25 and np.quantile(between, .95) < .2 and between.max() < 4, k


def test_floats_at_the_samples_of_the_world_are_exact(laps):
    "All fields of a `CarState` at every decision: nothing is interpolated, nothing unknown but the keys."
    track, lap = laps[0]
    floats, mask = recorded_floats(car_states(lap.rows), track.line)
    assert mask[:, 21:].all() and not mask[:, 1:21].any() and np.abs(floats - lap.floats)[:, 21:].max() < 2e-3
    previous = lap.floats[:, 1:21].reshape(-1, 5, 4)
    floats, mask = recorded_floats(car_states(lap.rows), track.line, previous=nearest_action(previous > .5))
    assert mask.all() and np.array_equal(floats[:, :21], lap.floats[:, :21])


def test_speeds_along_the_axes_make_the_velocity_exact(laps):
    track, lap = laps[0]
    ghost = as_ghost(lap)
    floats, _ = recorded_floats(ghost, track.line)
    plain, _ = recorded_floats(ghost_states(ghost), track.line)
    error = lambda f: np.abs(f[::2, [56, 58]] - lap.floats[:len(f):2, [56, 58]]).max()
    assert error(floats) < .1 and error(plain) > 3 * error(floats)


def test_what_cannot_be_interpolated_is_refused(laps):
    states = car_states(laps[0][1].rows)
    with pytest.raises(ValueError, match="at least two"): interpolate_states(states[:1], [0])
    with pytest.raises(ValueError, match="outside the samples"): interpolate_states(states[:4], [-50, 0])
    with pytest.raises(ValueError, match="does not record"): interpolate_states(ghost_states(as_ghost(laps[0][1]))[:4].__class__(**{**vars(states), "known": frozenset({"time_ms"})}), [0])


@pytest.mark.real
def test_floats_of_real_runs(real):
    line = ReferenceLine.load(real("lines", "A01-Race_0.5m_cl.npy"))
    paths = sorted(real("replays", "stadium").glob("A01-Race*"))
    assert len(paths) >= 8
    for path in paths:
        ghost = read_gbx(path).best
        floats, mask = recorded_floats(ghost, line)
        assert len(floats) == ghost.race_time_ms // 50 + 1 and np.isfinite(floats).all(), path.name
        normal = (floats - FLOAT_MEAN) / FLOAT_STD
        assert np.abs(normal).max() < 16 and (normal[~mask] == 0).all(), path.name
        assert (np.diff(floats[:, 182]) <= 0).all() and floats[0, 182] == 700 and floats[-1, 182] < 5, path.name  # progress never falls on A01
        assert np.allclose(np.linalg.norm(floats[:, 59:62], axis=1), 1, atol=1e-4) and 80 < floats[:, 58].max() < 160, path.name
        assert np.array_equal(floats[1:, 1:17], floats[:-1, 5:21]), path.name                             # the history moves on by one action
        assert np.array_equal(floats[1:, 17:21] > .5, ACTIONS[hard_labels(ghost_keys(ghost, np.arange(0, 50 * (len(floats) - 1), 10)))]), path.name


@pytest.mark.real
def test_set_backs_are_the_respawns(real):
    ghost = read_gbx(real("replays", "edge", "Canopus_5588870_malun22.Replay.Gbx")).best
    respawns = ghost.inputs[(ghost.inputs.name == "Respawn") & (ghost.inputs.value > 0)].time_ms.to_numpy()
    state = ghost_states(ghost)
    at = state.time_ms[:-1][set_back(state)]
    assert len(at) > 0.9 * ghost.respawns and all(np.abs(respawns - t).min() <= 200 for t in at)
