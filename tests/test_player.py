"""The replay player in JupyterLab, scrubbed in headless Chromium: frame, marker, inputs and time move together, and the right way round."""
import os, secrets, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import numpy as np
import pytest
from tmlab.core.state import make_state
from tmlab.explore.player import player_data, replay_browser
from tmlab.replays.manifest import decode_jpeg, write_replay
from tmlab.replays.store import Replay

pytestmark = pytest.mark.browser
N = 60


def record(root, track, name, known=True):
    "A left half circle of N frames: brightness grows with the frame, the left key is down in the second half."
    t = np.arange(N) * 50
    a = t / 1000 * 0.8
    zero, forward = 0 * a, np.stack([np.sin(a), 0 * a, np.cos(a)], 1)
    rotation = np.stack([np.stack([np.cos(a), zero, -np.sin(a)], 1), np.tile([0., 1, 0], (N, 1)), forward], 2)
    states = make_state(N, time_ms=t, position=np.stack([25 * (1 - np.cos(a)), zero, 25 * np.sin(a)], 1), velocity=(10 + 10 * np.arange(N) / N)[:, None] * forward,
                        rotation=rotation, steer=-np.linspace(0, 1, N))
    frames = np.repeat((20 + 3 * np.arange(N)).astype(np.uint8), 64 * 64).reshape(N, 64, 64)
    keys = np.zeros((N, 4), bool)
    keys[:, 0], keys[N // 2:, 2] = True, True
    entries = dict(time_ms=t) | (dict(inputs=keys, states=states) if known else {})
    write_replay(root / track / name, frames, entries, dict(frame_source="rendered", race_finished=True, race_time_ms=50 * N))
    line = np.stack([25 * (1 - np.cos(a)), zero, 25 * np.sin(a)], 1)
    (root.parent / "vcp").mkdir(exist_ok=True)
    np.save(root.parent / "vcp" / f"{track}_0.5m_cl.npy", line)


@pytest.fixture(scope="module")
def project(tmp_path_factory, repo):
    "A project folder with two tracks of tiny replays and a copy of the explorer notebook."
    home = tmp_path_factory.mktemp("project")
    record(home / "maps/img", "left-1-3s-v1", "run_a")
    record(home / "maps/img", "left-1-3s-v1", "run_b")
    record(home / "maps/img", "old-2-3s-v1", "frames_only", known=False)
    (home / "nbs/explorers").mkdir(parents=True)
    shutil.copy(repo / "nbs/explorers/10_player.ipynb", home / "nbs/explorers")
    return home


@pytest.fixture(scope="module")
def lab(project, tmp_path_factory):
    "Address of a JupyterLab on the project, with a home of its own."
    home, token = tmp_path_factory.mktemp("home"), secrets.token_hex(16)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON"))}
    env |= dict(HOME=str(home), JUPYTER_CONFIG_DIR=str(home / "config"), JUPYTER_DATA_DIR=str(home / "data"), JUPYTER_RUNTIME_DIR=str(home / "runtime"), IPYTHONDIR=str(home / "ipython"))
    cmd = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
           f"--ServerApp.root_dir={project}", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    log = open(home / "lab.log", "w")
    server = subprocess.Popen(cmd, env=env, stdout=log, stderr=log, cwd=project)
    try:
        wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, home / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/nbs/explorers/10_player.ipynb?token={token}&reset"
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


def wait_for(url, process, log, seconds=90):
    "Return when `url` answers; fail with the server's log when it ends or takes too long."
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try: return urllib.request.urlopen(url, timeout=2).close()
        except OSError: time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def run_all(page, lab):
    "Open the explorer, run its cells, wait for the player. Asked to run before the kernel is there, JupyterLab would ask for one."
    page.goto(lab)
    page.locator(".jp-StatusBar-Widget, #jp-main-statusbar").get_by_text("| Idle").first.wait_for(timeout=90_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_selector(".tm-player .tm-frame[src^='blob:']", timeout=90_000)


def drag_to(page, i):
    "Drag the slider to frame `i`, as a hand would, without letting go."
    page.locator(".tm-slider").evaluate("(el, i) => { el.value = i; el.dispatchEvent(new Event('input', {bubbles: true})); }", i)


def wait_until(condition, page, seconds=5):
    "Let the page run until `condition()` holds."
    for _ in range(int(seconds * 10)):
        if condition(): return
        page.wait_for_timeout(100)
    pytest.fail("it did not happen in time")


def view(page):
    "What the player shows now: the frame's number and mean gray as decoded by the browser, the car's transform, keys down, steering, cursor, time."
    return page.locator(".tm-player").evaluate("""async (root) => {
        const img = root.querySelector(".tm-frame");
        await img.decode();
        const c = Object.assign(document.createElement("canvas"), {width: img.naturalWidth, height: img.naturalHeight}), g = c.getContext("2d");
        g.drawImage(img, 0, 0);
        const car = root.querySelector(".tm-car");
        return {frame: Number(img.dataset.index), gray: g.getImageData(32, 32, 1, 1).data[0], car: car && car.getAttribute("transform"),
                keys: [...root.querySelectorAll(".tm-key.on")].map((k) => k.dataset.key), steer: root.querySelector(".tm-steer span").textContent,
                cursor: Number(root.querySelector(".tm-speed .tm-cursor").getAttribute("x1")), now: root.querySelector(".tm-now").textContent,
                time: root.querySelector(".tm-time").textContent};
    }""")


def test_scrubbing_moves_everything_together(lab, open_page, screenshot):
    tab = open_page(viewport=dict(width=1400, height=1300))
    page, sent = tab.page, []
    page.on("websocket", lambda ws: ws.on("framesent", lambda data: sent.append(data if isinstance(data, bytes) else data.encode())))
    run_all(page, lab)

    a = view(page)
    assert a["frame"] == 0 and a["keys"] == ["accelerate"] and a["time"].startswith("0.00 s of 2.95 s") and a["now"] == "36 km/h"
    told = len(sent)
    for i in range(1, 46): drag_to(page, i)
    assert sent[:told] and not [m for m in sent[told:] if b"comm_msg" in m]  # while it is dragged the kernel hears nothing
    b = view(page)
    assert b["frame"] == 45 and abs(b["gray"] - (20 + 3 * 45)) <= 3 and abs(a["gray"] - 20) <= 3
    assert b["keys"] == ["accelerate", "left"] and b["steer"] == "-0.76" and b["cursor"] == 45 * 50 and b["now"] == "63 km/h" and b["time"].startswith("2.25 s")
    assert a["car"] != b["car"] and b["car"].startswith(f"translate({25 * (1 - np.cos(1.8)):.2f}"[:14])
    screenshot(page, "player")
    page.locator(".tm-slider").dispatch_event("change")
    wait_until(lambda: any(b"comm_msg" in m and b'"index":45' in m.replace(b" ", b"") for m in sent[told:]), page)  # let go: `player.index` follows

    page.locator(".tm-step").click()
    assert view(page)["frame"] == 46
    page.locator(".tm-player").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowLeft")
    assert view(page)["frame"] == 25
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('.tm-frame').dataset.index >= 30", timeout=10_000)
    page.keyboard.press("Space")
    still = view(page)
    page.wait_for_timeout(200)
    assert view(page) == still and still["cursor"] == still["frame"] * 50

    page.locator(".tm-follow").check()
    assert page.locator(".tm-map svg").get_attribute("viewBox").endswith("120 120")
    ours = [e for e in tab.errors if any(w in e for w in ("tm-", "player", "anywidget", "blob:", "widget"))]
    assert not ours and not [e for e in tab.errors if e.startswith("uncaught")], tab.errors


def test_a_replay_without_inputs_and_states_says_so(lab, open_page, screenshot):
    page = (tab := open_page(viewport=dict(width=1400, height=1300))).page
    run_all(page, lab)
    page.locator(".widget-dropdown select").first.select_option("old-2-3s-v1")
    page.wait_for_function("document.querySelector('.tm-title')?.textContent.includes('frames_only')", timeout=20_000)
    notes = page.locator(".tm-absent").evaluate_all("els => els.map(e => e.dataset.note)")
    assert sorted(notes) == ["inputs not recorded", "positions not recorded", "speed not recorded", "steering not recorded"]
    drag_to(page, 10)
    assert page.locator(".tm-time").text_content().startswith("0.50 s") and page.locator(".tm-frame").get_attribute("data-index") == "10"
    screenshot(page, "player_frames_only")
    assert not [e for e in tab.errors if e.startswith("uncaught") or "player" in e], tab.errors


def test_tmlab_lab_starts_on_the_explorer(project, tmp_path):
    "The command itself: it serves the notebook and stops when asked to."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")} | dict(HOME=str(tmp_path), JUPYTER_RUNTIME_DIR=str(tmp_path))
    cmd = [str(Path(sys.executable).with_name("tmlab")), "lab", "--data", str(project / "maps/img"), "--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=x"]
    with open(tmp_path / "log", "w") as log: server = subprocess.Popen(cmd, env=env, stdout=log, stderr=log, cwd=project)
    try:
        wait_for(f"http://127.0.0.1:{port}/api?token=x", server, tmp_path / "log")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents/nbs/explorers/10_player.ipynb?token=x", timeout=20) as r: assert "replay_browser" in r.read().decode()
    finally:
        server.terminate()
        server.wait(20)


def test_data_is_the_replay(project):
    data = player_data(replay := Replay(project / "maps/img/left-1-3s-v1/run_a"))
    assert data["line"] is None and data["n"] == N == len(data["offsets"]) - 1
    cut = [data["jpegs"][a:b] for a, b in zip(data["offsets"], data["offsets"][1:])]
    assert all(np.array_equal(decode_jpeg(j), replay.frame(i)) for i, j in enumerate(cut))
    assert data["position"][-1] == pytest.approx([25 * (1 - np.cos(2.36)), 25 * np.sin(2.36)], abs=0.01)


def test_an_unreadable_frame_is_named(project, tmp_path):
    shutil.copytree(project / "maps", tmp_path / "maps")
    folder = tmp_path / "maps/img/left-1-3s-v1/run_a"
    (folder / "frame_00000_0ms.jpeg").write_bytes(b"\xff\xd8 cut off")
    with pytest.raises(ValueError, match="frame_00000_0ms.jpeg"): player_data(Replay(folder))
    (folder / "frame_00000_0ms.jpeg").unlink()
    with pytest.raises(ValueError, match="frame_00000_0ms.jpeg"): player_data(Replay(folder))
    box = replay_browser(tmp_path / "maps/img")
    assert "frame_00000_0ms.jpeg" in box.children[1].children[0].value  # the notebook shows the cause and stays usable
