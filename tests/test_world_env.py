"""The vector env: bad arguments, no NaN whatever is pressed, one future per seed and car."""
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from tmlab.tracks.generate import generate_track
from tmlab.world.env import ENDS, FINISH_MS, RUNNING, TRACK, RaceVectorEnv, thread_count


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


@pytest.mark.parametrize("mode,bad", [("keys", [0, 12]), ("keys", [-1, 0]), ("keys", [0]), ("keys", [0.0, 1.0]), ("keys", [[0, 1]]), ("keys", None),
                                      ("analog", [[0, 1, 0]]), ("analog", [[0, 1, 2], [0, 0, 0]]), ("analog", [[-1.5, 0, 0], [0, 0, 0]]), ("analog", [[np.nan, 0, 0], [0, 0, 0]])])
def test_bad_actions(tracks, mode, bad):
    env = RaceVectorEnv(tracks, 2, image_size=None, action_mode=mode, threads=1)
    env.reset(seed=0)
    rows = env.rows.copy()
    with pytest.raises(ValueError, match="actions"): env.step(bad)
    assert np.array_equal(rows, env.rows)


@pytest.mark.parametrize("kw,cause", [(dict(tracks=[]), "tracks"), (dict(tracks=["A01"]), "tracks"), (dict(num_envs=0), "num_envs"), (dict(action_mode="mouse"), "mouse"),
                                      (dict(device="cuda"), "cuda"), (dict(threads=999), "threads"), (dict(extras=("time",)), "extras"), (dict(random_start="maybe"), "maybe")])
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
