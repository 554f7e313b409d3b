"""The demo at its tiny scale, as a user runs it: killed at any moment, on one thread or two, the same bytes."""
import hashlib, os, signal, subprocess, sys
from pathlib import Path
import pandas as pd
import pytest, torch
from tmlab.replays.manifest import read_manifest

def start(folder, threads=2):
    env = os.environ | {k: str(threads) for k in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS")}
    return subprocess.Popen([str(Path(sys.executable).with_name("tmlab")), "demo", "--scale", "tiny", "--out", "demo", "--reports", "reports"], cwd=folder, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

def finish(folder, threads=2):
    p = start(folder, threads)
    out, _ = p.communicate(timeout=600)
    assert p.returncode == 0, out
    return out

def digest(folder, patterns):
    "Relative path → hash of the files under `folder` that match."
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for pattern in patterns for p in sorted(Path(folder).rglob(pattern)) if p.is_file()}

DATA = ["maps/**/*.jpeg", "maps/**/manifest.json", "maps/**/metadata.json", "maps/**/geometry.npz", "maps/**/*.npy", "cache/**/*.npy"]
RESULTS = ["output/pretrain/vis/ae/metrics.csv"]

def curves(folder):
    "What the learners logged, but for times: the rows of both metrics.csv."
    return {p.parent.name: pd.read_csv(p)[["decisions", "gradient_steps", "tag", "value"]].query("not tag.str.contains('Performance/|_hours|_duration')")
            for p in sorted(Path(folder, "demo/output/train").glob("*/metrics.csv"))}

@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    "A demo that nobody disturbed."
    folder = tmp_path_factory.mktemp("reference")
    folder.joinpath("log").write_text(finish(folder))
    return folder

def weights(folder):
    return {str(p.relative_to(folder)): torch.load(p, weights_only=True) for pattern in ("encoder.pt", "weights1.torch") for p in sorted(Path(folder, "demo/output").rglob(pattern))}

def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and len(a) >= 4
    for name in a:
        for k in a[name]: assert torch.equal(a[name][k], b[name][k]), (name, k)

def test_report_is_there_and_says_what_it_is(reference):
    page = (reference / "reports/demo/index.html").read_text()
    assert "carries no verdict" in page and "A_scratch" in page and "B1_ae" in page
    assert (reference / "reports/assets/plotly.min.js").exists()

@pytest.mark.browser
def test_report_opens_offline_with_its_figures_visible(reference, open_page):
    tab = open_page(offline=True, viewport=dict(width=1100, height=900))
    tab.page.goto((reference / "reports/demo/index.html").as_uri())
    tab.page.wait_for_function("[...document.querySelectorAll('.plot')].every(p => p.dataset.drawn)", timeout=30_000)
    boxes = [b.bounding_box() for b in tab.page.locator(".plot > .plot-container .main-svg:first-child").all()]
    assert len(boxes) >= 5 and all(b["width"] > 500 and b["height"] > 200 for b in boxes)
    assert tab.page.locator("img").count() > 10 and all(tab.page.locator("img").evaluate_all("all => all.map(i => i.complete && i.naturalWidth == 64)"))
    assert not tab.errors and all(u.startswith(("file:", "data:", "blob:")) for u in tab.requests)

def test_second_run_redoes_nothing(reference):
    def state():  # the injection takes a second and is written again, with the same bytes
        files = [p for p in (reference / "demo").rglob("*") if p.is_file() and p.name != "run.lock"]
        return {p: hashlib.sha256(p.read_bytes()).hexdigest() if p.match("vis/ae/weights?.torch") else p.stat().st_mtime_ns for p in files}
    before = state()
    finish(reference)
    assert state() == before

def test_killed_again_and_again_ends_with_the_same_result(reference, tmp_path):
    kills = 0
    for patience_s in (3, 5, 7, 9, 11, 14, 18, 25):
        p = start(tmp_path)
        try: p.communicate(timeout=patience_s); break
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            p.communicate()
            kills += 1
    finish(tmp_path)
    assert kills >= 2
    assert digest(tmp_path / "demo", DATA) == digest(reference / "demo", DATA)
    assert digest(tmp_path / "demo", RESULTS) == digest(reference / "demo", RESULTS)
    assert_same_weights(tmp_path, reference)
    for name, rows in curves(reference).items(): pd.testing.assert_frame_equal(curves(tmp_path)[name], rows)

def test_one_thread_gives_the_same_data_and_nearly_the_same_losses(reference, tmp_path):
    finish(tmp_path, threads=1)
    assert digest(tmp_path / "demo", DATA) == digest(reference / "demo", DATA)
    losses = lambda f: [float(row.split(",")[i]) for rows in [(f / "demo/output/pretrain/vis/ae/metrics.csv").read_text().split("\n")]
                        for i in [rows[0].split(",").index("train_loss")] for row in rows[1:] if row]
    assert losses(tmp_path) == pytest.approx(losses(reference), abs=1e-4)

def test_every_folder_is_sound(reference):
    folders = [p.parent for p in (reference / "demo/maps/img").rglob("manifest.json")]
    assert len(folders) == 4
    for f in folders: assert read_manifest(f).metadata["race_finished"]
