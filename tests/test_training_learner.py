"The learner's constraints: frozen parts, imitation, starting from parts of other networks, further heads; runs that break, and resuming without the buffer."
import os, shutil
import numpy as np
import pandas as pd
import pytest
import torch
from tmlab.core.runs import read_json
from tmlab.evidence.events import read_events
from tmlab.models.encoder import encoder_dim, image_head
from tmlab.models.iqn import IQN
from tmlab.training import iqn, learner as room
from tmlab.training.artifacts import save_torch
from tmlab.training.buffer import Batch, ReplayBuffer
from tmlab.training.iqn import Trainer, read_checkpoint, run_kpis, train_iqn, with_gap
from tmlab.training.iqn_config import TrainConfig
from tmlab.training.learner import Aux, Diverged, Learner, load_parts, parts_of
from tmlab.training.rollout import policy_values, resolve_tracks
from tmlab.training.weights import export_linesight, load_linesight

SMALL = dict(iqn_embedding_dimension=8, batch_size=16, target_every=16)
TINY = dict(tracks=["flat:1:5"], iqn_embedding_dimension=8, num_envs=8, batch_size=32, total_decisions=640, start_learning=160, buffer_size=1000, reuse=2, eval_every=320,
            eval_episodes=2, eval_quantiles=2, log_every=80, save_every=160, schedule_speed=500, precision="fp32", threads=1)
ALL = ("encoder", "floats", "advantage", "value", "quantiles")


def batch(n=16, seed=0, **kw):
    "A random batch of `n` rows."
    g = torch.Generator().manual_seed(seed)
    images, floats = torch.randint(0, 256, (2, n, 1, 64, 64), dtype=torch.uint8, generator=g), torch.randn(2, n, 184, generator=g)
    out = dict(image=images[0], floats=floats[0], action=torch.randint(0, 12, (n,), generator=g), reward=torch.randn(n, generator=g), next_image=images[1], next_floats=floats[1],
               discount=torch.full((n,), 0.9), expert=torch.arange(n) % 2 == 0, weight=torch.ones(n), index=torch.arange(n))
    return Batch(**out | kw)


def copies(net): return {part: [p.detach().clone() for p in params] for part, params in parts_of(net).items()}


def moved(net, before):
    "Parts of which every tensor changed; a part of which only some changed is an error."
    out = []
    for part, params in parts_of(net).items():
        changed = [not torch.equal(p, q) for p, q in zip(params, before[part])]
        assert all(changed) or not any(changed), (part, changed)
        out += [part] * all(changed)
    return sorted(out)


def steps(learner, n, generator, **kw): return [learner.learn(batch(seed=k), 1e-3, generator, **kw) for k in range(n)]


def start_weights(folder, seed=0, change=None, **kw):
    "weights1/2.torch of a small network, the target's differing from the online one's; `change(net)` alters both."
    nets = []
    for k in (seed, seed + 1000):
        torch.manual_seed(k)
        nets.append(IQN(iqn_embedding_dimension=8, **kw))
        if change: change(nets[-1])
    export_linesight(nets[0], folder, target=nets[1])
    return nets[0]


# freezing

@pytest.mark.parametrize("part", ALL)
def test_a_frozen_part_does_not_move_and_then_does(part, tmp_path):
    "Neither by a step, nor by weight decay, nor in the target, although the two loaded networks differ; from step 3 on it moves in both."
    start_weights(tmp_path)
    l, g = Learner(TrainConfig(**SMALL, freeze=f"{part}:3", init_dir=tmp_path)), torch.Generator().manual_seed(0)
    net, target = copies(l.net), copies(l.target)
    assert all(torch.equal(p, q) for p, q in zip(net[part], target[part])) and not torch.equal(net["value" if part != "value" else "advantage"][0], target["value" if part != "value" else "advantage"][0])
    steps(l, 3, g)
    assert moved(l.net, net) == moved(l.target, target) == sorted(set(ALL) - {part})
    steps(l, 1, g)
    assert moved(l.net, net) == moved(l.target, target) == sorted(ALL)


def compiler():
    "Whether torch.compile's own backend can build here."
    return shutil.which(os.environ.get("CXX", "g++")) is not None

