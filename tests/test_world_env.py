"""The vector env: bad arguments, no NaN whatever is pressed, one future per seed and car, an early end never pays, the same cars on a graphics card."""
import hashlib, json, os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from tmlab.replays.floats import float_vectors
from tmlab.tracks.generate import FAMILIES, generate_track
from tmlab.tracks.track import Track
from tmlab.world import env as world_env
from tmlab.world.car import ANG, CHECKPOINT, LATERAL, OFF, POS, S, TIME, VEL, place_car
from tmlab.world.env import BEST_MS, ENDS, FINISH_MS, FINISHED, NO_PROGRESS, OFF_ROAD, PREVIOUS, PROGRESS, RUNNING, TRACK, ZONE, RaceEnv, RaceVectorEnv, place_on_line, thread_count

ROOT = Path(__file__).parents[1]


def steer(floats):
    "Actions of a plain driver: towards the reference line 30 to 50 m ahead, slower before bends."
    x, bend, speed = floats[:, 71], np.abs(floats[:, 86]), floats[:, 58]
    return np.where(x > 1, 1, np.where(x < -1, 2, 0)) + np.where(speed > 25 + 500 / (10 + bend), 6, 0)


@pytest.fixture(scope="module")
def tracks(): return [generate_track(k, kind, 8) for k, kind in enumerate(("flat", "hilly", "technical"))]


def test_is_a_gymnasium_vector_env(tracks):
    env = RaceVectorEnv(tracks, 3, threads=1, extras=("progress",))
    obs, info = env.reset(seed=0)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.observation_space.contains(obs) and obs["image"].shape == (3, 1, 64, 64) and obs["extras"].shape == (3, 1)
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(obs) and reward.shape == terminated.shape == truncated.shape == (3,) and terminated.dtype == truncated.dtype == bool
    assert {"time_ms", "finished", "progress_m", "track", "checkpoint", "end"} <= set(info)


def test_numbers_of_tracks_are_seen(tracks):
    "Behind the floats stand the numbers of the track that a car is on, in the order asked for, also in the last observation of an episode that ended."
    z = {t.id: [k, -k] for k, t in enumerate(tracks)}
    env = RaceVectorEnv(tracks, 4, image_size=None, threads=1, extras=(z, "progress", {t.id: 7.5 for t in tracks}), max_race_s=0.2)
    obs, info = env.reset(seed=0)
    expected = lambda info, ids: np.c_[ids, -ids, info["progress_m"] / [env.tracks[k].line.length_m for k in ids], np.full(4, 7.5)]
    assert np.allclose(obs["extras"], expected(info, np.array([0, 1, 2, 0])), atol=1e-6) and env.single_observation_space["extras"].shape == (4,)
    for _ in range(4): obs, *_, info = env.step(np.zeros(4, int))
    assert info["_final_obs"].all() and np.allclose(np.stack([o["extras"] for o in info["final_obs"]]), expected(info["final_info"], np.array([0, 1, 2, 0])), atol=1e-6)
    assert np.array_equal(obs["extras"][:, :2], [[1, -1], [2, -2], [0, 0], [1, -1]])
    for bad, cause in (({tracks[0].id: [1]}, "no numbers for track"), (dict(zip(z, ([1], [1, 2], [1]))), "equally many"), (dict.fromkeys(z, [np.inf]), "finite"), (dict.fromkeys(z, [[1]]), "one list")):
        with pytest.raises(ValueError, match=cause): RaceVectorEnv(tracks, 1, image_size=None, extras=(bad,))


@pytest.mark.parametrize("mode,bad", [("keys", [0, 12]), ("keys", [-1, 0]), ("keys", [0]), ("keys", [0.0, 1.0]), ("keys", [[0, 1]]), ("keys", None),
                                      ("analog", [[0, 1, 0]]), ("analog", [[0, 1, 2], [0, 0, 0]]), ("analog", [[-1.5, 0, 0], [0, 0, 0]]), ("analog", [[np.nan, 0, 0], [0, 0, 0]])])
def test_bad_actions(tracks, mode, bad):
    env = RaceVectorEnv(tracks, 2, image_size=None, action_mode=mode, threads=1)
    env.reset(seed=0)
    rows = env.rows.copy()
    with pytest.raises(ValueError, match="actions"): env.step(bad)
    assert np.array_equal(rows, env.rows)


