"The GBX reader against real recordings: every row of the index, the files' own summaries, physics, played-back telemetry."
import csv, re, struct, unicodedata
from functools import lru_cache
from xml.etree import ElementTree
import numpy as np
import pandas as pd
import pytest
from tmlab.core.runs import real_data
from tmlab.replays import gbx
from tmlab.replays.actions import ACTIONS, nearest_action
from tmlab.replays.gbx import GbxError, ghost_keys, ghost_states, ghost_steer, in_force, read_gbx, read_recording

DATA = real_data()
pytestmark = pytest.mark.skipif(real_data("index.tsv") is None, reason="real game files are not here (TMLAB_REAL_DATA)")
START = {0: (16, 2.21, 11.2), 1: (20.8, 2.21, 16), 3: (11.2, 2.21, 16)}  # m from the start block's corner to the first sample, by rotation
FACING = {0: (0, 0, 1), 1: (-1, 0, 0), 3: (1, 0, 0)}

def rows():
    "Rows of index.tsv by file name; none where the files are absent."
    if not (DATA and (DATA / "index.tsv").exists()): return {}
    with open(DATA / "index.tsv", newline="", encoding="utf-8") as f: return {row["file"]: row for row in csv.DictReader(f, delimiter="\t")}

INDEX = rows()
FOREVER = [n for n in INDEX if n.startswith(("replays/", "challenges/")) and "not_forever" not in n]
OLDER = [n for n in INDEX if "not_forever" in n]
each = lambda names: names or [pytest.param(None, marks=pytestmark)]
recording = lru_cache(None)(lambda name: read_gbx(DATA / name))

@pytest.fixture(scope="module")
def recordings():
    "Every Forever file of the index, read once."
    return {name: recording(name) for name in FOREVER}

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

def check_ghosts(ghosts, row):
    "Counts, times, samples and inputs of a replay's ghosts against its row of the index."
    what, first = row["what"], ghosts[0]
    number = lambda pattern: re.search(pattern, what)[1]
    assert [len(g.samples) for g in ghosts] == [int(n) for n in row["samples"].split("+")]
    assert [0 if g.inputs is None else len(g.inputs) for g in ghosts] == [int(n) for n in row["events"].split("+")]
    assert len(ghosts) == int(number(r"ghosts (\d+)")) and str(first.race_time_ms or "") == row["race_time_ms"]
    times = [int(t) for t in number(r"cps \[(.*?)\]").split(", ")]
    assert first.checkpoints_ms.tolist() == [t for t in times if t != 2**32 - 1]
    assert str(first.respawns if first.respawns is not None else "") == number(r"respawns (\d*)")
    used = set() if first.inputs is None else set(first.inputs.name)
    assert number(r"steering (\w+)") == ("analog" if "Steer" in used else "keys" if used else "none")
    assert any(g.clock_shifted for g in ghosts) == ("TMInterface-made" in what)
    assert f"{np.linalg.norm(first.samples.velocity, axis=1).max() * 3.6:.1f}" == number(r"max ([\d.]+) km/h")
    assert f"{np.linalg.norm(np.diff(first.samples.position, axis=0), axis=1).sum():.1f}" == number(r"path ([\d.]+) m")

@pytest.mark.parametrize("name", each(FOREVER))
def test_every_row_of_the_index(name):
    r, row = recording(name), INDEX[name]
    assert (DATA / name).stat().st_size == int(row["bytes"]) and r.kind == ("replay" if name.startswith("replays/") else "challenge")
    assert r.game_version == re.search(r"exever ([\d.]+)", row["what"])[1] and not r.notes
    check_map(r.map, row["what"])
    if r.kind == "replay": return check_ghosts(r.ghosts, row)
    assert r.map.mood == re.search(r"mood (\w+)", row["what"])[1] and [row[k] for k in ("race_time_ms", "samples", "events")] == [""] * 3

def test_the_index_was_read():
    assert (len(FOREVER), len(OLDER)) == (144, 3) and sum(n.startswith("replays/stadium/") for n in FOREVER) == 28