@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not compiler(), reason="torch.compile's inductor needs a C++ compiler (g++, or CXX)"))])
def test_frozen_parts_of_a_compiled_network(backend, monkeypatch):
    "The names change, the frozen tensors do not; what is unfrozen while the compiled code is in use moves from then on."
    plain = room.initial_networks
    monkeypatch.setattr(room, "initial_networks", lambda cfg: tuple(torch.compile(net, backend=backend) for net in plain(cfg)))
    monkeypatch.setattr(room, "quantile_values", torch.compile(room.quantile_values, backend=backend))
    torch._dynamo.reset(); torch._dynamo.utils.counters.clear()
    l, g = Learner(TrainConfig(**SMALL, freeze="encoder:2 advantage:-1")), torch.Generator().manual_seed(0)
    assert all(k.startswith("_orig_mod.") for k in l.net.state_dict())
    net, target = copies(l.net), copies(l.target)
    steps(l, 2, g)
    assert moved(l.net, net) == moved(l.target, target) == ["floats", "quantiles", "value"]
    steps(l, 1, g)
    assert moved(l.net, net) == moved(l.target, target) == ["encoder", "floats", "quantiles", "value"]
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # it was compiled


def test_momentum_of_before_does_not_move_a_frozen_part():
    "A frozen learner that takes over the optimiser of one that moved; where nothing is frozen, the same state moves it."
    whole, g = Learner(TrainConfig(**SMALL)), torch.Generator().manual_seed(0)
    steps(whole, 8, g)
    for freeze, want in (("encoder:-1 value:-1", ["advantage", "floats", "quantiles"]), ("", sorted(ALL))):
        l = Learner(TrainConfig(**SMALL, freeze=freeze))
        l.load_state_dict(whole.state_dict())
        assert l.opt.state[l.parts["encoder"][0]]["exp_avg"].abs().max() > 0
        before = copies(l.net)
        steps(l, 2, g)
        assert moved(l.net, before) == want


@pytest.mark.parametrize("freeze, said", [("wheels:3", "no part wheels"), (" ".join(f"{p}:3" for p in ALL), "nothing is left")])
def test_impossible_freezing(freeze, said):
    with pytest.raises(ValueError, match=said): Learner(TrainConfig(**SMALL, freeze=freeze))


# imitation

def test_no_weight_is_no_imitation():
    "λ = 0 gives the same bits as rows without the expert's flag, and as learning that is not told of λ."
    ends = []
    for flag, kw in ((True, dict(bc_weight=0.0)), (False, dict(bc_weight=1.0)), (True, {}), (True, dict(bc_weight=1.0))):
        l, g = Learner(TrainConfig(**SMALL)), torch.Generator().manual_seed(0)
        losses = [l.learn(batch(seed=k, expert=torch.full((16,), flag)), 1e-3, g, **kw)[:3] for k in range(3)]
        ends.append((losses, l.net.state_dict()))
    same = lambda a, b: a[0] == b[0] and all(torch.equal(a[1][k], b[1][k]) for k in a[1])
    assert same(ends[0], ends[1]) and same(ends[0], ends[2]) and not same(ends[0], ends[3])


@pytest.mark.parametrize("kind", ["margin", "cross_entropy"])
def test_gradient_is_the_sum_of_both(kind):
    "The gradient of a step is that of L_RL plus λ that of L_BC on the expert's rows alone."
    l, b = Learner(TrainConfig(**SMALL, bc_loss=kind)), batch()
    q = l.loss(b, torch.Generator().manual_seed(0))
    l.self_loss = torch.full((2,), 0.01)
    bc = room.imitation_loss(q[1].mean(0)[::2], b.action[::2], kind).sum()
    want = [x + 0.5 * y for x, y in zip(torch.autograd.grad(q[0].sum(), l.params, retain_graph=True), torch.autograd.grad(bc, l.params, allow_unused=True, materialize_grads=True))]
    l.cfg.clip_norm, l.cfg.clip_value = 1e9, 1e9
    l.learn(b, 0.0, torch.Generator().manual_seed(0), bc_weight=0.5)
    for p, w in zip(l.params, want): torch.testing.assert_close(p.grad, w, rtol=1e-4, atol=1e-4 * w.abs().max().item())


