"""Map blocks as surfaces: the grid, learning from runs, the table that comes with tmlab, and how it fits the recorded runs of real maps."""
import re
import numpy as np
import pandas as pd
import pytest
from tmlab.core.state import concat_states, make_state
from tmlab.replays.gbx import read_gbx
from tmlab.replays.maps import fit_figures, learn_folder, leave_one_out, read_maps, unknown_blocks
from tmlab.tracks.blocks import (DRIVEN, EXTENDED, LEARNT, NOTHING, BlockShapes, block_kind, block_table, fold, learn_blocks, on_ground, overlaps, place_blocks, track_from_map,
                                 unfold)
from tmlab.tracks.line import ReferenceLine
from tmlab.tracks.track import Track, follow_road

CHECKED = ["A01-Race", "A02-Race", "ESL-Hockolicious", "StadiumA2", "TAS_Training_Map1", "TMNF-Trial", "Unnamed", "GBX-NET 2 CGameCtnChallenge TMF 001"]


@pytest.fixture(scope="module")
def maps(real):
    "Stadium maps of all replays and challenges."
    real("replays", "stadium")
    return read_maps(real("challenges"), real("replays"))[0]


@pytest.fixture(scope="module")
def raced(maps): return {uid: m for uid, m in maps.items() if m.runs}


@pytest.fixture(scope="module")
def uids(raced): return {m.info.plain_name: uid for uid, m in raced.items()}


def table(*rows): return pd.DataFrame(rows, columns=["name", "x", "y", "z", "rotation", "flags"])


def drive(points, material=16):
    "A run along `points` (n, 3) on four wheels, upright on the slope it drives."
    points = np.asarray(points, float)
    forward = np.gradient(points, axis=0)
    forward /= np.linalg.norm(forward, axis=1, keepdims=True)
    left = np.cross([0, 1.0, 0], forward)
    left /= np.linalg.norm(left, axis=1, keepdims=True)
    rotation = np.stack([left, np.cross(forward, left), forward], 2)
    return make_state(len(points), position=points, rotation=rotation, wheel_contact=np.ones((len(points), 4), bool), wheel_material=np.full((len(points), 4), material))


def slope_map(rotation, x=4, y=2, z=4):
    "A start, a finish and one slope, turned by `rotation`, with a run up the slope."
    blocks = table(("StadiumRoadMainStartLine", 0, 1, 0, 0, 0), ("StadiumRoadMainFinishLine", 8, 1, 8, 0, 0), ("StadiumCircuitSlopeStraight", x, y, z, rotation, 0))
    b = block_table(blocks).iloc[[2] * 60]
    along = np.linspace(.5, 31.5, 60)
    return blocks, drive(unfold(np.stack([14 + np.sin(along / 5), 8 + along / 2, along], 1), b))


@pytest.mark.parametrize("rotation", range(4))
def test_a_surface_is_the_same_however_the_block_was_turned(rotation):
    "Learnt on one rotation, placed on another: height and normal turn with the block."
    shapes = learn_blocks([(blocks, [run]) for blocks, run in [slope_map(rotation)]])
    slope = shapes["StadiumCircuitSlopeStraight"]
    assert slope.rule == "along" and slope.maps == 1 and np.allclose(slope.height, 8 + np.arange(17) * 1.0, atol=.03) and set(np.unique(slope.evidence)) == {LEARNT, EXTENDED}
    blocks, run = slope_map((rotation + 1) % 4, 6, 3, 5)
    fit = place_blocks(blocks, shapes).agreement(run)
    assert fit["agreeing"] == 1 and fit["off"] == 0 and fit["median_m"] < .03, fit


def test_maps_of_one_name_agree_and_a_parked_car_does_not_outvote_them():
    level = lambda y, n: (table(("StadiumRoadMainStartLine", 0, 1, 0, 0, 0), ("StadiumRoadMainFinishLine", 8, 1, 8, 0, 0), ("StadiumRoadMainTurbo", 4, 1, 4, 0, 0)),
                          [drive(np.stack([np.full(n, 144.0), np.full(n, 8 + y), np.linspace(129, 159, n)], 1), 7)])
    shapes = learn_blocks([level(1.36, 15), level(1.38, 20), level(1.37, 9), level(1.37, 12), level(1.38, 14), level(0.0, 400)])
    turbo = shapes["StadiumRoadMainTurbo"]
    assert turbo.rule == "level" and abs(np.median(turbo.height[turbo.evidence > 0]) - 1.37) < .02 and (turbo.material[turbo.evidence > 0] == 7).all()


