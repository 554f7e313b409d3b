"""The expert, the reference time and its bound: bad arguments, same result every time, no lap below the bound, both ways round an island and over a jump."""
import threading
import numpy as np
import pytest
from tmlab.tracks.generate import FAMILIES, generate_track
from tmlab.core.runs import read_json
from tmlab.tracks.generate import VERSION as GENERATOR
from tmlab.world.car import CAR, CONTACT, place_car
from tmlab.world.env import FINISHED, WORLD_VERSION, RaceVectorEnv, place_on_line
from tmlab.world.expert import (SEARCH_VERSION, STYLES, Expert, begin_rows, car_digest, drive_actions, drive_rows, laps, load_reference, lower_bound, offer_lap, packed, reference_time,
                                save_reference, search_lap, survey, survey_summary)
from tmlab.world.racing_line import best_line, make_way, planned_ways, ways


@pytest.fixture(scope="module")
def tracks(): return [generate_track(700 + k, kind, 10) for kind in FAMILIES for k in range(2)]


@pytest.fixture(scope="module")
def reference(tracks): return reference_time(tracks[4], threads=1, decisions=200_000)


@pytest.fixture
def saved(tracks, reference, tmp_path):
    "Folder of a saved track with its reference."
    tracks[4].save(tmp_path / "tracks" / tracks[4].id)
    save_reference(tmp_path / "tracks" / tracks[4].id, reference)
    return tmp_path / "tracks" / tracks[4].id


def test_finishes_every_family(tracks):
    for style in ("normal", "early", "late"):
        _, end = laps(tracks, Expert(tracks, style), threads=1)
        assert (end == FINISHED).mean() >= (1 if style == "normal" else 0.8), (style, [t.id for t, e in zip(tracks, end) if e != FINISHED])


def test_recovers(tracks):
    _, end = laps(tracks, threads=1, random_start="disturbed", per_track=10, patience_s=15.0)
    assert (end == FINISHED).mean() > 0.9


@pytest.mark.parametrize("kind,seed,seconds", [("flat", 200008, 30), ("fast", 200000, 30), ("two-line", 100023, 15), ("technical", 510003, 25)])
def test_what_threw_a_first_version_off_the_road(kind, seed, seconds):
    "Brakes in a slide (two), full lock without slowing down, a crest in a corner."
    assert np.isfinite(laps([generate_track(seed, kind, seconds)], threads=1)[0]).all()


def test_a_gate_passed_beside_the_road_is_made_good():
    track = generate_track(703, "flat", 12)
    expert, (T, L) = Expert(track), packed([track])
    rows = begin_rows(T, L, [0, 0])
    for c, aside in zip(rows, (2.5, -3.0)):
        place_car(c, T, 0, track.gates_s[1] - 2.0, aside + np.copysign(track.road.half_width[0], aside), 0.0, 12.0)
        place_on_line(c, T, L)
    assert (drive_rows(rows, T, L, expert, patience_ms=15_000) == FINISHED).all()


def test_styles_put_the_apex_earlier_and_later(tracks):
    track = generate_track(701, "flat", 10)
    way, normal = planned_ways(track)[0]
    early, late = (Expert(track, style).plans.points for style in ("early", "late"))
    offsets = lambda p: ((p - way.centre) * way.left).sum(1)
    lag = lambda x: max(range(-10, 11), key=lambda k: float((np.roll(offsets(x), -k) * normal)[20:way.finish - 20].sum()))
    assert lag(early) < 0 < lag(late)


def test_act_is_one_whatever_the_batch(tracks):
    expert = Expert(tracks, list(STYLES), noise=[0.0, 0.5], seed=3)
    env = RaceVectorEnv(tracks, 24, image_size=None, threads=1, random_start="anywhere")
    _, info = env.reset(seed=1)
    for _ in range(20):
        a = expert.act_rows(env.rows, info["track"])
        assert np.array_equal(a, expert.act(env.states(), info["track"]))
        assert np.array_equal(a[7:9], expert.act_rows(env.rows[7:9], info["track"][7:9], cars=[7, 8]))
        *_, info = env.step(a)


