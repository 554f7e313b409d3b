"The GBX reader and the script reader against real recordings, and against damaged files."
import csv, random, re, struct, time, unicodedata, zlib
import numpy as np
import pytest
from tmlab.core.runs import real_data
from tmlab.replays import gbx
from tmlab.replays.actions import ACTIONS, nearest_action
from tmlab.replays.gbx import GbxError, ghost_keys, ghost_states, ghost_steer, read_gbx, read_recording, strip_codes
from tmlab.replays.scripts import agreement, ghost_ticks, read_script, script_ticks

DATA = real_data()
pytestmark = pytest.mark.skipif(real_data("index.tsv") is None, reason="real game files are not here (TMLAB_REAL_DATA)")
START = {0: (16, 2.21, 11.2), 1: (20.8, 2.21, 16), 3: (11.2, 2.21, 16)}  # m from the start block's corner to the first sample, by rotation
FACING = {0: (0, 0, 1), 1: (-1, 0, 0), 3: (1, 0, 0)}

@pytest.fixture(scope="module")
def index():
    "Rows of index.tsv by file name."
    with open(DATA / "index.tsv", newline="", encoding="utf-8") as f: return {row["file"]: row for row in csv.DictReader(f, delimiter="\t")}

@pytest.fixture(scope="module")
def recordings(index):
    "Every Forever file of the index, read once."
    return {name: read_gbx(DATA / name) for name in index if name.startswith(("replays/", "challenges/")) and "not_forever" not in name}

@pytest.fixture(scope="module")
def ghosts(recordings):
    "(file, recording, ghost) of every ghost."
    return [(name, r, g) for name, r in recordings.items() if r.kind == "replay" for g in r.ghosts]

@pytest.fixture(scope="module")
def racing(ghosts):
    "Those of the Stadium replays."
    return [x for x in ghosts if x[0].startswith("replays/stadium/")]

letters = lambda name: re.sub(r"[^a-zA-Z0-9]", "", unicodedata.normalize("NFKD", name))  # the index keeps no other characters

def check_map(m, what):
    found = re.search(r"'(.*)' uid (\S+) env (\w+); (\d+) blocks", what)
    assert (letters(m.plain_name), m.uid, m.environment, str(len(m.blocks))) == (letters(found[1]), *found.groups()[1:])
    author = int(re.search(r"author time (-?\d+)", what)[1])
    assert (m.author_time_ms or -1) == author
    assert m.blocks[["x", "y", "z"]].to_numpy().max() <= 255 and set(m.blocks.rotation) <= {0, 1, 2, 3} and not m.notes

def test_replays_agree_with_the_index(recordings, index):
    names = [n for n in recordings if n.startswith("replays/")]
    assert sum(n.startswith("replays/stadium/") for n in names) == 28
    for name in names:
        r, row = recordings[name], index[name]
        what = row["what"] + row["note"]
        check_map(r.map, what)
        assert r.kind == "replay" and r.game_version in what and not r.notes, name
        assert [len(g.samples) for g in r.ghosts] == [int(n) for n in row["samples"].split("+")], name
        assert [0 if g.inputs is None else len(g.inputs) for g in r.ghosts] == [int(n) for n in row["events"].split("+")], name
        assert str(r.ghosts[0].race_time_ms or "") == row["race_time_ms"], name
        times = [int(t) for t in re.search(r"cps \[(.*?)\]", what)[1].split(", ")]
        assert r.ghosts[0].checkpoints_ms.tolist() == [t for t in times if t != 2**32 - 1], name
        assert str(r.ghosts[0].respawns if r.ghosts[0].respawns is not None else "") == re.search(r"respawns (\d*)", what)[1], name
        assert any(g.clock_shifted for g in r.ghosts) == ("TMInterface-made" in what), name

def test_challenges_agree_with_the_index(recordings, index):
    names = [n for n in recordings if n.startswith("challenges/")]
    assert len(names) > 100
    for name in names:
        check_map(recordings[name].map, index[name]["what"])
        assert recordings[name].map.mood == re.search(r"mood (\w+)", index[name]["what"])[1]