def test_a_block_with_two_surfaces_stays_unknown():
    "Where positions contradict each other by metres, nothing is claimed."
    blocks = table(("StadiumRoadMainStartLine", 0, 1, 0, 0, 0), ("StadiumRoadMainFinishLine", 8, 1, 8, 0, 0), ("StadiumLoopLeft", 4, 1, 4, 0, 0))
    z = np.linspace(129, 159, 30)
    runs = [drive(np.stack([np.full(30, 144.0), np.full(30, 8.0 + y), z], 1)) for y in (1.0, 3.0, 5.0, 7.0)]
    shapes = learn_blocks([(blocks, runs)])
    assert "StadiumLoopLeft" not in shapes
    placed = place_blocks(blocks, shapes)
    at = placed.surface([144], [144], [9.4])
    assert placed.unknown["StadiumLoopLeft"] == 1 and not at.known[0] and at.block[0] == 2 and np.isfinite(at.height[0])  # a flat placeholder, marked


def test_folding_is_undone_and_finds_the_block(maps):
    "On every real map: positions inside a block's footprint fold into it, and `overlaps` names the block."
    rng = np.random.default_rng(1)
    for m in list(maps.values())[:30]:
        b = block_table(m.info.blocks)
        local = rng.uniform([0, 0, 0], np.column_stack([32 * b["nx"], np.full(len(b), 8), 32 * b["nz"]]))
        world = unfold(local, b)
        assert np.allclose(fold(world, b), local)
        i, j = overlaps(world, b)
        assert (np.bincount(i[i == j], minlength=len(b)) == 1).all()


@pytest.mark.real
def test_no_two_driven_blocks_claim_one_cell(maps):
    "Footprints against the grid: over all maps, hardly a block of several cells has another driven block's corner in its other cells."
    hits = {}
    for m in maps.values():
        b = block_table(m.info.blocks)
        b = b[[block_kind(n) == DRIVEN for n in b["shape"]]]
        corners = set(zip(b["x"], b["y"], b["z"]))
        for r in b[b["nx"] * b["nz"] > 1].itertuples():
            wide, deep = (r.nz, r.nx) if r.rotation % 2 else (r.nx, r.nz)
            hit = any((r.x + i, r.y, r.z + k) in corners for i in range(wide) for k in range(deep) if i or k)
            hits.setdefault(r.name, []).append(hit)
    often = {n: np.mean(h) for n, h in hits.items() if len(h) >= 5}
    assert len(often) > 40
    wrong = {n: h for n, h in often.items() if h > .2}
    assert len(wrong) <= 2, wrong
    assert np.mean([h for v in hits.values() for h in v]) < .08


def test_blocks_of_several_cells_were_seen_beyond_their_first():
    for name, shape in BlockShapes.load().items():
        if max(shape.size) == 1 or shape.samples < 10 or "Slope" in name: continue
        outside = shape.evidence.copy()
        outside[:17, :17] = NOTHING
        assert (outside == LEARNT).any(), f"{name}: {shape.size} cells, but all positions in one"


@pytest.mark.real
def test_the_line_of_hockolicious_passes_its_gates_in_order(raced, uids, real):
    m = raced[uids["ESL-Hockolicious"]]
    line = ReferenceLine.load(real("lines", "ESL-Hockolicious_0.5m_cl2.npy"))
    gates = place_blocks(m.info.blocks).gates_along(line)
    assert list(gates["kind"]) == ["start"] + ["checkpoint"] * 13 + ["finish"]
    assert gates["distance_m"].max() <= 12 and np.diff(gates["line_m"]).min() > 50
    # the same order as the race clock: where the ghost was at each of its checkpoint times
    ghost = read_gbx(m.sources[0]).best
    at = np.stack([np.interp(ghost.checkpoints_ms, ghost.samples.time_ms, ghost.samples.position[:, k]) for k in range(3)], 1)
    assert np.linalg.norm(at - gates[["x", "y", "z"]].to_numpy()[1:], axis=1).max() < 14


