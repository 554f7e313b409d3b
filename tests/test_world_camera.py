"""The camera against a slow, obvious renderer: every pixel's ray is intersected with the triangles of the road's mesh."""
import numba, numpy as np, pytest
from tmlab.tracks.generate import FAMILIES, generate_track
from tmlab.tracks.geometry import CAR, GROUND, SKY, build_road, gate_mesh, road_mesh
from tmlab.tracks.line import ReferenceLine
from tmlab.tracks.track import Track, pack
from tmlab.world.camera import CHASE, HOOD, NEAR_M, RANGE_M, TAN_X, TAN_Y, render, render_classes

def camera_frame(position, rotation, view):
    "Eye (3,) and rows right, up, forward (3, 3) of the camera, in numpy."
    back, above, pitch = CHASE if view == "chase" else HOOD
    forward = rotation[:, 2]
    up = rotation[:, 1] + max(0, rotation[1, 1]) * np.array([0, 1, 0])
    up = up - forward * (up @ forward)
    up /= np.linalg.norm(up)
    eye = position + back * forward + above * up
    tilted = np.cos(pitch) * forward + np.sin(pitch) * up
    return eye, np.stack([np.cross(forward, up), np.cross(np.cross(forward, up), tilted), tilted])

def slow_classes(track, position, rotation, size, view):
    "Classes (H, W) by nearest ray hit; ground and sky where nothing is hit."
    eye, axes = camera_frame(position, rotation, view)
    (h, w), meshes = size, [road_mesh(track.road), gate_mesh(track.road, track.gates_s)]
    x, y = np.meshgrid((2 * (np.arange(w) + .5) / w - 1) * TAN_X, (1 - 2 * (np.arange(h) + .5) / h) * TAN_Y)
    rays = np.stack([x, y, np.ones_like(x)], axis=-1)
    out = np.where((rays @ axes)[..., 1] > -1e-3, SKY, GROUND).astype(np.uint8)
    depth = np.full((h, w), RANGE_M)
    for vertices, triangles, classes in meshes:
        corners = ((vertices - eye) @ axes.T)[triangles]
        seen = (corners[..., 2].max(1) > NEAR_M) & (corners[..., 2].min(1) < RANGE_M)
        for (p, a, b), c in zip(corners[seen], classes[seen]):
            rows, columns = box((p, a, b), h, w)
            if rows.start >= rows.stop or columns.start >= columns.stop: continue
            d = rays[rows, columns]
            m = np.stack([a - p, b - p], axis=1)
            normal = np.cross(m[:, 0], m[:, 1])
            with np.errstate(divide="ignore", invalid="ignore"): z = (p @ normal) / (d @ normal)
            u, v = np.moveaxis((d * z[..., None] - p) @ np.linalg.pinv(m).T, -1, 0)
            hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (z >= NEAR_M) & (z < depth[rows, columns])
            depth[rows, columns][hit], out[rows, columns][hit] = z[hit], c
    return out

def box(corners, h, w):
    "Rows and columns that can see the triangle; all of them when it reaches behind the camera."
    corners = np.array(corners)
    if corners[:, 2].min() < .1: return slice(0, h), slice(0, w)
    c = (corners[:, 0] / corners[:, 2] / TAN_X / 2 + .5) * w
    r = (.5 - corners[:, 1] / corners[:, 2] / TAN_Y / 2) * h
    return slice(max(0, int(r.min()) - 1), min(h, int(r.max()) + 2)), slice(max(0, int(c.min()) - 1), min(w, int(c.max()) + 2))