def test_imitation_learns_the_experts_actions():
    l, g, b = Learner(TrainConfig(**SMALL)), torch.Generator().manual_seed(0), batch(reward=torch.zeros(16))
    said = [l.learn(b, 1e-3, g, bc_weight=1.0).extra for _ in range(60)]
    assert said[0]["RL/expert_agreement"] < 0.5 < 0.9 < said[-1]["RL/expert_agreement"] and said[-1]["Training/loss_bc"] < said[0]["Training/loss_bc"] / 2


def expert_rows(steps=60, cars=4):
    "A buffer of rows with the expert's flag."
    b, g = ReplayBuffer(steps, cars), torch.Generator().manual_seed(0)
    for _ in range(steps): b.add(image=torch.randint(0, 256, (cars, 1, 64, 64), generator=g), floats=torch.randn(cars, 184, generator=g), action=3, reward=-0.05, terminated=False,
                                 truncated=False, failed=False, greedy=True, expert=True)
    return b

def test_experts_share_of_a_batch(tmp_path):
    "A quarter of every batch comes from the experts' buffer; the imitation loss is logged; the rows are part of the run's identity; without rows the share is refused."
    cfg = TrainConfig(**TINY | dict(total_decisions=320, test_share=0, expert_share=0.25, bc_weight="0:1 160000:0"), output_dir=tmp_path, run_name="r")
    t = Trainer(cfg, resolve_tracks(cfg.tracks), experts=expert_rows())
    while not t.ready: t.act()
    b = t.batch()
    assert len(b.action) == 32 and b.expert.sum() == 8 and (b.action[b.expert] == 3).all()
    t.env.close()
    run = train_iqn(cfg, experts=expert_rows())
    assert {"Training/loss_bc", "RL/expert_agreement"} <= set(pd.read_csv(run.dir / "metrics.csv").tag)
    with pytest.raises(ValueError, match="experts"): train_iqn(cfg, experts=expert_rows(steps=50))
    with pytest.raises(ValueError, match="no expert rows"): Trainer(cfg, resolve_tracks(cfg.tracks))


# starting from parts

def test_parts_of_weights_and_of_pretraining_files(tmp_path):
    "The asked parts come from the files, in both networks; everything else is what a fresh network has."
    source, fresh = start_weights(tmp_path / "iqn"), Learner(TrainConfig(**SMALL))
    torch.manual_seed(5)
    other = IQN(iqn_embedding_dimension=8)
    for name, module in (("float_head.pt", other.float_feature_extractor), ("actions_head.pt", other.A_head), ("encoder.pt", other.img_head)): save_torch(tmp_path / "pre" / name, module.state_dict())
    (tmp_path / "pre/pretrain_meta.json").write_text('{"image_normalization": "iqn"}')
    for folder, origin, asked in (("iqn", source, ["encoder", "quantiles"]), ("pre", other, ["floats", "advantage"]), ("pre", other, ["encoder"])):
        l = Learner(TrainConfig(**SMALL, init_dir=tmp_path / folder, init_parts=asked))
        for net in (l.net, l.target):
            for part, params in parts_of(net).items():
                want = parts_of(origin if part in asked else fresh.net)[part]
                assert all(torch.equal(p, q) for p, q in zip(params, want)), (folder, part)


@pytest.mark.parametrize("asked, said", [(["quantiles"], "weights1.torch"), (["floats"], "float_head.pt"), (["encoder"], "6.weight"), (["nose"], "no part nose")])
def test_missing_parts_are_named(asked, said, tmp_path):
    state = image_head().state_dict(); state.pop("6.weight")
    save_torch(tmp_path / "encoder.pt", state)
    net = IQN(iqn_embedding_dimension=8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=said): load_parts(net, tmp_path, asked)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_part_that_is_incomplete_or_of_another_shape(tmp_path):
    "Named, and a run that asks for it makes no folder."
    save_torch(tmp_path / "weights1.torch", {k: v for k, v in IQN(84, iqn_embedding_dimension=8).state_dict().items() if k != "V_head.2.bias"})
    with pytest.raises(ValueError, match="lacks V_head.2.bias"): load_parts(IQN(84, iqn_embedding_dimension=8), tmp_path, ["value"])
    with pytest.raises(ValueError, match="A_head.0.weight has shape .512, 1824., the network has .512, 768."):
        train_iqn(TrainConfig(**TINY, output_dir=tmp_path / "out", init_dir=tmp_path, init_parts=["encoder", "advantage"]))
    assert not (tmp_path / "out").exists()


