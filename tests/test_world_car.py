"""The car against the public figures, through the air, against walls and islands; no energy from nothing, no NaN, one future per car."""
import numpy as np
import pytest
from tmlab.tracks.generate import generate_track
from tmlab.tracks.geometry import DIRT, GRASS, ISLAND_HEIGHT, TURBO, build_road
from tmlab.tracks.line import ReferenceLine
from tmlab.tracks.track import Track, pack
from tmlab.world.car import (ANG, CAR, CLEAR, CONTACT, DAMPER, DRIVE, DT, FREE, FREE_WHEELING, GEAR, HEIGHT, LATERAL, MATERIAL, MAX_MPS, N_CAR, NOSE, OFF, POS, ROT, S, SEGMENT, SIDE_GRIP,
                             SLIDING, STEERING, TURBO_MS, VEL, YAW, drive_ticks, new_cars, place_car)

STRAIGHT = np.c_[np.zeros(3001), np.full(3001, 10.0), np.arange(3001.0)]
WIDE = dict(half_width=1400.0, verge=1.0)


def world(*roads):
    "Packed tracks of (points, keywords of build_road)."
    made = [build_road(points, **kw) for points, kw in roads]
    return pack([Track(f"t{k}", r, ReferenceLine(points[2:-2]), 2.0, r.length_m - 2.0, [r.length_m - 2.0]) for k, (r, (points, _)) in enumerate(zip(made, roads))])


def drive(T, controls, s=20.0, lateral=0.0, heading=0.0, speed=0.0, P=CAR, track=0, change=None):
    "Rows after each tick; `change(row)` may alter the placed car."
    c, out = new_cars(1)[0], np.empty((len(controls), N_CAR))
    place_car(c, T, track, s, lateral, heading, speed)
    if change: change(c)
    drive_ticks(c, T, P, np.ascontiguousarray(controls, float), out)
    assert np.isfinite(out).all()
    return out


def hold(ticks, steer=0.0, gas=1.0, brake=0.0): return np.tile([steer, gas, brake], (ticks, 1))
def speeds(run): return np.linalg.norm(run[:, VEL:VEL + 3], axis=1)
def energy(run, P=CAR): return 0.5 * speeds(run) ** 2 + P.gravity * run[:, POS + 1]


@pytest.fixture(scope="module")
def wide(): return world((STRAIGHT, WIDE))


def test_drive_acceleration(wide):
    "Full gas from rest, and again from just below 800 km/h: the gain of speed per second is the published one."
    run = np.concatenate([drive(wide, hold(3000)), drive(wide, hold(900), speed=795 / 3.6)])
    v = speeds(run)
    kmh, gain = 3.6 * (v[1:] + v[:-1]) / 2, np.diff(v) / DT
    for at, want in ((3, 16), (50, 16), (101.5, 11), (150, 11), (201.5, 7), (300, 7), (401.5, 5.5), (600, 5.5), (801.5, 1)):
        k = np.argmin(abs(kmh - at))
        assert abs(kmh[k] - at) < 1 and abs(gain[k] / want - 1) < 0.05, (at, kmh[k], gain[k])


@pytest.mark.parametrize("kmh,want", [(50, 80), (100, 80), (200, 75), (300, 67), (400, 60), (500, 55)])
def test_side_grip(wide, kmh, want):
    "Steering is wound on slowly, with more of it than the car has: its path bends by the published grip before the wheels slide, by less after."
    P = CAR._replace(grip_scale=1.0, steer_scale=20.0, min_radius=0.1, radius_rate=0.0, yaw_lag=0.05, steer_drag=0.0)
    controls = np.c_[-np.linspace(0, 1, 300), np.zeros(300), np.zeros(300)]
    run = drive(wide, controls, s=100, speed=kmh / 3.6, P=P._replace(coast=0.0, coast_rate=0.0, rolling=0.0, air_drag=0.0))
    v = run[:, VEL:VEL + 3]
    heading = np.unwrap(np.arctan2(v[:, 0], v[:, 2]))
    side = np.diff(heading) / DT * speeds(run)[1:]
    slides = np.argmax(run[:, SLIDING] > 0)
    assert 10 < slides < 290
    held, after = side[:slides - 1].max(), side[slides + 5]
    grip = np.interp(3.6 * speeds(run)[slides], *np.array(SIDE_GRIP, float).T)
    assert abs(grip / want - 1) < 0.03 and abs(held / want - 1) < 0.05 and after < 0.9 * held, (kmh, held, after)


