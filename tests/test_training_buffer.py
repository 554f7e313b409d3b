"The replay memory against slow, obvious definitions; interrupted saves; warm starts."
import json, shutil
import numpy as np
import pytest
import torch
from tmlab.replays.store import ReplayStore
from tmlab.tracks.generate import generate_track
from tmlab.training.buffer import (ReplayBuffer, add_step, draw_starts, ends, fill_policy, fill_replays, frames, load_rows, prioritised_starts, recorded_drive,
                                   row_files, sample, save_rows, stack_rows, window_length)
from tmlab.world.env import NO_PROGRESS, RUNNING, RaceVectorEnv, TIME_LIMIT
from tmlab.world.expert import Expert
from tmlab.world.record import import_replay, record_replays

ROW = dict(image=0, floats=0.0, action=0, reward=0.0, terminated=False, truncated=False, failed=False, greedy=True, expert=False)
seeded = lambda seed: torch.Generator().manual_seed(seed)

def random_row(g, n, t, p_end=0.05):
    "What `n` random cars did at row `t`; image and second float hold the row's number."
    flag = lambda p: torch.rand(n, generator=g) < p
    floats = torch.tensor([0.0, t, 0, 0]).expand(n, 4)
    return dict(image=t % 251, floats=floats, action=torch.randint(0, 12, (n,), generator=g), reward=torch.randn(n, generator=g), terminated=flag(p_end), truncated=flag(p_end),
                failed=flag(p_end), greedy=flag(0.8), expert=flag(0.3))

def random_buffer(drawn, rows, steps=30, cars=3, **kw):
    "A ring after `rows` random rows; `drawn`: their seed."
    b, g = ReplayBuffer(steps, cars, (1, 8, 8), 4, **kw), seeded(drawn)
    for t in range(rows): b.add(**random_row(g, cars, t))
    return b

def same(a, b): return all(torch.equal(x, b[k]) if torch.is_tensor(x) else x == b[k] for k, x in a.items()) and a.keys() == b.keys()

@pytest.mark.parametrize("seed", range(5))
def test_windows_never_cross_a_race(seed):
    "Random flags: a window holds the end of a race only as its last step, never a cut, and an exploratory action only as its first."
    g = seeded(seed)
    over, cut, greedy = (torch.rand(400, 4, generator=g) < p for p in (0.15, 0.15, 0.8))
    length, ended = window_length(over, cut, greedy)
    for i in range(400):
        n = length[i].item()
        assert not over[i, :max(n - 1, 0)].any() and ended[i] == (n > 0 and over[i, n - 1])
        assert not (cut & ~over)[i, :n].any() and greedy[i, 1:n].all()
        if n < 4 and not ended[i]: assert cut[i, n] or not greedy[i, n]

def test_a_failed_car_stands_until_the_mini_race_ends():
    "From the failing step on, −0.06 per decision to the horizon, whatever the time in the mini-race; with standing=None that row is no start at all."
    b = ReplayBuffer(10, 1, (1, 8, 8), 4)
    for t in range(10): b.add(**ROW | dict(reward=-0.05, truncated=t == 5, failed=t == 5))
    batch = sample(b, 300, 1, 1.0, generator=seeded(0))
    at = batch.index == 5
    assert at.any() and (batch.discount[at] == 0).all() and torch.allclose(batch.reward[at], -0.05 - 0.06 * (139 - batch.floats[at, 0]))
    assert torch.allclose(batch.reward[~at], torch.tensor(-0.05)) and 5 not in draw_starts(b, 300, 1, None)[0]
    costly = sample(b, 300, 3, 0.9, generator=seeded(0), penalty=-10.0).reward - sample(b, 300, 3, 0.9, generator=seeded(0)).reward
    steps = 6 - sample(b, 300, 3, 0.9, generator=seeded(0)).index  # of the window until the failure is behind
    room = sample(b, 300, 3, 0.9, generator=seeded(0)).floats[:, 0] + steps <= 140
    hit = (steps >= 1) & (steps <= 3) & room
    assert hit.any() and torch.allclose(costly[hit], -10 * 0.9 ** steps[hit].float()) and (costly[~hit] == 0).all()