@pytest.mark.parametrize("name", each(OLDER))
def test_older_games_are_refused(name):
    with pytest.raises(GbxError, match=r"not_forever.*TMN ESWC.*0\.1\.8\.0.*Forever"): read_gbx(DATA / name)

def summary(box):
    "The XML summary in a file's header."
    data = next(d for cid, d in box.header.items() if gbx.class_id(cid) in (0x03093001, 0x03043005))
    return ElementTree.fromstring(data[4:].decode())  # behind its length

def check_challenge(box):
    "Names, laps and medal times that the body says against what the header says."
    xml, m = summary(box), gbx.read_map(box)
    ident, desc, times = xml.find("ident").attrib, xml.find("desc").attrib, xml.find("times").attrib
    assert (m.uid, m.name.lstrip("\ufeff"), m.author, m.environment, m.mood) == (ident["uid"], ident["name"], ident["author"], desc["envir"], desc["mood"])
    assert [m.author_time_ms, m.gold_ms, m.silver_ms, m.bronze_ms] == [gbx.known(int(times[k]) % 2**32) for k in ("authortime", "gold", "silver", "bronze")]
    assert m.laps == (int(desc["nblaps"]) or 1)


@pytest.mark.parametrize("name", each(FOREVER))
def test_what_the_header_says(name):
    "A file's header repeats in XML what its body stores in binary."
    box = gbx.read_container((DATA / name).read_bytes())
    if box.kind == 0x03043000: return check_challenge(box)
    chunks, _ = gbx.read_main(box.body, 0x03093002)
    check_challenge(gbx.read_container(chunks[0x03093002]))
    xml, r = summary(box), recording(name)
    times, best = xml.find("times").attrib, r.best or r.ghosts[0]
    assert xml.find("challenge").attrib["uid"] == r.map.uid and gbx.known(int(times["respawns"]) % 2**32) == best.respawns
    unfinished = "Oachkatzlschwoafs" in name  # the header of this MediaTracker replay gives the length of its clip
    assert int(times["best"]) == (best.samples.time_ms[-1] + 100 if unfinished else best.race_time_ms)

def test_respawns(ghosts):
    "The number of respawns is that of the key's presses; a press at t acts on the state at t, so every jump is in the first sample from t on."
    with_respawns = [g for _, _, g in ghosts if g.respawns]
    assert sorted(g.respawns for g in with_respawns) == [1, 363]
    for g in with_respawns:
        pressed = g.inputs.time_ms[(g.inputs.name == "Respawn") & (g.inputs.value > 0)].to_numpy()
        after = np.searchsorted(g.samples.time_ms, pressed)
        jumps = np.flatnonzero(np.linalg.norm(np.diff(g.samples.position, axis=0), axis=1) > 35) + 1
        assert len(pressed) == g.respawns and len(jumps) and np.isin(jumps, after).all()
        assert np.median(np.linalg.norm(g.samples.velocity[after[after < len(g.samples)]], axis=1)) < 2

def test_multilap_maps(recordings):
    assert sorted(r.map.laps for r in recordings.values() if r.map.laps > 1) == [2, 3, 3]

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

def stacked(ghosts, *names):
    "Fields of all samples of `ghosts`, one array each."
    return [np.concatenate([getattr(g.samples, n) for _, _, g in ghosts]) for n in names]

def test_wheels(racing):
    "In the air the dampers hang out, sliding goes with sideways speed, and the ground is mostly road."
    damper, contact, sliding, side, material = stacked(racing, "wheel_damper", "wheel_contact", "wheel_sliding", "side_speed", "wheel_material")
    for w in range(4):
        assert damper[~contact[:, w], w].mean() > damper[contact[:, w], w].mean() + 0.1
        assert np.abs(side[sliding[:, w]]).mean() > 5 * np.abs(side[~sliding[:, w]]).mean()
    assert contact.mean() > 0.8 and (material == 16).mean() > 0.3 and set(np.unique(material)) <= set(gbx.MATERIALS)
    assert contact[material > 0].mean() > 0.999 and (material[contact] > 0).mean() > 0.99
    assert -0.05 < damper.min() and damper.max() < 0.25

RADIUS = dict(Stadium=0.3636, Speed=0.3296, Rally=0.32, Coast=0.3291, Bay=0.4041, Island=0.3298, Alpine=0.4694)  # m

