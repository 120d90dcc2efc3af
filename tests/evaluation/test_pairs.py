"""Paired comparisons against scipy and a permutation of their own; runs of other documents are refused."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.pairs import compare_runs, pair_scores, read_run, write_run
from ngc_jax.evaluation.scores import Sum
from ngc_jax.evaluation.tasks import Measured


def test_the_test_counts_all_splits_of_the_documents_that_differ():
    ours, theirs = [1, 1, 1, 1, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1, 0, 1, 0, 1]
    pair = pair_scores(ours, theirs)
    assert (pair.better, pair.worse, pair.mean, pair.other) == (5, 1, 0.7, 0.3)
    splits = [sum(signs) for signs in itertools.product([0, 1], repeat=6)]
    assert pair.p_value == pytest.approx(np.mean([abs(split - 3) >= 2 for split in splits]))
    assert pair_scores(theirs, ours).p_value == pair.p_value
    assert pair_scores(ours, ours).p_value == 1.0
    assert pair_scores([0.5, 1.0], [0.0, 1.0]).p_value is None  # pass@k is not right or wrong


def test_the_interval_is_of_the_difference_of_pairs():
    rng = np.random.default_rng(0)
    easy = rng.random(500)
    ours, theirs = ((easy + 0.15 * rng.random(500) > limit).astype(float) for limit in (0.5, 0.55))
    pair = pair_scores(ours.tolist(), theirs.tolist())
    differences = ours - theirs
    expected = scipy.stats.t.interval(0.95, 499, differences.mean(), scipy.stats.sem(differences))
    assert pair.interval == pytest.approx(expected, abs=0.004)
    assert pair.difference == pytest.approx(differences.mean())
    # Pairs that vary together are known better than two independent samples.
    assert pair.interval[1] - pair.interval[0] < 0.7 * (4 * np.sqrt(ours.var() / 500 + theirs.var() / 500))


DOCUMENTS = [{"question": str(n)} for n in range(4)]


def run(place, name, values, numbers=(1, 2, 3), documents=DOCUMENTS, score="acc"):
    (place / name).mkdir()
    write_run(place / name, "colours", documents, Measured(numbers, {score: Sum(values), "extra_" + name: Sum(values)}))
    return place / name


def test_runs_are_compared_by_their_directories(tmp_path):
    one, two = run(tmp_path, "one", (1.0, 0.0, 1.0)), run(tmp_path, "two", (0.0, 0.0, 1.0))
    pairs = compare_runs(one, str(two))
    assert set(pairs) == {"acc"}
    assert (pairs["acc"].better, pairs["acc"].worse, pairs["acc"].p_value) == (1, 0, 1.0)
    assert json.loads(json.dumps(pairs["acc"].summary()))["difference"] == pytest.approx(1 / 3)


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    one = run(tmp_path, "one", (1.0, 0.0, 1.0))
    others = [{**document, "question": document["question"] + "?"} for document in DOCUMENTS]
    for other, message in (
        (run(tmp_path, "fewer", (1.0, 0.0), (1, 2)), "scored 2 documents and this run 3, of which 2 are the same"),
        (run(tmp_path, "others", (1.0, 0.0, 1.0), documents=others), "of which 0 are the same"),
        (run(tmp_path, "score", (1.0, 0.0, 1.0), score="math"), "no score in common"),
        (tmp_path, "finished evaluation"),
    ):
        with pytest.raises(UsageError, match=message):
            compare_runs(one, other)
    for text in ("[]", "{", '{"task": "a", "documents": ["b"], "scores": {"acc": [1, 2]}}'):
        (one / "scores.json").write_text(text)
        with pytest.raises(UsageError, match="evaluate that run again"):
            read_run(one)
