"Pretraining: killed runs end as if they had not been killed; bad input is named; every framework and task leaves a whole artifact."
import csv, json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
import torch
from tmlab.models.encoder import ARCH_HASH
from tmlab.replays.manifest import write_replay
from tmlab.training.artifacts import check_artifact, read_artifact, read_metrics
from tmlab.training.pretrain import LightningOptions, PretrainConfig, pretrain

QUIET = dict(tensorboard=False, csv_logger=False)

@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "Small nets are fastest on one thread, the more so when other tests run beside these."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("data") / "img", np.random.default_rng(0)
    for track in range(3):
        frames = rng.integers(0, 256, (20, 8, 8), np.uint8).repeat(8, 1).repeat(8, 2)
        write_replay(root / f"flat-{track}-1s-v1" / "replay_0", frames, dict(time_ms=np.arange(20) * 50), dict(frame_source="rendered"))
    return root

def config(data, out, lightning=QUIET, **kw):
    return PretrainConfig(**dict(data_dir=str(data), output_dir=str(out), epochs=5, batch_size=16, val_fraction=0.3, tqdm=False, run_name="r", workers=2,
                                 lightning=LightningOptions(**lightning)) | kw)

CHILD = """
import json, sys
from tmlab.training.pretrain import PretrainConfig, pretrain
pretrain(PretrainConfig(**json.loads(sys.argv[1])))
"""

def killed(cfg, when):
    "Run `pretrain(cfg)` in another process and SIGKILL it as soon as `when()` holds."
    env = os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()))
    child = subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(cfg.model_dump(mode="json"))], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not when():
        assert child.poll() is None, f"ended before it could be killed: {child.stderr.read().decode()[-2000:]}"
        assert time.time() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()

@pytest.mark.parametrize("framework,task", [("lightning", "vae"), ("native", "simclr")])
def test_sigkill_then_the_same_end(data, tmp_path, framework, task):
    kw = dict(framework=framework, task=task, epochs=30, n_stack=2, lightning=dict(save_top_k=2, log_every_n_steps=1))
    whole = pretrain(config(data, tmp_path / "whole", **kw))
    cfg = config(data, tmp_path / "killed", **kw)
    run = Path(cfg.output_dir) / "r"
    rows = lambda: len(read_metrics(run / "metrics.csv")) if (run / "metrics.csv").exists() else 0
    killed(cfg, lambda: rows() >= 2)
    first = rows()
    assert 2 <= first < 30 and check_artifact(run) != [] and not (run / "encoder.pt").exists()
    killed(cfg, lambda: rows() >= first + 2)                      # and once more, now in a resumed run
    assert first < rows() < 30
    time.sleep(1.1)                                               # TensorBoard orders the files of a directory by the second they were begun
    again = pretrain(cfg)
    assert again.resumed and check_artifact(run) == []
    for name in ("encoder.pt", "metrics.csv"): assert (run / name).read_bytes() == (whole.dir / name).read_bytes(), name
    names = lambda d: sorted(p.name for p in (d / "checkpoints").glob("*.ckpt"))
    assert names(run) == names(whole.dir) and len(names(run)) == 3
    assert not [p for p in run.rglob(".tmp-*")]
    check_logs(run, read_metrics(run / "metrics.csv"))

def check_logs(run, rows):
    "Every epoch stands in the TensorBoard events and in some part of the CSV log, with the numbers of `metrics.csv`."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("train_loss")
    assert [np.float32(e.value) for e in events] == [np.float32(r["train_loss"]) for r in rows]
    assert [e.step for e in events] == [len(range(0, 38, 16)) * (r["epoch"] + 1) - 1 for r in rows]
    parts = [list(csv.DictReader(p.open())) for p in sorted((run / "csv").glob("version_*/metrics.csv"))]
    found = {int(float(row["epoch"])): float(row["train_loss"]) for part in parts for row in part if row.get("train_loss")}
    assert len(parts) == 3 and found == {r["epoch"]: r["train_loss"] for r in rows}

def test_killed_before_the_artifact(data, tmp_path):
    cfg = config(data, tmp_path, epochs=2)
    run = pretrain(cfg)
    record = json.loads((run.dir / "run.json").read_text())
    before = (run.dir / "encoder.pt").read_bytes()
    (run.dir / "run.json").write_text(json.dumps(record | dict(status="running")))
    for name in ("encoder.pt", "pretrain_meta.json"): (run.dir / name).unlink()
    assert pretrain(cfg).finished and (run.dir / "encoder.pt").read_bytes() == before and check_artifact(run.dir) == []

