"Training that is killed, resumed, given bad input."
import json, os, signal, subprocess, sys, time
import numpy as np
import pandas as pd
import pytest
import torch
from tmlab.core.runs import read_json
from tmlab.evidence.events import read_events
from tmlab.evidence.kpi import compare, load_runs
from tmlab.training.buffer import load_rows, save_rows
from tmlab.training.iqn import RunLog, Trainer, read_checkpoint, train_iqn
from tmlab.training.iqn_config import LINESIGHT, TrainConfig
from tmlab.training.learner import mask_inputs, quantile_values, resolve_precision
from tmlab.training.rollout import evaluate, make_env, resolve_tracks
from tmlab.training.weights import export_linesight, load_linesight

TINY = dict(tracks=["flat:1:5"], iqn_embedding_dimension=8, num_envs=8, batch_size=32, total_decisions=1600, start_learning=200, buffer_size=1000, eval_every=800,
            eval_episodes=2, eval_quantiles=2, log_every=80, save_every=160, schedule_speed=500, precision="fp32", threads=1)
CHILD = "import sys; from tmlab.training.iqn import TrainConfig, train_iqn; train_iqn(TrainConfig(output_dir=sys.argv[1], run_name='r', **eval(sys.argv[2])))"

def logged(folder):
    "The record without measured times."
    rows = pd.read_csv(folder / "metrics.csv")
    return rows[~rows.tag.str.contains("_per_s|active_seconds|_hours|_percentage_|_duration")][["decisions", "gradient_steps", "tag", "value"]].reset_index(drop=True)

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train_iqn(TrainConfig(**TINY, output_dir=tmp_path_factory.mktemp("whole"), run_name="r"))

def test_killed_twice_and_resumed(whole, tmp_path):
    "SIGKILL soon after the first and a later checkpoint; the third start finishes with the bytes of the run that was left alone."
    for checkpoints in (1, 3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), repr(TINY)], stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seen, last = 0, None
        while seen < checkpoints and child.poll() is None:
            stat = (tmp_path / "r/checkpoint.pt").stat().st_mtime_ns if (tmp_path / "r/checkpoint.pt").exists() else None
            seen, last = seen + (stat != last), stat
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL); child.wait()
        assert read_json(tmp_path / "r/run.json")["status"] == "running" and child.returncode == -signal.SIGKILL
    run = train_iqn(TrainConfig(**TINY, output_dir=tmp_path, run_name="r"))
    pd.testing.assert_frame_equal(logged(whole.dir), logged(run.dir), check_exact=True)
    for name in ("weights1.torch", "weights2.torch", "evaluation.csv"): assert (whole.dir / name).read_bytes() == (run.dir / name).read_bytes(), name
    steps = read_events(run.dir / "tensorboard").query("tag == 'Training/loss'").step
    assert steps.is_unique and steps.is_monotonic_increasing and not list(run.dir.glob(".tmp-*"))

def test_stopped_on_the_last_step_and_resumed(whole, tmp_path, monkeypatch):
    "Between the last evaluation and the mark `finished` the whole checkpoint is still there."
    from tmlab.core.runs import Run
    def power_cut(*a, **k): raise SystemExit
    with monkeypatch.context() as m:
        m.setattr(Run, "finish", power_cut)
        with pytest.raises(SystemExit): train_iqn(TrainConfig(**TINY, output_dir=tmp_path, run_name="r"))
    run = train_iqn(TrainConfig(**TINY, output_dir=tmp_path, run_name="r"))
    assert run.finished and run.result["metres"] == whole.result["metres"]
    pd.testing.assert_frame_equal(logged(whole.dir), logged(run.dir), check_exact=True)

