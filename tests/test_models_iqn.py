"The IQN against its formula in plain numpy, pinned; its options from settings to driving and back from disk."
import copy, math
import numpy as np
import pytest
import torch
from tmlab.models.encoder import normalise_image
from tmlab.models.iqn import IQN, draw_tau
from tmlab.replays.floats import FLOAT_MEAN, FLOAT_STD
from tmlab.training import rollout as rollout_room
from tmlab.training.buffer import Batch
from tmlab.training.iqn_config import TrainConfig, network_options
from tmlab.training.learner import Learner, initial_networks, mask_inputs, quantile_values
from tmlab.training.rollout import make_env, policy_values, reference_times, resolve_tracks, run_config, seen, start
from tmlab.training.weights import export_linesight, load_linesight
from tmlab.world.car import CAR
from tmlab.world.env import RaceVectorEnv
from tmlab.world.expert import ReferenceTime, load_reference, save_reference
from tmlab.world.racing_line import car_digest

CASES = {  # arguments, then rows 0 and 5 of Q, actions 0, 5 and 11
    "64x64": (dict(image_size=64, iqn_embedding_dimension=128), [[0.77517, 5.68686, 4.00591], [-0.92847, 2.62142, 0.10934]]),
    "160x120": (dict(image_size=(120, 160), iqn_embedding_dimension=64), [[2.79711, 7.21085, 5.02267], [-0.45208, 2.13037, 0.77875]]),
    "stack": (dict(stack=4), [[1.02888, 5.24363, 4.92897], [-0.30445, 3.05392, 1.31297]]),
    "recurrent": (dict(stack=4, recurrent=True), [[-0.24063, 2.28703, 2.36267], [0.13639, 1.36006, 0.11985]]),
    "floats": (dict(use_image_head=False), [[0.38584, 0.09792, -0.40602], [0.99035, -0.0329, -1.22967]]),
    "images": (dict(use_float_head=False), [[1.01261, -0.45071, -1.50896], [-1.23913, -4.04104, -3.08081]]),
    "extras": (dict(extras=2, extra_mean=(0.5, 1), extra_std=(0.25, 2)), [[1.62281, 5.89097, 3.61496], [-0.90115, 2.77953, 0.24839]]),
}
OPTIONS = {k: v[0] for k, v in CASES.items() if "iqn_embedding_dimension" not in v[0]}

def fixed(shape, offset, scale):
    "Numbers in −scale … scale that any tool can rebuild: squares modulo a prime."
    i = np.arange(math.prod(shape), dtype=np.int64) + 10_007 * offset
    return (scale * (i * i % 1009 / 504 - 1)).astype(np.float32).reshape(shape)

def example(net, batch=3, quantiles=4):
    "Fills `net` and returns (image uint8, floats, tau), all by formula."
    with torch.no_grad():
        for n, p in enumerate(net.parameters()): p.copy_(torch.from_numpy(fixed(p.shape, n + 1, math.sqrt(6 / p[0].numel()) if p.ndim > 1 else 0.1)))
    shape = (batch, net.stack, *(net.image_size or (0, 0)))
    image = (np.arange(math.prod(shape)) * 37 % 256).astype(np.uint8).reshape(shape)
    floats = np.concatenate([FLOAT_MEAN + fixed((batch, 184), 0, 1.0) * FLOAT_STD, fixed((batch, net.extras), 5, 1.0)], 1).astype(np.float32)
    tau = (np.arange(batch * quantiles) * 7 % 12 + 0.5).reshape(-1, 1) / 12
    return image, floats, tau.astype(np.float32)

def leaky(x): return np.where(x > 0, x, 0.01 * x)
def sigmoid(x): return 1 / (1 + np.exp(-x))