# further heads

def test_further_heads_are_trained_saved_and_kept_out_of_the_weights(tmp_path):
    "A head that tells the reward from the features: its loss falls, its gradient reaches the features, the checkpoint has it, the weights have not; resuming is exact."
    def make():
        torch.manual_seed(0)
        return dict(reward=Aux(torch.nn.Linear(encoder_dim(64) + 256, 1), lambda module, x, b: (module(x)[:, 0] - b.reward) ** 2, 1.0))
    l, g, b = Learner(TrainConfig(**SMALL), aux=make()), torch.Generator().manual_seed(0), batch()
    said = [l.learn(b, 1e-3, g).extra["Training/loss_reward"] for _ in range(20)]
    assert said[-1] < said[0] / 2
    again = Learner(TrainConfig(**SMALL), aux=make())
    again.load_state_dict(l.state_dict())
    assert torch.equal(again.aux["reward"].weight, l.aux["reward"].weight)
    run = train_iqn(TrainConfig(**TINY | dict(total_decisions=320), output_dir=tmp_path, run_name="r"), aux=make())
    assert "Training/loss_reward" in set(pd.read_csv(run.dir / "metrics.csv").tag) and "reward.weight" in read_checkpoint(run.dir)["learner"]["aux"]
    net, _ = load_linesight(run.dir)
    assert len(net.state_dict()) == 22
    with pytest.raises(ValueError, match="aux"): train_iqn(TrainConfig(**TINY | dict(total_decisions=320), output_dir=tmp_path, run_name="r"))


# runs that break

def broken_run(tmp_path, **kw):
    "The `Diverged` of a run."
    with pytest.raises(Diverged) as e: train_iqn(TrainConfig(**TINY | kw, output_dir=tmp_path, run_name="r"))
    assert read_json(tmp_path / "r/run.json")["status"] == "running"
    return str(e.value)

def finite(folder): return all(torch.isfinite(v).all() for net in load_linesight(folder) for v in net.state_dict().values())


@pytest.mark.parametrize("rate, kept", [("0:1e6", 160), ("0:1e-3 160000:1e-3 160001:1e6", 320)])
def test_a_learning_rate_of_a_million(rate, kept, tmp_path):
    "Stopped with learning rate, step, losses and what broke first; the checkpoint of before stays, is named, and its weights are usable."
    said = broken_run(tmp_path, learning_rate=rate)
    assert "learning rate 1e+06" in said and "gradient step" in said and "losses before" in said, said
    assert f"checkpoint.pt, of decision {kept};" in said and read_checkpoint(tmp_path / "r")["decisions"] == kept, said
    assert "first tensor that is not finite is the" in said or "times the median" in said
    assert finite(tmp_path / "r") and load_linesight(tmp_path / "r")[0].A_head[2].weight.abs().max() < 10
    run = train_iqn(TrainConfig(**TINY | dict(init_dir=tmp_path / "r"), output_dir=tmp_path, run_name="cured"))
    assert run.finished


@pytest.mark.parametrize("poison, said", [(1e9, "times the median"), (float("nan"), "paid what is not finite")])
def test_a_poisoned_reward(poison, said, tmp_path, monkeypatch):
    "From decision 400 on one car is paid nonsense."
    make = iqn.make_env
    def poisoned(*a, **k):
        env = make(*a, **k)
        step, count = env.step, [0]
        def bad(action):
            obs, reward, *rest = step(action)
            count[0] += 1
            reward = reward.copy()
            if count[0] > 50: reward[0] = poison
            return obs, reward, *rest
        env.step = bad
        return env
    monkeypatch.setattr(iqn, "make_env", poisoned)
    text = broken_run(tmp_path, total_decisions=1600)
    assert said in text and "The last good checkpoint is" in text and finite(tmp_path / "r"), text