class Live:
    "Cars that cannot be taken up where they were, as in a game."
    def __init__(self, cfg, steps=None):
        self.cars, self.num_envs, self.steps = make_env(resolve_tracks(cfg.tracks), cfg.num_envs, cfg.image_size, 1, cfg.start), cfg.num_envs, steps
        self.reset, self.close = self.cars.reset, self.cars.close
    def step(self, action):
        if self.steps is not None: self.steps -= 1
        if self.steps == 0: raise ConnectionError("the game has gone")
        return self.cars.step(action)

def test_other_cars_that_go_away(whole, tmp_path, capsys):
    "What the run learned before is kept, its windows do not cross the gap, and it is another run than the world's."
    cfg = TrainConfig(**TINY, output_dir=tmp_path, run_name="r")
    with pytest.raises(ConnectionError): train_iqn(cfg, env=Live(cfg, 60))
    saved = read_checkpoint(tmp_path / "r")
    assert saved["world"] is None and saved["decisions"] == 320
    seen = []
    run = train_iqn(cfg, env=Live(cfg), watch=lambda folder, trainer, episodes: seen.append((trainer.decisions, trainer.buffer.truncated[320 // 8 - 1].all())))
    assert run.finished and run.result["decisions"] == 1600 and "begin anew" in capsys.readouterr().out
    assert seen[0] == (800, True) and len(seen) == 2
    with pytest.raises(ValueError, match="env"): train_iqn(cfg)

def test_result_and_evaluation(whole):
    assert whole.finished and whole.result["decisions"] == 1600 and whole.result["gradient_steps"] > 0
    again = evaluate(whole.dir, TINY["tracks"], 2, TrainConfig().eval_seed, quantiles=2, precision="fp32")
    pd.testing.assert_frame_equal(again, pd.read_csv(whole.dir / "evaluation.csv"))
    other = evaluate(whole.dir, TINY["tracks"], 2, 5, quantiles=2, precision="fp32")
    assert not np.array_equal(other.metres, again.metres)
    assert "buffer" not in read_checkpoint(whole.dir)

def test_compare_reads_the_run(whole):
    tables = compare([whole.dir], interval_min=None, step_interval=400, gradient_interval=None)
    t = tables["Race/eval_race_time_trained_flat-1-5s-v2 by environment steps"]
    assert list(t.r_n) == [2, 4, 4, 6] and load_runs([whole.dir])["r"].attrs["clock"] == "active training time"
    assert "Training/loss by gradient steps" in tables and "Race/eval_metres_trained_flat-1-5s-v2 by minutes" in tables

def test_other_settings_are_refused(whole):
    with pytest.raises(ValueError, match="seed: 0 -> 1"): train_iqn(TrainConfig(**TINY, output_dir=whole.dir.parent, run_name="r", seed=1))

def test_starts_from_weights_exactly_or_not_at_all(whole, tmp_path):
    "The first evaluation of a run begun from weights is theirs; weights of another shape, or only one of the two files, are refused before a folder is made."
    kw = TINY | dict(total_decisions=80, init_dir=whole.dir)
    run = train_iqn(TrainConfig(**kw, output_dir=tmp_path, run_name="r"))
    first = logged(run.dir).query("decisions == 0 and tag == 'Race/eval_metres_trained_flat-1-5s-v2'").value
    assert list(first) == [whole.result["metres"]]
    with pytest.raises(ValueError, match="image_size|shape|features|expected"): train_iqn(TrainConfig(**kw | dict(image_size=84), output_dir=tmp_path, run_name="s"))
    (tmp_path / "one").mkdir(); (tmp_path / "one/weights1.torch").write_bytes((whole.dir / "weights1.torch").read_bytes())
    with pytest.raises(ValueError, match="weights2.torch"): train_iqn(TrainConfig(**kw | dict(init_dir=tmp_path / "one"), output_dir=tmp_path, run_name="s"))
    assert not (tmp_path / "s").exists()

@pytest.mark.parametrize("inputs", ["pixels", "floats"])
def test_unseen_inputs_do_not_matter(inputs):
    from tmlab.models.iqn import IQN, draw_tau
    torch.manual_seed(0)
    net, tau, g = IQN(iqn_embedding_dimension=8), draw_tau(3, 4), torch.Generator().manual_seed(0)
    image, floats = torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8, generator=g), torch.randn(3, 184, generator=g)
    value = lambda i, f: quantile_values(net, *mask_inputs(i, f, inputs), tau).detach()
    changed = floats.clone(); changed[:, 62:183] += 1
    assert torch.equal(value(image, floats), value(255 - image, floats)) == (inputs == "floats")
    assert torch.equal(value(image, floats), value(image, changed)) == (inputs == "pixels")

def test_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="checkpoint.pt: not a checkpoint"): read_checkpoint(tmp_path)

def test_record_shorter_than_checkpoint(tmp_path):
    RunLog(tmp_path).close()
    with pytest.raises(ValueError, match="delete"): RunLog(tmp_path, rows=3)

def test_published_settings_are_accepted():
    cfg = TrainConfig(**LINESIGHT)
    assert cfg.batch_size == 512 and resolve_precision("fp32") == "fp32"

OPTIONS = dict(stack=dict(stack=3), recurrent=dict(stack=2, recurrent=True), extras={}, no_image=dict(use_image_head=False), no_floats=dict(use_float_head=False),
               priorities=dict(priority_alpha=0.6), ddqn=dict(ddqn=True))

@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_network_trains_and_resumes(name, tmp_path):
    "Losses, actions and priorities of a run taken up from its checkpoint are those of the run that went on; the policy that is evaluated sees what the trained one saw."
    (tmp_path / "z.json").write_text(json.dumps({resolve_tracks(TINY["tracks"])[0].id: [0.5, -1]}))
    options = OPTIONS[name] | (dict(extras=["progress", str(tmp_path / "z.json")]) if name == "extras" else {})
    cfg = TrainConfig(**TINY | options)
    trainer = lambda: Trainer(cfg, resolve_tracks(cfg.tracks))
    a, b = trainer(), trainer()
    for _ in range(40): a.advance()
    state, save = a.state_dict(), save_rows(a.buffer, tmp_path)
    torch.save(state, tmp_path / "state.pt")
    b.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    load_rows(b.buffer, tmp_path, save)
    for t in (a, b):
        t.recent["loss"].clear()
        for _ in range(10): t.advance()
    assert len(a.recent["loss"]) >= 8 and a.recent["loss"] == b.recent["loss"] and all(np.isfinite(a.recent["loss"]))
    rows = a.buffer.state_dict(), b.buffer.state_dict()
    for field in ("action", "reward", "image", "floats", "priority"): assert torch.equal(rows[0][field], rows[1][field]), field
    assert (a.buffer.priority.unique().numel() > 2) == (name == "priorities")
    for t in (a, b): t.env.close()

def test_stacked_frames_are_those_of_the_race():
    "What the policy sees while driving is what is sampled from the buffer later."
    cfg = TrainConfig(**TINY | dict(stack=3))
    t, seen = Trainer(cfg, resolve_tracks(cfg.tracks)), []
    for _ in range(30): seen.append(t.obs["image"].clone()); t.act()
    b = t.draw(t.buffer, 200, torch.Generator().manual_seed(0))
    assert torch.equal(b.image, torch.stack(seen)[b.index // cfg.num_envs, b.index % cfg.num_envs])
    assert (b.image[:, 0] != b.image[:, 2]).any()
    t.env.close()

def test_warm_start_by_a_policy(whole, tmp_path):
    "The buffer holds what the network of a folder drives, marked as an expert's, before the first decision is counted."
    cfg = TrainConfig(**TINY | dict(warm_start_dir=whole.dir, warm_start_decisions=400))
    t = Trainer(cfg, resolve_tracks(cfg.tracks))
    assert t.warm_start() == len(t.buffer) == 400 and t.decisions == 0 and t.buffer.expert[:50].all()
    t.advance()
    assert not t.buffer.expert[50].any() and t.learner.gradient_steps
    t.env.close()
    run = train_iqn(TrainConfig(**TINY | dict(warm_start_dir=whole.dir, warm_start_decisions=400, total_decisions=160), output_dir=tmp_path, run_name="r"))
    assert logged(run.dir).query("tag == 'Buffer/warm_start_decisions'").value.tolist() == [400]

def test_the_best_weights_are_kept(whole):
    "`best/` drives as the best evaluation of the run did, seen through the settings of the run."
    m = logged(whole.dir)
    metres = m[m.tag == "Race/eval_metres_trained_flat-1-5s-v2"].groupby("decisions").value.first()
    assert not m[m.tag.str.contains("eval_race_finished")].value.any()  # so metres decide
    best = evaluate(whole.dir / "best", episodes=2, seed=TrainConfig().eval_seed, quantiles=2, precision="fp32")
    assert best.metres.mean() == metres.max() and len(metres) == 3

def test_a_flying_lap_is_no_best_time():
    "A car that starts shortly before the finish drives no lap."
    best = {}
    for start in ("flying", "random"):
        cfg = TrainConfig(**TINY | dict(start=start))
        t = Trainer(cfg, resolve_tracks(cfg.tracks))
        t.race_over(dict(time_ms=np.full(8, 1500.0), progress_m=np.full(8, 90.0), track=np.zeros(8, int)), 0, True)
        best[start] = t.best_ms[t.tracks[0].id]
        t.env.close()
    assert best == dict(flying=300_000, random=1500)

@pytest.mark.parametrize("wrong, words", [
    (dict(buffer_size=64), "n_step"), (dict(start_learning=5000), "start_learning 5000"), (dict(warm_start_dir="x"), "warm_start_decisions"), (dict(epsilon="0:1 10:0"), "positive"), (dict(n_step=0), "from 1 on"), (dict(n_step="0:10 5:x"), "expected points"),
    (dict(expert_dir="x"), "expert_share"), (dict(inputs="floats", use_float_head=False), "see nothing"), (dict(inputs="pixels", use_image_head=False), "see nothing"),
])
def test_settings_that_could_not_work_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words): TrainConfig(**TINY | wrong)

def test_steps_of_a_window_follow_their_schedule():
    cfg = TrainConfig(**TINY | dict(n_step="0:10 2000:10 4000:3", schedule_speed=10))
    t, seen = Trainer(cfg, resolve_tracks(cfg.tracks)), []
    for t.decisions in (0, 200, 300, 400, 900): seen.append(t.n_step)
    t.env.close()
    assert seen == [10, 10, 6, 3, 3] and cfg.most_steps == 10 and TrainConfig(n_step=3).n_step == "3"  # 6.5 is rounded to the even number

def test_a_card_that_is_not_there(tmp_path):
    if torch.cuda.is_available(): pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="no graphics card"): train_iqn(TrainConfig(**TINY | dict(device="cuda"), output_dir=tmp_path, run_name="r"))
    assert not list(tmp_path.iterdir())

def test_what_the_buffer_begins_with_is_part_of_the_run(whole, tmp_path):
    "Warm starts from different folders, and a prior from the same, are different runs."
    from tmlab.training.iqn import identity
    (tmp_path / "m/t/r").mkdir(parents=True); (tmp_path / "m/t/r/manifest.json").write_text("[]")
    settings = [dict(), dict(warm_start_dir=whole.dir), dict(prior_dir=whole.dir), dict(warm_start_dir=tmp_path / "m")]
    kept = [identity(cfg := TrainConfig(**TINY | dict(warm_start_decisions=400) | s), resolve_tracks(cfg.tracks)) for s in settings]
    assert all(a != b for i, a in enumerate(kept) for b in kept[:i])