@pytest.mark.parametrize("kw,cause", [(dict(style="fast"), "fast"), (dict(noise=2), "noise"), (dict(noise=[0.1, np.nan]), "noise")])
def test_bad_experts(tracks, kw, cause):
    with pytest.raises(ValueError, match=cause): Expert(tracks[:1], **kw)


def test_a_track_it_does_not_know(tracks):
    expert, rows = Expert(tracks[:2]), RaceVectorEnv(tracks[:1], 1, image_size=None, threads=1).rows
    with pytest.raises(ValueError, match="2 tracks"): expert.act_rows(rows, np.array([2]))
    assert len(expert.act_rows(rows[:0])) == 0


def test_two_ways_round_an_island():
    track = generate_track(1, "two-line", 12)
    (best, a), (other, b) = planned_ways(track)
    inside = track.road.island.any(1)
    s = track.road.s[inside][8:-8]
    face_l, face_r = (np.interp(s, track.road.s, track.road.island[:, k]) for k in (0, 1))
    one, two = np.interp(s, best.s, a), np.interp(s, other.s, b)
    assert ((one > face_l) | (one < face_r)).all() and ((two > face_l) | (two < face_r)).all() and (np.sign(one) != np.sign(two)).all()
    middle = (one + two) / 2
    assert ((middle < face_l + 1) & (middle > face_r - 1)).any()
    assert best_line(best)[1] <= best_line(other)[1] + 0.02


def test_each_island_is_decided_as_if_all_were_tried():
    track = next(t for t in (generate_track(k, "two-line", 25) for k in range(700, 720)) if len(planned_ways(t)[0][0].s) and islands(t) == 2)
    tried = [best_line(make_way(track, (), (a, b)), sweeps=4, hot=0.0)[1] for a in (True, False) for b in (True, False)]
    assert best_line(ways(track)[0], sweeps=4, hot=0.0)[1] <= min(tried) + 0.05


def islands(track): return int((np.diff(track.road.island.any(1).astype(int)) == 1).sum())


def test_a_short_track_with_a_jump_is_driven_over_it():
    tracks = [generate_track(200000 + k, "jump", 5) for k in range(4)]
    seconds, _ = laps(tracks, threads=1)
    assert (seconds < 6).all() and all(len(ways(t)) == 2 for t in tracks)


def test_the_jump_is_shorter_and_a_slow_car_goes_round():
    track = next(t for t in (generate_track(k, "jump", 12) for k in range(700, 720)) if len(ways(t)) == 2)
    over, around = ways(track)
    assert best_line(over)[1] < best_line(around)[1] - 1.0
    env = RaceVectorEnv(track, 1, image_size=None, threads=1)
    env.reset(seed=0)
    expert, end, flew = Expert(track), 0, False
    while end == 0:
        *_, info = env.step(expert.act_rows(env.rows))
        end = info["end"][0]
        flew |= not env.rows[0, CONTACT:CONTACT + 4].any()
    assert end == FINISHED and flew


def test_no_lap_is_below_the_bound(tracks):
    for track in tracks[::2]:
        bound, way = lower_bound(track), planned_ways(track)[0][0]
        driven = [laps([track], Expert(track, list(STYLES), pace=pace), threads=1, per_track=len(STYLES))[0] for pace in (0.95, 1.0, 1.05)]
        driven.append([search_lap(track, way, best_line(way, margin=m, use=1.0, slew=1.2, grip=0.9)[0], 60).seconds for m in (-0.5, 0.3)])
        assert bound < np.nanmin(np.concatenate(driven)), track.id


def test_the_reference_is_the_same_every_time(tracks, reference):
    again = reference_time(tracks[4], threads=2, decisions=200_000)
    assert again == reference and reference.lower_bound < reference.seconds
    assert drive_actions(tracks[4], reference.actions)[0] == reference.seconds
    with pytest.raises(ValueError, match="decisions"): reference_time(tracks[4], decisions=0)


def test_kept_references(saved, tracks, reference):
    assert load_reference(saved) == reference
    assert offer_lap(saved, reference.seconds - 0.01, "x") and not offer_lap(saved, reference.seconds - 0.005, "y")
    newest = load_reference(saved)
    assert (newest.version, newest.by, newest.actions, newest.lower_bound) == (2, "x", (), reference.lower_bound)
    for seconds in (reference.lower_bound - 0.001, float("nan"), -1.0):
        with pytest.raises(ValueError, match="no lap on the road"): offer_lap(saved, seconds, "z")