def test_steering_response(wide):
    "Yaw rates at full lock, with grip to spare, are in the published ratio, up to 50 km/h with the smallest turning circle taken away."
    def drive_lock(kmh, **kw): return drive(wide, hold(56, -1, 0), s=1500, speed=kmh / 3.6, P=CAR._replace(grip_scale=9.0, steer_drag=0.0, coast=0.0, coast_rate=0.0, rolling=0.0, **kw))
    runs = [drive_lock(kmh, min_radius=0.01, radius_rate=0.0) for kmh in (1, 50)] + [drive_lock(kmh) for kmh in (100, 200, 300, 500)]
    rates, now = np.array([r[-1, YAW] for r in runs]), [3.6 * speeds(r)[-4] for r in runs]
    ratio = rates / np.interp(now, *np.array(STEERING, float).T) / CAR.steer_scale
    assert np.abs(ratio - 1).max() < 0.05, ratio
    yaw = lambda kmh: drive(wide, hold(60, steer=-1.0), s=1500, speed=kmh / 3.6)[:, YAW]
    slewed = yaw(200)
    assert slewed[4] < 0.35 * slewed[-1] and slewed[15] < 0.75 * slewed[-1] and slewed[45] > 0.9 * slewed[-1]  # not instant


def test_gears_turbo_and_freewheeling():
    pad = np.where((np.arange(3001) > 200) & (np.arange(3001) < 205), TURBO, 16)
    with_pad, without = (drive(world((STRAIGHT, dict(surface=m))), hold(600), s=100, speed=70) for m in (pad, 16))  # no change of gear meanwhile
    boosted = np.flatnonzero(with_pad[:, TURBO_MS] > 0)
    gain = np.diff(speeds(with_pad))[boosted[1:20]] / np.diff(speeds(without))[boosted[1:20]]
    off_pad = np.argmax(with_pad[:, S] > 204)
    assert np.abs(gain / 5 - 1).max() < 0.05 and 240 <= 10 * (boosted[-1] - off_pad) <= 270
    climb = drive(world((STRAIGHT, {})), hold(3000))
    assert climb[0, GEAR] == 1 and climb[-1, GEAR] == 5 and (np.diff(climb[:, GEAR]) >= 0).all()
    free = np.where(np.arange(3001) == 300, FREE_WHEELING, np.where(np.arange(3001) == 600, TURBO, 16))
    run = drive(world((STRAIGHT, dict(surface=free))), hold(2500), s=250, speed=40)
    at = lambda s: np.argmax(run[:, S] > s)
    assert run[at(400), FREE] == 1 and speeds(run)[at(590)] < speeds(run)[at(310)] and run[at(650), FREE] == 0 and speeds(run)[at(650)] > speeds(run)[at(590)] + 5


@pytest.mark.parametrize("material,slower", [(GRASS, 3.0), (DIRT, 0.9)])
def test_soft_ground_is_slow_and_slippery(wide, material, slower):
    soft = world((STRAIGHT, dict(WIDE, surface=material)))
    on, off = (drive(T, hold(500)) for T in (wide, soft))
    assert speeds(on)[-1] > speeds(off)[-1] + slower and (off[-1, MATERIAL:MATERIAL + 4] == material).all()
    braked = [drive(T, hold(150, steer=1, gas=0, brake=1), s=1500, speed=50) for T in (wide, soft)]
    assert braked[1][:, SLIDING].sum() > braked[0][:, SLIDING].sum()


def helix(turn_deg, then_m=150.0, radius=40.0, high=12.0, low=2.0):
    "150 m straight along +z, a left turn that goes down, then straight on."
    a = np.radians(np.arange(0, turn_deg + 0.1, 1.0))
    turn = np.c_[radius - radius * np.cos(a), np.interp(a, [0, a[-1]], [high, low]), 150 + radius * np.sin(a)]
    end = turn[-1] + np.arange(1.0, then_m)[:, None] * np.array([np.sin(a[-1]), 0, np.cos(a[-1])])
    return np.concatenate([np.c_[np.zeros(150), np.full(150, high), np.arange(150.0)], turn, end])


