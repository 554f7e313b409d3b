"""The camera against a slow, obvious renderer: every pixel's ray is intersected with the triangles of the road's and the gates' mesh, and the nearest hit wins."""
import numba, numpy as np, pytest
from numba import njit
from tmlab.tracks.generate import FAMILIES, generate_track
from tmlab.tracks.geometry import CAR, GROUND, SKY, WALL, build_road, gate_mesh, road_mesh
from tmlab.tracks.line import ReferenceLine
from tmlab.tracks.track import Track, pack
from tmlab.world import camera
from tmlab.world.camera import CHASE, HOOD, NEAR_M, RANGE_M, TAN_X, TAN_Y, render, render_classes, scene_of

VIEWS = 200

def camera_frame(position, rotation, view):
    "Eye (3,) and rows right, up, forward (3, 3) of the camera."
    back, above, pitch = CHASE if view == "chase" else HOOD
    forward = rotation[:, 2]
    up = rotation[:, 1] + max(0, rotation[1, 1]) * np.array([0, 1, 0])
    up = up - forward * (up @ forward)
    up /= np.linalg.norm(up)
    eye = position + back * forward + above * up
    tilted = np.cos(pitch) * forward + np.sin(pitch) * up
    return eye, np.stack([np.cross(forward, up), np.cross(np.cross(forward, up), tilted), tilted])

@njit
def span_of(x, z, half, n):
    "First and end pixel of `n` that can see coordinates `x` (3,) at depths `z` (3,), `half`: half of the picture at depth 1; all when a corner is behind the camera."
    if z.min() < .1: return 0, n
    at = (.5 + x / z / half / 2) * n
    return int(min(max(at.min() - 1, 0), n)), int(min(max(at.max() + 2, 0), n))

@njit(error_model="numpy")
def nearest_hits(corners, classes, depth, out):
    "Put the class of the nearest triangle (F, 3 corners, 3; camera space) that each pixel's ray hits into `out`, where it is nearer than `depth`."
    h, w = out.shape
    for f in range(len(corners)):
        x, y, z = corners[f, :, 0], corners[f, :, 1], corners[f, :, 2]
        if z.max() < NEAR_M or z.min() > RANGE_M: continue
        side = np.empty((3, 3))  # normals of the planes through the eye and each edge
        for k in range(3): side[k] = np.cross(corners[f, k], corners[f, (k + 1) % 3])
        normal = np.cross(corners[f, 1] - corners[f, 0], corners[f, 2] - corners[f, 0])
        away = x[0] * normal[0] + y[0] * normal[1] + z[0] * normal[2]
        (c0, c1), (r0, r1) = span_of(x, z, TAN_X, w), span_of(-y, z, TAN_Y, h)
        for r in range(r0, r1):
            for c in range(c0, c1):
                dx, dy = (2 * (c + .5) / w - 1) * TAN_X, (1 - 2 * (r + .5) / h) * TAN_Y  # the ray: (dx, dy, 1)
                a = side[0, 0] * dx + side[0, 1] * dy + side[0, 2]
                b = side[1, 0] * dx + side[1, 1] * dy + side[1, 2]
                g = side[2, 0] * dx + side[2, 1] * dy + side[2, 2]
                if not (a >= 0 and b >= 0 and g >= 0 or a <= 0 and b <= 0 and g <= 0): continue
                hit = away / (normal[0] * dx + normal[1] * dy + normal[2])  # negative when the triangle is behind
                if NEAR_M <= hit < depth[r, c]: depth[r, c], out[r, c] = hit, classes[f]

def slow_classes(meshes, position, rotation, size, view):
    "Classes (H, W) by nearest hit; ground and sky where nothing is hit."
    eye, axes = camera_frame(position, rotation, view)
    h, w = size
    x, y = np.meshgrid((2 * (np.arange(w) + .5) / w - 1) * TAN_X, (1 - 2 * (np.arange(h) + .5) / h) * TAN_Y)
    out = np.where((np.stack([x, y, np.ones_like(x)], axis=-1) @ axes)[..., 1] > -1e-3, SKY, GROUND).astype(np.uint8)
    depth = np.full((h, w), RANGE_M)
    for vertices, triangles, classes in meshes: nearest_hits(((vertices - eye) @ axes.T)[triangles], classes, depth, out)
    return out