def numpy_image_head(w, x):
    "(B, channels, H, W) → (B, C): four convolutions without padding."
    for i, stride in ((0, 2), (2, 2), (4, 2), (6, 1)):
        kernel = w[f"img_head.{i}.weight"]
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (2, 3))[:, :, ::stride, ::stride]
        x = leaky(np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True) + w[f"img_head.{i}.bias"][:, None, None])
    return x.reshape(len(x), -1)

def numpy_lstm(w, x):
    "Last output (B, C) of an LSTM over x (B, T, C), from zeros; gates in the order in, forget, new, out."
    h = c = np.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ w["lstm.weight_ih_l0"].T + w["lstm.bias_ih_l0"] + h @ w["lstm.weight_hh_l0"].T + w["lstm.bias_hh_l0"], 4, 1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    return h

def numpy_iqn(net, image, floats, tau):
    "Q (K·B, 12) in float64, from the tensors of `net` and the definition, one row at a time."
    w = {k: v.double().numpy() for k, v in net.state_dict().items()}
    layer = lambda name, x: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    mean, std = np.append(FLOAT_MEAN, (0.5, 1)[:net.extras]), np.append(FLOAT_STD, (0.25, 2)[:net.extras])
    x, parts = (image.astype(np.float64) - 128) / 128, []
    if net.recurrent: parts.append(numpy_lstm(w, np.stack([numpy_image_head(w, x[:, t:t + 1]) for t in range(net.stack)], 1)))
    elif net.use_image_head: parts.append(numpy_image_head(w, x))
    if net.use_float_head: parts.append(leaky(layer("float_feature_extractor.2", leaky(layer("float_feature_extractor.0", (floats - mean) / std)))))
    features, out = np.concatenate(parts, 1), []
    for row in range(len(tau)):  # quantile row // B of image row % B
        angle = math.pi * np.arange(1, net.iqn_embedding_dimension + 1) * tau[row].astype(np.float64)
        z = features[row % len(features)] * leaky(layer("iqn_fc.0", np.cos(angle)))
        a, v = (layer(f"{h}.2", leaky(layer(f"{h}.0", z))) for h in ("A_head", "V_head"))
        out.append(v + a - a.mean())
    return np.array(out)

@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    "The network, the learner's values and the plain formula agree, and are what they were."
    options, pin = CASES[case]
    net = IQN(**options)
    image, floats, tau = example(net)
    want = numpy_iqn(net, image, floats, tau)
    with torch.no_grad():
        got, _ = net(normalise_image(torch.from_numpy(image)), torch.from_numpy(floats), 4, torch.from_numpy(tau))
        learner = quantile_values(net, *map(torch.from_numpy, (image, floats, tau)))
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())
    np.testing.assert_allclose(learner.flatten(0, 1), got, atol=1e-4 * np.abs(want).max())
    np.testing.assert_allclose(want[[0, 5]][:, [0, 5, 11]], pin, atol=1e-4 * np.abs(want).max())

@pytest.mark.parametrize("size,embedding,parameters", [(64, 128, 1_051_805), ((120, 160), 64, 6_578_333), (128, 256, 6_397_085)])
def test_upstream_keys_shapes_and_gains(size, embedding, parameters):
    "Without options: upstream's 22 tensors in its order, its parameter counts, orthogonal weights with its gains."
    net = IQN(size, embedding)
    names = [f"{m}.{i}.{p}" for m, at in (("img_head", (0, 2, 4, 6)), ("float_feature_extractor", (0, 2)), ("A_head", (0, 2)), ("V_head", (0, 2)), ("iqn_fc", (0,))) for i in at for p in ("weight", "bias")]
    assert list(net.state_dict()) == names and sum(p.numel() for p in net.parameters()) == parameters
    leaky_gain = math.sqrt(2 / (1 + 0.01 ** 2))
    for name in names[::2]:
        gain = 1.0 if name in ("A_head.2.weight", "V_head.2.weight") else leaky_gain * (math.sqrt(2) if name.startswith("iqn_fc") else 1)
        weight = net.state_dict()[name].flatten(1)
        product = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
        assert torch.allclose(product, gain ** 2 * torch.eye(len(product)), atol=1e-3), name
        assert not net.state_dict()[name.replace("weight", "bias")].any()