@pytest.mark.real
def test_every_ghost_is_at_a_gate_when_its_clock_says_so(raced):
    "Along the block within 2 m (a 10 Hz sample is up to 8 m away), across it within the road."
    seen = 0
    for uid, m in raced.items():
        if m.info.plain_name in ("Canopus", "Oachkatzlschwoafs on ICE"): continue  # respawns; unfinished
        gates = place_blocks(m.info.blocks).gates
        for source in set(m.sources):
            for g in read_gbx(source).ghosts:
                s = g.samples
                at = np.stack([np.interp(g.checkpoints_ms, s.time_ms, s.position[:, k]) for k in range(3)], 1)
                for k, p in enumerate(at):
                    here = gates[gates["kind"] == ("finish" if k == len(at) - 1 else "checkpoint")]
                    ahead = here[["direction_x", "direction_z"]].to_numpy()
                    off = p[[0, 2]] - here[["x", "z"]].to_numpy()
                    along, across = (off * ahead).sum(1), off[:, 0] * ahead[:, 1] - off[:, 1] * ahead[:, 0]
                    nearest = np.abs(along) + np.maximum(0, np.abs(across) - 14) + np.abs(p[1] - here["y"]) / 4
                    assert nearest.min() < 7, (m.info.plain_name, source.name, k, along, across)
                    seen += 1
    assert seen > 70


@pytest.mark.real
def test_recorded_positions_lie_on_known_surfaces(raced):
    "The milestone's figures, with the table that comes with tmlab."
    figures = fit_figures(raced).set_index("map")
    for name in CHECKED:
        f = figures.loc[name]
        assert f["near"] >= .95 and f["agreeing"] >= .95 and f["material"] >= .9 and f["off"] == 0, f.to_dict()
    assert figures.loc["Zigzags", "near"] > .88 and figures.loc["Oachkatzlschwoafs on ICE", "agreeing"] > .95 and figures.loc["StarStadiumA5", "agreeing"] > .95


@pytest.mark.real
def test_they_do_also_where_map_or_run_was_left_out(raced, uids):
    "Figures for maps the table has not seen; maps with blocks of their own can only lose there."
    raced = {u: m for u, m in raced.items() if m.info.plain_name != "Canopus"}  # three quarters of all positions, on blocks that the others hardly have
    unseen = leave_one_out(raced, [uids[n] for n in ("A01-Race", "TAS_Training_Map1", "TMNF-Trial", "A02-Race")]).set_index("map")
    for name in ("A01-Race", "TAS_Training_Map1", "TMNF-Trial"): assert unseen.loc[name, "agreeing"] >= .95 and unseen.loc[name, "material"] >= .9, unseen.loc[name].to_dict()
    assert .4 < unseen.loc["A02-Race", "near"] < .9 and unseen.loc["A02-Race", "median_m"] < .1  # half of its blocks are on no other map; the rest fits
    run = leave_one_out({u: m for u, m in raced.items() if m.info.plain_name in ("A01-Race", "StarStadiumA5", "TMNF-Trial", "A02-Race", "StadiumA2")}, [uids["A01-Race"], uids["A02-Race"]], by="run").set_index("map")
    assert run.loc["A01-Race", "agreeing"] > .99 and run.loc["A02-Race", "agreeing"] > .85, run


@pytest.mark.real
def test_the_table_is_what_the_replays_teach(real):
    "Learnt again from the data folder: the same blocks, heights to two centimetres, evidence and materials but for a node in a hundred."
    ours, again = BlockShapes.load(), learn_folder(real("replays"))
    assert set(ours) == set(again)
    same = ["shape", "cells", "rule", "samples", "runs", "maps"]
    assert ours.table[same].equals(again.table[same])
    for name in ours:
        both = (ours[name].evidence > 0) & (again[name].evidence > 0)
        assert np.abs(ours[name].height - again[name].height)[both].max() < .02, name
        assert (ours[name].evidence != again[name].evidence).mean() < .01 and (ours[name].material != again[name].material).mean() < .01, name


