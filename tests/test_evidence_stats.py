"""Intervals and verdicts: rliable's figures, what the intervals hold, false alarms, exact p values, pairing, wording, determinism."""
import itertools, json, math, subprocess, sys
import numpy as np
import pandas as pd
import pytest
from tmlab.evidence import stats
from tmlab.evidence.stats import (ESTIMATES, SCORES, aggregates, as_scores, bounds, compare, compare_many, coverage, difference_ci, estimator, holm, improvement, iqm, iqm_ci,
                                  newcombe, pair_of, percentile_ci, performance_profile, permutation_test, plot_profiles, probability_of_improvement, rate_interval, runs_needed,
                                  sign_flip_test, verdict_rates, verdict_table, wilson)


@pytest.fixture(scope="module")
def rliable(repo): return json.loads((repo / "tests/data/rliable_scores.json").read_text())


@pytest.fixture(scope="module")
def card(repo): return json.loads((repo / "data_cards/stats_calibration.json").read_text())


def arms(seed=0, shift=0.0, n=8):
    rng = np.random.default_rng(seed)
    return rng.normal(size=n) + shift, rng.normal(size=n)


def test_points_are_rliables(rliable):
    assert rliable["made_with"]["rliable"] == "1.2.0" and len(rliable["point"]) == 6
    for name, scores in rliable["scores"].items():
        for of, value in rliable["point"][name].items(): assert abs(estimator(of)(as_scores(scores)) - value) < 1e-6, (name, of)
        assert abs(iqm_ci(scores)["iqm"] - rliable["point"][name]["iqm"]) < 1e-6
        assert np.allclose(aggregates(scores, reps=100).value, [rliable["point"][name][of] for of in ESTIMATES], atol=1e-6, rtol=0)


def test_percentile_intervals_are_rliables(rliable):
    for name, scores in rliable["scores"].items():
        for of, (low, high) in rliable["interval_95"][name].items():
            assert np.allclose(percentile_ci(scores, of, per_task=True, reps=20_000, seed=3), (low, high), rtol=0, atol=0.03 * (high - low) + 1e-9), (name, of)


def test_improvement_and_profiles_are_rliables(rliable):
    for pair, theirs in rliable["improvement"].items():
        a, b = (rliable["scores"][x] for x in pair.split(" > "))
        ours = probability_of_improvement(a, b, method="percentile")
        assert abs(ours["probability"] - theirs["point"]) < 1e-6 and np.allclose(bounds(ours), theirs["interval_95"], atol=0.02)
        assert abs(probability_of_improvement(a, b, higher_is_better=False)["probability"] - (1 - theirs["point"])) < 1e-6
    for name, theirs in rliable["profile"].items(): assert np.allclose(performance_profile(rliable["scores"][name], theirs["taus"]).share, theirs["share"], atol=1e-6)


def test_intervals_of_five_runs_hold_the_truth():
    held = {name: coverage(lambda x: ci(x), SCORES["normal"], 0, 5, 1000, seed=5) for name, ci in
            (("calibrated", lambda x: bounds(iqm_ci(x, reps=800))), ("percentile", lambda x: percentile_ci(x, reps=800)))}
    assert 0.91 <= held["calibrated"] <= 0.97 and held["percentile"] < held["calibrated"] - 0.02, held


@pytest.mark.parametrize("shape", ["normal", "finish rates near 1"])
def test_intervals_of_the_difference_at_eight_runs(shape):
    held = coverage(lambda x: bounds(difference_ci(x[:, :1], x[:, 1:], reps=600)), pair_of(SCORES[shape]), 0, 8, 600, seed=1)
    assert 0.925 <= held <= 0.98, held


def test_the_card_says_calibrated_and_belongs_to_this_code(card):
    d = pd.DataFrame(card["coverage"])
    assert card["n_sim"] >= 4000 and set(d.n) == {5, 8, 20} and set(d.scores) == set(SCORES) and set(d.interval) == set(stats.INTERVALS)
    kept = d[(d.n == 8) & ~d.interval.isin(["mean", "IQM, percentile bootstrap"])]
    assert len(kept) == 5 * len(SCORES) and kept.coverage.between(0.93, 0.97).all(), kept
    assert len(card["false_alarms"]) == 2 * len(SCORES) and all(r["called"] <= 16 / 200 for r in card["false_alarms"])
    again = verdict_rates(SCORES["normal"], 2 * stats.spread(SCORES["normal"]), 8, 100, seed=7)["better"]
    stored = next(r["power"] for r in card["power"] if (r["scores"], r["effect"], r["of"]) == ("normal", 2, "iqm"))
    assert abs(again - stored) < 4 * math.sqrt(stored * (1 - stored) / 100) + 0.01