def test_velocity_against_positions(ghosts):
    for name, _, g in ghosts:
        s = g.samples
        error = np.linalg.norm((s.position[2:] - s.position[:-2]) / 0.2 - s.velocity[1:-1], axis=1)
        assert np.median(error) < 1.2, (name, np.median(error))

def test_car_frame_and_signs(ghosts):
    "+z forward, +x left as `side_speed`, steering right turns about −y, rotations are rotations and fit the angular velocity."
    turn = []
    for name, _, g in ghosts:
        s, state = g.samples, ghost_states(g)
        local, spin, fast = state.to_car(state.velocity), state.to_car(state.angular_velocity), state.speed > 10
        assert np.median(local[fast, 2] / state.speed[fast]) > 0.99, name
        assert np.median(np.abs(local[fast, 2] - s.forward_speed[fast])) < 0.15, name
        assert np.corrcoef(local[fast, 0], s.side_speed[fast])[0, 1] > 0.6, name
        assert np.allclose(state.rotation @ state.rotation.transpose(0, 2, 1), np.eye(3), atol=1e-9)
        assert np.allclose(np.linalg.det(state.rotation), 1)
        step = np.einsum("nji,njk->nik", state.rotation[:-1], state.rotation[1:])
        assert np.median(np.abs(np.arctan2(step[:, 0, 2], step[:, 2, 2]) / 0.1 - (spin[1:, 1] + spin[:-1, 1]) / 2)) < 0.05, name
        hard = fast & (np.abs(s.steer) > 0.5) & s.wheel_contact.all(1)
        turn.append(np.sign(s.steer[hard] * spin[hard, 1]))
    assert np.concatenate(turn).mean() < -0.5

def test_wheels(racing):
    "In the air the dampers hang out, sliding goes with sideways speed, and the ground is mostly road."
    s = [g.samples for _, _, g in racing]
    damper, contact = np.concatenate([x.wheel_damper for x in s]), np.concatenate([x.wheel_contact for x in s])
    sliding, side = np.concatenate([x.wheel_sliding for x in s]), np.abs(np.concatenate([x.side_speed for x in s]))
    for w in range(4):
        assert damper[~contact[:, w], w].mean() > damper[contact[:, w], w].mean() + 0.1
        assert side[sliding[:, w]].mean() > 5 * side[~sliding[:, w]].mean()
    assert contact.mean() > 0.8 and 16 in np.concatenate([x.wheel_material for x in s])

def test_race_time_and_checkpoints(racing):
    for name, r, g in racing:
        finish = g.inputs[g.inputs.name == "_FakeFinishLine"].time_ms
        assert finish.tolist() == [g.race_time_ms] and g.inputs.time_ms.iloc[-1] == g.race_time_ms, name
        assert g.inputs[g.inputs.name == "_FakeIsRaceRunning"].time_ms.tolist() == [0] and len(g.samples) > g.race_time_ms / 100, name
        on_tick = g.inputs[g.inputs.name != "Respawn"].time_ms % 10
        assert (on_tick == 0).all() and (np.diff(g.inputs.time_ms) >= 0).all(), name
        assert r.map.laps == 1 and len(g.checkpoints_ms) == r.map.blocks.name.str.contains("Checkpoint").sum() + 1, name
        assert g.checkpoints_ms[-1] == g.race_time_ms and (np.diff(g.checkpoints_ms) > 0).all(), name

def test_start_offset(racing):
    "The first sample stands at a fixed place in the start block and faces its way; Zigzags starts 1.35 m lower."
    rotations = set()
    for name, r, g in racing:
        start = r.map.blocks[r.map.blocks.name == "StadiumRoadMainStartLine"]
        assert len(start) == 1, name
        b = start.iloc[0]
        lower = 1.35 if "Zigzags" in name else 0
        expected = np.array([32 * b.x, 8 * b.y - lower, 32 * b.z]) + START[b.rotation]
        assert np.allclose(g.samples.position[0], expected, atol=0.03), (name, g.samples.position[0] - expected)
        assert g.samples.rotation[0][:, 2] @ FACING[b.rotation] > 0.999, name
        rotations.add(b.rotation)
    assert len(rotations) >= 2