@pytest.mark.parametrize("task,framework,mode,n", [("ae", "native", "concat", 3), ("vae", "lightning", "channel", 2), ("simclr", "lightly", "channel", 1)])
def test_every_path_leaves_a_whole_artifact(data, tmp_path, task, framework, mode, n):
    run = pretrain(config(data, tmp_path, task=task, framework=framework, stack_mode=mode, n_stack=n, epochs=1, image_size=70, image_normalization="iqn"))
    state, meta, rows = read_artifact(run.dir)
    assert meta["in_channels"] == (n if mode == "channel" else 1) and (meta["arch_hash"] == ARCH_HASH) == (meta["in_channels"] == 1)
    assert (meta["image_size"], meta["framework"], meta["normalisation"]["black"]) == (70, framework, -1.0) and len(rows) == 1

def test_a_last_batch_of_one(data, tmp_path):
    run = pretrain(config(data, tmp_path, task="simclr", val_fraction=0, batch_size=59, epochs=1))       # 60 frames
    assert check_artifact(run.dir) == []

def test_frameworks_agree_on_simclr(data, tmp_path):
    runs = [pretrain(config(data, tmp_path / f, task="simclr", framework=f, epochs=2)) for f in ("lightning", "native", "lightly")]
    assert len({(r.dir / "metrics.csv").read_bytes() for r in runs}) == 1 == len({(r.dir / "encoder.pt").read_bytes() for r in runs})

def test_early_stopping(data, tmp_path):
    for framework in ("lightning", "native"):
        run = pretrain(config(data, tmp_path / framework, framework=framework, epochs=20, lightning=QUIET | dict(patience=2, min_delta=1.0)))
        _, meta, rows = read_artifact(run.dir)
        assert len(rows) == 3 == meta["epochs_trained"] and meta["stopped_early"]

def test_without_validation_the_training_loss_is_watched(data, tmp_path):
    run = pretrain(config(data, tmp_path, val_fraction=0, epochs=2))
    _, meta, rows = read_artifact(run.dir)
    assert set(rows[0]) == {"epoch", "train_loss"} and meta["n_val_samples"] == 0 and meta["val_loss_final"] is None

def test_nan_stops_and_keeps_the_checkpoint(data, tmp_path):
    cfg = config(data, tmp_path, lr=1e30, grad_clip=0)
    with pytest.raises(ValueError, match="the loss became .* lower lr"): pretrain(cfg)
    assert check_artifact(tmp_path / "r") != []
    with pytest.raises(ValueError, match="the loss became"): pretrain(cfg)       # the lock is free, and the cause is said again

def test_other_settings_and_other_frames_are_other_runs(data, tmp_path):
    import shutil
    mine = tmp_path / "img"
    shutil.copytree(data, mine)
    run = pretrain(config(mine, tmp_path / "out", epochs=1))
    assert pretrain(config(data, tmp_path / "out", epochs=1)).dir == run.dir       # the same frames elsewhere: the same run
    with pytest.raises(ValueError, match="epochs: 1 -> 2"): pretrain(config(mine, tmp_path / "out", epochs=2))
    shutil.rmtree(mine / "flat-2-1s-v1")
    with pytest.raises(ValueError, match="data_fingerprint"): pretrain(config(mine, tmp_path / "out", epochs=1))

def test_bad_input_is_named(data, tmp_path):
    for match, kw in {"no such folder": dict(data_dir=str(tmp_path / "nowhere")), "framework lightly trains simclr": dict(framework="lightly"),
                      "accelerator gpu": dict(lightning=QUIET | dict(accelerator="gpu")), "cannot be read": dict(rl_config_path=str(tmp_path / "absent.yaml"))}.items():
        if "accelerator" in match and torch.cuda.is_available(): continue
        with pytest.raises(ValueError, match=match): pretrain(config(data, tmp_path / "out", **kw))
    for argv in (["--task", "gan"], ["--epochs", "0"], ["--val-fraction", "1"], ["--lr", "0"], ["--epoch", "3"], ["--no-csv-loggers"]):
        with pytest.raises(ValueError): PretrainConfig.load(None, argv)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*/encoder.pt"))

def test_a_damaged_frame_is_named(data, tmp_path):
    import shutil
    mine = tmp_path / "img"
    shutil.copytree(data, mine)
    frame = sorted(mine.rglob("*.jpeg"))[5]
    frame.write_bytes(frame.read_bytes()[:100])
    for kw in ({}, dict(preprocess_cache_dir=str(tmp_path / "cache"))):
        with pytest.raises(ValueError, match=frame.name): pretrain(config(mine, tmp_path / "out", val_fraction=0, **kw))

def test_torch_and_lightning_are_not_loaded_early():
    code = "import sys, tmlab; assert 'torch' not in sys.modules; import tmlab.training.pretrain; assert 'pytorch_lightning' not in sys.modules and 'lightly' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