@pytest.mark.parametrize("shape, paired", [("lap times, skewed", False), ("normal", True)])
def test_identical_arms_are_seldom_told_apart(shape, paired):
    rates = verdict_rates(SCORES[shape], 0, 8, 200, seed=3, paired=paired, reps=600)
    assert 1 <= 200 * (rates["better"] + rates["worse"]) <= 16, rates  # none at all would be a test that never speaks


def test_scatter_alone_is_no_verdict():
    rng = np.random.default_rng(1)
    wide = [compare(x, y, reps=600) for x, y in zip(rng.normal(size=(100, 8)), 4 * rng.normal(size=(100, 8)))]
    assert sum(v.p <= 0.05 for v in wide) > 9 >= sum(v.verdict in ("better", "worse") for v in wide)


def test_shared_trainings_need_whole_runs():
    def shared(rng, size): return rng.normal(size=size)[..., None] + rng.normal(size=(*size, 5))
    whole, split = (coverage(lambda x: bounds(iqm_ci(x, per_task=p, reps=300)), shared, 0, 8, 200) for p in (False, True))
    assert whole > 0.9 > 0.85 > split


def test_permutation_counts_every_division():
    a, b = [1.0, 4, 2], [3.0, 9, 7, 8]
    pool, f = np.array(a + b), lambda x: iqm(np.array(x)[:, None])
    d = [f(pool[list(k)]) - f(np.delete(pool, k)) for k in itertools.combinations(range(7), 3)]
    t = permutation_test(a, b)
    assert t == dict(effect=f(a) - f(b), p=np.mean(np.abs(d) >= abs(f(a) - f(b)) - 1e-12), arrangements=35, exact=True)
    assert permutation_test(range(8), range(10, 18))["p"] == permutation_test(np.ones(8), np.zeros(8))["p"] == 2 / math.comb(16, 8) and permutation_test([1, 1, 1], [1, 1, 1])["p"] == 1


def test_monte_carlo_says_so_and_never_gives_zero():
    a, b = np.arange(12.0), np.arange(12.0) + 100
    t = permutation_test(a, b, reps=2000)
    assert not t["exact"] and t["arrangements"] == 2000 and t["p"] == 1 / 2001 and "Monte-Carlo permutation test of 20000" in compare(a, b).text
    x, y = arms(4, 0.8, 10)
    exact = permutation_test(x, y)
    stats_limit, stats.EXACT_UP_TO = stats.EXACT_UP_TO, 10
    try: drawn = permutation_test(x, y, reps=4000)
    finally: stats.EXACT_UP_TO = stats_limit
    assert exact["exact"] and not drawn["exact"] and abs(exact["p"] - drawn["p"]) < 0.03
    s = sign_flip_test(np.arange(1.0, 21), reps=3000)
    assert not s["exact"] and s["p"] <= 2 / 3001


def test_sign_flips_are_all_patterns():
    d = np.array([0.5, -0.2, 0.9, 0.4, 0.1])
    means = [np.mean(d * s) for s in itertools.product((1, -1), repeat=5)]
    assert sign_flip_test(d)["p"] == np.mean(np.abs(means) >= abs(d.mean()) - 1e-12) and sign_flip_test(d)["arrangements"] == 32
    assert sign_flip_test(np.arange(1, 9))["p"] == 2 / 256


