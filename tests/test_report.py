"""A report opened from disk in headless Chromium without network: figures visible, nothing loaded from elsewhere, no console error."""
import json, re, shutil
import nbformat
import plotly
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from tmlab.evidence.batch import NotebookFailed, content_hash, read_notebook, read_stamp, run_notebook
from tmlab.evidence.report import external_urls, index_page, report_info, to_html

CELLS = [
    new_markdown_cell("# Does it draw?\n\n> A test of the page."),
    new_code_cell("n = 20  # points\narm = 'A_scratch'  # name of the arm", metadata=dict(tags=["parameters"])),
    new_code_cell("import cv2, numpy as np, pandas as pd, plotly.graph_objects as go, sys\nfrom IPython.display import Image\nfrom plotly.subplots import make_subplots\n"
                  "from tmlab.evidence.report import figure_defaults, strip\nfigure_defaults();"),
    new_markdown_cell("## Figures"),
    new_code_cell("go.Figure([go.Scatter(y=np.sqrt(np.arange(n)), name=f'</script> {arm} {k}') for k in range(3)], dict(title='a curve'))"),
    new_code_cell("fig = make_subplots(1, 3)\nfor c in (1, 2, 3): fig.add_scatter(y=np.arange(n) * c, row=1, col=c)\nfig.show()"),
    new_markdown_cell("## Table and frames"),
    new_code_cell("pd.DataFrame(np.arange(40).reshape(2, 20))"),
    new_code_cell("Image(cv2.imencode('.png', np.full((64, 64), 90, np.uint8))[1].tobytes(), format='png')"),
    new_code_cell("strip({'original': np.zeros((9, 64, 64), np.uint8)})"),
    new_code_cell("print('said'); print('noted', file=sys.stderr)"),
    new_markdown_cell("## Last"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder with `reports/toy/report.html`, `reports/toy/failed.html`, the index, and the executed notebooks beside them."
    d = tmp_path_factory.mktemp("site")
    nbformat.write(new_notebook(cells=CELLS), d / "toy.ipynb")
    nbformat.write(new_notebook(cells=CELLS[:4] + [new_code_cell("losses = {}\nlosses['val']")] + CELLS[4:]), d / "broken.ipynb")
    run_notebook(d / "toy.ipynb", d / "runs/toy.ipynb", dict(n=30), fingerprint="abc", cwd=d, echo=False)
    with pytest.raises(NotebookFailed, match=r"broken.ipynb: cell In \[3\] .*KeyError: 'val'"):
        run_notebook(d / "broken.ipynb", d / "runs/broken.ipynb", cwd=d, echo=False)
    to_html(d / "runs/toy.ipynb", d / "reports/toy/report.html")
    to_html(d / "runs/broken.ipynb", d / "reports/toy/failed.html")
    index_page(d / "reports")
    return d


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_are_visible_offline(site, open_page, screenshot, scheme):
    tab = open_page(offline=True, viewport=dict(width=1100, height=900), color_scheme=scheme)
    tab.page.goto((site / "reports/toy/report.html").as_uri())
    tab.page.wait_for_function("[...document.querySelectorAll('.plot')].every(p => p.dataset.drawn)", timeout=30_000)
    boxes = [b.bounding_box() for b in tab.page.locator(".plot > .plot-container .main-svg:first-child").all()]
    assert len(boxes) == 2 and all(b["width"] > 500 and b["height"] > 200 for b in boxes)
    assert all(b["width"] > 300 for b in (p.bounding_box() for p in tab.page.locator(".scatterlayer").all()[:1]))
    assert tab.page.locator(".scatterlayer .js-line").count() == 6
    assert all(tab.page.locator("img").evaluate_all("all => all.map(i => i.complete && i.naturalWidth == 64)"))
    ink, paper = tab.page.evaluate("[getComputedStyle(document.querySelector('.xtick text')).fill, getComputedStyle(document.body).backgroundColor]")
    light = lambda colour: sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
    assert light(ink) - light(paper) > 120 if scheme == "dark" else light(paper) - light(ink) > 120
    assert not tab.errors and all(u.startswith(("file:", "data:", "blob:")) for u in tab.requests)
    screenshot(tab.page, f"report_{scheme}", full_page=True)


@pytest.mark.browser
def test_code_is_folded_until_asked_for(site, open_page):
    page = (tab := open_page(offline=True)).page
    page.goto((site / "reports/toy/report.html").as_uri())
    assert not page.locator("details.code pre").first.is_visible()
    page.locator("#show-code").check()
    assert all(d.is_visible() for d in page.locator("details.code pre").all())
    assert not tab.errors


@pytest.mark.browser
def test_on_a_phone_the_page_does_not_scroll_sideways(site, open_page, screenshot):
    page = open_page(offline=True, viewport=dict(width=390, height=844), is_mobile=True, device_scale_factor=2).page
    page.goto((site / "reports/toy/report.html").as_uri())
    page.wait_for_function("[...document.querySelectorAll('.plot')].every(p => p.dataset.drawn)", timeout=30_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    screenshot(page, "report_phone", full_page=True)


@pytest.mark.browser
def test_it_prints(site, open_page, tmp_path):
    page = open_page(offline=True, color_scheme="dark").page
    page.goto((site / "reports/toy/report.html").as_uri())
    page.wait_for_function("[...document.querySelectorAll('.plot')].every(p => p.dataset.drawn)", timeout=30_000)
    pdf = page.pdf(path=tmp_path / "report.pdf")
    assert pdf.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 5
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)" and not page.locator("header .toggle").is_visible()


@pytest.mark.browser
def test_an_error_is_the_first_thing_seen(site, open_page):
    page = (tab := open_page(offline=True, viewport=dict(width=1100, height=900))).page
    page.goto((site / "reports/toy/failed.html").as_uri())
    banner = page.locator(".banner")
    assert banner.bounding_box()["y"] < 300 and "Cell 3 stopped with KeyError: 'val'" in " ".join(banner.text_content().split())
    banner.locator("a").click()
    assert page.locator("#error pre.error").is_visible() and not tab.errors


@pytest.mark.browser
def test_index_lists_and_filters(site, open_page):
    page = (tab := open_page(offline=True)).page
    page.goto((site / "reports/index.html").as_uri())
    assert page.locator("tbody tr").count() == 2
    page.locator("#filter").fill("broken.ipynb failed")
    assert page.locator("tbody tr:visible").count() == 1
    page.locator("tbody tr:visible a").click()
    assert page.locator("h1").text_content() == "Does it draw?" and not tab.errors


def test_plotly_is_shared_and_pages_are_small(site):
    pages = list((site / "reports/toy").glob("*.html"))
    assert len(pages) == 2 and all(p.stat().st_size < 200_000 for p in pages)
    scripts = list((site / "reports").rglob("plotly.min.js"))
    assert scripts == [site / "reports/assets/plotly.min.js"]
    assert plotly.offline.get_plotlyjs_version() in scripts[0].read_text()[:500]
    assert all(not external_urls(p.read_text()) and "cdn" not in p.read_text().lower() for p in pages)


def test_the_page_tells_how_it_was_made(site):
    page, stamp = (site / "reports/toy/report.html").read_text(), read_stamp(site / "runs/toy.ipynb")
    assert stamp["content"] == content_hash(read_notebook(site / "toy.ipynb")) and stamp["content"] in page
    assert "n = 30" in page and "abc" in page and stamp["environment"]["packages"]["torch"] in page
    assert report_info(site / "reports/toy/failed.html")["status"] == "failed"


def test_title_and_assets_can_be_given(site, tmp_path):
    page = to_html(site / "runs/toy.ipynb", tmp_path / "x.html", title="Other <b>title</b>", assets=tmp_path / "shared", hide_code=False).read_text()
    assert "Other &lt;b&gt;title" in page and (tmp_path / "shared/plotly.min.js").exists() and 'src="shared/plotly.min.js"' in page and re.search(r'<details class="code" open', page)


def test_bad_input_leaves_nothing_behind(site, tmp_path):
    (tmp_path / "cut.ipynb").write_text((site / "runs/toy.ipynb").read_text()[:500])
    for name, cause in (("cut.ipynb", "not a notebook"), ("absent.ipynb", "no such notebook")):
        with pytest.raises(ValueError, match=f"{name}: {cause}"): to_html(tmp_path / name, tmp_path / "out.html")
    with pytest.raises(ValueError, match="cannot write"): to_html(site / "runs/toy.ipynb", tmp_path / "cut.ipynb/out.html", assets=tmp_path / "assets")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["assets", "cut.ipynb"]


def test_a_finished_notebook_is_not_run_again(site, tmp_path):
    out = shutil.copy(site / "runs/toy.ipynb", tmp_path / "toy.ipynb")
    before = json.loads((tmp_path / "toy.ipynb").read_text())
    run_notebook(site / "toy.ipynb", out, dict(n=30), fingerprint="abc", echo=False)
    assert json.loads((tmp_path / "toy.ipynb").read_text()) == before
