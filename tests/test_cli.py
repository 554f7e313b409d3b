"""The commands as a user types them: what works, and what a wrong input says."""
import os, shutil, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from tmlab.replays.store import ReplayStore

TMLAB = str(Path(sys.executable).with_name("tmlab"))

def tmlab(*args, cwd, **env):
    return subprocess.run([TMLAB, *map(str, args)], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=300)

def one_error(done, *words):
    "The command failed with a single line on stderr that holds the words."
    lines = [l for l in done.stderr.strip().splitlines() if "error" in l]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for w in words: assert w in lines[0], (w, lines[0])

@pytest.mark.parametrize("args, words", [
    (["pretian"], ["unknown command", "pretrain"]),
    (["pretrain", "--epoch", "3"], ["--epoch", "--epochs"]),
    (["pretrain", "--epochs", "many"], ["epochs", "many"]),
    (["pretrain", "--data-dir", "nowhere"], ["nowhere"]),
    (["pretrain", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
    (["prepare", "--data-dir", "nowhere", "--output-dir", "c"], ["nowhere"]),
    (["inject", "--encoder-pt", "nowhere.pt"], ["nowhere.pt"]),
    (["train", "--tracks", '["spiral:1:10"]'], ["spiral"]),
    (["evaluate", "nowhere", "--tracks", "flat:1:6"], ["nowhere"]),
    (["compare", "nowhere"], ["nowhere"]),
    (["run", "nowhere.ipynb"], ["nowhere.ipynb"]),
    (["check", "nowhere"], ["nowhere"]),
    (["convert", "nowhere.Replay.Gbx", "out.txt"], ["nowhere.Replay.Gbx"]),
    (["convert", "nowhere.txt", "out.txt"], ["nowhere.txt"]),
    (["map", "nowhere.Challenge.Gbx"], ["nowhere.Challenge.Gbx"]),
    (["export", "nowhere", "out"], ["nowhere"]),
    (["export", "nowhere", "out", "--format", "csv"], ["csv", "lerobot"]),
    (["lab", "--data", "nowhere"], ["nowhere"]),
    (["generate", "--kind", "spiral"], ["spiral"]),
])
def test_wrong_input_is_one_error(args, words, tmp_path):
    one_error(tmlab(*args, cwd=tmp_path), *words)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], "something was half written"

def test_environment_beats_yaml_and_a_typo_in_it_is_an_error(tmp_path):
    one_error(tmlab("pretrain", cwd=tmp_path, PRETRAIN_EPOCH="3"), "PRETRAIN_EPOCH", "PRETRAIN_EPOCHS")

def test_generate_check_prepare_pretrain_inject(tmp_path):
    run = lambda *args: tmlab(*args, cwd=tmp_path)
    assert run("generate", "--kind", "flat", "--tracks", 2, "--seconds", 6, "--replays", 1).returncode == 0
    assert run("check").returncode == 0
    assert run("prepare", "--output-dir", "c", "--val-fraction", 0.5).returncode == 0
    assert run("pretrain", "--epochs", 1, "--run-name", "v1", "--preprocess-cache-dir", "c", "--val-fraction", 0.5).returncode == 0
    assert run("inject", "--encoder-pt", "output/pretrain/vis/v1/encoder.pt", "--dry-run").returncode == 0
    assert not (tmp_path / "output/pretrain/vis/v1/weights1.torch").exists()
    assert run("inject", "--encoder-pt", "output/pretrain/vis/v1/encoder.pt").returncode == 0
    assert (tmp_path / "output/pretrain/vis/v1/weights2.torch").exists()
    one_error(run("pretrain", "--epochs", 2, "--run-name", "v1", "--preprocess-cache-dir", "c", "--val-fraction", 0.5), "another configuration", "epochs: 1 -> 2")
    frame = next((tmp_path / "maps/img").rglob("*.jpeg"))
    frame.write_bytes(b"not a picture")
    done = run("check")
    assert done.returncode == 1 and frame.name in done.stdout
    one_error(run("prepare", "--output-dir", "c2"), frame.name)
    assert not (tmp_path / "c2/cache_meta.json").exists()

def test_convert_and_export(tmp_path):
    script, run = tmp_path / "run.txt", lambda *args: tmlab(*args, cwd=tmp_path)
    script.write_text("0-1000 press up\n500 steer -31970\n")
    assert run("convert", script, "seconds.txt", "--dialect", "seconds").returncode == 0 and "press up" in (tmp_path / "seconds.txt").read_text()
    one_error(run("convert", script, "seconds.txt"), "seconds.txt", "already")
    one_error(run("convert", script, "other.txt", "--dialect", "minutes"), "minutes", "seconds")
    script.write_text("0-1000 press upwards\n")
    one_error(run("convert", script, "other.txt"), "run.txt", "upwards")
    assert not (tmp_path / "other.txt").exists()
    assert run("generate", "--kind", "flat", "--tracks", 1, "--seconds", 5, "--replays", 1).returncode == 0
    for how in ("hf", "lerobot"): assert run("export", "maps/img", how, "--format", how).returncode == 0
    assert list((tmp_path / "hf/data").glob("train-*.parquet")) and (tmp_path / "lerobot/meta/info.json").exists()
    one_error(run("export", "maps/img", "hf", "--format", "lerobot"), "hf")

def test_import_refuses_bad_files_and_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/empty.Replay.Gbx").write_bytes(b"")
    (tmp_path / "in/random.Replay.Gbx").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "in/text.Replay.Gbx").write_text("not a replay at all")
    done = tmlab("import", "in", cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for name in ("empty", "random", "text"): assert name + ".Replay.Gbx" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("manifest.json"))