def test_flies_over_the_void_and_lands_on_a_later_part_of_its_road():
    T = world((helix(360), {}))
    run = drive(T, hold(400), s=100, speed=38)
    air = ~run[:, CONTACT:CONTACT + 4].any(axis=1)
    landed = np.flatnonzero(air)[-1] + 1
    assert 0.5 < air.sum() * DT < 2 and not run[:, OFF].any() and run[landed, S] - run[np.argmax(air), S] > 200
    assert run[landed:landed + 30, DAMPER].max() > 0.05 and abs(run[-1, HEIGHT]) < 0.01 and abs(run[-1, POS + 1] - 2) < 0.1
    assert (run[:np.argmax(air), CLEAR] == 0).all() and run[:, CLEAR].max() > 1  # far from every road it is not looked for at each tick
    assert run[landed + 2, VEL + 1] > -1 > run[landed - 1, VEL + 1] + 15  # the speed along the normal is gone


def test_bridge_from_above_and_from_below():
    T = world((helix(270), {}))
    under = drive(T, hold(300, gas=0.2), s=345, speed=30)  # passes below the approach
    assert np.ptp(under[:, POS]) > 60 and np.abs(under[:, HEIGHT]).max() < 0.05 and under[:, CONTACT:CONTACT + 4].all() and (np.diff(under[:, S]) < 2).all()
    fall = drive(T, hold(200, gas=0), s=90, lateral=12, heading=0.25, speed=14)
    landed = np.argmax((fall[:, POS + 1] < 3) & fall[:, CONTACT:CONTACT + 4].any(axis=1))
    assert landed and fall[landed, S] > 300 and not fall[:, OFF].any() and fall[0, S] < 100


def test_gap_and_steep_landing():
    z = np.arange(600.0)
    points = np.c_[0 * z, np.interp(z, [0, 200, 260, 300, 600], [20, 20, 24, 10, 10]), z]
    T = world((points, dict(gap=(z >= 262) & (z < 285))))
    run = drive(T, hold(500, gas=0), s=150, speed=55, P=CAR._replace(coast_rate=0.0))
    assert not run[:, OFF].any() and run[-1, CONTACT:CONTACT + 4].all() and run[-1, S] > 320
    assert (np.diff(energy(run)) < 1e-3 * energy(run)[:-1]).all()
    slow = drive(T, hold(900, gas=0.3), s=200, speed=8)
    assert slow[-1, OFF] == 1 and slow[-1, POS + 1] == T.ground_y[0]


def test_air_control():
    def spin(c): c[POS + 1] += 20; c[ANG:ANG + 3] = 1.0, 0.5, -0.7; c[CONTACT:CONTACT + 4] = 0
    T = world((STRAIGHT, {}))
    free, braked, steered = (drive(T, hold(40, s, 0, b), speed=30, change=spin) for s, b in ((0, 0), (0, 1), (1, 0)))
    turning = lambda run: np.linalg.norm(run[-1, ANG:ANG + 3])
    assert turning(braked) < 0.01 < 0.8 < turning(free) and steered[-1, YAW] < free[-1, YAW] - 0.1
    assert not free[:, CONTACT:CONTACT + 4].any() and not free[:, SLIDING:SLIDING + 4].any()


@pytest.mark.parametrize("kmh", [60, 300, 700, 1000])
@pytest.mark.parametrize("lateral", [-1.7, 0.0, 0.5, 2.2])
def test_nothing_passes_through_an_island(kmh, lateral):
    "Two sections thin and 3 m wide: a car that drives at it is stopped, or slips along its side."
    island = np.zeros((3001, 2)); island[1500:1502] = 1.5, -1.5
    T = world((STRAIGHT, dict(island=island)))
    for s in 1000 + np.arange(0, 3, 0.31):
        run = drive(T, hold(1000, gas=0), s=1500 - 30 * kmh / 100 - s % 1, lateral=lateral, speed=kmh / 3.6)
        inside = (abs(run[:, S] - 1500.5) < 0.5) & (abs(run[:, LATERAL]) < 1.5)
        assert not inside.any()
        if abs(lateral) < 2: assert run[:, S].max() < 1500 - NOSE + 1e-6 and speeds(run)[-1] < 0.3 * kmh / 3.6
        else: assert run[-1, S] > 1502 or speeds(run)[-1] < 1


