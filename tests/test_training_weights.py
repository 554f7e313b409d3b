"Weights: nothing that does not fit is ever loaded in part; injection touches the image head alone and keeps what it was given."
import hashlib, json, os
from pathlib import Path
import pytest
import torch
from tmlab.models.encoder import ARCH_HASH, arch_hash, image_head
from tmlab.models.iqn import IQN
from tmlab.training.artifacts import load_torch, save_torch
from tmlab.training.weights import PREFIX, WEIGHTS, InjectConfig, export_linesight, inject, load_linesight

@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return IQN(64, 32)

@pytest.fixture
def run(tmp_path):
    "A pretraining run's encoder and record."
    torch.manual_seed(1)
    head = image_head()
    save_torch(tmp_path / "run/encoder.pt", head.state_dict())
    (tmp_path / "run/pretrain_meta.json").write_text(json.dumps(dict(arch_hash=ARCH_HASH, in_channels=1, image_size=64, image_normalization="01")))
    return tmp_path / "run"

def digest(folder): return {n: hashlib.sha256((Path(folder) / n).read_bytes()).hexdigest() for n in WEIGHTS}

@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_round_trip_is_byte_equal(net, tmp_path, prefix):
    export_linesight(net, tmp_path / "a", prefix)
    online, target = load_linesight(tmp_path / "a")
    export_linesight(online, tmp_path / "b", prefix, target)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert all(k.startswith(prefix + "img_head") for k in list(load_torch(tmp_path / "a/weights1.torch"))[:8])

def test_a_compiled_network_is_exported_without_double_prefix(net, tmp_path):
    export_linesight(torch.compile(net), tmp_path, PREFIX)
    assert list(load_torch(tmp_path / "weights1.torch"))[0] == "_orig_mod.img_head.0.weight"

def test_half_and_strided_tensors_become_contiguous_float32(net, tmp_path):
    mixed = IQN(64, 32).half()
    mixed.A_head[0].weight.data = mixed.A_head[0].weight.data.t().contiguous().t()
    export_linesight(mixed, tmp_path)
    assert all(v.dtype == torch.float32 and v.is_contiguous() for v in load_torch(tmp_path / "weights1.torch").values())

@pytest.mark.parametrize("bytes_", [b"", b"not torch", b"PK\x03\x04" + b"\0" * 100])
def test_a_damaged_file_is_named(net, tmp_path, bytes_):
    export_linesight(net, tmp_path)
    (tmp_path / "weights2.torch").write_bytes(bytes_)
    with pytest.raises(ValueError, match="weights2.torch"): load_linesight(tmp_path)

def test_a_cut_file_is_named_wherever_it_is_cut(net, tmp_path):
    export_linesight(net, tmp_path)
    whole = (tmp_path / "weights1.torch").read_bytes()
    for n in range(1, len(whole), len(whole) // 9):
        (tmp_path / "weights1.torch").write_bytes(whole[:n])
        with pytest.raises(ValueError, match="weights1.torch"): load_linesight(tmp_path)

def test_code_in_a_weights_file_is_not_run(net, tmp_path):
    export_linesight(net, tmp_path)
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "exploded"),)
    torch.save({"img_head.0.weight": Bomb()}, tmp_path / "weights1.torch")
    with pytest.raises(ValueError, match="weights1.torch: refused"): load_linesight(tmp_path)
    assert not (tmp_path / "exploded").exists()

@pytest.mark.parametrize("key", list(IQN(64, 32).state_dict()))
def test_every_tensor_is_checked(net, tmp_path, key):
    export_linesight(net, tmp_path)
    state = load_torch(tmp_path / "weights2.torch")
    for change in (dict(state) | {key: torch.zeros(*state[key].shape, 2)}, {k: v for k, v in state.items() if k != key}):
        save_torch(tmp_path / "weights2.torch", change)
        with pytest.raises(ValueError, match=f"weights2.torch: .*{key}"): load_linesight(tmp_path)

def test_dry_run_writes_nothing_and_still_checks(run, tmp_path, net):
    assert inject(run / "encoder.pt", tmp_path / "new", dry_run=True)["written"] == [] and not (tmp_path / "new").exists()
    export_linesight(net, tmp_path / "old", PREFIX)
    before = digest(tmp_path / "old")
    report = inject(run / "encoder.pt", tmp_path / "old", fresh=False, dry_run=True)
    assert digest(tmp_path / "old") == before and report["prefix"] == PREFIX and len(report["replaced"]) == 8
    with pytest.raises(ValueError, match="exists with other weights"): inject(run / "encoder.pt", tmp_path / "old", dry_run=True)

def test_half_written_pair(run, tmp_path):
    inject(run / "encoder.pt", tmp_path / "a")
    (tmp_path / "a/weights2.torch").unlink()                               # killed between the two files
    with pytest.raises(ValueError, match="weights2.torch: no such file"): load_linesight(tmp_path / "a")
    inject(run / "encoder.pt", tmp_path / "a")
    load_linesight(tmp_path / "a")

@pytest.mark.parametrize("prefix,want", [("none", ""), ("compiled", PREFIX), ("keep", PREFIX)])
def test_prefix_of_patched_files(run, tmp_path, net, prefix, want):
    export_linesight(net, tmp_path / "old", PREFIX)
    inject(run / "encoder.pt", tmp_path / "old", fresh=False, prefix=prefix)
    assert all(k.startswith(want + "") and k.startswith(PREFIX) == bool(want) for n in WEIGHTS for k in load_torch(tmp_path / "old" / n))

def test_fresh_networks_follow_the_seed(run, tmp_path):
    torch.manual_seed(0)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)): inject(run / "encoder.pt", tmp_path / name, seed=seed, iqn_embedding_dimension=32); torch.rand(1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    a, c = (load_linesight(tmp_path / n)[0].img_head.state_dict() for n in "ac")
    assert all(torch.equal(v, c[k]) for k, v in a.items())

def test_channels_merge_as_asked(tmp_path):
    torch.manual_seed(0)
    state = image_head(3).state_dict()
    save_torch(tmp_path / "encoder.pt", state)
    for kernel in ("mean", "sum"):
        report = inject(tmp_path / "encoder.pt", tmp_path / kernel, kernel=kernel, image_normalization="iqn")
        head = load_linesight(tmp_path / kernel)[0].img_head.state_dict()
        assert torch.equal(head["0.weight"], getattr(state["0.weight"], kernel)(1, keepdim=True)) and torch.equal(head["0.bias"], state["0.bias"])
        assert any("3 channels" in n for n in report["notes"]) and not report["folded"] and arch_hash(head) == ARCH_HASH

@pytest.mark.parametrize("change,match", [(dict(arch_hash="0" * 16), "arch_hash"), (dict(in_channels=4), "in_channels")])
def test_a_record_that_contradicts_the_weights(run, tmp_path, change, match):
    path = run / "pretrain_meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=match): inject(run / "encoder.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()

def test_command_line():
    cfg = InjectConfig.load(None, "--encoder-pt e.pt --save-dir s --no-fresh --dry-run --kernel sum --prefix compiled --no-fold-normalisation".split())
    assert (cfg.fresh, cfg.dry_run, cfg.kernel, cfg.prefix, cfg.fold_normalisation) == (False, True, "sum", "compiled", False)
    with pytest.raises(ValueError, match="kernel"): InjectConfig.load(None, ["--kernel", "max"])