def test_wheels_roll(ghosts):
    "A wheel that neither slides nor flies turns by the distance over its radius, the same for a car wherever it drives; scale of both fields."
    for name, r, g in ghosts:
        s = g.samples
        turned = (np.diff(s.wheel_rotation, axis=0) + 804.2475) % 1608.495 - 804.2475
        speed, ground = (s.forward_speed[1:] + s.forward_speed[:-1]) / 2, s.wheel_contact & ~s.wheel_sliding
        rolls = (ground[1:] & ground[:-1]).all(1) & (np.abs(speed) > 10) & (np.abs(speed) < 100)
        radius = np.median(speed[rolls, None] * 0.1 / turned[rolls], axis=0)
        assert rolls.sum() > 9 and np.allclose(radius, RADIUS[r.map.environment], rtol=0.006), (name, radius)

def test_front_wheels_and_lean(racing):
    "The front wheels turn with the steering (left positive), the body leans with the sideways acceleration."
    steer, front, contact, roll, pitch = stacked(racing, "steer", "front_wheel_angle", "wheel_contact", "lean_roll", "lean_pitch")
    push = np.concatenate([(x := ghost_states(g)).to_car(np.gradient(x.velocity, 0.1, axis=0)) for _, _, g in racing])
    ground = contact.all(1)
    assert np.corrcoef(steer, front)[0, 1] < -0.6 and np.abs(front).max() < 1
    assert np.corrcoef(push[ground, 0], roll[ground])[0, 1] > 0.8 and np.corrcoef(push[ground, 2], pitch[ground])[0, 1] < -0.4

def test_turbo_burnout_and_impacts(ghosts):
    state, burnout, on, turbo = stacked(ghosts, "gearbox_state", "burnout", "turbo_on", "turbo")
    assert set(state) == {0, 1, 2, 3, 4} and burnout[state == 4].mean() > 0.95 and burnout[state != 4].mean() < 0.03
    assert (turbo[on] > 0).mean() > 0.99 and not turbo[~on].any()
    wheels, body, wheel_material, body_material = stacked(ghosts, "wheel_impact", "body_impact", "wheel_impact_material", "body_impact_material")
    assert not wheel_material[wheels.max(1) == 0].any() and not body_material[body == 0].any()
    assert (wheel_material[wheels.max(1) > 0] > 0).mean() > 0.9 and (body_material[body > 0] > 0).mean() > 0.8
    pressed = np.concatenate([np.diff(g.samples.wheel_damper, axis=0, prepend=g.samples.wheel_damper[:1]) for _, _, g in ghosts])
    front, rear = pressed[:, :2].mean(1), pressed[:, 2:].mean(1)
    assert front[wheels[:, 0] > 0].mean() < rear[wheels[:, 0] > 0].mean() < 0 and rear[wheels[:, 1] > 0].mean() < front[wheels[:, 1] > 0].mean() < 0

GEARS = np.array([366, 220, 158.3, 109.7, 85.0])  # rev/min per m/s of the Stadium car

def test_gear_changes(racing):
    "Between two gears, told by engine over forward speed, the gearbox was shifting, and it remembers the direction."
    changes = []
    for _, _, g in racing:
        s = g.samples
        ratio = s.rpm / np.maximum(s.forward_speed, 1)
        gear = np.abs(ratio[:, None] / GEARS - 1).argmin(1)
        known = (np.abs(ratio / GEARS[gear] - 1) < 0.03) & (s.gearbox_state == 0) & (s.forward_speed > 5) & s.wheel_contact.all(1)
        at = np.flatnonzero(known)
        changes += [(s.shifted_down[j], gear[j] < gear[i], (s.gearbox_state[i:j] == 1).any())
                    for i, j in zip(at, at[1:]) if gear[i] != gear[j] and j - i < 8]
    down, lower, shifting = np.array(changes).T
    assert len(down) > 150 and (down == lower).all() and shifting.all() and 0.1 < down.mean() < 0.9

