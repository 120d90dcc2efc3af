"""The experiment on stability and reasoning: its statistics, its prompts, and the whole program on a tiny model."""

import dataclasses
import json
import re

import numpy as np
import pytest
from scipy import stats

from experiments.reasoner.run import Settings as Reasoner
from experiments.stability_reasoning import run as program
from experiments.stability_reasoning.comparisons import PRIMARY, SECONDARY, corrected, markdown
from experiments.stability_reasoning.prompts import common_suffix, last_number, make_chains, make_pairs, make_sums
from experiments.stability_reasoning.statistics import holm, paired, rank_biserial, residuals, unpaired
from ngc_jax.errors import UsageError
from ngc_jax.models.save import save_model
from ngc_jax.reporting.render.figures import save_figure
from ngc_jax.reporting.render.forest import forest
from tests.models.compact import dense_model

RNG = np.random.default_rng(0)


def test_paired_differences():
    first = RNG.standard_normal(40)
    second = first + 0.3 + 0.5 * RNG.standard_normal(40)
    found = paired(first, second)
    change = second - first
    np.testing.assert_allclose(found.mean, change.mean())
    # The t of a paired test is d_z times the root of n.
    np.testing.assert_allclose(found.effect * 40**0.5, stats.ttest_rel(second, first).statistic)
    assert found.p == stats.wilcoxon(second, first).pvalue
    student = stats.ttest_1samp(change, 0).confidence_interval()
    np.testing.assert_allclose([found.low, found.high], student, atol=0.1 * (student.high - student.low))
    assert found.effect_low < found.effect < found.effect_high
    assert paired(first, second) == found
    assert paired(first[:7], second[:7]) is None
    same = paired(first, first)
    assert (same.mean, same.p) == (0, 1)


def test_unpaired_differences():
    first, second = np.round(RNG.standard_normal(30), 1), np.round(RNG.standard_normal(50) + 0.5, 1)
    found = unpaired(first, second)
    u = stats.mannwhitneyu(second, first)
    np.testing.assert_allclose(found.effect, 2 * u.statistic / (30 * 50) - 1)
    np.testing.assert_allclose(found.p, u.pvalue)
    np.testing.assert_allclose(found.mean, second.mean() - first.mean())
    assert found.low < found.mean < found.high
    assert found.n == (30, 50)
    np.testing.assert_allclose(rank_biserial(np.array([1.0, 2]), np.array([2.0, 3, 4])), 5 / 6)
    assert unpaired(first, second[:7]) is None


def test_intervals_hold_what_they_promise():
    """Of many samples of a normal distribution with a known effect about 95 in 100 intervals have it."""
    held = []
    for seed in range(60):
        change = 0.4 + np.random.default_rng(seed).standard_normal(40)
        found = paired(np.zeros(40), change, seed=seed)
        held.append([found.low < 0.4 < found.high, found.effect_low < 0.4 < found.effect_high])
    assert (np.mean(held, axis=0) > 0.85).all()


def test_holm():
    # Holm's procedure by its definition: reject in order until one is not below level / (tests left).
    p = [0.01, 0.04, 0.03, 0.005, 0.5]
    np.testing.assert_allclose(holm(p), [0.04, 0.09, 0.09, 0.025, 0.5])
    for _ in range(20):
        p = RNG.random(8) ** 4
        rejected = np.zeros(8, bool)
        for left, index in zip(range(8, 0, -1), np.argsort(p), strict=True):
            if p[index] > 0.05 / left:
                break
            rejected[index] = True
        np.testing.assert_array_equal(np.array(holm(p)) <= 0.05, rejected)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_what_a_covariate_explains_is_taken_out():
    x = RNG.integers(0, 5, 50)
    y = 3.0 * x + RNG.standard_normal(50)
    rest = residuals(y, x)
    assert abs(np.corrcoef(rest, x)[0, 1]) < 1e-9
    np.testing.assert_allclose(rest.mean(), y.mean())
    np.testing.assert_array_equal(residuals(y, np.ones(50)), y)