def test_what_broke_first_is_named():
    l, g = Learner(TrainConfig(**SMALL)), torch.Generator().manual_seed(0)
    for change, name in ((dict(next_floats=torch.full((16, 184), torch.inf)), "next_floats of the batch"), (dict(reward=torch.full((16,), torch.nan)), "reward of the batch")):
        with pytest.raises(Diverged, match=name): l.learn(batch(**change), 1e-3, g)
    assert l.gradient_steps == 0
    l.target.A_head[0].weight.data[0, 0] = torch.nan
    with pytest.raises(Diverged, match="A_head.0.weight of the target network"): l.learn(batch(), 1e-3, g)
    l = Learner(TrainConfig(**SMALL))
    for net in (l.net, l.target): net.V_head[0].weight.data.fill_(1e38)  # finite weights whose product is not
    with pytest.raises(Diverged, match="output of V_head.0 in the target network"): l.learn(batch(), 1e-3, g)


@pytest.mark.parametrize("change, epsilon, said", [
    (lambda net: [net.A_head[2].weight.data.zero_(), net.A_head[2].bias.data.zero_()], "0:0.5", "say nothing about the action"),
    (lambda net: net.A_head[2].bias.data[3].add_(10), "0:0.05", "has collapsed"),
    (lambda net: net.A_head[2].bias.data[3].add_(10), "0:0.5", None)])
def test_a_collapsed_policy_is_pointed_out_once(change, epsilon, said, tmp_path, capsys):
    "No lead at all; one action for everything while little is explored; the same while much is explored is no news."
    start_weights(tmp_path / "start", change=change)
    run = train_iqn(TrainConfig(**TINY, output_dir=tmp_path, run_name="r", init_dir=tmp_path / "start", epsilon=epsilon, epsilon_boltzmann="0:0.01", learning_rate="0:1e-9"))
    rows, out = pd.read_csv(run.dir / "metrics.csv"), capsys.readouterr().out
    assert (rows.tag == "RL/policy_collapsed").sum() == out.count("warning: decision") == (said is not None)
    if said: assert said in out
    assert {"RL/action_entropy", "RL/action_gap"} <= set(rows.tag)


# resuming without the buffer

def test_resumes_without_the_buffer(tmp_path, monkeypatch, capsys):
    "A small checkpoint; the resumed run says how many decisions it drives again, learns nothing from them but with them, and finishes with the same counts."
    kw = TINY | dict(save_buffer=False)
    advance = Trainer.advance
    def stop(self):
        if self.decisions >= 400: raise KeyboardInterrupt
        advance(self)
    with monkeypatch.context() as m:
        m.setattr(Trainer, "advance", stop)
        with pytest.raises(KeyboardInterrupt): train_iqn(TrainConfig(**kw, output_dir=tmp_path, run_name="r"))
    saved = read_checkpoint(tmp_path / "r")
    assert saved["decisions"] == 320 and "buffer" not in saved
    run = train_iqn(TrainConfig(**kw, output_dir=tmp_path, run_name="r"))
    rows = pd.read_csv(run.dir / "metrics.csv")
    refilled = rows[rows.tag == "Buffer/refilled_decisions"]
    assert refilled.value.tolist() == [160] and refilled.decisions.tolist() == [320] and refilled.gradient_steps.tolist() == [saved["learner"]["gradient_steps"]]
    assert "160 decisions driven again" in capsys.readouterr().out
    whole = train_iqn(TrainConfig(**TINY, output_dir=tmp_path, run_name="whole"))
    assert run.result["decisions"] == 640 and run.result["gradient_steps"] == whole.result["gradient_steps"]
    assert rows[rows.tag == "Training/loss"].decisions.is_unique


# the record

