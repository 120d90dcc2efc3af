"""The picture of a stability run: growth of perturbations, and the metric over the text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ngc_jax.reporting.render.figures import save_figure
from ngc_jax.reporting.render.plots import draw_beside
from ngc_jax.reporting.views import growth, metric_over_text


def draw_stability(results: Mapping[str, Any], directory: Path) -> Path:
    """Draw stability.png: growth on the left, the metric of every token or segment on the right.

    Args:
        results: As `ngc-jax stability` returns them.
        directory: Where to write it.

    Returns:
        The file.
    """
    title = f"{results['model']} along {results['along']}: below 0 perturbations decay"
    return save_figure(draw_beside([growth(results), metric_over_text(results)], title), directory / "stability.png")