SMALL = dict(image_size=46, iqn_embedding_dimension=8, batch_size=32, distance_shaping=0.0, quantiles=4)

def remembered(stack, oldest, g):
    "A batch whose reward is ±1 as its `oldest` frame is light or dark; all other frames are grey, all floats alike, and nothing follows."
    light = torch.rand(32, generator=g) < 0.5
    image = torch.full((32, stack, 46, 46), 128, dtype=torch.uint8)
    image[:, oldest] = torch.where(light, 200, 56).to(torch.uint8)[:, None, None]
    floats = torch.tensor(FLOAT_MEAN, dtype=torch.float32).expand(32, -1).contiguous()
    return Batch(image=image, floats=floats, action=torch.arange(32) % 12, reward=torch.where(light, 1.0, -1.0), next_image=image, next_floats=floats, discount=torch.zeros(32),
                 expert=torch.zeros(32, dtype=torch.bool), weight=torch.ones(32), index=torch.arange(32)), light

@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("options", [dict(stack=3), dict(stack=3, recurrent=True)], ids=["channels", "lstm"])
def test_a_policy_learns_from_a_frame_that_is_gone(options, bf16):
    "The value follows a frame seen two decisions ago; stopping in between, from a saved state, changes nothing."
    learner, g = Learner(TrainConfig(**SMALL, **options), bf16), torch.Generator().manual_seed(0)
    for _ in range(70): learner.learn(remembered(3, 0, g)[0], 3e-3, g)
    other = Learner(TrainConfig(**SMALL, **options), bf16)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))  # as read from a file: nothing is shared
    batch, light = remembered(3, 0, g)
    tau = draw_tau(32, 4, g)
    with torch.no_grad(): value = quantile_values(learner.net, batch.image, batch.floats, tau, bf16)[:, torch.arange(32), batch.action].mean(0)
    assert value[light].mean() - value[~light].mean() > 1
    losses = [l.learn(batch, 1e-3, torch.Generator().manual_seed(1)).loss for l in (learner, other)]
    assert losses[0] == losses[1] and all(torch.equal(a, b) for a, b in zip(learner.net.parameters(), other.net.parameters()))

def test_a_network_without_image_head_learns():
    "It has no encoder that could be frozen, and needs no image."
    learner, g = Learner(TrainConfig(**SMALL, use_image_head=False)), torch.Generator().manual_seed(0)
    batch = remembered(1, 0, g)[0]
    empty = torch.empty((32, 1, 0, 0), dtype=torch.uint8)
    before = [p.clone() for p in learner.params]
    for _ in range(2): assert math.isfinite(learner.learn(batch._replace(image=empty, next_image=empty), 1e-3, g).loss)
    assert not any(torch.equal(a, b) for a, b in zip(before, learner.params))
    with pytest.raises(ValueError, match="no part encoder"): Learner(TrainConfig(**SMALL, use_image_head=False, freeze="encoder:-1"))

@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_from_settings_to_disk_and_back(options, tmp_path):
    "Settings → networks → files → the same networks, as a start of another run too; without the options, or with others, an error names file and tensor."
    changes = {k: v for k, v in options.items() if k in TrainConfig.model_fields} | (dict(extras=["progress"]) if "extras" in options else {})
    cfg = TrainConfig(**SMALL | changes)
    net, target = initial_networks(cfg)
    export_linesight(net, tmp_path, "_orig_mod.", target)
    again, _ = initial_networks(cfg.model_copy(update=dict(init_dir=tmp_path, seed=1)))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items()) and network_options(run_config(tmp_path, **dict(image_size=46, iqn_embedding_dimension=8) | changes)) == network_options(cfg) | dict(image_size=46)
    with pytest.raises(ValueError, match="weights1.torch: .*ask for that"): load_linesight(tmp_path)
    for other in OPTIONS.values():
        wanted = {k: v for k, v in other.items() if not k.startswith("extra_")}
        if other is not options:
            with pytest.raises(ValueError, match="weights1.torch: "): load_linesight(tmp_path, **wanted)