def test_pairs_are_matched_by_seed():
    rng = np.random.default_rng(2)
    level, seeds = 10 * rng.normal(size=8), [3, 1, 4, 15, 9, 2, 6, 5]
    a = pd.Series(level + 1 + 0.3 * rng.normal(size=8), pd.Index(seeds, name="seed"))
    b = dict(zip(seeds, level + 0.3 * rng.normal(size=8)))
    v, shuffled = compare(a, b), compare(a, {s: b[s] for s in sorted(b)})
    assert v.paired and v.verdict == "better" and v == shuffled and "8 pairs of training seeds" in v.text and 0.5 < v.low < v.effect < v.high < 1.5
    assert compare(a, b, paired=False).verdict == "under-powered" and not compare(a.to_numpy(), list(b.values())).paired
    with pytest.raises(ValueError, match="seeds .* were trained in one arm only"): compare(a, {s + 1: x for s, x in b.items()}, paired=True)
    assert not compare(a, {s + 1: x for s, x in b.items()}).paired
    assert "IQM of the paired differences" in compare(a, b, of="iqm").text
    with pytest.raises(ValueError, match="optimality gap of differences"): compare(a, b, of="optimality_gap")
    with pytest.raises(ValueError, match="a seed occurs twice"): compare(pd.Series([1.0, 2], pd.Index([1, 1], name="seed")), b)


def test_few_runs_get_students_interval():
    v = compare([3.0, 5, 4, 8], [1.0, 2, 2, 4], paired=True, reps=50_000)
    d = np.array([2.0, 3, 2, 4])
    assert np.allclose(bounds(iqm_ci([1, 3], reps=50_000)), (2 - 12.706, 2 + 12.706), rtol=0.02)  # of two runs the IQM is the mean; quantiles end at 1 and 3
    assert np.allclose(bounds(v), d.mean() + np.array([-1, 1]) * 3.182 * d.std(ddof=1) / 2, rtol=0.02) and v.of == "mean" and v.pilot


def test_verdict_words():
    fast, slow = arms(0, 3)
    assert compare(fast, slow).verdict == "better" and compare(slow, fast).verdict == "worse" and compare(slow, fast, higher_is_better=False).verdict == "better"
    under, none = compare(*arms(1), smallest=0.5), compare(*arms(1, n=40), smallest=1)
    assert under.verdict == "under-powered" and under.n_needed > 8 and f"about {under.n_needed} runs per arm" in under.text
    assert none.verdict == "no evidence" and none.n_needed <= 40 and "ruled out by the interval" in none.text
    tiny = compare(fast, slow, smallest=50)
    assert tiny.verdict == "better" and "below the 50 that matters" in tiny.text
    assert str(compare(fast, slow, names=("simclr", "scratch"), unit="m")).startswith("simclr is better than scratch: difference of IQMs +") and " m [" in compare(fast, slow, unit="m").text
    assert "8 and 8 training seeds" in compare(fast, slow).text and "exact permutation test of 12870" in compare(fast, slow).text


def test_few_seeds_are_a_pilot():
    a, b = arms(0, 9)
    v = compare(a[:7], b)
    assert v.pilot and v.verdict == "under-powered" and v.p < 0.01 and v.low > 0 and v.text.startswith("Pilot (n = 7, a verdict takes 8)") and v.n_needed >= 8
    assert " better than" not in v.text and not compare(a, b).pilot and compare(a, b).verdict == "better"


def test_equal_runs_say_that_scatter_is_unknown():
    v = compare(np.ones(8), np.zeros(8), names=("x", "y"))
    assert v.verdict == "better" and "All runs of x and of y are equal" in v.text and np.isfinite([v.low, v.high, v.detectable]).all()
    assert compare(np.ones(8), np.ones(8)).verdict == "no evidence" and "are equal" not in compare(*arms()).text


def test_several_comparisons_are_corrected_and_say_so():
    assert np.allclose(holm([0.04, 0.01, 0.02]), [0.04, 0.03, 0.04]) and holm([0.5, 0.9, 0.8]) == [1, 1, 1]
    rng = np.random.default_rng(21)
    runs = {"scratch": rng.normal(size=8), **{f"arm {i}": rng.normal(size=8) + s for i, s in enumerate((1.35, 0.2, 0.1, 0))}}
    many = compare_many(runs, "scratch")
    assert [v.p_corrected for v in many] == holm([v.p for v in many]) and all(v.comparisons == 4 and v.names[1] == "scratch" for v in many)
    assert all("after Holm's correction for 4 comparisons" in v.text for v in many) and len(compare_many(runs)) == 10
    one = compare(runs["arm 0"], runs["scratch"])
    assert one.verdict == "better" and one.p < 0.05 < many[0].p_corrected and many[0].verdict == "under-powered"  # what the correction takes away
    assert many[0].n_needed > one.n_needed and "after Bonferroni's correction for 4" in compare(runs["arm 0"], runs["scratch"], comparisons=4).text
    with pytest.raises(ValueError, match="control='x'"): compare_many(runs, "x")


