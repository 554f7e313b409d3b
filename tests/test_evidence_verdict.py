"""From the tables of a batch to its verdicts and its page: what is said is what is in the tables, twice the same, and readable anywhere."""
import json
import numpy as np
import pandas as pd
import pytest
from tmlab.cli import run_command
from tmlab.core.runs import write_json
from tmlab.evidence.report import index_page, report_info
from tmlab.evidence.verdict import answer_line, judge, read_results


def write_batch(folder, effect, seeds=8, preset="cpu", title="Does pretraining help?", arms=("scratch", "ae"), seed=0, missing=(), **plan):
    "The tables of a batch: metres of `arms`, the second arm `effect` metres better; the seeds `missing` of it have no lap time."
    rng, rows = np.random.default_rng(seed), []
    for group in ("pixels", "all"):
        rows += [dict(group=group, arm=arm, seed=s, hash=f"{arm}{s}", wall_s=100.0, git="abc", metres=250 + effect * (arm == arms[1]) + rng.normal(0, 8), time_s=None if s in missing and arm == arms[1] else 12 + rng.random())
                 for arm in arms for s in range(1, seeds + 1)]
    tables = dict(rows=rows, tracks=[{k: r[k] for k in ("group", "arm", "seed", "metres")} | dict(track="flat-1", spec="flat:1:12", role="trained", n=16, finish_rate=0.0, time_s=None) for r in rows],
                  curves=[{k: r[k] for k in ("group", "arm", "seed")} | dict(metric="metres", decisions=d, gradient_steps=d // 16, active_s=d / 200, value=r["metres"] * d / 1000) for r in rows for d in (0, 500, 1000)])
    folder.mkdir(parents=True)
    for name, table in tables.items(): pd.DataFrame(table).to_csv(folder / f"{name}.csv", index=False)
    write_json(folder / "batch.json", dict(
        version=1, name=folder.name, title=title, question="Does an encoder that has seen replays learn faster?", preset=preset, arms={a: {} for a in arms}, groups=dict(pixels={}, all={}), parameters={}, controls=["scratch"],
        limits=["A longer budget."], planned=2 * len(arms) * 8, finished=len(rows), failed=[], notebook="agent.ipynb", notebook_hash="0", environment={},
        compare=[dict(score="metres", control=arms[0], unit="m", smallest=20, primary=True), dict(score="time_s", control=arms[0], unit="s", smallest=0.5, higher_is_better=False)]) | plan)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "reports/ with three batches: an effect, none, and a smoke run."
    root = tmp_path_factory.mktemp("verdicts") / "reports"
    write_batch(root / "effect", 40, missing=(3,))
    write_batch(root / "null", 0, title="Nothing here?", seed=1)
    write_batch(root / "quick", 40, seeds=2, preset="smoke", title="Does it run?")
    for name in ("effect", "null", "quick"): assert run_command("report", str(root / name)) == 0
    return root


def test_the_verdicts_are_those_of_the_tables(site):
    by = lambda name: pd.read_csv(site / name / "verdicts.csv").set_index(["score", "group"]).verdict
    assert (by("effect")["metres"] == "better").all() and (by("effect")["time_s"] == "not comparable").all()
    assert set(by("null")["metres"]) <= {"no evidence", "under-powered"} and set(by("quick")) == {"no verdict"}
    info = report_info(site / "effect/index.html")
    assert info["verdicts"] == ["better"] and info["preset"] == "cpu" and info["seeds"] == 8 and "pixels: ae better" in info["answer"]


def test_twice_the_same_table(site, tmp_path):
    write_batch(tmp_path / "effect", 40, missing=(3,))
    assert run_command("report", str(tmp_path / "effect")) == 0
    assert (tmp_path / "effect/verdicts.csv").read_bytes() == (site / "effect/verdicts.csv").read_bytes()


def test_the_order_of_rows_changes_nothing(tmp_path):
    folder = write_batch(tmp_path / "b", 15)
    before = judge(read_results(folder)).drop(columns="v")
    rows = pd.read_csv(folder / "rows.csv").sample(frac=1, random_state=0)
    pd.concat([rows[rows.group == "pixels"], rows[rows.group == "all"]]).to_csv(folder / "rows.csv", index=False)
    pd.testing.assert_frame_equal(judge(read_results(folder)).drop(columns="v"), before)


def test_many_comparisons_are_not_paired_where_pairs_could_never_tell(tmp_path):
    few = judge(read_results(write_batch(tmp_path / "few", 40, arms=("scratch", "a", "b"))))
    many = judge(read_results(write_batch(tmp_path / "many", 40, arms=("scratch", "a", "b", "c", "d", "e"))))
    assert few[few.primary].paired.all() and not many[many.primary].paired.any()
    assert set(many[many.primary & (many.a == "a")].verdict) == {"better"}


def test_a_partial_batch_says_what_is_missing(tmp_path):
    folder = write_batch(tmp_path / "part", 40)
    rows = pd.read_csv(folder / "rows.csv")
    rows[(rows.arm == "scratch") | (rows.seed == 1)].to_csv(folder / "rows.csv", index=False)
    results = read_results(folder)
    table = judge(results)
    assert set(table.verdict) == {"not comparable"} and "ae has 1 finished run" in table.text[0] and "not comparable" in answer_line(results, table)


@pytest.mark.parametrize("wound, cause", [
    (lambda d: (d / "rows.csv").unlink(), "no unit has finished"),
    (lambda d: (d / "batch.json").write_text("{"), "batch.json: not valid JSON"),
    (lambda d: write_json(d / "batch.json", json.loads((d / "batch.json").read_text()) | dict(compare=[dict(score="meters", control="scratch")])), "no score 'meters'; did you mean 'metres'"),
    (lambda d: write_json(d / "batch.json", json.loads((d / "batch.json").read_text()) | dict(compare=[dict(score="metres", control="scrach")])), "no arm 'scrach'; did you mean 'scratch'"),
])
def test_what_cannot_be_judged_is_one_clear_error(tmp_path, capsys, wound, cause):
    folder = write_batch(tmp_path / "reports/b", 0)
    wound(folder)
    assert run_command("report", str(folder)) == 2
    assert cause in (said := capsys.readouterr().err) and said.count("\n") == 1 and not (folder / "index.html").exists() and not (folder / "verdicts.csv").exists()


@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(1100, "light"), (390, "dark")])
def test_the_answer_is_seen_at_once(site, open_page, screenshot, width, scheme):
    page = (tab := open_page(offline=True, viewport=dict(width=width, height=844), color_scheme=scheme)).page
    page.goto((site / "effect/index.html").as_uri())
    chips = page.locator(".answer .chip")
    assert chips.all_text_contents() == ["better", "better"] and all(c.bounding_box()["y"] < 600 for c in chips.all())
    page.wait_for_function("[...document.querySelectorAll('.plot')].every(p => p.dataset.drawn)", timeout=30_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width and not tab.errors
    assert "3.0" not in page.locator(".answer").text_content() and "not compared: 1 of 8 seeds of ae have no time_s" in page.locator("main").text_content()
    screenshot(page, f"verdict_{width}", full_page=True)


@pytest.mark.browser
def test_the_index_shows_answers_and_filters(site, open_page, screenshot):
    page = (tab := open_page(offline=True)).page
    index_page(site)
    page.goto((site / "index.html").as_uri())
    seen = lambda: page.locator("tbody tr:visible a").all_text_contents()
    assert len(seen()) == 3
    page.locator("#by-verdict").select_option("better")
    assert seen() == ["Does pretraining help?"] and "pixels: ae better" in page.locator("tbody tr:visible").text_content()
    page.locator("#by-verdict").select_option("")
    page.locator("#by-preset").select_option("smoke")
    assert seen() == ["Does it run?"] and page.locator("#shown").text_content() == "1 of 3"
    page.locator("#by-preset").select_option("")
    page.locator("#since").fill("2999-01-01")
    assert not seen() and not tab.errors
    screenshot(page, "verdict_index")
