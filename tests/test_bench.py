"""`tmlab bench world` and `bench_data`, small: their keys, what they refuse, that they measure what they say. Never how fast anything is."""
import json, math, os, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from tmlab.bench import CarRacing, Decoding, Parsing, Replaying, attempt, bench_data, bench_iqn, bench_world, flat, game_root, record_drive
from tmlab.cli import run_command
from tmlab.tracks.generate import generate_track

TMLAB = str(Path(sys.executable).with_name("tmlab"))
KEYS = ["decisions_per_s_64", "decisions_per_s_state", "decisions_per_s_160x120", "ratio_carracing", "thread_scaling", "frames_written_per_s", "decisions_per_s_gpu"]
SMALL = ["--seconds", "0.2", "--repeats", "1", "--cars", "64", "--tracks", "3"]


def tmlab(*args, **env): return subprocess.run([TMLAB, *map(str, args)], capture_output=True, text=True, timeout=600, env=os.environ | env)


@pytest.fixture(scope="module")
def bench(): return tmlab("bench", "world", "--json", *SMALL)


def test_json_is_one_flat_object(bench):
    assert bench.returncode == 0, bench.stderr
    figures = json.loads(bench.stdout)
    assert list(figures) == KEYS and bench.stdout.count("\n") == 1
    always = [k for k in KEYS if k not in ("ratio_carracing", "thread_scaling", "decisions_per_s_gpu")]
    for k in always: assert isinstance(figures[k], float) and figures[k] > 0 and math.isfinite(figures[k]), k
    assert figures["decisions_per_s_state"] > figures["decisions_per_s_160x120"]
    for k in KEYS:
        if figures[k] is None: assert f"{k}: " in bench.stderr, "a figure that could not be measured says why"


def test_car_racing_is_measured_where_it_is_installed(bench):
    racing, why = attempt(CarRacing)
    ratio = json.loads(bench.stdout)["ratio_carracing"]
    if racing is None: assert ratio is None and "pip install" in why and why in bench.stderr
    else: assert ratio > 1 and racing.decisions_per_s(0.05) > 0


def test_without_car_racing_the_rest_is_measured(tmp_path):
    "A Box2D that cannot be imported, as where the package is missing."
    (tmp_path / "Box2D.py").write_text("raise ImportError('no Box2D')")
    done = tmlab("bench", "world", "--json", "--threads", 1, "--seconds", 0.05, "--repeats", 1, "--cars", 16, "--tracks", 1, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    figures = json.loads(done.stdout)
    assert done.returncode == 0 and figures["ratio_carracing"] is None and figures["thread_scaling"] is None and figures["decisions_per_s_64"] > 0
    assert "pip install 'gymnasium[box2d]'" in done.stderr


def test_the_table_names_targets_and_the_machine():
    figures, text = bench_world(0.05, 2, threads=1, cars=32, tracks=2, quiet=True)
    shown = "\n".join(text)
    for words in ("median", "min – max", "≥ 200,000", "≥ 2,000,000", "≥ 40,000", "≥ 3,000", "cores", "1 threads used", "184 floats", "64x64 frame", "km/h"): assert words in shown, words
    for f in figures: assert len(f.values) == 2 if f.why is None else f.values is None and f.why in shown, f


def test_the_recorded_cars_drive():
    "Replayed from their keys they are still fast, and go on from the beginning of the recording when its end is reached."
    drive = record_drive([generate_track(k, "hilly", 10) for k in range(2)], 16, threads=1)
    replaying = Replaying(drive, image_size=None, threads=1)
    for _ in range(2 * len(drive.actions)): replaying.decisions_per_s(1e-9)
    assert drive.speed > 10 and replaying.env.states().speed.mean() > 10 and np.isfinite(replaying.env.states().position).all()


@pytest.mark.parametrize("args, words", [
    (["word"], ["word", "world"]), ([], ["suite"]), (["world", "--seconds", "0"], ["seconds", "0"]), (["world", "--seconds", "nan"], ["seconds", "nan"]), (["world", "--repeats", "0"], ["repeats"]),
    (["world", "--threads", "0"], ["threads", "0"]), (["world", "--threads", "9999"], ["threads", "9999"]), (["world", "--cars", "-1"], ["cars", "-1"]),
    (["world", "--tracks", "many"], ["tracks", "many"]), (["world", "--fast"], ["--fast"]),
])
def test_wrong_options_are_one_error(args, words, capsys):
    assert run_command("bench", *args) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.strip().splitlines()) == 1, err
    for w in words: assert w in err


