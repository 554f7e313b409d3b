"Input scripts, replay events, ticks and actions: each way there and back keeps every 10 ms tick, on real files and on seeded random runs."
import ast, csv, re
import numpy as np
import pandas as pd
import pytest
from tmlab.core.runs import real_data
from tmlab.replays.actions import nearest_action
from tmlab.replays.gbx import SAMPLE, Ghost, decode_samples, ghost_keys, read_gbx
from tmlab.replays.scripts import (DIALECTS, Script, Ticks, action_ticks, agreement, ghost_ticks, inputs_script, read_script, script_inputs, script_text,
                                   script_ticks, ticks_actions, ticks_script, write_script)

DATA = real_data()
real = pytest.mark.skipif(real_data("index.tsv") is None, reason="real game files are not here (TMLAB_REAL_DATA)")
each = lambda cases, n=1: cases or [pytest.param(*[None] * n, marks=real)]
SAME = dict.fromkeys(Ticks._fields, 1.0)

def rows():
    "Rows of index.tsv by file name; none where the files are absent."
    if not (DATA and (DATA / "index.tsv").exists()): return {}
    with open(DATA / "index.tsv", newline="", encoding="utf-8") as f: return {row["file"]: row for row in csv.DictReader(f, delimiter="\t")}

INDEX = rows()
SCRIPTS = [n for n in INDEX if n.startswith("input_scripts/") and not n.endswith(".json")]
PAIRS = [(n, m[1]) for n in SCRIPTS if (m := re.search(r"same run as ([^;]+)", INDEX[n]["note"] or ""))]
REPLAYS = [n for n in INDEX if n.startswith("replays/") and INDEX[n]["events"] not in ("", "0", "0+0")]

def ghost_of(inputs, race_time_ms):
    "A ghost that holds only inputs."
    return Ghost(decode_samples(np.zeros(0, SAMPLE), np.zeros(0, np.int64)), inputs, race_time_ms, np.array([race_time_ms]), 0, "a", "a")

def check_all_ways(script, ms, tmp_path):
    "Script → each dialect → script, → replay events → script, → ticks → script: the same ticks."
    ticks = script_ticks(script, ms)
    events = script_inputs(script)
    others = [read_script(write_script(script, tmp_path / f"{d}.txt", d)) for d in DIALECTS] + [inputs_script(events), ticks_script(ticks)]
    for other in others: assert agreement(script_ticks(other, ms), ticks) == SAME
    assert agreement(ghost_ticks(ghost_of(events, ms)), ticks) == SAME
    pressed = [(other.events.control == "enter").sum() for other in others[:-1]]
    assert pressed == [(script.events.control == "enter").sum()] * len(pressed)

# ---- real files

@real
def test_the_index_was_read(): assert (len(SCRIPTS), len(PAIRS), len(REPLAYS)) == (57, 11, 35)

@pytest.mark.parametrize("name", each(SCRIPTS))
def test_every_row_of_the_index(name, tmp_path):
    "No line of a script is lost; each way to another form and back keeps its ticks."
    script, row = read_script(DATA / name), INDEX[name]
    lines = [line for line in (DATA / name).read_text().split("\n") if line.strip()]
    timed = [line for line in lines if line[0].isdigit()]
    assert len(timed) == int(row["events"]) and (DATA / name).stat().st_size == int(row["bytes"]) and not script.skipped
    assert len(script.events) == len(lines) + sum("-" in line.split()[0] for line in timed)
    assert (script.events.time_ms % 10 == 0).all() and (np.diff(script.events.time_ms) >= 0).all()
    check_all_ways(script, min(script.end_ms + 50, 10**6), tmp_path)

@pytest.mark.parametrize("name, replay", each(PAIRS, 2))
def test_scripts_agree_with_their_replays(name, replay):
    g = read_gbx(DATA / replay).best
    shares = agreement(script_ticks(read_script(DATA / name), g.race_time_ms), ghost_ticks(g))
    noted = ast.literal_eval(re.search(r"agreement (\{.*\})", INDEX[name]["note"])[1])
    assert shares == SAME and set(noted.values()) == {1.0}

@pytest.mark.parametrize("name", each(REPLAYS))
def test_replays_as_scripts(name, tmp_path):
    for g in read_gbx(DATA / name).ghosts:
        script, ticks = inputs_script(g.inputs), ghost_ticks(g)
        assert agreement(script_ticks(script, g.race_time_ms), ticks) == SAME
        assert (script.events.control == "enter").sum() == (g.inputs.name == "Respawn").sum()
        assert len(script.events) == (~g.inputs.name.str.startswith("_Fake")).sum()
        if len(script.events) < 5000: check_all_ways(script, g.race_time_ms, tmp_path)
        assert agreement(script_ticks(read_script(write_script(g, tmp_path / "g.txt", "seconds")), g.race_time_ms), ticks) == SAME
        assert (ticks_actions(ticks) == nearest_action(ghost_keys(g, np.arange(0, g.race_time_ms, 10)))).all()

@real
def test_a_keyboard_log_is_refused_by_name():
    with pytest.raises(ValueError, match=r"hqo998_recording\.json, line 1: JSON.*keyboard recorder.*not of the race"):
        read_script(DATA / "input_scripts/hqo998_recording.json")

# ---- seeded random runs