def test_island_sides_top_and_back():
    island = np.zeros((3001, 2)); island[1500:1600, 0], island[1500:1600, 1] = np.linspace(1, 3, 100), -2
    T = world((STRAIGHT, dict(island=island)))
    side = drive(T, hold(150, gas=0), s=1505, lateral=4.5, heading=-0.3, speed=50)
    face = np.interp(side[:, S], [1500, 1599], [1, 3])
    assert (side[:, LATERAL] > face + 0.9).all() and side[-1, S] > 1540 and speeds(side)[-1] > 15 and np.sign(side[-1, LATERAL]) == 1 and speeds(side)[-1] < 50
    def lift(c): c[POS + 1] += 4
    top = drive(T, hold(200, gas=0), s=1530, speed=5, change=lift)
    assert abs(top[-1, HEIGHT] - ISLAND_HEIGHT) < 0.02 and top[-1, CONTACT:CONTACT + 4].all()
    back = drive(T, hold(300, gas=0), s=1650, heading=np.pi, speed=60)
    assert back[:, S].min() > 1599 + NOSE - 1e-6 and speeds(back)[-1] < 20


@pytest.mark.parametrize("heading", [0.3, 1.5, -0.6, np.pi - 0.4, 2.5])
@pytest.mark.parametrize("kmh", [100, 1000])
def test_walls_deflect(heading, kmh):
    "Nose or tail first: the car's box stays inside, the blow takes speed, and a car at a small angle drives on along the wall."
    T = world((STRAIGHT, dict(wall=1.2)))
    run = drive(T, hold(200, gas=0), s=1500, heading=heading, speed=kmh / 3.6, P=CAR._replace(coast_rate=0.0))
    assert abs(run[:, LATERAL]).max() <= 14 - 0.99 and not run[:, OFF].any()
    assert (np.diff(energy(run)) < 1e-6 * energy(run)[0]).all() and speeds(run)[-1] < 0.9 * kmh / 3.6
    if heading == 0.3: assert abs(run[-1, ROT + 2]) < 0.2 and run[-1, VEL + 2] > 10
    backwards = drive(T, hold(200, gas=0), s=1500, heading=heading, speed=-kmh / 3.6)
    assert abs(backwards[:, LATERAL]).max() <= 14 - 0.99


def random_drives(n, seed, P=CAR._replace(reverse=0.0)):
    "(rows, track) of cars thrown onto difficult roads in any attitude, without gas."
    z, island = np.arange(601.0), np.zeros((601, 2))
    island[100:160], island[220:260], island[400:402] = (1.5, -2), (4, -4), (0.3, -0.3)
    ramps = np.interp(z, [0, 100, 110, 160, 161, 300, 330, 350, 400, 420, 440, 601], [20, 20, 25, 25, 15, 5, 12, 14, 10, 18, 9, 9])
    T = world((np.c_[3 * np.sin(z / 50), ramps, z], dict(wall=1.2, island=island, gap=(z > 350) & (z < 380))),
              (np.c_[40 * np.sin(z / 60), 20 + 5 * np.sin(z / 30), z], dict(wall=(1.2, 0), island=island, bank=0.2 * np.sin(z / 40))),
              (np.c_[0 * z, ramps, z], dict(half_width=5.0, verge=0.0, spacing_m=3.0)), (helix(360), {}))
    rng = np.random.default_rng(seed)
    for k in range(n):
        def throw(c):
            c[POS + 1] += rng.choice([0, 0, 3, 12]); c[VEL + 1] += rng.uniform(-10, 10)
            if k % 3: return
            q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            c[ROT:ROT + 9] = (q * np.sign(np.linalg.det(q))).ravel(); c[ANG:ANG + 3] = rng.normal(size=3) * 3; c[CONTACT:CONTACT + 4] = 0
        controls = np.repeat(np.c_[rng.uniform(-1, 1, 20), np.zeros(20), rng.random(20) < 0.3], 20, axis=0)
        length = T.finish_s[k % 4]
        yield drive(T, controls, rng.uniform(5, length - 20), rng.uniform(-12, 12), rng.uniform(-3.2, 3.2), rng.choice([10, 40, 80, 270]) * rng.uniform(0.5, 1), P, k % 4, throw), T