def turned(rotation, yaw, pitch, roll):
    "`rotation` (3, 3) followed by small turns about the car's own axes, rad."
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch, roll))
    return rotation @ [[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]] @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]]) @ [[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]

def random_view(track, rng, around=.5):
    "A pose on or a little above the road, looking about."
    position, rotation = track.spawn(rng.uniform(track.start_s, track.finish_s), rng.uniform(-7, 7))
    yaw = rng.uniform(-np.pi, np.pi) if rng.random() < .2 else rng.normal(0, around)
    return position + [0, rng.uniform(0, 3), 0], turned(rotation, yaw, rng.normal(0, .05), rng.normal(0, .1))

def agreement(tracks, views, seed, size=(64, 64)):
    "Share of equal pixels (views,), cycling through tracks and camera views."
    rng, packed, out = np.random.default_rng(seed), pack(tracks), []
    for n in range(views):
        k, view = n % len(tracks), ("chase", "hood")[n // len(tracks) % 2]
        position, rotation = random_view(tracks[k], rng)
        fast = render_classes(packed, k, position, rotation, size, view, car=False)[0]
        out.append((fast == slow_classes(tracks[k], position, rotation, size, view)).mean())
    return np.array(out)

@pytest.fixture(scope="module")
def tracks(): return [generate_track(5, kind, 15) for kind in FAMILIES]

@pytest.fixture(scope="module")
def bridge():
    "A helix that passes over itself, with walls and a gap."
    a = np.linspace(0, 4 * np.pi, 400)
    road = build_road(np.column_stack([60 * np.cos(a), 10 + 1.2 * a, 60 * np.sin(a)]), half_width=6, verge=2, wall=(1.0, 0.0), gap=(a > 5) & (a < 5.15))
    line = ReferenceLine(road.frame(np.arange(30, 600, .5))[0])
    return Track("bridge", road, line, 30.0, 600.0, [200.0, 400.0, 600.0])

def test_classes_agree_with_slow_renderer(tracks):
    got = agreement(tracks, 24, seed=0)
    print("agreement", got.round(4))
    assert got.mean() >= .99 and got.min() >= .97

def test_classes_agree_on_bridges_walls_and_gaps(bridge):
    got = agreement([bridge], 8, seed=1)
    print("agreement", got.round(4))
    assert got.mean() >= .985 and got.min() >= .96

def test_same_bytes_for_any_batch_and_thread_count(tracks):
    packed, rng = pack(tracks), np.random.default_rng(2)
    index = rng.integers(0, len(tracks), 37)
    views = [random_view(tracks[k], rng) for k in index]
    position, rotation = (np.array(v) for v in zip(*views))
    once = render(packed, index, position, rotation)
    threads = numba.get_num_threads()
    try: numba.set_num_threads(1); assert np.array_equal(once, render(packed, index, position, rotation))
    finally: numba.set_num_threads(threads)
    single = np.concatenate([render(packed, [k], position[i], rotation[i]) for i, k in enumerate(index)])
    assert np.array_equal(once, single)

def test_own_car_is_drawn_at_the_bottom_centre(tracks):
    packed = pack(tracks)
    classes = render_classes(packed, 0, *tracks[0].spawn())[0]
    rows, columns = np.nonzero(classes == CAR)
    assert len(rows) > 60 and abs(columns.mean() - 31.5) < 1 and 44 < rows.mean() < 54
    assert not (render_classes(packed, 0, *tracks[0].spawn(), view="hood") == CAR).any()

def test_turning_the_car_moves_the_picture(tracks):
    "Nose to the left: what was ahead moves to the right of the picture."
    packed, (position, rotation) = pack(tracks), tracks[0].spawn()
    road = lambda yaw: np.nonzero(render_classes(packed, 0, position, turned(rotation, yaw, 0, 0), car=False)[0, 26:32] == 2)[1].mean()
    assert road(.3) > road(0) + 5 and road(-.3) < road(0) - 5

@pytest.mark.parametrize("far", [1e3, 1e6])
def test_poses_off_the_map_are_drawn(tracks, far):
    packed, rng = pack(tracks), np.random.default_rng(3)
    for _ in range(20):
        position, rotation = random_view(tracks[1], rng, around=3)
        image = render(packed, 1, position + rng.uniform(-far, far, 3), rotation @ turned(np.eye(3), *rng.uniform(-3, 3, 3)))
        assert image.shape == (1, 64, 64)

def test_bad_arguments_are_refused(tracks):
    packed, (position, rotation) = pack(tracks), tracks[0].spawn()
    for change in [dict(view="side"), dict(track_index=9), dict(track_index=-1), dict(position=position * np.nan), dict(out=np.empty((1, 64, 64))),
                   dict(rotation=np.stack([rotation] * 2))]:
        with pytest.raises(ValueError): render(**(dict(tracks=packed, track_index=0, position=position, rotation=rotation) | change))