def test_the_table_is_small_and_travels_with_the_package(repo):
    path = repo / "tmlab/static/blocks.npz"
    assert path.stat().st_size < 200_000
    assert re.search(r'package_data=\{"tmlab": \[.*"static/\*"', (repo / "setup.py").read_text())
    shapes = BlockShapes.load()
    assert len(shapes) > 80 and all(s.samples >= 3 and s.error_m < .3 and (s.evidence > 0).any() and np.isfinite(s.height).all() for s in shapes.values())


@pytest.mark.real
def test_every_stadium_map_is_placed_and_every_block_accounted_for(maps):
    assert len(maps) > 100
    unknown = unknown_blocks(maps)
    missing = 0
    for m in maps.values():
        placed = place_blocks(m.info.blocks)
        missing += int(placed.unknown.sum() + placed.scenery.sum())
        assert placed.blocks["known"].sum() + placed.unknown.sum() + placed.scenery.sum() == len(m.info.blocks)
        assert {"start", "finish"} <= set(placed.gates["kind"]) and np.isfinite(placed.gates[["x", "y", "z"]].to_numpy()).all()
        v, f, material, block = placed.mesh()
        assert len(f) == len(material) == len(block) and (not len(f) or f.max() < len(v))
    assert unknown["blocks"].sum() == missing and not unknown["block"].duplicated().any()


@pytest.mark.real
def test_maps_of_other_environments_are_refused(real):
    seen = 0
    for path in sorted(real("replays", "other_env").glob("*.Gbx")):
        with pytest.raises(ValueError, match="not a block of Stadium"): place_blocks(read_gbx(path).map.blocks)
        seen += 1
    assert seen >= 6


@pytest.mark.parametrize("change, why", [
    (dict(name=["StadiumRoadMain", "StadiumRoadMainFinishLine"]), "no start block"), (dict(name=["StadiumRoadMainStartLine", "StadiumRoadMain"]), "no finish block"),
    (dict(name=["BayRoadStart", "StadiumRoadMainFinishLine"]), "not a block of Stadium"), (dict(rotation=[0, 4]), "rotation 4"), (dict(rotation=[-1, 0]), "rotation -1")])
def test_broken_maps_are_named(change, why):
    good = table(("StadiumRoadMainStartLine", 0, 1, 0, 0, 0), ("StadiumRoadMainFinishLine", 1, 1, 0, 0, 0))
    assert len(place_blocks(good).gates) == 2
    with pytest.raises(ValueError, match=why): place_blocks(good.assign(**change))
    with pytest.raises(ValueError, match="column x is missing"): place_blocks(good.drop(columns="x"))


def test_runs_without_contact_teach_nothing():
    blocks, run = slope_map(0)
    flying = drive(run.position)
    flying.wheel_contact[:] = False
    with pytest.raises(ValueError, match="no run of these maps was on the ground"): learn_blocks([(blocks, [flying])])
    with pytest.raises(ValueError, match="does not record"): on_ground(make_state(2, position=np.zeros((2, 3))))


@pytest.mark.real
def test_tracks_from_maps_hold_the_runs(raced, uids, real, tmp_path):
    "The road under A01's line is where the cars of all its replays drove, and survives the disk."
    m = raced[uids["A01-Race"]]
    line = ReferenceLine.load(real("lines", "A01-Race_0.5m_cl.npy"))
    track = track_from_map(place_blocks(m.info.blocks), line, id="a01")
    assert abs(track.length_m - line.length_m) < .02 * line.length_m and len(track.gates_s) == 3
    grounded = on_ground(concat_states(m.runs))
    segment, lateral, height = follow_road(track.road, grounded.position).T
    on = np.abs(lateral) < track.road.half_width[segment.astype(int)]
    assert on.mean() > .9 and np.median(np.abs(height)) < .1 and np.mean(np.abs(height) < 1) > .9
    track.save(tmp_path / "a01")
    assert Track.load(tmp_path / "a01").hash == track.hash
    with pytest.raises(ValueError, match="is it a line of this map"): track_from_map(place_blocks(m.info.blocks), ReferenceLine.load(real("lines", "A02-Race_0.5m_cl.npy")))
