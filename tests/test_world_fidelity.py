"""Open-loop errors: our own drives are reproduced exactly, baselines and regimes are right, real runs are held out and predicted."""
import json
import numpy as np
import pytest
from tmlab.core.runs import real_data
from tmlab.tracks.geometry import build_road
from tmlab.tracks.line import ReferenceLine
from tmlab.tracks.track import Track, pack
from tmlab.world.car import CAR, DT, N_CAR, POS, ROT, VEL, YAW, SLIDING, drive_ticks, new_cars, place_car
from tmlab.world.fidelity import HELD_OUT_MAPS, REGIMES, RANGES, RecordedRun, baselines, errors, fit, loss, open_loop, prepare, recorded_runs, regimes, summary

needs_real = pytest.mark.skipif(real_data("replays/stadium") is None, reason="no real replays (TMLAB_REAL_DATA)")


def own_run(seed, split="fit", seconds=8.0):
    "A run of our own car on a flat plane as a recording at 100 Hz."
    rng, n = np.random.default_rng(seed), int(seconds / DT)
    controls = np.repeat(np.c_[rng.integers(-1, 2, n // 40), np.ones(n // 40), np.zeros(n // 40)], 40, axis=0).astype(float)
    z = np.arange(4001.0)
    road = build_road(np.c_[0 * z, 10 + 0 * z, z], half_width=900.0, verge=1.0)
    T = pack([Track("plane", road, ReferenceLine(np.c_[0 * z, 10 + 0 * z, z][10:-10]), 20.0, road.length_m - 20, [road.length_m - 20])])
    c, out = new_cars(1)[0], np.empty((n, N_CAR))
    place_car(c, T, 0, 200.0, 0.0, 0.0, 40.0)
    first = c.copy()
    drive_ticks(c, T, CAR, controls, out)
    rows = np.concatenate([first[None], out])
    R = rows[:, ROT:ROT + 9].reshape(-1, 3, 3)
    v = rows[:, VEL:VEL + 3]
    return RecordedRun(f"own_{seed}", "plane", "telemetry", split, 1, rows[:, POS:POS + 3], np.linalg.norm(v, axis=1), R, rows[:, YAW], np.einsum("ni,ni->n", v, R[:, :, 0]),
                       np.full(n + 1, 4), rows[:, SLIDING] > 0, np.full(n + 1, 16), controls)


def test_our_own_drives_are_predicted():
    "What is left is the initial velocity, taken from positions."
    table = errors(prepare([own_run(k) for k in range(2)], 0.3))
    s = summary(table, ("horizon_s",), 100).set_index("horizon_s")
    assert (table["regime"] == "grip").mean() > 0.9 and s.loc[1.0, "car_m"] < 0.06 and s.loc[2.0, "car_m"] < 0.15
    assert (s["turn_m"] > 5 * s["car_m"]).all() and (s["velocity_m"] > 5 * s["car_m"]).all() and (s["ratio"] < 0.2).all()


def test_a_fit_finds_a_parameter_again_and_refuses_what_is_held_out():
    runs = prepare([own_run(3)], 0.5)
    wrong = CAR._replace(steer_scale=0.94 * CAR.steer_scale)
    found = fit(runs, wrong, dict(steer_scale=RANGES["steer_scale"]), evaluations=25)
    assert abs(found.steer_scale / CAR.steer_scale - 1) < 0.005 and loss(runs, found) < loss(runs, wrong) - 1
    with pytest.raises(ValueError, match="held out"): fit(prepare([own_run(3, "held out")], 2.0))


def test_open_loop_names_what_does_not_fit():
    run = own_run(4)
    ours = open_loop(run, 1.0, 2.0)
    assert np.linalg.norm(ours[-1, POS:POS + 3] - run.position[300]) < 0.2
    for start, horizon in ((0.0, 1.0), (7.5, 1.0)):
        with pytest.raises(ValueError, match="not inside"): open_loop(run, start, horizon)


def test_baselines_on_a_circle_and_a_line():
    one = lambda *v: np.array([v], float)
    for w in (0.8, -0.8, 0.0):
        at = baselines(one(0, 0, 0), one(0, 0, 50), one(0, 0, 1), one(0, 1, 0), np.array([w]), 1.5)
        turn = at["turn"][0][0]
        want = [0, 0, 75] if w == 0 else [50 / w * (1 - np.cos(1.5 * w)), 0, 50 / w * np.sin(1.5 * w)]
        assert np.allclose(turn, want, atol=1e-3) and np.allclose(at["velocity"][0], [[0, 0, 75]]) and np.linalg.norm(at["turn"][1]) == pytest.approx(50)


def test_regimes():
    run = own_run(5)
    run.sliding[:] = False
    run.wheels[300:330] = 0
    run.sliding[600:610] = True
    run.speed[700:] -= 10
    name = lambda a, b: REGIMES[regimes(run, np.array([a]), np.array([b]))[0]]
    assert [name(100, 200), name(250, 310), name(340, 380), name(385, 480), name(590, 650), name(660, 720)] == ["grip", "flight", "landing", "grip", "slide", "crash"]


def test_without_real_files_the_cause_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TMLAB_REAL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="TMLAB_REAL_DATA"): recorded_runs()


@needs_real
def test_the_split_is_by_run_and_fixed():
    runs = recorded_runs()
    split = {r.name: r.split for r in runs}
    assert {r.map for r in runs} == {"A01-Race", *HELD_OUT_MAPS} and all(split[r.name] == "held out" for r in runs if r.map in HELD_OUT_MAPS)
    a01 = [r.split for r in runs if r.map == "A01-Race"]
    assert set(a01) == {"fit", "held out"} and 0.25 < a01.count("held out") / len(a01) < 0.4
    assert split == {r.name: r.split for r in recorded_runs()}


@needs_real
def test_held_out_runs_are_predicted_within_half_of_the_better_baseline(repo):
    "The target, recomputed with the committed car on every third window; and the stored report still describes it."
    table = errors(prepare([r for r in recorded_runs() if r.split == "held out"], 0.3))
    ground = table[table["regime"].isin(["grip", "slide"])]
    s = summary(ground, ("horizon_s",), 500).set_index("horizon_s")
    assert (s["ratio"] < 0.5).all() and (s["high"] < 0.5).all() and s.loc[1.0, "runs"] >= 14
    for name, one in ground[ground["horizon_s"] == 1.0].groupby("map"): assert one["car_m"].median() < 0.5 * one[["velocity_m", "turn_m"]].median().min(), name
    stored = json.loads((repo / "data_cards/car_fidelity.json").read_text())
    assert {k: v for k, v in CAR._asdict().items() if not isinstance(v, np.ndarray)} == stored["parameters"], "the parameters changed: run fidelity_report('data_cards/car_fidelity.json')"
    was = next(r for r in stored["errors"] if (r["split"], r["map"], r["regime"], r["horizon_s"]) == ("held out", "all", "ground", 1.0))
    assert abs(s.loc[1.0, "car_m"] / was["car_m"] - 1) < 0.2