@pytest.mark.parametrize("name, row", [("A01-rollin", "A01-Race_23830_jack1998-1998"), ("A01-arian", "A01-Race_23850_nici0903"), ("A01-sam", "A01-Race_23870_samgusta")])
def test_against_the_game(name, row):
    "These replays were played back in the game while another program noted speed display and steering every 10 ms."
    g = recording(f"replays/stadium/{row}.Replay.Gbx").ghosts[0]
    seen = pd.read_csv(DATA / f"screen_rays_100hz/{name}.csv")
    time_ms = seen.img.str.extract(r"_(\d+)\.jpg")[0].astype(int).to_numpy()
    assert (in_force(g, "Steer", time_ms - 10) == seen.steer)[time_ms <= g.race_time_ms].mean() > 0.998
    at, display = np.isin(g.samples.time_ms, time_ms), pd.Series(seen.speed.to_numpy(), time_ms)
    display, speed = display[g.samples.time_ms[at]].to_numpy(), g.samples.forward_speed[at] * 3.6
    assert at.sum() > 240 and (np.abs(np.trunc(speed) - display) <= 1).mean() > 0.96

def test_sample_bytes_come_back():
    "Scaled fields, scaled back, are the bytes of the file: nothing is lost and nothing is left out."
    raw = np.random.default_rng(0).integers(0, 256, (5000, 61), dtype=np.uint8)
    raw[:, :12] = np.arange(15000, dtype="<f4").view(np.uint8).reshape(5000, 12)
    s, b = gbx.decode_samples(raw.reshape(-1).view(gbx.SAMPLE), np.arange(5000) * 100), raw.astype(int)
    u16 = lambda at: b[:, at] + 256 * b[:, at + 1]
    back = lambda x: np.rint(x).astype(int)
    for at, value in ((26, (s.forward_speed + 1000) / 11000), (28, (s.side_speed + 1000) / 2000), (30, s.rpm / 30000),
                      *((32 + 2 * w, s.wheel_rotation[:, w] / 1608.495) for w in range(4))):
        assert (back(value * 65535) == u16(at)).all()
    bits = lambda w: s.wheel_sliding[:, w] + 2 * s.wheel_contact[:, w]
    byte = {40: (s.steer + 1) * 127.5, 41: s.gas * 255, 42: s.brake * 255, 43: s.body_impact_material, 44: s.wheel_impact_material,
            45: (s.lean_pitch + 1) * 127.5, 46: (s.lean_roll + 1) * 127.5, 47: s.turbo * 255, 48: (s.front_wheel_angle + np.pi) * 127.5 / np.pi,
            57: s.gearbox_state + 8 * s.unknown + 128 * s.turbo_on,
            58: s.wheel_impact[:, 0] + 4 * s.wheel_impact[:, 1] + 16 * s.body_impact + 64 * bits(0),
            59: bits(1) + 4 * bits(2) + 16 * bits(3) + 64 * s.shifted_down + 128 * s.burnout, 60: s.dirt * 255}
    byte |= {49 + 2 * w: (s.wheel_damper[:, w] + 2) * 63.75 for w in range(4)} | {50 + 2 * w: s.wheel_material[:, w] for w in range(4)}
    for at, value in byte.items(): assert (back(value) == b[:, at]).all(), at
    assert set(byte) | set(range(40)) == set(range(61))

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

def unpacked(data):
    "The same file with an uncompressed body, and where the body begins."
    at = 25 + struct.unpack_from("<I", data, 13)[0]
    return data[:7] + b"U" + data[8:at] + gbx.read_container(data).body.data, at

@pytest.mark.parametrize("content", [b"", b"GBX", b"GBX\6\0BUCR", b"\x89PNG" + bytes(100), b"GBX\5\0BUCR" + bytes(100),
                                     b"GBX\6\0TUCR" + bytes(100), b"hello\n" * 50, bytes(5000)])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "bad.Replay.Gbx"
    path.write_bytes(content)
    with pytest.raises(GbxError, match=re.escape(f"{path}: ")): read_gbx(path)

def test_missing_files_are_named(tmp_path):
    for path in (tmp_path / "none.Gbx", tmp_path):
        with pytest.raises(GbxError, match=re.escape(f"{path}: ")): read_gbx(path)