def test_kpis_are_those_of_the_record(tmp_path):
    "At fixed marks of three axes, from the logged races alone."
    cfg = TrainConfig(**TINY | dict(mark_decisions=250, mark_gradient_steps=15, mark_active_s=1e9), output_dir=tmp_path, run_name="r")
    run = train_iqn(cfg)
    table, rows = pd.read_csv(run.dir / "kpis.csv"), pd.read_csv(run.dir / "metrics.csv")
    assert table[table.axis == "decisions"].mark.tolist() == [250, 500, 640] and (table.axis == "active_seconds").sum() == 1
    assert table[table.axis == "gradient_steps"].mark.tolist() == [15, 30]
    assert table[table.axis == "decisions"].n.tolist() == [2, 4, 6]
    # the same table from races that were finished: 8 s at once, nothing at 320, 6 s at 640
    races, finished = (rows.tag == f"Race/eval_race_{k}_trained_flat-1-5s-v2" for k in ("time", "finished"))
    rows.loc[races, "value"], rows.loc[finished, "value"] = [8, 300, 300, 300, 6, 7], [1, 0, 0, 0, 1, 1]
    rows.to_csv(tmp_path / "metrics.csv", index=False)
    t = run_kpis(tmp_path, cfg).query("axis == 'decisions'")
    assert t.finish_rate.tolist() == [0.5, 0, 1] and t.best_s.tolist() == [8, 8, 6] and t.first_finish.tolist() == [0, 0, 0] and np.allclose(t.finish_rate_so_far, [1 / 2, 1 / 4, 1 / 2])
    assert with_gap(t, {"flat-1-5s-v2": 5.0}).gap.tolist() == pytest.approx([0.6, 0.6, 0.2]) and with_gap(t, {}).gap.isna().all()