@pytest.mark.parametrize("kw,cause", [(dict(tracks=[]), "tracks"), (dict(tracks=["A01"]), "tracks"), (dict(num_envs=0), "num_envs"), (dict(action_mode="mouse"), "mouse"),
                                      (dict(device="tpu"), "tpu"), (dict(distractors=4), "distractors"), (dict(shaping=np.nan), "shaping"), (dict(threads=999), "threads"), (dict(extras=("time",)), "extras"), (dict(random_start="maybe"), "maybe")])
def test_bad_arguments(tracks, kw, cause):
    with pytest.raises(ValueError, match=cause): RaceVectorEnv(**dict(dict(tracks=tracks, num_envs=2), **kw))


def test_bad_options(tracks):
    env = RaceVectorEnv(tracks, 2, image_size=None, threads=1)
    with pytest.raises(ValueError, match="reset before"): env.step([0, 0])
    for options, cause in ((dict(track=7), "7"), (dict(track="no-such"), "no-such"), (dict(track=[0]), "1 given"), (dict(speed=3), "speed")):
        with pytest.raises(ValueError, match=cause): env.reset(seed=0, options=options)
    env.reset(seed=0, options=dict(track=tracks[2].id))
    assert env.rows[:, TRACK].tolist() == [2, 2]


@pytest.mark.parametrize("mode", ["keys", "analog"])
def test_no_nan_whatever_is_pressed(tracks, mode):
    env = RaceVectorEnv(tracks, 16, image_size=None, action_mode=mode, threads=1, random_start="anywhere")
    env.reset(seed=4)
    env.action_space.seed(4)
    seen = set()
    for step in range(400):
        if step % 8 == 0:
            held = env.action_space.sample()
            if mode == "analog" and step % 32: held[:, 1:] = 1, 0  # the brake stops the engine, however lightly it is pressed
        obs, reward, terminated, truncated, info = env.step(held)
        seen |= set(info["end"])
        assert np.isfinite(obs["floats"]).all() and np.isfinite(reward).all() and np.isfinite(env.rows).all()
        for i in np.flatnonzero(info["end"]): assert np.isfinite(info["final_obs"][i]["floats"]).all() and env.rows[i, FINISH_MS] == 0
    assert len(seen - {RUNNING}) >= 2, [ENDS[e] for e in seen]


def test_one_future_per_seed_and_car(tracks):
    "Cars 0-2 of 3, 5 and 17 cars, one and two threads, keep the same rows, frames and rewards through several episodes."
    actions = np.repeat(np.random.default_rng(1).integers(0, 12, (30, 17)), 5, axis=0)
    def futures(n, threads):
        env = RaceVectorEnv(tracks, n, image_size=(32, 32), threads=threads, random_start=True)
        env.reset(seed=9)
        steps = [env.step(a[:n]) for a in actions]
        return np.stack([s[1][:3] for s in steps]), steps[-1][0]["image"][:3], env.rows[:3]
    first = futures(3, 1)
    for n, threads in ((5, 1), (17, thread_count(None))):
        for a, b in zip(first, futures(n, threads)): assert np.array_equal(a, b)


def test_snapshot_of_another_env_is_refused(tracks):
    a, b, c = (RaceVectorEnv(t, n, image_size=None, threads=1) for t, n in ((tracks, 2), (tracks, 3), (tracks[:1], 2)))
    a.reset(seed=0)
    for other in (b, c):
        with pytest.raises(ValueError, match="snapshot"): other.restore(a.snapshot())


def test_reset_without_a_seed_goes_on(tracks):
    env = RaceVectorEnv(tracks, 2, image_size=None, threads=1, random_start=True)
    env.reset(seed=5); first = env.rows.copy()
    env.reset(); assert not np.array_equal(first, env.rows)
    env.reset(seed=5); assert np.array_equal(first, env.rows)


def test_one_car_passes_gymnasiums_checker(tracks, recwarn):
    for kw in (dict(), dict(action_mode="analog", extras=("progress",), render_mode="rgb_array"), dict(image_size=None, random_start="anywhere")):
        check_env(RaceEnv(tracks, **kw))
    told = [str(w.message) for w in recwarn if "infinity" not in str(w.message) and "spec" not in str(w.message)]
    assert not told, told
    assert RaceEnv(tracks[0], render_mode="rgb_array").reset(seed=0) is not None