def test_energy_never_comes_from_nothing():
    "Kinetic and potential energy without gas, through bumps, flights, landings, islands and walls: never above its lowest value before by more than 4 cm of height."
    worst, flights, hits = 0.0, 0, 0
    for run, T in random_drives(200, 5):
        e = energy(run)
        worst = max(worst, (e - np.minimum.accumulate(e)).max())
        flights += (~run[:, CONTACT:CONTACT + 4].any(axis=1)).any(); hits += (np.diff(speeds(run)) < -5).any()
        axes = run[:, ROT:ROT + 9].reshape(-1, 3, 3)
        assert np.abs(np.einsum("nij,nik->njk", axes, axes) - np.eye(3)).max() < 1e-9
    assert worst < 1.0 and flights > 100 and hits > 50, (worst, flights, hits)


@pytest.mark.parametrize("points", [np.array([[0.0, 5, 0], [0, 5, 10]]), np.array([[0.0, 5, 0], [0, 5, 0.4]]), np.array([[0.0, 5, 0], [0, 5, 1], [0, 5, 1], [0, 6, 2]])])
def test_degenerate_roads(points):
    road = build_road(points)
    T = pack([Track("tiny", road, ReferenceLine(np.array([[0.0, 5, 0], [0, 5, 0.3]])), 0.0, road.length_m, [road.length_m])])
    road.s[-1] = road.s[-2]; flat = pack([Track("tiny", build_road(points), ReferenceLine(np.array([[0.0, 5, 0], [0, 5, 0.3]])), 0.0, 0.2, [0.2])])
    flat.s[1:] = flat.s[0]; flat.centre[1:] = flat.centre[0]  # segments without length
    for world_ in (T, flat):
        for s in (-5.0, 0.0, 3.0, 50.0):
            run = drive(world_, np.repeat(np.random.default_rng(0).uniform(-1, 1, (20, 3)), 20, axis=0), s=s, speed=30)
            assert run[:, SEGMENT].min() >= 0 and run[:, SEGMENT].max() <= len(road) - 2


def test_inputs_and_speeds_outside_their_range():
    T = world((STRAIGHT, {}))
    for bad, good in (((7, 3, -2), (1, 1, 0)), ((-9, 0.5, 40), (-1, 0.5, 1)), ((np.nan, np.nan, np.nan), (0, 0, 0)), ((np.inf, 1, 0), (1, 1, 0))):
        assert np.array_equal(drive(T, hold(50, *bad), speed=20), drive(T, hold(50, *good), speed=20))
    for speed in (1e4, -1e7, 1e200, np.inf, np.nan):
        assert speeds(drive(T, hold(50), speed=speed)).max() <= MAX_MPS + 3
    away = drive(T, hold(100), change=lambda c: c.__setitem__(slice(POS, POS + 3), [1e6, 1e6, -1e6]))
    assert np.isfinite(away).all()


def test_off_is_the_ground_plane_and_stays():
    T = world((STRAIGHT, {}))
    run = drive(T, hold(500, steer=1), s=500, speed=40)
    first = np.argmax(run[:, OFF])
    assert first and abs(run[first - 1, LATERAL]) > 14 and run[first:, OFF].all() and (run[first:, POS + 1] == T.ground_y[0]).all() and speeds(run)[-1] < 0.01


def test_one_future_per_car():
    "The same rows whether cars are driven one by one or in turn, tick by tick or at once."
    T = pack([generate_track(k, "hilly", 8) for k in range(2)])
    controls = np.repeat(np.random.default_rng(2).uniform(-1, 1, (40, 3)), 10, axis=0); controls[:, 1] = 1
    def start(k): c = new_cars(1)[0]; place_car(c, T, k % 2, 40.0 + k, 0.0, 0.0, 20.0); return c
    alone = []
    for k in range(4):
        out = np.empty((400, N_CAR)); drive_ticks(start(k), T, CAR, controls, out); alone.append(out[-1])
    cars = [start(k) for k in range(4)]
    for i in range(0, 400, 5):
        for c in cars: drive_ticks(c, T, CAR, controls[i:i + 5], np.empty((5, N_CAR)))
    assert np.array_equal(np.stack(cars), np.stack(alone))