DATA_KEYS = ["stacks_per_s", "stacks_per_s_float32", "stacks_ratio_float32", "cache_size_ratio", "decode_ratio_pil", "decode_ratio_pil_game", "decode_difference_levels", "gbx_files_per_s", "store_open_s"]
DATA_SMALL = dict(seconds=0.02, repeats=2, threads=1, replays=4, opened=8, quiet=True)


def test_data_is_measured_and_cleaned_up(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    figures, text = bench_data(**DATA_SMALL)
    shown = "\n".join(text)
    assert list(flat(figures)) == DATA_KEYS and not list(tmp_path.iterdir())
    for words in ("median", "≥ 300,000", "≤ 0.0667", "≤ 2.00", "≥ 3.00", "decode and shrink", "float32 layout", "8 replay folders", "GB/s", "cores"): assert words in shown, words
    for f in figures: assert (f.values > 0).all() if f.why is None else f.values is None and f.why in shown, f
    sizes = {f.name: f for f in figures}
    assert sizes["cache_size_ratio"].values[0] < 1 / 15 and sizes["decode_difference_levels"].values[0] < 2 and sizes["cache_size_ratio"].at_most


def test_without_game_files_the_rest_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TMLAB_REAL_DATA", str(tmp_path))
    figures, text = bench_data(**DATA_SMALL)
    absent = {k for k, v in flat(figures).items() if v is None}
    assert absent == {"decode_ratio_pil_game", "gbx_files_per_s"} and sum("TMLAB_REAL_DATA" in line for line in text) == 2


@pytest.mark.parametrize("name, value", [("seconds", 0), ("seconds", math.nan), ("repeats", 0), ("replays", 0), ("opened", 0), ("threads", 0)])
def test_data_refuses_wrong_options(name, value):
    with pytest.raises(ValueError, match=name): bench_data(**DATA_SMALL | {name: value})


@pytest.mark.real
def test_the_small_decode_is_true_to_game_frames(real, tmp_path):
    real("frames/tmuf_stadium_run1")
    decoding = Decoding(game_root(tmp_path / "img", 1), tmp_path / "work", 1)
    assert len(decoding.paths) >= 40 and decoding.difference() < 0.5 and decoding.cached_per_s(0.01) > 0 and not decoding.work.exists()


@pytest.mark.real
def test_replay_files_of_a01_are_found(real):
    real("replays/stadium")
    assert len(Parsing().paths) >= 8


IQN_KEYS = ["grad_steps_per_s_eager", "grad_steps_per_s", "grad_steps_ratio_eager", "grad_steps_ratio_eager_fp32", "train_decisions_per_s", "buffer_bytes_200k", "grad_steps_ratio_eager_gpu", "train_decisions_per_s_gpu"]
IQN_SMALL = dict(seconds=0.05, repeats=2, threads=1, batch=16, cars=8, quiet=True)


def test_learning_is_measured():
    import torch
    threads = torch.get_num_threads()
    figures, text = bench_iqn(**IQN_SMALL)
    shown = "\n".join(text)
    assert list(flat(figures)) == IQN_KEYS and torch.get_num_threads() == threads
    for words in ("median", "≥ 1.50", "≥ 800", "≤ 1,000,000,000", "≥ 3.00", "≥ 20,000", "batch of 16", "8 cars", "cores"): assert words in shown, words
    for f in figures: assert (f.values > 0).all() if f.why is None else f.values is None and f.why in shown, f
    ratio = {f.name: f.values for f in figures}
    assert np.allclose(ratio["grad_steps_ratio_eager"], ratio["grad_steps_per_s"] / ratio["grad_steps_per_s_eager"])


@pytest.mark.parametrize("name, value", [("seconds", 0), ("seconds", math.nan), ("repeats", 0), ("batch", 0), ("cars", 0), ("threads", 0)])
def test_learning_refuses_wrong_options(name, value):
    with pytest.raises(ValueError, match=name): bench_iqn(**IQN_SMALL | {name: value})