def test_one_car_does_not_go_on_after_its_end(tracks):
    env = RaceEnv(tracks[0], image_size=None, max_race_s=0.2)
    with pytest.raises(ValueError, match="reset"): env.step(0)
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(4)]
    assert ends == [(False, False)] * 3 + [(False, True)]
    with pytest.raises(ValueError, match="reset"): env.step(0)
    frame = RaceEnv(tracks[0], render_mode="rgb_array")
    frame.reset(seed=0)
    assert frame.render().shape == (240, 320, 3) and frame.render().std() > 5
    with pytest.raises(ValueError, match="human"): RaceEnv(tracks[0], render_mode="human")


def test_floats_are_those_of_the_shared_builder(tracks):
    env = RaceVectorEnv(tracks, 9, image_size=None, threads=1, random_start="anywhere")
    obs, info = env.reset(seed=2)
    for _ in range(60): obs, *_, info = env.step(steer(obs["floats"]))
    T, states = env.packed, env.states()
    for i, row in enumerate(env.rows):
        lo, hi = T.line_offset[int(row[TRACK])], T.line_offset[int(row[TRACK]) + 1]
        margin = env.lines.finish_m[int(row[TRACK])] - row[PROGRESS]
        wanted, mask = float_vectors(states[i], T.line[lo:hi], [int(row[ZONE]) - lo], [margin], row[None, PREVIOUS:PREVIOUS + 5])
        assert mask.all() and np.array_equal(wanted[0], obs["floats"][i])


def test_observations_of_two_steps_share_no_memory(tracks):
    env = RaceVectorEnv(tracks, 3, image_size=(16, 16), threads=1)
    first, _ = env.reset(seed=0)
    kept = {k: v.copy() for k, v in first.items()}
    second, reward, *_, info = env.step([0, 0, 0])
    for k in kept: assert np.array_equal(first[k], kept[k]) and not np.shares_memory(first[k], second[k]) and not np.array_equal(first[k], second[k])


def returns(env, rows, actions):
    """Rewards (decisions, cars) of driving copies of `rows` by `actions(rows)`, past the ends that would cut an episode off (a learner bootstraps there: the
    value of a cut-off state is what would follow), and the decision at which each would be cut off."""
    rows, rewards, over = rows.copy(), [], np.full(len(rows), 140)
    for k in range(140):
        controls, reward = world_env.KEY_CONTROLS[actions(rows)], np.empty(len(rows))
        for i, c in enumerate(rows):
            reward[i] = world_env.decide(c, env.packed, env.lines, env.car, *controls[i], 0.0)
            if world_env.end_of(c, 3e5) > FINISHED: over[i] = min(over[i], k + 1)
        rewards.append(reward)
    return np.array(rewards), over


def test_an_early_end_never_pays():
    """Over the fixed horizon of 7 s that upstream learns, leaving the road or driving into a wall is worth less than driving on, whether the value after the cut-off is
    that of the car driving on from there or of standing there. Counted only up to the cut-off, as if the episode were over, it would be worth more."""
    tracks = [generate_track(40 + k, kind, 20) for k, kind in enumerate(("flat", "hilly", "technical", "fast"))]
    env = RaceVectorEnv(tracks, 16, image_size=None, threads=1, random_start=True)
    env.reset(seed=1)
    def drive(rows):
        floats = np.empty((len(rows), 184), np.float32)
        world_env.observe_cars(np.arange(len(rows)), rows, env.packed, env.lines, floats, np.empty((len(rows), 0), np.float32))
        return steer(floats)
    for _ in range(60): env.step(drive(env.rows))
    start = env.rows.copy()
    on, never = returns(env, start, drive)
    assert (never == 140).all()
    crashes = pays = 0
    for crash in (1, 2):  # hold left, or right, with full throttle, and drive on as well as one can after 2 s
        away, over = returns(env, start, lambda rows: np.where(rows[:, TIME] - start[:, TIME] < 2000, crash, drive(rows)))
        cut = over < 140
        naive = np.array([r[:k].sum() for r, k in zip(away.T, over)])
        stand = naive - 0.06 * (140 - over)
        assert (away.sum(0) < on.sum(0))[cut].all() and (stand < on.sum(0))[cut].all()
        crashes, pays = crashes + cut.sum(), pays + (naive > on.sum(0))[cut].sum()
    assert crashes > 10 and pays > 10, (crashes, pays)