def test_buffer_too_short():
    with pytest.raises(ValueError, match="no window of 3"): sample(ReplayBuffer(10, 2, (1, 8, 8), 4), 4)

@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_starts_cover_the_ring(alpha):
    "All rows that have their window in the ring, and no other; before and after it has wrapped around."
    b = ReplayBuffer(20, 2, (1, 8, 8), 4)
    for total in range(1, 70):
        b.add(**ROW)
        if total not in (4, 12, 20, 33, 60): continue
        row, car, weight = draw_starts(b, 5000, 3, None, alpha=alpha, generator=seeded(0))
        assert set(row.tolist()) == set(range(max(0, total - 20), total - 3)) and set(car.tolist()) == {0, 1} and (weight == 1).all()

@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_no_start_is_said_not_searched_for(alpha, test):
    b = ReplayBuffer(20, 2, (1, 8, 8), 4)
    for _ in range(20): b.add(**ROW | dict(truncated=True))
    with pytest.raises(ValueError, match="no window"): sample(b, 4, alpha=alpha, test=test)

# frame stacks

def stack_by_hand(b, row, car, stack):
    "Rows of the last `stack` frames of a state: walk back until there are enough, a race ends, or the ring does."
    rows = [row]
    while len(rows) < stack:
        t = rows[0] - 1
        if t < max(0, b.total - b.steps) or b.terminated[t % b.steps, car] or b.truncated[t % b.steps, car]: break
        rows.insert(0, t)
    return [rows[0]] * (stack - len(rows)) + rows