def test_frames_of_a_race_never_hold_those_of_the_one_before():
    "In the world, with races of 0.35 s: what is seen is what a list per car, emptied at each start, would hold."
    env = RaceVectorEnv(resolve_tracks(["flat:1:5"]), 3, image_size=(46, 46), max_race_s=0.35, random_start=True, extras=("progress",), threads=1)
    obs = start(env, seed=0)
    see, lists, ends = seen(obs, 4), [[obs["image"][i, 0]] for i in range(3)], 0
    for t in range(25):
        obs, _, terminated, truncated, _ = env.step(np.array([0, 1, t % 12]))
        over, see = terminated | truncated, seen(obs, 4, see, terminated | truncated)
        for i in range(3):
            lists[i] = ([] if over[i] else lists[i]) + [obs["image"][i, 0]]
            want = ([lists[i][0]] * 3 + lists[i])[-4:]
            assert np.array_equal(see["image"][i], np.stack(want)), (t, i)
        ends += over.sum()
        assert np.array_equal(see["floats"][:, :184], obs["floats"]) and np.array_equal(see["floats"][:, 184:], obs["extras"])
    assert ends >= 9 and len(set(see["image"].flatten(2).sum(2)[0].tolist())) > 1

def test_extras_are_seen_whatever_the_inputs():
    net, tau = IQN(46, 8, extras=1), draw_tau(3, 4)
    image, floats = torch.zeros((3, 1, 46, 46), dtype=torch.uint8), torch.randn(3, 185)
    changed = floats.clone(); changed[:, 184] += 1
    for inputs in ("all", "pixels", "floats"):
        assert not torch.equal(*(quantile_values(net, *mask_inputs(image, f, inputs), tau) for f in (floats, changed)))

def test_nothing_is_rendered_for_a_network_without_image_head():
    net = IQN(iqn_embedding_dimension=8, use_image_head=False)
    env = make_env(resolve_tracks(["flat:1:5"]), 2, net.image_size, threads=1)
    see = seen(start(env, seed=0), net.stack)
    assert set(env.observation_space.spaces) == {"floats"} and see["image"].shape == (2, 1, 0, 0) and policy_values(net, see, 2, torch.Generator().manual_seed(0)).shape == (2, 12)

def test_references_are_read_or_found(tmp_path, monkeypatch):
    "Kept in the folder: read. Not kept: searched for only when asked."
    one, other = resolve_tracks(["flat:1:5", "flat:2:5"])
    one.save(tmp_path / "one"); other.save(tmp_path / "other")
    save_reference(tmp_path / "one", ReferenceTime(5.0, 4.5, track_hash=one.hash, car=car_digest(CAR)))
    monkeypatch.setattr(rollout_room, "reference_time", lambda track: f"searched {track.id}")
    assert {k: v.seconds for k, v in reference_times([tmp_path / "one", tmp_path / "other", other]).items()} == {one.id: 5.0}
    assert reference_times([tmp_path / "one", other], find=True) == {one.id: load_reference(tmp_path / "one"), other.id: f"searched {other.id}"}

def test_races_from_rest_begin_alike():
    "`rest`: every car stands on the line; `random`: they roll, all differently."
    tracks = resolve_tracks(["flat:1:5"])
    speed = {s: np.linalg.norm(start(make_env(tracks, 4, None, 1, s), seed=0)["floats"][:, 56:59], axis=1) for s in ("rest", "random")}
    assert (speed["rest"] < 0.1).all() and len(np.unique(speed["random"])) == 4