def test_input_bytes_follow_the_events(ghosts):
    "A sample shows the inputs of the events up to 10 ms before it, exactly, but for samples on the tick of a respawn (zero)."
    checked = 0
    for name, _, g in ghosts:
        if g.inputs is None: continue
        s = g.samples
        respawns = g.inputs[(g.inputs.name == "Respawn") & (g.inputs.value > 0)].time_ms.to_numpy()
        reset = np.isin(s.time_ms, -(-respawns // 10) * 10)
        use = (s.time_ms <= g.race_time_ms) & ~reset
        keys = ghost_keys(g, s.time_ms - 20)
        assert ((s.gas > 0) == keys[:, 0])[use].all() and ((s.brake > 0) == keys[:, 1])[use].all(), name
        assert np.abs(ghost_steer(g, s.time_ms - 20) - s.steer)[use].max() < 0.009, name
        checked += use.sum()
    assert checked > 60_000

def test_states_and_actions(racing):
    for name, _, g in racing:
        state = ghost_states(g)
        assert {"position", "velocity", "rotation", "gas", "steer", "wheel_contact"} <= state.known and not {"gear", "progress_m"} & state.known
        actions = nearest_action(ghost_keys(g, np.arange(0, g.race_time_ms, 50)))
        assert actions.min() >= 0 and ACTIONS[actions][:, 0].mean() > 0.2, name

def test_several_unfinished_and_inputless_ghosts(recordings):
    r = recordings["replays/edge/StarStadiumA5_18090_catasystgma.Replay.Gbx"]
    assert [g.race_time_ms for g in r.ghosts] == [18090, 18050] and r.best is r.ghosts[1]
    with pytest.raises(ValueError, match="no inputs"): ghost_keys(r.ghosts[0], [0])
    unfinished = recordings["replays/edge/Oachkatzlschwoafs_on_ICE_na_ev.Replay.Gbx"]
    assert unfinished.ghosts[0].race_time_ms is None and unfinished.best is None

def test_ghosts_behind_an_unknown_chunk():
    "An unknown chunk costs a note and the node it stands in, not the ghosts behind it, though they refer to strings announced in between."
    data = (DATA / "replays/edge/StarStadiumA5_18090_catasystgma.Replay.Gbx").read_bytes()
    plain, at = unpacked(data)
    whole, summary = read_recording(data), lambda ghosts: [(len(g.samples), g.race_time_ms, g.login, g.nickname) for g in ghosts]
    for chunk, lost in ((0x03093014, 0), (0x0309200C, 1)):  # the list of ghosts; a chunk of the first ghost
        spot = plain.index(struct.pack("<I", chunk), at)
        r = read_recording(plain[:spot] + struct.pack("<I", 0x03093FFF) + plain[spot + 4:])
        assert "0x03093fff" in r.notes[0] and summary(r.ghosts) == summary(whole.ghosts)[lost:]

def test_older_games_are_refused(index):
    names = [n for n in index if "not_forever" in n]
    assert len(names) == 3
    for name in names:
        with pytest.raises(GbxError, match=r"not_forever.*TMN ESWC.*0\.1\.8\.0.*Forever"): read_gbx(DATA / name)

def test_scripts_agree_with_their_replays(index):
    pairs = [(name, m[1]) for name, row in index.items() if (m := re.search(r"same run as ([^;]+)", row["note"] or ""))]
    assert len(pairs) == 11
    for script, replay in pairs:
        g = read_gbx(DATA / replay).best
        shares = agreement(script_ticks(read_script(DATA / script), g.race_time_ms), ghost_ticks(g))
        assert set(shares.values()) == {1.0}, (script, shares)

def test_every_script_is_read(index):
    names = [n for n in index if n.startswith("input_scripts/") and n.endswith((".txt", ".inputs"))]
    assert len(names) > 50 and all(len(read_script(DATA / n).events) for n in names)
    with pytest.raises(ValueError, match=r"recording\.json, line 1: not an input"): read_script(DATA / "input_scripts/hqo998_recording.json")

# ---- damaged files

def unpacked(data):
    "The same file with an uncompressed body, and where the body begins."
    at = 25 + struct.unpack_from("<I", data, 13)[0]
    return data[:7] + b"U" + data[8:at] + gbx.read_container(data).body.data, at

def mutate(data, rnd, first=0):
    "Flip bytes, cut off, forge numbers, leave a piece out, or double one."
    b, p = bytearray(data), rnd.randrange(first, len(data) - 4)
    kind = rnd.randrange(5)
    if kind == 0:
        for _ in range(rnd.choice([1, 3, 20])): b[rnd.randrange(first, len(b))] = rnd.randrange(256)
    elif kind == 1: del b[p:]
    elif kind == 2: b[p:p + 4] = struct.pack("<I", rnd.choice([0, 1, 255, 65535, 10**6, 2**31 - 1, 2**31, 2**32 - 1]))
    elif kind == 3: del b[p:p + rnd.randrange(1, 200)]
    else: b[p:p] = b[rnd.randrange(first, len(b)):][:200]
    return bytes(b)

def with_samples(plain, change):
    "The file with its first ghost's sample block changed and packed again."
    at = gbx.GHOST_START.search(plain).end()
    _, n = struct.unpack_from("<2I", plain, at)
    block = change(zlib.decompress(plain[at + 8:at + 8 + n]))
    packed = zlib.compress(block)
    return plain[:at] + struct.pack("<2I", len(block), len(packed)) + packed + plain[at + 8 + n:]

def test_damaged_files():
    "Whatever is wrong with a file, the answer is a recording or a GbxError, at once."
    rnd = random.Random(7)
    names = ("replays/stadium/A01-Race_23850_protraintrack.Replay.Gbx", "replays/edge/StarStadiumA5_18090_catasystgma.Replay.Gbx",
             "replays/stadium/TMNF-Trial_7740_malun22.Replay.Gbx", "challenges/nadeo/A01-Race.Challenge.Gbx")
    files = [(DATA / n).read_bytes() for n in names]
    plain, refused, slowest = [unpacked(f) for f in files], 0, 0
    for i in range(500):
        which = rnd.randrange(4)
        (data, at), kind = plain[which], i % 4
        if kind == 0: bad = mutate(files[which], rnd)
        elif kind == 1 or which == 3: bad = mutate(data, rnd, at)
        elif kind == 2:
            n = struct.unpack_from("<I", data, at + 4)[0]
            inner = mutate(unpacked(data[at + 8:at + 8 + n])[0], rnd)
            bad = data[:at + 4] + struct.pack("<I", len(inner)) + inner + data[at + 8 + n:]
        else: bad = with_samples(data, lambda block: mutate(block, rnd))
        before = time.process_time()
        try: read_recording(bad)
        except GbxError: refused += 1
        slowest = max(slowest, time.process_time() - before)
    assert refused > 250 and slowest < 1, (refused, slowest)

def test_bombs():
    "Sizes that lie, and streams that blow up, are refused before memory is spent."
    file = (DATA / "replays/stadium/TMNF-Trial_7740_malun22.Replay.Gbx").read_bytes()
    data, at = unpacked(file)
    with pytest.raises(GbxError, match="announced"): read_recording(file[:at] + struct.pack("<I", 2**32 - 1) + file[at + 4:])
    zeros = gbx.lzallright.LZOCompressor().compress(bytes(200 << 20))
    with pytest.raises(GbxError, match="size announced"): read_recording(file[:at] + struct.pack("<2I", 1 << 20, len(zeros)) + zeros)
    with pytest.raises(GbxError, match="samples"): read_recording(with_samples(data, lambda block: block + bytes(100 << 20)))
    ghost = gbx.GHOST_START.search(data)
    lying = data[:ghost.end()] + struct.pack("<I", 100) + data[ghost.end() + 4:]
    with pytest.raises(GbxError, match="samples"): read_recording(lying)

@pytest.mark.parametrize("content", [b"", b"GBX", b"GBX\6\0BUCR", b"\x89PNG" + bytes(100), b"GBX\5\0BUCR" + bytes(100),
                                     b"GBX\6\0TUCR" + bytes(100), b"hello\n" * 50, bytes(5000)])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "bad.Replay.Gbx"
    path.write_bytes(content)
    with pytest.raises(GbxError, match=re.escape(f"{path}: ")): read_gbx(path)

def test_missing_files_are_named(tmp_path):
    for path in (tmp_path / "none.Gbx", tmp_path):
        with pytest.raises(GbxError, match=re.escape(f"{path}: ")): read_gbx(path)