@pytest.mark.parametrize("rows", [1, 7, 30, 31, 80])
@pytest.mark.parametrize("stack", [1, 2, 4, 9])
def test_stacks_are_the_last_frames_of_the_race(rows, stack):
    b = random_buffer(rows, rows, steps=30)
    row = torch.arange(max(0, rows - 30), rows).repeat_interleave(3)
    car = torch.arange(3).repeat(len(row) // 3)
    wanted = [stack_by_hand(b, r, c, stack) for r, c in zip(row.tolist(), car.tolist())]
    assert stack_rows(b, row, car, stack).tolist() == wanted
    seen = frames(b, row, car, stack)
    assert seen.shape == (len(row), stack, 8, 8) and seen[:, :, 3, 5].tolist() == [[t % 251 for t in w] for w in wanted]

def test_stacks_of_a_batch():
    "Both states of every transition; everything else is as without a stack."
    b = random_buffer(3, 80)
    plain, batch = (sample(b, 300, 3, generator=seeded(1), stack=s) for s in (1, 4))
    assert all(torch.equal(x, y) for name, x, y in zip(plain._fields, plain, batch) if "image" not in name)
    for row, image, car in ((batch.floats[:, 1], batch.image, batch.index % 3), (batch.next_floats[:, 1], batch.next_image, batch.index % 3)):
        assert image[:, :, 0, 0].tolist() == [stack_by_hand(b, int(r), c, 4) for r, c in zip(row, car.tolist())]
    assert torch.equal(plain.image[:, 0], batch.image[:, 3])

# races kept for testing

def test_whole_races_are_kept_and_never_learned_from():
    b = random_buffer(0, 250, steps=250, cars=8, test_share=0.3)
    done = b.terminated | b.truncated
    assert (b.test[1:] == b.test[:-1])[~done[:-1]].all() and 0.2 < b.test.float().mean() < 0.4
    for alpha in (0.0, 0.7):
        batch = sample(b, 2000, 5, generator=seeded(0), stack=3, alpha=alpha)
        car = batch.index % 8
        for row in (batch.index // 8, batch.next_floats[:, 1].long()): assert not b.test[row, car].any()
        for image in (batch.image, batch.next_image): assert not b.test[image[:, :, 0, 0].long(), car[:, None]].any()  # a pixel is the number of its row
    kept = sample(b, 2000, 5, generator=seeded(0), test=True)
    assert b.test[kept.index // 8, kept.index % 8].all() and b.test[kept.next_floats[:, 1].long(), kept.index % 8].all()

def test_without_a_share_nothing_is_kept():
    b = random_buffer(0, 60)
    assert not b.test[:30].any()
    with pytest.raises(ValueError, match="kept for testing"): sample(b, 4, test=True)

def test_the_share_is_of_the_seed():
    one, same_seed, other = (random_buffer(0, 30, test_share=0.5, seed=s).test for s in (1, 1, 2))
    assert torch.equal(one, same_seed) and not torch.equal(one, other)

# prioritised replay

def test_priorities_by_definition():
    "Draws in proportion to priority ** α among the usable rows, none of the others; weights (N·P)^−β over the batch's largest."
    b = random_buffer(5, 80, test_share=0.2)
    error = torch.rand(90, generator=seeded(0)) * 3
    b.update_priorities(torch.arange(50 * 3, 80 * 3), error, eps=0.1)
    row, car, weight = prioritised_starts(b, 50, 77, 300_000, -0.06, 0.6, 0.4, seeded(1))
    p = torch.zeros(30, 3, dtype=torch.float64)
    for t in range(50, 77):
        for c in range(3):
            s = t % 30
            cut = b.truncated[s, c] and not b.terminated[s, c] and not b.failed[s, c]
            if not cut and not b.test[s, c]: p[s, c] = (error[(t - 50) * 3 + c].item() + 0.1) ** 0.6
    p /= p.sum()
    count = torch.bincount(row % 30 * 3 + car, minlength=90).double()
    expected, open_rows = 300_000 * p.flatten(), p.flatten() > 0
    chi2, freedom = ((count - expected)[open_rows] ** 2 / expected[open_rows]).sum(), open_rows.sum() - 1
    assert not count[~open_rows].any() and chi2 < freedom + 5 * (2 * freedom) ** 0.5 and row.min() >= 50 and row.max() < 77
    wanted = (open_rows.sum() * p[row % 30, car]) ** -0.4
    assert torch.allclose(weight.double(), wanted / wanted.max(), atol=1e-5) and weight.max() == 1

def test_new_decisions_have_the_highest_priority_so_far():
    b = random_buffer(0, 10)
    b.update_priorities(torch.tensor([3, 4]), torch.tensor([-7.0, 0.5]), eps=0)
    b.add(**ROW)
    assert b.priority[1].tolist() == [7.0, 0.5, 1.0] and (b.priority[10] == 7).all() and b.max_priority == 7
    b.update_priorities(torch.tensor([3]), torch.tensor([2.0]), eps=0)
    b.add(**ROW)
    assert b.priority[1, 0] == 2 and (b.priority[11] == 7).all()

def test_a_decision_drawn_twice_or_gone_since():
    b = random_buffer(0, 30)
    b.update_priorities(torch.tensor([5, 5, 5]), torch.tensor([2.0, 9.0, 4.0]), eps=0)
    assert b.priority[1, 2] == 9
    b.add(**ROW)
    before = b.priority.clone()
    b.update_priorities(torch.tensor([1, 7]), torch.tensor([100.0, 3.0]), eps=0)  # row 0 has just been overwritten
    before[2, 1] = 3
    assert torch.equal(b.priority, before) and b.max_priority == 9

def test_priorities_that_are_no_numbers():
    b = random_buffer(0, 30)
    b.update_priorities(torch.arange(30), torch.full((30,), float("nan")))
    with pytest.raises(ValueError, match="priority is nan"): sample(b, 4, alpha=1.0)

def test_weights_of_a_uniform_draw_are_one():
    b = random_buffer(0, 60)
    assert (sample(b, 50, alpha=0.0, generator=seeded(0)).weight == 1).all() and (sample(b, 50, alpha=0.5, generator=seeded(0)).weight == 1).all()  # all priorities are 1

# what is stored

def test_extra_floats_and_refused_ones():
    b = ReplayBuffer(10, 2, (1, 8, 8), 187)
    x = torch.randn(2, 187, generator=seeded(0))
    for _ in range(8): b.add(**ROW | dict(floats=x))
    batch = sample(b, 10, generator=seeded(0))
    assert batch.floats.dtype == torch.float32 and torch.equal(batch.floats[:, 1:], x.half().float()[batch.index % 2, 1:])
    for bad in (np.nan, 1e5, -np.inf):
        x[1, 186] = bad
        with pytest.raises(ValueError, match="scale them down"): b.add(**ROW | dict(floats=x))
    assert b.total == 8

def test_memory_of_200k_decisions():
    b = ReplayBuffer(1, 64, num_floats=184 + 64)
    assert b.nbytes / 64 * 200_000 <= 1e9

# saving

@pytest.mark.parametrize("seed", range(4))
def test_interrupted_saves(seed, tmp_path):
    "Random rows, cuts, priorities and saves; sometimes the run dies after the rows were written and before the checkpoint was. What comes back is what the checkpoint saw, and draws the same batches."
    rng, g, kw = np.random.default_rng(seed), seeded(seed), dict(test_share=0.3, seed=3)
    b, checkpoint = ReplayBuffer(25, 2, (1, 8, 8), 4, **kw), None
    for _ in range(40):
        for _ in range(rng.integers(0, 20)): b.add(**random_row(g, 2, b.total))
        if b.total and rng.random() < 0.3: b.cut()
        if b.total: b.update_priorities(torch.arange(max(0, b.total - 5) * 2, b.total * 2), torch.rand(2 * min(5, b.total), generator=g))
        number = save_rows(b, tmp_path)
        if rng.random() < 0.7: checkpoint, in_it = b.state_dict(), number
        elif checkpoint:
            b = ReplayBuffer(25, 2, (1, 8, 8), 4, **kw)
            load_rows(b, tmp_path, in_it)
            assert same(b.state_dict(), checkpoint)
            twin = ReplayBuffer(25, 2, (1, 8, 8), 4, **kw)
            twin.load_state_dict(checkpoint)
            assert torch.equal(twin.testing, b.testing)
            if b.total > 10: assert all(torch.equal(x, y) for x, y in zip(*(sample(c, 20, 2, generator=seeded(1), alpha=0.5) for c in (b, twin))))
    stored = sum(until - first for _, first, until, _ in row_files(tmp_path))
    assert stored < 25 + 4 * 20 and not list(tmp_path.glob(".tmp-*"))

def test_missing_and_damaged_parts(tmp_path):
    b = random_buffer(0, 10, steps=25)
    save_rows(b, tmp_path)
    for t in range(10, 20): b.add(**random_row(seeded(t), 3, t))
    assert save_rows(b, tmp_path) == 2
    first, last = (path for *_, path in row_files(tmp_path))
    fresh = lambda: ReplayBuffer(25, 3, (1, 8, 8), 4)
    kept = last.read_bytes()
    last.write_bytes(kept[:1000])
    with pytest.raises(ValueError, match="not a part of a buffer"): load_rows(fresh(), tmp_path, 2)
    last.write_bytes(kept)
    with pytest.raises(ValueError, match="steps, cars"): load_rows(ReplayBuffer(26, 3, (1, 8, 8), 4), tmp_path, 2)
    first.unlink()
    with pytest.raises(ValueError, match="rows 0 to 20 .* resume without the buffer"): load_rows(fresh(), tmp_path, 2)
    for number, folder in ((3, tmp_path), (1, tmp_path / "none")):
        with pytest.raises(ValueError, match=f"save {number} of the buffer is missing"): load_rows(fresh(), folder, number)

# warm starts

@pytest.fixture(scope="module")
def track(): return generate_track(1, "flat", 6)

@pytest.fixture(scope="module")
def laps(track, tmp_path_factory):
    "Four laps of the expert; the folder `maps/img`."
    root = tmp_path_factory.mktemp("laps") / "maps/img"
    record_replays(track, root, per_track=4, image_size=(16, 16), noise=0.05, quiet=True)
    return root

@pytest.fixture
def copy_of_laps(laps, tmp_path):
    shutil.copytree(laps.parent, tmp_path / "maps")
    return tmp_path / "maps/img"

def test_fill_from_a_policy(track):
    "The rows are what the env gave; a car that goes off the road has failed; nothing crosses the cut behind them."
    env, b = RaceVectorEnv(track, 4, (16, 16), threads=1, random_start=True), ReplayBuffer(120, 4, (1, 16, 16))
    seen = []
    def policy(obs):
        seen.append(obs)
        return np.full(4, 2)  # full gas to the right
    obs = fill_policy(b, env, policy, 330, env.reset(seed=0)[0])
    assert b.total == 83 == len(seen) and b.expert[:83].all() and b.failed[:83].sum() > 3 and not (b.failed & ~b.truncated)[:83].any() and b.truncated[82].all()
    assert all(np.array_equal(b.image[t], o["image"]) and np.array_equal(b.floats[t], o["floats"].astype(np.float16)) for t, o in enumerate(seen))
    assert np.array_equal(env.observe()["floats"], obs["floats"])
    for t in range(20): b.add(**ROW)
    batch = sample(b, 2000, 5, generator=seeded(0), standing=None)
    assert not ((batch.index // 4 < 83) & (batch.index // 4 + torch.log(batch.discount.clamp(min=1e-9)).div(np.log(0.999)).round() > 82) & (batch.discount > 0)).any()
    with pytest.raises(ValueError, match="do not fit"): fill_policy(b, env, policy, 481, obs)

def test_the_clock_is_no_failure():
    b, obs = ReplayBuffer(4, 2, (1, 8, 8), 4), dict(image=np.zeros((2, 1, 8, 8), np.uint8), floats=np.zeros((2, 3), np.float32), extras=np.full((2, 1), 5, np.float32))
    ended = np.ones(2, bool)
    for info in (dict(end=np.array([TIME_LIMIT, NO_PROGRESS])), {}): add_step(b, obs, np.zeros(2, int), (obs, np.zeros(2), ~ended, ended, info))
    assert b.failed[:2].tolist() == [[False, True], [False, False]] and b.truncated[:2].all() and (b.floats[:2, :, 3] == 5).all()

def test_a_car_that_stood_had_failed_when_it_stopped(tmp_path):
    "Its rows say so from there on: in the buffer, in the files of an earlier save, and not where the race is shorter than that; upstream's bootstrap knows nothing of it."
    obs, no = dict(image=np.zeros((2, 1, 8, 8), np.uint8), floats=np.zeros((2, 184), np.float32)), np.zeros(2, bool)
    b, upstream = ReplayBuffer(60, 2, (1, 8, 8)), ReplayBuffer(60, 2, (1, 8, 8))
    for t in range(70):
        idle = np.array([t == 65, False])
        for buffer, hindsight in ((b, True), (upstream, False)): add_step(buffer, obs, np.zeros(2, int), (obs, np.full(2, -0.05), no, idle, dict(end=np.where(idle, NO_PROGRESS, RUNNING))), in_hindsight=hindsight)
        if t == 50: save_rows(b, tmp_path)
    failed = torch.arange(10, 70)[b.failed[torch.arange(10, 70) % 60, 0]]
    assert failed.tolist() == list(range(26, 66)) and not b.failed[:, 1].any() and upstream.failed.sum() == 1
    batch = sample(b, 500, 5, gamma=1.0, generator=seeded(0), discard_non_greedy=False)
    row, stood = batch.index // 2, (batch.index % 2 == 0) & (batch.index // 2 >= 26) & (batch.index // 2 < 66)
    left = 140 - batch.floats[:, 0]
    assert stood.sum() > 100 and torch.allclose(batch.reward[stood], -0.05 - 0.06 * (left[stood] - 1), atol=1e-4) and (batch.discount[stood] == 0).all()
    assert stack_rows(b, torch.tensor([40]), torch.tensor([0]), 4).tolist() == [[37, 38, 39, 40]]  # it is one race all the same
    again = ReplayBuffer(60, 2, (1, 8, 8))
    load_rows(again, tmp_path, save_rows(b, tmp_path))
    assert torch.equal(again.failed, b.failed)
    young = ReplayBuffer(60, 2, (1, 8, 8))
    for t in range(3): add_step(young, obs, np.zeros(2, int), (obs, np.zeros(2), no, np.array([t == 2, False]), dict(end=np.full(2, NO_PROGRESS))), in_hindsight=True)
    assert young.failed[:3, 0].all()

def test_replays_are_what_the_world_gave(track, laps):
    "A lap driven again in the world with the recorded actions: the same floats, frames and rewards, but for the last reward, which stops at the line."
    for replay in ReplayStore(laps):
        first, row = recorded_drive(replay)
        env = RaceVectorEnv(track, 1, (16, 16), threads=1)
        (obs, _), over = env.reset(seed=0), False
        for t, action in enumerate(row["action"]):
            assert not over and np.allclose(obs["floats"][0, 1:], row["floats"][t, 1:], atol=0.02)
            obs, reward, terminated, *_ = env.step(np.array([action]))
            over = terminated[0]
            assert abs(reward[0] - row["reward"][t]) < (0.05 if over else 1e-4)
        assert first == 0 and over and row["terminated"].tolist() == [False] * t + [True] and not row["truncated"].any()

@pytest.mark.parametrize("cars, steps", [(1, 2000), (3, 2000), (64, 100), (3, 60), (5, 7)])
def test_replays_in_the_ring(laps, cars, steps):
    "Every decision once, in order; windows and stacks stay within one replay and one piece, and what was in the ring before stays behind a cut."
    store = ReplayStore(laps)
    drives = [recorded_drive(r)[1] for r in store]
    action, reward = (np.concatenate([d[k] for d in drives]) for k in ("action", "reward"))
    b = ReplayBuffer(steps, cars, (1, 16, 16), test_share=0.3)
    for _ in range(5): b.add(**ROW | dict(truncated=True))
    filled = fill_replays(b, store)
    n, length = min(len(action), steps * cars), b.total - 5
    assert filled == (n, 4, [], len(action) - n) and length == min(-(-len(action) // cars), steps)
    rows = torch.arange(5, b.total) % steps
    tape = lambda f: getattr(b, f)[rows].transpose(0, 1).reshape(-1)[:n].numpy()
    assert np.array_equal(tape("action"), action[:n]) and np.allclose(tape("reward"), reward[:n], atol=1e-6) and tape("expert").all() and b.truncated[rows].transpose(0, 1).flatten()[n:].all()
    image = b.image[rows].transpose(0, 1).flatten(0, 1)[:n, 0].numpy()
    assert np.array_equal(image, np.concatenate([r.images((16, 16)) for r in store])[:n])
    over, cut = ends(b, None)
    assert (over | cut)[(b.total - 1) % steps].all() and over[rows].sum() == sum(sum(len(d["reward"]) for d in drives[:k + 1]) <= n for k in range(4))
    if length > 20: assert sample(b, 500, 3, generator=seeded(0)).expert[sample(b, 500, 3, generator=seeded(0)).index // cars >= 5].all()

def test_frames_that_were_left_out_begin_no_race(copy_of_laps):
    "A capture that begins within a race: its first five decisions have unknown actions before them and are not used."
    folder = next(copy_of_laps.glob("*/*"))
    data = json.loads((folder / "manifest.json").read_text())
    data["entries"], data["actions"] = data["entries"][3:], None
    (folder / "manifest.json").write_text(json.dumps(data))
    replay = ReplayStore(copy_of_laps.parent / "img").replay(folder.parent.name, folder.name)
    replay.metadata = {**replay.metadata, "total_frames": len(data["entries"])}
    first, row = recorded_drive(replay)
    assert first == 5 and len(row["reward"]) == len(data["entries"]) - 5 == len(row["floats"])
    b = ReplayBuffer(400, 1, (1, 16, 16))
    fill_replays(b, [replay])
    assert np.array_equal(b.image[:b.total, 0, 0], replay.images()[5:])

def spoil(root, change):
    "The first replay of `root`, its manifest's JSON passed through `change`, its metadata too."
    folder = sorted(root.glob("*/*"))[0]
    for name in ("manifest.json", "metadata.json"):
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))
    return folder

def no_inputs(d):
    for e in d.get("entries", []): e["inputs"] = e["action_idx"] = None
def no_states(d):
    for e in d.get("entries", []): e["state"] = None
    if "meta" in d: d["meta"] = None
def every_second_frame(d):
    if "entries" in d: d["entries"] = d["entries"][::2]
    if "total_frames" in d: d["total_frames"] = -(-d["total_frames"] // 2)
def moved(d):
    for e in d.get("entries", [])[:30]: e["state"]["position"][0] += 300.0

@pytest.mark.parametrize("change, why", [(no_inputs, "no action_idx"), (no_states, "no states"), (every_second_frame, "not 50 ms apart"), (moved, "set back 1 times")])
def test_what_is_not_recorded_is_refused_by_name(copy_of_laps, change, why):
    folder = spoil(copy_of_laps, change)
    b = ReplayBuffer(2000, 2, (1, 16, 16))
    filled = fill_replays(b, ReplayStore(copy_of_laps))
    assert filled.replays == 3 and len(filled.refused) == 1 and filled.refused[0][0].endswith(folder.name) and why in filled.refused[0][1]

def test_no_line_no_floats_and_no_extras(copy_of_laps):
    b = ReplayBuffer(2000, 2, (1, 16, 16), 186)
    with pytest.raises(ValueError, match="184 floats, the buffer holds 186"): fill_replays(b, ReplayStore(copy_of_laps))
    fill_replays(b, ReplayStore(copy_of_laps), extras=lambda r: np.full((len(r), 2), 7.0))
    assert (b.floats[:b.total - 1, :, 184:] == 7).all()
    shutil.rmtree(copy_of_laps.parent / "vcp")
    with pytest.raises(ValueError, match="none of 4 replays .*not a reference line"): fill_replays(b, ReplayStore(copy_of_laps))

def test_a_damaged_frame_is_an_error(copy_of_laps):
    frame = sorted(copy_of_laps.glob("*/*/*.jpeg"))[7]
    frame.write_bytes(b"")
    b = ReplayBuffer(2000, 2, (1, 16, 16))
    with pytest.raises(ValueError, match="unreadable JPEG"): fill_replays(b, ReplayStore(copy_of_laps))
    assert b.total == 0

def test_an_unfinished_run_is_cut_off(copy_of_laps):
    def unfinished(d):
        if "race_finished" in d: d["race_finished"] = False
    folder = spoil(copy_of_laps, unfinished)
    replay = ReplayStore(copy_of_laps).replay(folder.parent.name, folder.name)
    _, row = recorded_drive(replay)
    assert row["truncated"][-1] and not row["terminated"].any() and row["reward"][-1] == 0 and len(row["reward"]) == len(replay)

@pytest.mark.real
def test_a_real_replay(real, tmp_path):
    "A human's run: its reward is the metres of its line at a hundredth each, less its time at 1.2 per second."
    [folder] = import_replay(real("replays", "stadium", sorted(p.name for p in real("replays", "stadium").glob("A01*"))[0]), tmp_path / "img", (16, 16))[:1]
    store = ReplayStore(tmp_path / "img")
    replay = next(iter(store))
    _, row = recorded_drive(replay)
    from tmlab.tracks.line import ReferenceLine
    line = ReferenceLine.load(next((tmp_path / "vcp").glob("*.npy")))
    assert row["terminated"][-1] and abs(row["reward"].sum() - (0.01 * line.length_m - 0.0012 * replay.metadata["race_time_ms"])) < 0.1
    b = ReplayBuffer(400, 2, (1, 16, 16))
    filled = fill_replays(b, store)
    assert filled.decisions == -(-replay.metadata["race_time_ms"] // 50) and sample(b, 100, 10, generator=seeded(0)).expert.all()