def test_tags_in_both_families(tmp_path):
    "What upstream and its fork log under their own names is there under both."
    run = train_iqn(TrainConfig(**TINY, output_dir=tmp_path, run_name="r"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(run.dir / "tensorboard"))
    board.Reload()
    bare = {"loss", "learning_rate", "weight_decay", "n_steps", "discard_non_greedy_actions_in_nsteps", "train_on_batch_duration", "gamma", "epsilon", "epsilon_boltzmann", "memory_size",
            "learner_percentage_training", "transitions_learned_per_second", "cumul_number_batches_done", "cumul_number_frames_played", "cumul_number_target_network_updates",
            "cumul_training_hours", "grad_norm_history_median", "eval_race_time_trained_flat-1-5s-v2", "avg_Q_trained_flat-1-5s-v2"}
    grouped = {"Training/loss", "RL/gamma", "Race/eval_race_time_trained_flat-1-5s-v2", "Performance/learner_percentage_training", "Buffer/size", "Gradients/norm_median"}
    assert bare | grouped <= set(board.Tags()["scalars"])
    assert len(read_events(run.dir / "tensorboard")) == len(pd.read_csv(run.dir / "metrics.csv"))


# exploring with a prior; a loss without learning

def test_exploring_with_a_prior_policy(tmp_path):
    "With ε = 1 and the prior's share 1, every action is the prior's; where the share has run out, none is asked for."
    start_weights(tmp_path, seed=7)
    cfg = TrainConfig(**TINY | dict(prior_dir=tmp_path, prior="0:1 40000:1 40001:0", epsilon="0:1"))
    t = Trainer(cfg, resolve_tracks(cfg.tracks))
    net, asked, policy = load_linesight(tmp_path)[0], [], t.prior
    t.prior = lambda obs: asked.append(t.decisions) or policy(obs)
    for k in range(12):
        g = torch.Generator(); g.set_state(t.random["prior"].get_state())
        obs = t.obs
        t.act()
        if k < 10: assert torch.equal(t.buffer.action[k].long(), policy_values(net, obs, 8, g).argmax(1))
    assert asked == [8 * k for k in range(11)]
    t.env.close()


def test_loss_of_a_batch_that_is_not_learned_from():
    "The mean that `learn` would report; nothing changes."
    l, b = Learner(TrainConfig(**SMALL)), batch()
    steps(l, 2, torch.Generator().manual_seed(0))
    state = {k: v.clone() for k, v in l.net.state_dict().items()}
    first, second = (l.evaluate_loss(b, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second and all(torch.equal(v, state[k]) for k, v in l.net.state_dict().items())
    assert l.learn(b, 1e-3, torch.Generator().manual_seed(3)).loss == pytest.approx(first, rel=1e-6)


def test_expert_rows_from_replays(tmp_path, capsys):
    "A folder of recorded laps: their decisions are a share of every batch; what cannot be used, or imitated, is said."
    from tmlab.world.record import record_replays
    record_replays(resolve_tracks(["flat:1:5"]), tmp_path / "maps/img", per_track=2, quiet=True)
    kw = TINY | dict(total_decisions=320, expert_dir=tmp_path / "maps/img")
    run = train_iqn(TrainConfig(**kw | dict(expert_share=0.5, bc_weight="0:1"), output_dir=tmp_path, run_name="r"))
    rows = pd.read_csv(run.dir / "metrics.csv")
    assert "expert decisions of 2 replays" in capsys.readouterr().out and {"Training/loss_bc", "RL/expert_agreement"} <= set(rows.tag)
    with pytest.raises(ValueError, match="no row would be imitated"): train_iqn(TrainConfig(**kw | dict(bc_weight="0:1"), output_dir=tmp_path, run_name="s"))
    with pytest.raises(ValueError, match="no such folder"): train_iqn(TrainConfig(**kw | dict(expert_dir=tmp_path / "none", expert_share=0.5), output_dir=tmp_path, run_name="s"))


def test_loss_of_races_kept_for_testing(tmp_path):
    "Logged where races are kept; looking at it changes nothing: a run that does not look has the same weights."
    kw = TINY | dict(test_share=0.3)
    run = train_iqn(TrainConfig(**kw, output_dir=tmp_path, run_name="r"))
    rows = pd.read_csv(run.dir / "metrics.csv")
    assert (rows.tag == "Training/loss_test").sum() > 2 and np.isfinite(rows[rows.tag == "Training/loss_test"].value).all()
    other = train_iqn(TrainConfig(**TINY | dict(test_share=0), output_dir=tmp_path, run_name="none"))
    assert "Training/loss_test" not in set(pd.read_csv(other.dir / "metrics.csv").tag)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Trainer, "test_loss", lambda self: None)
        blind = train_iqn(TrainConfig(**kw, output_dir=tmp_path, run_name="blind"))
    assert all((blind.dir / f"weights{k}.torch").read_bytes() == (run.dir / f"weights{k}.torch").read_bytes() for k in (1, 2))


def test_calibrated_before_the_first_step(tmp_path, monkeypatch):
    "Once, with returns of whole mini-races; the greedy actions stay; a buffer too short for them is refused."
    reports, plain = [], Trainer.calibrate
    monkeypatch.setattr(Trainer, "calibrate", lambda self: reports.append((self.learner.gradient_steps, plain(self))))
    start_weights(tmp_path / "start", change=lambda net: [p.data.mul_(50) for p in net.A_head[2].parameters()])
    kw = TINY | dict(total_decisions=1600, buffer_size=1600, init_dir=tmp_path / "start", calibrate=True, eval_every=1600)
    train_iqn(TrainConfig(**kw, output_dir=tmp_path, run_name="r"))
    (step, report), = reports
    assert step == 0 and report["error"] < report["error_before"] / 2 and 0 < report["advantage"] < 1 and report["n"] >= 32, report
    with pytest.raises(ValueError, match="buffer_size of at least 1128"): TrainConfig(**kw | dict(buffer_size=1000))


def test_importance_weights_scale_the_gradient():
    gradients = []
    for weight in (1.0, 0.5):
        l = Learner(TrainConfig(**SMALL, clip_norm=1e9, clip_value=1e9))
        l.learn(batch(weight=torch.full((16,), weight)), 0.0, torch.Generator().manual_seed(0))
        gradients.append(l.net.V_head[0].weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0] / 2)


def test_parts_of_other_networks():
    "An LSTM is a part like the others, a head that is not there is none; a diagnosis looks through both."
    l, g = Learner(TrainConfig(**SMALL, stack=2, recurrent=True, freeze="lstm:1")), torch.Generator().manual_seed(0)
    two = lambda **kw: batch(**kw)._replace(image=torch.zeros(16, 2, 64, 64, dtype=torch.uint8), next_image=torch.zeros(16, 2, 64, 64, dtype=torch.uint8))
    before = copies(l.net)
    l.learn(two(), 1e-3, g)
    assert "lstm" not in moved(l.net, before) and "floats" in moved(l.net, before)
    l.learn(two(), 1e-3, g)
    assert "lstm" in moved(l.net, before)
    with pytest.raises(Diverged, match="reward of the batch"): l.learn(two(reward=torch.full((16,), torch.nan)), 1e-3, g)
    with pytest.raises(ValueError, match="no part encoder"): Learner(TrainConfig(**SMALL, use_image_head=False, freeze="encoder:1"))