def test_pairs_of_stories_differ_in_the_question_only():
    pairs = make_pairs(3, 60)
    assert pairs == make_pairs(3, 60) != make_pairs(4, 60)
    assert len({pair.steps for pair in pairs}) == 60
    for pair in pairs:
        (asked, story), (other, same) = (text.split("\nStory: ") for text in (pair.steps, pair.stated))
        assert story == same
        assert asked != other
        assert len(asked.split()) == len(other.split())
        numbers = [int(number) for number in re.findall(r"\d+", story)]
        assert len(numbers) == 3
        assert pair.answers == (sum(numbers), numbers[0])
        assert not re.search(r"\d", asked + other)


def test_pairs_of_sums_are_of_equal_length():
    for hard, easy in make_chains(1, 40, 3):
        assert len(hard.prompt) == len(easy.prompt)
        assert eval(re.sub(r"\b0(\d)", r"\1", hard.prompt[:-1])) % 100 == hard.answer
        assert re.fullmatch(r"\d+([+-]0){3}=", easy.prompt)
        assert easy.answer == int(re.match(r"\d+", easy.prompt)[0])
        assert re.sub(r"\d", "", hard.prompt) == re.sub(r"\d", "", easy.prompt)
    assert len(make_sums()) == len(set(make_sums())) == 64
    assert all(eval(re.search(r"\d \+ \d", text)[0]) == answer for text, answer in make_sums())


def test_replies_and_common_ends():
    assert last_number("12 and 3,000 make 3,012.") == 3012
    assert last_number("none") is None
    assert common_suffix(np.array([1, 2, 3, 4]), np.array([9, 3, 4])) == 2
    assert common_suffix(np.array([1, 2]), np.array([1, 2])) == 2


@pytest.fixture
def settings(tmp_path):
    save_model(dense_model(), tmp_path / "tiny")
    return program.Settings(
        model=str(tmp_path / "tiny"),
        pairs=8,
        model_pairs=8,
        sequence_pairs=8,
        directions=2,
        memory=8,
        new_tokens=2,
        every_sum=8,
        calibration_tokens=256,
        methods=("svd",),
        keeps=(0.6,),
        chains=8,
        reasoner=Reasoner(width=12, layers=1, chain=2, steps=2, rows=2, length=24, calibration_rows=4),
    )


def test_the_small_model_is_measured_once_and_reported(settings, tmp_path, monkeypatch):
    rows, text = program.small_model(program.Stages(tmp_path / "run", settings), settings)
    expected = {"needs steps - does not", "svd 0.6 - dense", "trained - random weights"}
    assert {row["comparison"] for row in rows} >= expected
    assert {row["quantity"] for row in rows} == set(PRIMARY.values())
    assert "8 pairs of equal length" in text

    # What was measured is not measured again; what is missing is, and comes out the same.
    monkeypatch.setattr(program, "fit", None)
    (tmp_path / "run" / "sums-random.json").unlink()
    assert program.small_model(program.Stages(tmp_path / "run", settings), settings)[0] == rows
    with pytest.raises(UsageError, match="other settings"):
        program.Stages(tmp_path / "run", dataclasses.replace(settings, seed=1))

    tests = corrected(rows)
    table = markdown({"family_notes": {"sums": text}, "tests": tests})
    assert table.count("| sums |") == len(tests)
    unlike = {**tests[0], "pairs": False, "family": "other"}
    figure = forest([*tests, unlike], "A title")
    assert len(figure.axes) == 2
    save_figure(figure, tmp_path / "effects.png")
    assert (tmp_path / "effects.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_program_runs(settings, tmp_path):
    results = program.run(settings, tmp_path / "run", tmp_path)
    found = {row["quantity"] for row in results["tests"] if row["comparison"].startswith("needs")}
    assert found == {*PRIMARY.values(), *SECONDARY.values()}
    assert {row["family"] for row in results["tests"]} == {"SmolLM2", "sums"}
    assert all(row["p_holm"] >= row["p"] for row in results["tests"])
    assert len(json.loads((tmp_path / "results.json").read_text())["tests"]) == len(results["tests"])
    assert (tmp_path / "results.md").exists()
    assert (tmp_path / "effects.png").exists()
