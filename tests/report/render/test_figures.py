import pytest

from ngc_jax.report.render.figures import bars, draw_comparison


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


def test_levers_stand_below_the_methods_they_change_at_the_same_keep_ratios(tmp_path, monkeypatch):
    entries = [
        row("ngc", 0.8, 12.0, "methods", "ngc"),
        row("svd", 0.8, 40.0, "methods", "svd"),
        row("svd", 0.5, 90.0, "methods", "svd"),  # no lever has this keep ratio
        row("asvd", 0.8, 50.0, "methods", "asvd"),  # no lever changes it
        row("svd + gauge", 0.8, 25.0, "levers", "svd"),
        row("ngc, once", 0.8, 13.0, "levers", "ngc"),
    ]
    drawn = []
    monkeypatch.setattr(
        "ngc_jax.report.render.figures.bars", lambda rows, dense: drawn.append(rows) or bars(rows, dense)
    )
    dense = {"perplexity": 10.0, "block_parameters": 1000}
    files = draw_comparison({"entries": entries, "dense": dense}, tmp_path)
    assert [(one["variant"], one["keep"]) for one in drawn[0]] == [
        ("svd", 0.8),
        ("svd + gauge", 0.8),
        ("ngc", 0.8),
        ("ngc, once", 0.8),
    ]
    assert tmp_path / "levers.png" in files


@pytest.mark.parametrize("name", [r"$\bad$", "a$b", "日本"])
def test_names_are_no_mathematics_and_may_be_of_any_script(name, tmp_path):
    entries = [row(name, 0.8, perplexity, "methods", "ngc") for perplexity in (12.0, 9e9)]
    files = draw_comparison({"entries": entries, "dense": {"perplexity": 10.0, "block_parameters": 1000}}, tmp_path)
    assert files
    assert all(file.stat().st_size for file in files)
