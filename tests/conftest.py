"""What the tests share: markers, the repository's folders, headless Chromium, real game files."""
import os, shutil
from pathlib import Path
import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch loads: see tmlab.cli.main

REPO = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line("markers", "browser: opens pages in headless Chromium (skips where there is none)")
    config.addinivalue_line("markers", "real: reads real game files (skips where they are absent; set TMLAB_REAL_DATA)")


@pytest.fixture(scope="session")
def repo():
    "Root of the checkout."
    return REPO


@pytest.fixture(scope="session")
def real():
    "`real(*parts)`: a path among the real game files; skips the test where it is absent."
    from tmlab.core.runs import real_data

    def path(*parts):
        found = real_data(*parts)
        if found is None: pytest.skip(f"no real game files at {Path(*parts)}: set TMLAB_REAL_DATA to the folder that holds them")
        return found
    return path


@pytest.fixture(scope="session")
def chromium():
    "Headless Chromium of the system, started once."
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path: pytest.skip("no Chromium on the PATH: install the package `chromium`")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Page:
    "A browser page that keeps what went wrong: `errors` (console errors and uncaught exceptions) and `requests` (URLs)."
    def __init__(self, browser, **context):
        offline = context.pop("offline", False)
        self.context = browser.new_context(**context)
        if offline: self.context.set_offline(True)
        self.page, self.errors, self.requests = self.context.new_page(), [], []
        self.page.on("console", lambda m: m.type == "error" and self.errors.append(f"{m.text} ({m.location.get('url', '')})"))
        self.page.on("pageerror", lambda e: self.errors.append(f"uncaught: {e}"))
        self.page.on("request", lambda r: self.requests.append(r.url))


@pytest.fixture
def open_page(chromium):
    "`open_page(**context options, offline=False)`: a new `Page`, closed at the end of the test."
    pages = []

    def make(**context):
        pages.append(Page(chromium, **context))
        return pages[-1]
    yield make
    for p in pages: p.context.close()


@pytest.fixture
def screenshot(tmp_path):
    "`screenshot(page, name)`: into the folder TMLAB_SCREENSHOTS, where it is set, to be looked at by a person."
    folder = os.environ.get("TMLAB_SCREENSHOTS")

    def take(page, name, **kw):
        if folder: page.screenshot(path=Path(folder) / f"{name}.png", **kw)
    return take


def skipped_wrongly(reporter):
    "Tests that the full check (TMLAB_CI) may not skip: all but those that need a GPU."
    return [r for r in reporter.stats.get("skipped", []) if "GPU" not in str(r.longrepr)] if os.environ.get("TMLAB_CI") else []


def pytest_terminal_summary(terminalreporter):
    "Say in the full check that a skipped test is not a passed one."
    skipped = skipped_wrongly(terminalreporter)
    if skipped: terminalreporter.write_line(f"the full check may skip nothing but a GPU; it skipped {len(skipped)}", red=True)


def pytest_sessionfinish(session, exitstatus):
    if skipped_wrongly(session.config.pluginmanager.get_plugin("terminalreporter")) and exitstatus == 0: session.exitstatus = 1