def turned(rotation, yaw, pitch, roll):
    "`rotation` (3, 3) followed by small turns about the car's own axes, rad."
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch, roll))
    return rotation @ [[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]] @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]]) @ [[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]

def random_view(track, rng, around=.5):
    "A pose on or a little above the road, or in the air over a jump, 4 of 5 looking roughly along the road, the others anywhere."
    jumps = track.meta.get("jumps", [])
    position, rotation = track.spawn(rng.uniform(track.start_s, track.finish_s), rng.uniform(-7, 7))
    if jumps and rng.random() < .25:
        (p, rotation), (q, _), t = track.spawn(jumps[0][0]), track.spawn(jumps[0][1]), rng.random()
        position = p + t * (q - p) + [0, rng.uniform(0, 4), 0]
    yaw = rng.uniform(-np.pi, np.pi) if rng.random() < .2 else rng.normal(0, around)
    return position + [0, rng.uniform(0, 3), 0], turned(rotation, yaw, rng.normal(0, .05), rng.normal(0, .1))

def agreement(tracks, views, seed, size=(64, 64)):
    "Share of equal pixels (views,), cycling through tracks, every other time in the hood view."
    rng, packed, out = np.random.default_rng(seed), pack(tracks), []
    meshes = [[road_mesh(t.road), gate_mesh(t.road, t.gates_s)] for t in tracks]
    for n in range(views):
        k, view = n % len(tracks), ("chase", "hood")[n // len(tracks) % 2]
        position, rotation = random_view(tracks[k], rng)
        fast = render_classes(packed, k, position, rotation, size, view, car=False)[0]
        out.append((fast == slow_classes(meshes[k], position, rotation, size, view)).mean())
    print(f"agreement over {views} views: mean {np.mean(out):.4f}, 5 % below {np.quantile(out, .05):.4f}, min {np.min(out):.4f}")
    return np.array(out)

@pytest.fixture(scope="module")
def tracks(): return [generate_track(5, kind, 15) for kind in FAMILIES]

@pytest.fixture(scope="module")
def bridge():
    "A helix that passes over itself, with walls, a gap, a dirt stretch and an island."
    a = np.linspace(0, 4 * np.pi, 400)
    island = np.where(((a > 2) & (a < 2.4))[:, None], [2.0, -1.5], 0.0)
    road = build_road(np.column_stack([60 * np.cos(a), 10 + 1.2 * a, 60 * np.sin(a)]), half_width=6, verge=2, wall=(1.0, 0.0), gap=(a > 5) & (a < 5.15),
                      surface=np.where((a > 8) & (a < 9), 6, 16), island=island)
    line = ReferenceLine(road.frame(np.arange(30, 600, .5))[0])
    return Track("bridge", road, line, 30.0, 600.0, [200.0, 400.0, 600.0])

@pytest.mark.parametrize("family", FAMILIES)
def test_classes_agree_with_slow_renderer(family):
    got = agreement([generate_track(seed, family, 15) for seed in (5, 6, 7, 8)], VIEWS, seed=0)
    assert got.mean() >= .99 and got.min() >= .9

def test_classes_agree_on_bridges_walls_gaps_and_islands(bridge):
    got = agreement([bridge], VIEWS, seed=1)
    assert got.mean() >= .99 and got.min() >= .9

def test_classes_agree_at_160x120(tracks, bridge):
    assert agreement([*tracks, bridge], 2 * len(tracks) + 2, seed=2, size=(120, 160)).mean() >= .99

def test_an_island_is_a_wall_ahead(bridge):
    s = np.interp(2.0, np.linspace(0, 4 * np.pi, 400), np.linspace(0, bridge.road.length_m, 400))
    classes = lambda s: render_classes(pack([bridge]), 0, *bridge.spawn(s), view="hood")[0]
    assert (classes(s - 12)[30:44, 24:40] == WALL).mean() > .2 and (classes(s - 60)[36:44, 28:36] == WALL).mean() < .1

def test_same_bytes_for_any_batch_and_thread_count(tracks):
    packed, rng = pack(tracks), np.random.default_rng(2)
    index = rng.integers(0, len(tracks), 37)
    views = [random_view(tracks[k], rng) for k in index]
    position, rotation = (np.array(v) for v in zip(*views))
    threads = numba.get_num_threads()
    for level in (0, 3):
        extra = lambda i: dict(distractors=level, time_ms=1000.0 * i, key=i, seed=4)
        once = render(packed, index, position, rotation, **extra(np.arange(37)))
        try: numba.set_num_threads(1); assert np.array_equal(once, render(packed, index, position, rotation, **extra(np.arange(37))))
        finally: numba.set_num_threads(threads)
        single = np.concatenate([render(pack(tracks), [k], position[i], rotation[i], **extra(i)) for i, k in enumerate(index)])
        assert np.array_equal(once, single)

@pytest.mark.parametrize("size", [(1, 1), (7, 5), (50, 33), (84, 84), (64, 100)])
def test_any_size_shows_the_same_scene(tracks, size):
    "Odd sizes touch no byte beyond their picture, and show what a large picture shows."
    packed, (position, rotation) = pack(tracks), tracks[1].spawn(200.0)
    guard = np.full((3, *size), 77, np.uint8)
    large = render_classes(packed, 1, position, rotation, (size[0] * 3, size[1] * 3))[0, 1::3, 1::3]
    assert (render_classes(packed, 1, position, rotation, size, out=guard[1:2])[0] == large).mean() > .99 and (guard[::2] == 77).all()

def test_own_car_is_drawn_at_the_bottom_centre(tracks):
    packed = pack(tracks)
    classes = render_classes(packed, 0, *tracks[0].spawn())[0]
    rows, columns = np.nonzero(classes == CAR)
    assert len(rows) > 60 and abs(columns.mean() - 31.5) < 2 and 44 < rows.mean() < 54
    assert not (render_classes(packed, 0, *tracks[0].spawn(), view="hood") == CAR).any()

def test_turning_the_car_moves_the_picture(tracks):
    "Nose to the left: what was ahead moves to the right of the picture."
    packed, (position, rotation) = pack(tracks), tracks[0].spawn()
    road = lambda yaw: np.nonzero(render_classes(packed, 0, position, turned(rotation, yaw, 0, 0), car=False)[0, 26:32] == 2)[1].mean()
    assert road(.3) > road(0) + 5 and road(-.3) < road(0) - 5

def test_distractors_follow_from_seed_key_and_time(tracks):
    packed, (position, rotation) = pack(tracks), tracks[0].spawn(200.0)
    shot = lambda **k: render(packed, 0, position, rotation, **(dict(distractors=3, time_ms=5000, seed=1, key=2) | k))
    assert np.array_equal(shot(), shot())
    for change in (dict(seed=2), dict(key=3), dict(time_ms=5700), dict(distractors=2)): assert (shot() != shot(**change)).any()
    assert np.array_equal(shot(distractors=0), render(packed, 0, position, rotation))
    clouds = shot(distractors=1) != shot(distractors=0)
    assert clouds.any() and (shot(distractors=1)[clouds] > shot(distractors=0)[clouds]).mean() > .9

def test_a_scene_lives_as_long_as_its_tracks(tracks):
    import gc
    from tmlab.world.camera import SCENES
    packed = pack(tracks)
    assert scene_of(packed) is scene_of(packed)
    key = id(packed.centre)
    del packed; gc.collect()
    assert key not in SCENES

@pytest.mark.parametrize("far", [1e3, 1e6])
def test_poses_off_the_map_are_drawn(tracks, far):
    packed, rng = pack(tracks), np.random.default_rng(3)
    for _ in range(20):
        position, rotation = random_view(tracks[1], rng, around=3)
        image = render(packed, 1, position + rng.uniform(-far, far, 3), rotation @ turned(np.eye(3), *rng.uniform(-3, 3, 3)))
        assert image.shape == (1, 64, 64)

def test_bad_arguments_are_refused(tracks):
    packed, (position, rotation) = pack(tracks), tracks[0].spawn()
    for change in [dict(view="side"), dict(track_index=99), dict(track_index=-1), dict(position=position * np.nan), dict(out=np.empty((1, 64, 64))),
                   dict(rotation=np.stack([rotation] * 2)), dict(distractors=4), dict(distractors=1), dict(image_size=(0, 64)), dict(image_size=(64, 2000))]:
        with pytest.raises(ValueError): render(**(dict(tracks=packed, track_index=0, position=position, rotation=rotation) | change))


@pytest.mark.parametrize("flat", [False, True])
def test_no_quad_is_drawn_outside_the_picture(flat):
    "Quads seen edge on, of no size, at no distance: what they write stays within the arrays, whatever the numbers on the way."
    height, width, spare, rng, f32 = 64, 48, 512, np.random.default_rng(0), np.float32
    sizes = [camera.MOST * (height // camera.SPAN_LANES + 2), camera.N_SPAN * camera.STRIDE, (camera.MOST_SPANS + camera.LANES) * (width // camera.LANES + 2) + 4, height * width + camera.LANES]
    cam, e, q = np.zeros(camera.N_CAM, f32), np.zeros(camera.N_SET * camera.MOST, f32), np.zeros((camera.FIELDS, camera.MOST), f32)
    camera.set_axes(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, cam)
    camera.look(cam, height, width)
    spec, values = camera.make_spec(False), f32([-3000, -100, -5, -1, -0.4, -1e-20, -1e-38, -1e-42, 0, 0, 1e-42, 1e-38, 1e-20, 0.4, 1, 5, 100, 3000])
    for trial in range(300):
        q[:12] = rng.choice(values, (12, camera.MOST)) + rng.choice(f32([0, 0, 1e-3, 3]), (12, camera.MOST)) * rng.normal(size=(12, camera.MOST)).astype(f32)
        q[:12, :16] = q[:12, 16:32] * f32([0, 1e-20, 1, 3])[rng.integers(4)]  # also flat ones and points
        q[2:12:3] = np.where(rng.random((4, camera.MOST)) < .5, np.abs(q[2:12:3]), q[2:12:3])
        q[camera.MID_U], q[camera.HALF], q[camera.GROWTH], q[camera.PAINT] = rng.uniform(0, 4000, camera.MOST), 8, 0, rng.integers(0, camera.CAR_PAINT if not flat else camera.PAINTS, camera.MOST)
        strips, spans, blocks, pixels = (np.full(n + spare, 77, dtype) for n, dtype in zip(sizes, (np.int32, f32, np.int32, np.int32)))
        camera.fill(q.ravel(), camera.MOST, cam, height, width, f32(0.9), spec, camera.TEXTURES, flat, e, strips, spans, blocks, pixels)
        for n, x in zip(sizes, (strips, spans, blocks, pixels)): assert (x[n:] == 77).all(), trial
