"""Commands that are killed and run again end with the same results: the short form."""

import json

import pytest

from experiments.kills import __main__ as kills


@pytest.mark.slow
def test_killed_commands_end_with_the_same_results(tmp_path):
    assert kills.main(["--count", "5", "--seed", "2", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["command"] for row in rows] == list(kills.COMMANDS)
    assert not any(row["fault"] for row in rows)


def test_results_are_compared_but_for_times():
    one = {"perplexity": 2.0, "seconds": 1.0, "entries": [{"cost": 3, "rank": 4}]}
    assert kills._lasting(one) == kills._lasting(one | {"seconds": 9.0})
    other = kills._lasting(one | {"entries": [{"cost": 3, "rank": 5}]})
    assert kills._difference(kills._lasting(one), other) == "/entries/0/rank: 4 became 5"