def test_identical_invocations_and_row_order():
    runs = {k: np.random.default_rng(i).normal(size=(8, 3)) for i, k in enumerate("abc")}
    table = verdict_table(compare_many(runs))
    assert table.equals(verdict_table(compare_many(runs))) and table.to_csv() == verdict_table(compare_many({k: x[::-1] for k, x in runs.items()})).to_csv()
    a, b = runs["a"], runs["b"]
    there, back = compare(a, b), compare(b, a)
    assert there.p == back.p and np.allclose([there.effect, there.low, there.high], [-back.effect, -back.high, -back.low])
    assert iqm_ci(a, seed=1) == iqm_ci(a, seed=1) != iqm_ci(a, seed=2)


def test_n_needed():
    assert [runs_needed(math.sqrt(2), d) for d in (0.5, 0.8, 1)] == [64, 26, 17]  # Cohen's tables: two-sample t-test, two-sided 0.05, power 0.8
    assert runs_needed(1, 0.5, paired=True) == 34 and runs_needed(0, 1) == 4 and runs_needed(0, 1, paired=True) == 6
    assert runs_needed(1, 0.01) == pytest.approx(78_491, rel=0.001)
    for bad in (0, -1, math.nan):
        with pytest.raises(ValueError, match="positive difference"): compare(*arms(), smallest=bad)


def test_probability_of_improvement_keeps_its_width():
    low, high = newcombe(1, 8, 8)
    assert high == 1 and 0.6 < low < 0.85 and np.allclose(newcombe(0, 8, 8), (1 - high, 1 - low)) and newcombe(0.5, 8, 8)[0] < 0.3
    assert improvement(np.array([[1.0], [2]]), np.array([[1.0], [0]])) == 0.875
    held = coverage(lambda x: bounds(probability_of_improvement(x[:, 0] + 1.5, x[:, 1])), pair_of(SCORES["normal"]), 0.8556, 8, 1000)  # Φ(1.5 / √2)
    assert 0.93 <= held <= 0.975, held


def test_profiles():
    p = performance_profile([1.0, 2, 3, 4], [0, 1, 2.5, 4])
    assert p.share.tolist() == [1, 0.75, 0.5, 0] and np.allclose(p.low, [wilson(k, 4)[0] for k in (4, 3, 2, 0)]) and (p.low[0] < 0.9) and (p.high[3] > 0.1)
    assert performance_profile([1.0, 2], [1, 2, 3], higher_is_better=False).share.tolist() == [0, 0.5, 1]
    fig = plot_profiles({"one": arms()[0], "two": arms()[1]})
    assert len(fig.data) == 4 and "n = 8" in fig.data[1].name


def test_wrong_scores_are_refused():
    good = [1.0, 2, 3]
    for bad, words in (([1, np.nan], "NaN or infinite in row 1"), ([np.inf, 1], "row 0"), ([], "empty"), ([1.0], "single run"), (np.ones((2, 2, 2)), "shape")):
        for call in (iqm_ci, lambda x: compare(good, x), lambda x: compare(x, good), performance_profile, sign_flip_test, lambda x: probability_of_improvement(x, good)):
            with pytest.raises(ValueError, match=words): call(bad)
    with pytest.raises(ValueError, match="2 tasks in one arm and 1 in the other"): compare(np.ones((3, 2)), good)
    with pytest.raises(ValueError, match="cannot be paired"): compare(good, [1.0, 2], paired=True)
    with pytest.raises(ValueError, match="choose iqm, mean"): compare(good, good, of="mode")
    with pytest.raises(ValueError, match="scores of scratch"): compare(good, [math.nan, 1], names=("simclr", "scratch"))


def test_rates_are_as_before():
    assert rate_interval(8, 10) == dict(n=10, rate=0.8, low=0.4902, high=0.9433) and rate_interval(16, 16)["low"] == 0.8064
    with pytest.raises(ValueError, match="5 of 4"): rate_interval(5, 4)


def test_import_is_light():
    code = "import sys, tmlab.evidence.stats; print([m for m in ('scipy.stats', 'plotly', 'torch', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