@pytest.mark.parametrize("mode,at_line,slow", [(False, 1, 1), (True, 1, 1), ("anywhere", 0, 1), ("flying", 0, 0.25), ("mixed", 0.5, 0.625)])
def test_where_races_begin_and_how_fast(tracks, mode, at_line, slow):
    "Share of the races that begin at the line, and share of those at up to 20 m/s; flying ones begin at up to 80 m/s."
    env = RaceVectorEnv(tracks, 900, image_size=None, threads=1, random_start=mode)
    env.reset(seed=0)
    speed, beyond = np.linalg.norm(env.rows[:, VEL:VEL + 3], axis=1), env.rows[:, S] - np.array([t.start_s for t in tracks])[env.rows[:, TRACK].astype(int)]
    assert abs((beyond < 0.1).mean() - at_line) < 0.05 and abs((speed <= 20).mean() - slow) < 0.05 and speed.max() < 80.01 and (speed.max() > 75) == (slow < 1)


def test_what_is_not_finite_ends_off_the_road(tracks):
    "A row with a number that is not finite is noticed, put back on its road and ended; nothing of it is observed."
    env = RaceVectorEnv(tracks, 3, image_size=None, threads=1)
    env.reset(seed=0)
    for column, bad in ((POS, np.nan), (VEL + 1, np.inf), (ANG + 2, -np.inf)):
        row = env.rows[1].copy()
        assert world_env.is_finite(row)
        row[column], row[TIME] = bad, 1500
        assert not world_env.is_finite(row)
        world_env.put_back(row, env.packed, env.lines)
        assert np.isfinite(row).all() and row[OFF] == 1 and row[TIME] == 1500 and world_env.end_of(row, 3e5) == OFF_ROAD


def test_a_car_leaves_the_map(tracks):
    "Full speed over the edge of the road: off the road or no progress, finite all the way."
    env = RaceVectorEnv(tracks, 4, image_size=(16, 16), threads=1)
    env.reset(seed=0)
    T = env.packed
    for i, c in enumerate(env.rows):
        world_env.place_car(c, T, int(c[TRACK]), T.start_s[int(c[TRACK])] + 20, 0.0, 1.57 * (-1) ** i, 80.0)
        world_env.place_on_line(c, T, env.lines)
    ends = np.zeros(4, int)
    for _ in range(200):
        obs, reward, terminated, truncated, info = env.step([0] * 4)
        ends = np.where(ends == 0, info["end"], ends)
        assert np.isfinite(obs["floats"]).all() and np.isfinite(reward).all() and np.isfinite(env.rows).all()
    assert set(ends.tolist()) <= {OFF_ROAD, NO_PROGRESS}, ends


@pytest.mark.parametrize("points", [[[0, 0, 0], [.4, 0, 0]], [[0, k, 0] for k in range(40)], [[min(k, 60 - k), 0, 0] for k in range(60)],
                                    [[3 * np.cos(t), 0, 3 * np.sin(t)] for t in np.linspace(0, 6.2, 60)], [[1e7 + k, 0, 0] for k in range(60)]],
                         ids=["shorter than a metre", "straight up", "back on itself", "tighter than a car", "far away"])
def test_degenerate_tracks(points):
    env = RaceVectorEnv(Track.from_line(np.array(points, float), id="odd"), 2, image_size=(16, 16), threads=1)
    obs, _ = env.reset(seed=0)
    for k in range(50):
        assert env.observation_space.contains(obs) and np.isfinite(obs["floats"]).all()
        obs, reward, *_ = env.step([0, k % 12])
        assert np.isfinite(reward).all() and np.isfinite(env.rows).all()


def test_the_detour_around_a_jump():
    "A slow car on the road's centre, up to 80 m away from the line that flies: progress goes on behind the jump, no cut-off, all gates, the finish."
    track = generate_track(1, "jump", 12)
    env = RaceVectorEnv(track, 1, image_size=None, threads=1)
    env.reset(seed=0)
    c, road, far, end = env.rows[0], track.road, 0.0, RUNNING
    assert track.meta["jumps"]
    while end == RUNNING:
        ahead = road.frame(c[S] + 9.0)[0][0] - c[POS:POS + 3]
        x, speed = ahead @ c[world_env.ROT:world_env.ROT + 9].reshape(3, 3)[:, 0], np.linalg.norm(c[VEL:VEL + 3])
        far = max(far, np.linalg.norm(env.packed.line[int(c[ZONE])] - c[POS:POS + 3]))
        *_, info = env.step([(0 if speed < 15 else 3 if speed < 17 else 6) + (1 if x > .4 else 2 if x < -.4 else 0)])
        end = info["end"][0]
    assert far > 50 and ENDS[end] == "finished" and info["checkpoint"][0] == len(track.gates_s) and info["progress_m"][0] > track.line.length_m - 5