def random_events(rng, n, ms):
    "Events as they may come: doubled, in one tick, unsorted within a tick, respawns between."
    control = rng.choice(["up", "down", "left", "right", "steer", "gas", "enter", "horn"], n)
    value = np.where(np.isin(control, ["steer", "gas"]), rng.integers(-65536, 65537, n), rng.integers(0, 2, n))
    return pd.DataFrame(dict(time_ms=np.sort(rng.integers(0, ms // 10, n)) * 10, control=control, value=value))

@pytest.mark.parametrize("seed", range(40))
def test_random_scripts(seed, tmp_path):
    rng = np.random.default_rng(seed)
    ms = int(rng.integers(1, 60)) * 100
    check_all_ways(Script(random_events(rng, int(rng.integers(0, 300)), ms)), ms, tmp_path)

@pytest.mark.parametrize("seed", range(20))
def test_random_ticks(seed, tmp_path):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 500))
    hold = lambda values: values[np.maximum.accumulate(np.where(rng.random(n) < 0.2, np.arange(n), 0))]
    ticks = Ticks(*(hold(rng.random(n) < 0.5) for _ in range(4)), *(hold(rng.integers(-65536, 65537, n).astype(np.int32)) for _ in range(2)))
    for dialect in DIALECTS:
        again = read_script(write_script(ticks, tmp_path / "t.txt", dialect))
        assert agreement(script_ticks(again, 10 * n), ticks) == SAME

@pytest.mark.parametrize("decision_ms", (10, 50, 100))
@pytest.mark.parametrize("dialect", DIALECTS)
def test_random_actions(decision_ms, dialect, tmp_path):
    actions = np.random.default_rng(decision_ms).integers(0, 12, 400)
    ticks = action_ticks(actions, decision_ms)
    again = read_script(write_script(ticks, tmp_path / "a.txt", dialect))
    ms = 400 * decision_ms
    assert agreement(script_ticks(again, ms), ticks) == SAME
    for form in (script_ticks(again, ms), ghost_ticks(ghost_of(script_inputs(again), ms))):
        assert (ticks_actions(form).reshape(400, -1) == actions[:, None]).all()

# ---- dialects by hand

def test_ranges_meet_overlap_and_come_in_any_order():
    t = script_ticks(read_script("50-100 press up\n0-50 press up\n0.02-0.06 press left\n0.04 rel left\n60 steer 5;60 steer 7\n"), 120)
    assert t.up.tolist() == [True] * 10 + [False] * 2 and t.left.tolist() == [False, False, True, True] + [False] * 8
    assert t.steer.tolist() == [0] * 6 + [7] * 6

def test_dialects_look_as_they_should(tmp_path):
    script = read_script("0-7750 press up\n830 steer -31970\n65.5 press enter\n")
    assert script_text(script) == "0-7750 press up\n830 steer -31970\n65500 press enter\n"
    assert script_text(script, "seconds") == "0.00-7.75 press up\n0.83 steer -31970\n65.50 press enter\n"
    assert script_text(script, "ms lines") == "0 press up\n830 steer -31970\n7750 rel up\n65500 press enter\n"
    assert write_script(script, tmp_path / "new" / "a.txt").read_bytes() == script_text(script).encode()

def test_console_commands_are_kept_aside():
    script = read_script("set speed 10\n0 set speed 2\n# 5 jump\n0 press up # go\n8000 speed 1\n")
    assert len(script.events) == 1 and script.skipped == ("line 1: set speed 10", "line 2: 0 set speed 2", "line 5: 8000 speed 1")

@pytest.mark.parametrize("line, said", [
    ("0 press jump", "unknown key 'jump'; known: up, down, left"), ("5 jump", "not an input: '5 jump'; expected such as"),
    ("9-3 press up", "ends before it begins.*whole numbers are ms"), ("0 steer 70000", "outside ±65536"), ("1:2:3:4 press up", "not a time.*write milliseconds"),
    ("load b.txt", "not an input"), ("0 press steer", "unknown key"), ("-5 press up", "not an input"), ("0..5 press up", "not a time"),
    ("9" * 400 + " press up", "not a time"), ("0 steer 1e4", "not an input"), ('{"a": 1}', "JSON"), ("\0\0", "not an input")])
def test_bad_lines_are_named(line, said, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_text("0 press up; 10 rel up\n# comment\n" + line + "\n20 press up\n")
    with pytest.raises(ValueError, match=rf"(?s){re.escape(str(path))}, line 3: .*{said}"): read_script(path)

def test_other_files_are_named(tmp_path):
    path = tmp_path / "run.inputs"
    with pytest.raises(ValueError, match="run.inputs: No such file"): read_script(path)
    path.write_bytes(b"GBX\6\0BUCR\xff\xfe")
    with pytest.raises(ValueError, match="run.inputs: not a text file.*read_gbx"): read_script(path)

def test_what_a_replay_or_a_script_cannot_say():
    with pytest.raises(ValueError, match="delete"): script_inputs(read_script("0 press up\n50 press delete\n"))
    with pytest.raises(ValueError, match="cannot say AccelerateReal"): inputs_script(pd.DataFrame(dict(time_ms=[10], name=["AccelerateReal"], value=[1])))
    with pytest.raises(ValueError, match="no inputs"): inputs_script(None)
    with pytest.raises(ValueError, match="unknown dialect 'xml'.*'seconds lines'"): script_text(read_script("0 press up\n"), "xml")

@real
def test_damaged_scripts():
    "Whatever is wrong with a script, the answer is a script or a ValueError that names the line."
    rng, refused = np.random.default_rng(5), 0
    texts = [(DATA / n).read_text()[:3000] for n in SCRIPTS]
    for _ in range(2000):
        text = list(texts[rng.integers(len(texts))])
        for at in rng.integers(0, len(text), rng.integers(1, 6)): text[at] = rng.choice(list("0159-.:;#\n\t\0 presultfé{") + [""])
        try: script_ticks(read_script("\n" + "".join(text)), 1000)
        except ValueError as e:
            refused += 1
            assert re.match(r"script, line \d+: ", str(e)) and len(str(e)) < 400
    assert 500 < refused < 2000