@pytest.mark.real
def test_import_of_real_files_among_bad_ones(tmp_path, real):
    good, old = real("replays/stadium/TMNF-Trial_7740_malun22.Replay.Gbx"), real("replays/not_forever/G-6_na_x.Replay.Gbx")
    (tmp_path / "in").mkdir()
    for f in (good, old): shutil.copy(f, tmp_path / "in" / f.name)
    (tmp_path / "in/cut.Replay.Gbx").write_bytes(good.read_bytes()[:4000])
    done = tmlab("import", "in", "--out", "maps/img", cwd=tmp_path)
    assert done.returncode == 1 and "1 replay folders written" in done.stdout and "2 files refused" in done.stdout
    assert old.name in done.stdout and "cut.Replay.Gbx" in done.stdout
    assert len(ReplayStore(tmp_path / "maps/img").replays) == 1
    again = tmlab("import", "in", "--out", "maps/img", cwd=tmp_path)
    assert "0 replay folders written, 1 were there" in again.stdout

@pytest.mark.real
def test_every_stadium_replay_imports_and_is_sound(tmp_path, real):
    done = tmlab("import", real("replays/stadium"), cwd=tmp_path)
    assert done.returncode == 0 and "28 replay folders written" in done.stdout, done.stdout + done.stderr
    store = ReplayStore(tmp_path / "maps/img")
    assert len(store.replays) == 28 and not store.problems and (store.replays.frame_source == "rendered").all()
    assert tmlab("check", cwd=tmp_path).returncode == 0

def test_train_evaluate(tmp_path):
    "A run, its best weights, and how they drive; a finished run is not begun again."
    settings = ["--tracks", '["flat:1:5"]', "--run-name", "r", "--total-decisions", 320, "--num-envs", 8, "--batch-size", 16, "--start-learning", 160, "--buffer-size", 400, "--eval-every", 160,
                "--eval-episodes", 2, "--log-every", 160, "--no-use-image-head", "--threads", 1]
    run = lambda *args: tmlab(*args, cwd=tmp_path)
    done = run("train", *settings)
    assert done.returncode == 0 and "decisions/s" in done.stderr, done.stderr
    assert "finished already" in run("train", *settings).stdout
    for folder in ("output/train/r", "output/train/r/best"):
        shown = run("evaluate", folder, "--episodes", 3, "--worst", 2, "--csv", "e.csv", "--reference")
        assert shown.returncode == 0, shown.stderr
        assert "of 3 finished" in shown.stdout and "95 % interval" in shown.stdout and shown.stdout.count("worst   episode") == 2
        assert len((tmp_path / "e.csv").read_text().splitlines()) == 4
    one_error(run("evaluate", "output/train/r", "--set", "inputs=smell"), "smell")
    shutil.copytree(tmp_path / "output/train/r/best", tmp_path / "bare")
    one_error(run("evaluate", "bare"), "bare", "tracks")
    bare = lambda *settings: run("evaluate", "bare", "--tracks", "flat:1:5", "--episodes", 2, "--set", *settings)
    one_error(bare("stack"), "NAME=VALUE"); one_error(bare("stak=4"), "--stack"); one_error(bare("stack=x"), "stack"); one_error(bare("use_image_head=true"), "use_image_head=False")
    assert "of 2 finished" in bare("use_image_head=false", "inputs=floats").stdout