def test_shaping_is_a_potential(tracks):
    "The sum of the shaped reward differs from the plain one by the potential's change alone."
    envs = [RaceVectorEnv(tracks, 3, image_size=None, threads=1, shaping=s) for s in (0.0, -0.1)]
    distance = lambda e: np.array([world_env.line_distance(c, e.packed) for c in e.rows])
    for e in envs: e.reset(seed=0)
    before, total = distance(envs[1]), np.zeros(3)
    for k in range(25):
        plain, shaped = (e.step([0, 1, 2]) for e in envs)
        assert not shaped[3].any()
        total += shaped[1] - plain[1]
    assert np.allclose(total, -0.1 * (distance(envs[1]) - before)) and not np.allclose(total, 0)


@pytest.mark.parametrize("distractors", [0, 3])
def test_snapshot_repeats_frames_and_futures(tracks, distractors):
    env = RaceVectorEnv(tracks, 5, image_size=(32, 32), threads=1, random_start=True, distractors=distractors)
    env.reset(seed=8)
    actions = np.random.default_rng(2).integers(0, 12, (80, 5))
    for a in actions[:30]: env.step(a)
    saved = env.snapshot()
    digest = lambda: hashlib.sha256(b"".join(x.tobytes() for a in actions[30:] for s in [env.step(a)] for x in (*s[0].values(), s[1], s[2], s[3]))).hexdigest()
    first = digest()
    env.restore(saved)
    assert digest() == first
    other = RaceVectorEnv(tracks, 5, image_size=(32, 32), threads=1, distractors=distractors)
    other.restore(saved)
    env = other
    env.restore(saved)
    assert digest() == first  # in another env too


def test_distractors_change_frames_alone(tracks):
    "Clouds, a shaking camera, a clock and other cars differ from car to car, episode to episode and moment to moment; the cars drive as without them."
    plain, busy = (RaceVectorEnv(tracks, 4, image_size=(64, 64), threads=1, distractors=d, max_race_s=1.0) for d in (0, 3))
    a, b = plain.reset(seed=0)[0], busy.reset(seed=0)[0]
    frames = [(a["image"], b["image"])]
    for k in range(25):
        (a, *_), (b, *_) = (e.step([0, 0, 0, 0]) for e in (plain, busy))
        assert np.array_equal(plain.rows, busy.rows) and np.array_equal(a["floats"], b["floats"])
        frames.append((a["image"], b["image"]))
    assert all(not np.array_equal(x, y) for x, y in frames)
    one = RaceVectorEnv(tracks, 2, image_size=(64, 64), threads=1, distractors=3, max_race_s=1.0)
    assert np.array_equal(one.reset(seed=0)[0]["image"], frames[0][1][:2])  # car i's are the same in any batch


