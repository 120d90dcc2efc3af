import math

import pytest

from ngc_jax.reporting import views
from ngc_jax.reporting.comparison import draw_comparison


def row(variant, keep, perplexity, section, method):
    return {
        "variant": variant,
        "keep": keep,
        "perplexity": perplexity,
        "section": section,
        "method": method,
        "allocation": "uniform",
        "stored_parameters": 100,
    }


DENSE = {"perplexity": 10.0, "block_parameters": 1000}


def test_levers_stand_below_the_methods_they_change_at_the_same_keep_ratios(tmp_path):
    entries = [
        row("ngc", 0.8, 12.0, "methods", "ngc"),
        row("svd", 0.8, 40.0, "methods", "svd"),
        row("svd", 0.5, 90.0, "methods", "svd"),  # no lever has this keep ratio
        row("asvd", 0.8, 50.0, "methods", "asvd"),  # no lever changes it
        row("ngc_paper", 0.8, 50.0, "methods", "ngc_paper"),
        row("svd + gauge", 0.8, 25.0, "levers", "svd"),
        row("ngc, once", 0.8, 13.0, "levers", "ngc"),
        row("ngc_paper + gauge", 0.8, 24.0, "levers", "ngc_paper"),
    ]
    chart = views.levers({"entries": entries, "dense": DENSE})
    assert chart.names == ("svd", "svd + gauge", "ngc", "ngc, once", "ngc_paper", "ngc_paper + gauge")
    assert chart.styles == (0, 0, -1, -1, 0, 0)
    ((title, values),) = chart.panels
    assert title == "keep 0.8"
    assert values == tuple(math.log(ratio) for ratio in (4.0, 2.5, 1.2, 1.3, 5.0, 2.4))
    files = draw_comparison({"entries": entries, "dense": DENSE}, tmp_path)
    assert [file.name for file in files] == ["pareto.png", "levers.png"]


def test_ranks_are_drawn_over_full_ranks_with_dense_blocks_at_the_top(tmp_path):
    entry = row("ngc", 0.6, 12.0, "methods", "ngc") | {
        "allocation": "loss",
        "topology": "q-k-v-o-u-g-d",
        "ranks": {"L0-q": 3, "L1-q": 6, "L1-d": 2},
        "full_ranks": {"L0-q": 12, "L1-q": 12, "L1-d": 8},
        "dense_blocks": ["layers.0.mlp.d"],
    }
    chart = views.rank_map(entry)
    assert [(cell.layer, cell.role, cell.value, cell.short) for cell in chart.cells] == [
        (0, "q", 0.25, "25"),
        (1, "q", 0.5, "50"),
        (0, "d", 1.0, "100"),
        (1, "d", 0.25, "25"),
    ]
    assert chart.layers == 2
    assert [cell.group for cell in chart.cells] == ["L0-q", "L1-q", None, "L1-d"]
    assert chart.table().rows[2] == ("L0-d", "–", "–", "100.0 %")
    files = draw_comparison({"entries": [entry], "dense": DENSE}, tmp_path)
    assert [file.name for file in files] == ["pareto.png", "ranks.png"]


@pytest.mark.parametrize("name", [r"$\bad$", "a$b", "日本"])
def test_names_are_no_mathematics_and_may_be_of_any_script(name, tmp_path):
    entries = [row(name, 0.8, perplexity, "methods", "ngc") for perplexity in (12.0, 9e9)]
    files = draw_comparison({"entries": entries, "dense": DENSE}, tmp_path)
    assert files
    assert all(file.stat().st_size for file in files)
