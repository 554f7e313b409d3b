"""Generated tracks of every family: the same bytes anywhere, every length, and what makes a family."""
import subprocess, sys
import numpy as np, pytest
from tmlab.tracks.generate import FAMILIES, generate_track
from tmlab.tracks.geometry import DIRT, TURBO
from tmlab.tracks.track import Track, locate_anywhere, pack

def test_same_bytes_in_another_process():
    code = "from tmlab.tracks.generate import *; print(*[generate_track(7, k, s).hash for k in FAMILIES for s in (8, 20)])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert other == [generate_track(7, k, s).hash for k in FAMILIES for s in (8, 20)] and len(set(other)) == 12

@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("seconds", [5, 9, 14, 45, 120])
def test_every_length(kind, seconds, tmp_path):
    made = [generate_track(seed, kind, seconds) for seed in range(4)]
    for t in made:
        assert all(np.isfinite(a).all() for a in t.arrays().values()) and t.road.half_width.min() > 5 and (t.road.verge >= 0).all()
        assert t.start_s >= 29 and t.road.length_m > t.finish_s + 100 and t.id == f"{kind}-{t.meta['seed']}-{seconds}s-v2"
        if kind == "jump": assert t.meta["jumps"] and all(t.start_s < a < b < t.finish_s for a, b in t.meta["jumps"])
        if kind == "two-line": assert t.start_s < t.meta["island_s"][0] < t.meta["island_s"][1] < t.finish_s and t.road.island.any()
        if kind != "two-line": assert not t.road.island.any()
    made[0].save(tmp_path / "t")
    assert Track.load(tmp_path / "t").hash == made[0].hash and Track.load(tmp_path / "t").meta == made[0].meta

def test_lengths_grow_with_seconds():
    for kind in FAMILIES:
        metres = [np.median([generate_track(seed, kind, s).line.length_m for seed in range(5)]) for s in (5, 15, 45)]
        assert metres[0] < .5 * metres[1] < .25 * metres[2] * 1.2

def test_some_have_dirt_turbo_and_bridges():
    made = {k: [generate_track(s, k, 30) for s in range(20)] for k in FAMILIES}
    share = lambda k, has: np.mean([bool(has(t)) for t in made[k]])
    for k in ("hilly", "technical"):
        assert .05 <= share(k, lambda t: (t.road.surface == DIRT).any()) < .8 and .05 <= share(k, lambda t: t.meta["bridges_s"]) < .9
        assert share(k, lambda t: t.road.wall.any()) > .5
    for k in ("fast", "jump"): assert .1 <= share(k, lambda t: (t.road.surface == TURBO).any()) <= .95
    assert share("flat", lambda t: t.meta["bridges_s"] or (t.road.surface != 16).any()) == 0

@pytest.mark.parametrize("bad", [dict(kind="loop"), dict(seed=-1), dict(seed=1.5), dict(seconds=0), dict(seconds=2), dict(seconds=1e9), dict(seconds=float("nan"))])
def test_degenerate_requests_are_refused(bad):
    with pytest.raises(ValueError): generate_track(**dict(seed=1, kind="jump", seconds=10) | bad)

def test_anywhere_is_somewhere():
    "Wherever a car is, it is located on the road, at finite metres."
    T, rng = pack([generate_track(3, k, 15) for k in FAMILIES]), np.random.default_rng(0)
    for far in (10, 1e3, 1e7):
        for k in range(len(FAMILIES)):
            i, s, lateral, height = locate_anywhere(T, k, *rng.uniform(-far, far, 3))
            assert T.offset[k] <= i < T.offset[k + 1] - 1 and 0 <= s <= T.s[T.offset[k + 1] - 1] and np.isfinite([lateral, height]).all()

def test_the_car_makes_the_jumps():
    "At full gas, without steering, from 77 to 130 % of the assumed speed, in the middle and 2 m aside; at half of it it falls."
    from tmlab.world.car import CAR, CONTACT, N_CAR, OFF, S, drive_ticks, new_cars, place_car
    made = [generate_track(seed, "jump", 25) for seed in range(6)]
    T, gas, landed = pack(made), np.tile([0., 1, 0], (260, 1)), {}
    for k, t in enumerate(made):
        for (a, b), mps in zip(t.meta["jumps"], t.meta["jump_mps"]):
            for share in (.5, .77, 1.0, 1.3):
                for aside in (-2., 0., 2.):
                    car, out = new_cars(1)[0], np.zeros((260, N_CAR))
                    place_car(car, T, k, a - 45, aside, 0.0, np.sqrt((share * mps) ** 2 - 2 * 7 * 45))  # it gains the rest on the way
                    drive_ticks(car, T, CAR, gas, out)
                    down = (out[:, S] > (a + b) / 2) & (out[:, CONTACT:CONTACT + 4] > 0).all(1) & (out[:, OFF] == 0)
                    landed.setdefault(share, []).append(down.any())
    print({k: f"{sum(v)} of {len(v)}" for k, v in landed.items()})
    assert all(np.mean(landed[k]) >= .98 for k in (.77, 1.0, 1.3)) and np.mean(landed[.5]) < .1

@pytest.mark.parametrize("kind", ["flat", "technical", "two-line"])
def test_the_expert_drives_them_in_about_the_time_asked_for(kind):
    from tmlab.world.expert import laps
    seconds, _ = laps([generate_track(seed, kind, 12) for seed in (11, 12, 13)])
    print(kind, seconds)
    assert np.isfinite(seconds).sum() >= 2 and .8 < np.nanmedian(seconds) / 12 < 1.2