def test_a_reference_of_another_track_or_car(saved, tracks, reference):
    with pytest.raises(ValueError, match="car"): load_reference(saved, CAR._replace(brake=30.0))
    with pytest.raises(ValueError, match="find it anew"): save_reference(saved, reference._replace(track_hash="0" * 16))
    content = (saved / "reference.json").read_text()
    (saved / "reference.json").write_text(content.replace(reference.track_hash, "0" * 16))
    with pytest.raises(ValueError, match="reference.json.*track_hash"): load_reference(saved)
    (saved / "reference.json").write_text(content[:100])
    with pytest.raises(ValueError, match="reference.json"): load_reference(saved)
    (saved / "reference.json").unlink()
    with pytest.raises(ValueError, match="reference.json"): offer_lap(saved, 9.0, "x")


def test_offers_at_the_same_time_are_all_counted(saved, reference):
    offers = [threading.Thread(target=offer_lap, args=(saved, reference.seconds - 0.001 * k, f"driver {k}")) for k in range(1, 9)]
    for o in offers: o.start()
    for o in offers: o.join()
    assert load_reference(saved).by == "driver 8" and load_reference(saved).version >= 2


def test_a_survey_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "rows.csv"
    first = survey("finish", path, families=("flat",), n=1, seconds=(8, 8), quiet=True)
    rows = survey("finish", path, families=("flat",), n=2, seconds=(8, 8), quiet=True)
    assert len(rows) == 2 and rows[0] == first[0]
    with pytest.raises(ValueError, match="one of"): survey("speed", path)
    path.write_text(path.read_text().replace(rows[0]["world"], "0-0-0"))
    with pytest.raises(ValueError, match="another world"): survey("finish", path, families=("flat",), n=1, quiet=True)


def test_the_card_of_the_surveys_describes_this_world(repo):
    card = read_json(repo / "data_cards" / "world_survey.json")
    assert card["versions"] == dict(world=WORLD_VERSION, generator=GENERATOR, search=SEARCH_VERSION, car=car_digest(CAR)), "survey again: survey(), then survey_summary()"
    names = [t.rsplit("-", 3) for t in card["laps_s"]]
    seconds, _ = laps([generate_track(int(seed), kind, float(s.rstrip("s"))) for kind, seed, s, _ in names], threads=1)
    assert np.abs(seconds - list(card["laps_s"].values())).mean() < 0.01, "the expert drives differently from the one surveyed: survey again"


def test_the_surveys_meet_the_announced_figures(repo):
    card = read_json(repo / "data_cards" / "world_survey.json")
    for f in FAMILIES: assert card["finish"][f]["rate"] >= 0.99 and card["disturbed"][f]["rate"] >= 0.95, f
    assert card["gap"]["all"]["n"] >= 100 and card["gap"]["all"]["median"] <= 0.05 and card["slower"]["all"]["median"] <= 0.05 and card["reference_cpu_s"]["of_ten_nine"] <= 20


def test_a_summary_of_two_worlds_is_refused(tmp_path):
    rows = dict(finish="world,family,track,finished,seconds,disturbed,recovered\n1-1-1-a,flat,x,1,5.0,4,3\n", reference="world,family,track,gap,slower,cpu_s\n1-1-1-a,flat,x,0.02,0.03,9\n")
    for name, text in rows.items(): (tmp_path / name).write_text(text)
    report = survey_summary(tmp_path / "finish", tmp_path / "reference")
    assert report["finish"]["flat"]["rate"] == 1 and report["disturbed"]["all"]["rate"] == 0.75 and report["gap"]["all"]["median"] == 0.02
    (tmp_path / "reference").write_text(rows["reference"].replace("1-1-1-a", "1-1-2-a"))
    with pytest.raises(ValueError, match="different worlds"): survey_summary(tmp_path / "finish", tmp_path / "reference")


def test_make_way_needs_a_side_for_every_island():
    with pytest.raises(ValueError, match="side"): make_way(generate_track(1, "two-line", 12))