def future_hashes(decisions, cars, threads, image_size=None, distractors=3):
    "Digest of everything that cars 0 … k − 1 observed, earned and became, for k = 1, 7 and 64 (as far as there are cars), over `decisions` on three tracks."
    rng = np.random.default_rng(3)
    table = np.repeat(np.where(rng.random((decisions // 10 + 1, 64)) < .25, rng.integers(0, 12, (decisions // 10 + 1, 64)), 99), 10, axis=0)[:, :cars]
    env = RaceVectorEnv([generate_track(k, kind, 8) for k, kind in enumerate(("flat", "hilly", "jump"))], cars, image_size=image_size, threads=threads, random_start=True, distractors=distractors)
    obs, _ = env.reset(seed=11)
    digests, ends = {k: hashlib.blake2b() for k in (1, 7, 64) if k <= cars}, np.zeros(5, int)
    for step in range(decisions):
        obs, reward, terminated, truncated, info = env.step(np.where(table[step] < 12, table[step], steer(obs["floats"])))
        ends += np.bincount(info["end"], minlength=5)
        for k, d in digests.items():
            for a in (*obs.values(), reward, info["end"], info["time_ms"]): d.update(a[:k].tobytes())
    for k, d in digests.items(): d.update(env.rows[:k].tobytes())
    return {str(k): d.hexdigest() for k, d in digests.items()} | dict(ends=ends.tolist())


def in_another_process(*arguments, **env):
    "What this file prints when it is run with these arguments."
    out = subprocess.run([sys.executable, __file__, *map(str, arguments)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | env, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.strip().splitlines()[-1])


def test_ten_thousand_decisions_are_the_same_for_any_batch_thread_count_and_restart():
    "10,000 decisions of 64 cars, twice: in this process, and in another one with another number of threads; and of the first 1 and 7 cars alone."
    whole = future_hashes(10_000, 64, 1)
    assert whole["ends"][FINISHED] > 100 and whole["ends"][OFF_ROAD] + whole["ends"][NO_PROGRESS] > 100, whole["ends"]
    assert in_another_process("future", 10_000, 64, thread_count(None)) == whole
    for cars in (1, 7): assert future_hashes(10_000, cars, 1)[str(cars)] == whole[str(cars)]


def test_frames_are_the_same_for_any_batch_thread_count_and_restart():
    whole = future_hashes(60, 64, 1, (64, 64))
    assert in_another_process("future", 60, 64, thread_count(None), 64) == whole
    for cars in (1, 7): assert future_hashes(60, cars, 1, (64, 64))[str(cars)] == whole[str(cars)]


def card_run(folders, device, mode, decisions=10, **pictures):
    "Everything that two cars see, earn and become in `decisions`, with ends and new episodes among them, as lists of arrays. `pictures`: image_size, view, distractors."
    read = lambda a: np.asarray(a.copy_to_host() if hasattr(a, "copy_to_host") else a).copy()
    seen_in = lambda obs: [read(obs[k]) for k in sorted(obs)]
    env = RaceVectorEnv([Track.load(f) for f in folders], 2, device=device, random_start=True, extras=("progress", {Track.load(f).id: [k, 0.5] for k, f in enumerate(folders)}), max_race_s=0.3, action_mode=mode, shaping=-0.1, **dict(image_size=None) | pictures)
    (obs, info), rng = env.reset(seed=3), np.random.default_rng(0)
    seen = [*seen_in(obs), read(info["episode"])]
    for k in range(decisions):
        obs, reward, terminated, truncated, info = env.step(rng.integers(0, 12, 2) if mode == "keys" else rng.uniform([-1, 0, 0], 1, (2, 3)))
        seen += [*seen_in(obs), *(read(x) for x in (reward, terminated, truncated, *(info[n] for n in sorted(info) if "final" not in n)))]
        if "final_obs" in info:
            final, ended = info["final_obs"], np.flatnonzero(read(info["_final_obs"]))
            seen += [a for i in ended for a in (seen_in(final[i]) if device == "cpu" else [x[i] for x in seen_in(final)])]
        if k == decisions // 2: saved = env.snapshot()
    seen.append(env.snapshot()["rows"])
    return seen + seen_in(env.restore(saved))


PICTURES = [dict(image_size=(24, 32)), dict(image_size=(18, 33), view="hood", distractors=1), dict(image_size=(24, 32), distractors=3)]


@pytest.fixture(scope="module")
def folders(tracks, tmp_path_factory):
    where = tmp_path_factory.mktemp("tracks")
    for t in tracks[:2]: t.save(where / t.id)
    return [str(where / t.id) for t in tracks[:2]]


@pytest.mark.parametrize("mode", ["keys", "analog"])
def test_cuda_kernels_in_the_simulator(folders, mode):
    "numba's simulator runs the card's kernels as plain Python: the same as the plain Python of the processor's kernels, to the last bit, and as the compiled ones."
    same, rows = in_another_process("card", mode, *folders, NUMBA_DISABLE_JIT="1", NUMBA_ENABLE_CUDASIM="1")
    assert same
    assert np.allclose(rows, card_run(folders, "cpu", mode)[-3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pictures", PICTURES)
def test_cuda_pictures_in_the_simulator(folders, pictures):
    "As above with pictures, also of the ends of episodes; and nearly the compiled ones, which round once where plain Python rounds twice."
    same, image = in_another_process("pictures", json.dumps(pictures), *folders, NUMBA_DISABLE_JIT="1", NUMBA_ENABLE_CUDASIM="1")
    assert same
    off = np.abs(np.array(image) - card_run(folders, "cpu", "keys", 7, **pictures)[-1].astype(int))
    assert np.array(image).std() > 20 and (off > 3).mean() < .01, off.mean()


def test_too_many_pictures_for_a_card_are_refused(folders):
    assert "GB on the card" in in_another_process("refused", *folders, NUMBA_DISABLE_JIT="1", NUMBA_ENABLE_CUDASIM="1")


def has_card():
    from numba import cuda
    return cuda.is_available()


@pytest.mark.skipif(not has_card(), reason="no GPU: no CUDA device, or no driver for it, on this machine")
@pytest.mark.parametrize("mode", ["keys", "analog"])
def test_cars_on_a_card(folders, mode):
    "As on the processor but for the last bits (a card contracts multiplications and additions), and twice the same."
    first, again, processor = (card_run(folders, device, mode) for device in ("cuda", "cuda", "cpu"))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert all(np.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(first, processor))


@pytest.mark.skipif(not has_card(), reason="no GPU: no CUDA device, or no driver for it, on this machine")
@pytest.mark.parametrize("pictures", [*PICTURES, dict(image_size=(64, 64)), dict(image_size=(120, 160), view="hood")])
def test_pictures_on_a_card(folders, pictures):
    first, again, processor = (card_run(folders, device, "keys", **pictures) for device in ("cuda", "cuda", "cpu"))
    assert all(np.array_equal(a, b) for a, b in zip(first, again)) and len(first) == len(processor)
    images = [(a, b) for a, b in zip(first, processor) if a.dtype == np.uint8]
    assert len(images) > 11 and np.mean([(np.abs(a.astype(int) - b) > 3).mean() for a, b in images]) < .01


@pytest.mark.skipif(has_card(), reason="this machine has a CUDA device")
def test_no_card(tracks):
    with pytest.raises(ValueError, match="device='cpu'"): RaceVectorEnv(tracks, 2, image_size=None, device="cuda")


def on_both(folders, mode, **rest):
    "[whether processor and card agree in everything, what the card has]."
    plain, card = (card_run(folders, device, mode, **rest) for device in ("cpu", "cuda"))
    return len(plain) == len(card) and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(plain, card)), card


def refusal(folders):
    "What is said when the card has 1 MB of memory left."
    from numba import cuda
    context = type(cuda.current_context())
    context.get_memory_info = lambda self: (1e6, 1e9)
    try: RaceVectorEnv([Track.load(f) for f in folders], 64, device="cuda")
    except ValueError as e: return str(e)


if __name__ == "__main__":
    task, *rest = sys.argv[1:]
    if task == "future": print(json.dumps(future_hashes(*map(int, rest[:3]), *([(int(rest[3]),) * 2] if rest[3:] else []))))
    elif task == "refused": print(json.dumps(refusal(rest)))
    elif task == "pictures":
        same, card = on_both(rest[1:], "keys", decisions=7, **json.loads(rest[0]))
        print(json.dumps([same, card[-1].tolist()]))
    else:
        same, card = on_both(rest[1:], rest[0])
        print(json.dumps([same, card[-3].tolist()]))


def test_a_missed_gate_ends_the_race():
    "Cars that drive on behind a gate they did not drive through get no metres beyond 12 m after it, and are out of the race two seconds later; the others drive on."
    env = RaceVectorEnv([generate_track(3, "flat", 20)], 8, image_size=None, threads=1)
    env.reset(seed=0)
    gates = env.packed.gate_s
    for i in range(8):
        place_car(env.rows[i], env.packed, 0, gates[1] + 30.0, 0.0, 0.0, 30.0)
        place_on_line(env.rows[i], env.packed, env.lines)
    env.rows[:4, CHECKPOINT] = 1  # the gate of number 1 is still to be driven through
    ended, metres, floats = np.zeros(8, int), [], env.observe()["floats"]
    for _ in range(42):
        obs, _, terminated, truncated, info = env.step(np.full(8, steer(floats[4:5])[0]))  # all eight drive alike
        floats = obs["floats"]
        metres.append(info["progress_m"])
        now = (ended == 0) & (terminated | truncated)
        ended[now] = info["end"][now]
        if (ended[:4] > 0).all(): break
    assert (ended[:4] == NO_PROGRESS).all() and (ended[4:] == 0).all()
    assert np.ptp(np.array(metres)[:, :4], axis=0).max() < 1 and (np.array(metres)[-1, 4:] - metres[0][:4].max() > 30).all()
