"""Small results in the form that the commands write, with numbers that can be checked by hand."""

from typing import Any

import numpy as np

HOSTILE = "</script><script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)> \"'&{{ 7*7 }}"


TEXTS = ("one two three four", "the same\nagain")


def stability(along: str = "depth", texts: tuple[str, ...] = TEXTS, layers: int = 3) -> dict[str, Any]:
    """As stability.json; every character is a token."""
    rng = np.random.default_rng(0)
    prompts: list[dict[str, Any]] = []
    for text in texts:
        count = len(text)
        if along == "sequence":
            segments = count // 4 - 1
            prompts.append(
                {
                    "text": text,
                    "tokens": list(text),
                    "metric": -0.25,
                    "error": None,
                    "ends": [4 * (index + 2) - 1 for index in range(segments)],
                    "segments": rng.normal(size=segments).tolist(),
                    "exponents": rng.normal(size=(segments, 2)).tolist(),
                    "growth": rng.normal(size=(segments, 4)).tolist(),
                    "layers": rng.normal(size=(segments, layers)).tolist(),
                }
            )
            continue
        metric = rng.normal(scale=0.1, size=count)
        prompts.append(
            {
                "text": text,
                "tokens": list(text),
                "metric": float(metric[1:].mean()),
                "error": 0.01,
                "tokens_metric": metric.tolist(),
                "tokens_error": rng.uniform(0, 0.1, count).tolist(),
                "exponents": rng.normal(size=(count, 2)).tolist(),
                "layer_exponents": [[0.5, None], *rng.normal(size=(layers - 1, 2)).tolist()],
                "growth": rng.normal(size=(count, layers + 1)).tolist(),
                "groups": {},
                "potential_share": 0.4,
                "tokens_potential_share": rng.uniform(0, 1, count).tolist(),
                "layer_potential_share": rng.uniform(0, 1, layers).tolist(),
            }
        )
    return {
        "model": "tiny",
        "along": along,
        "unit": "1 / layer" if along == "depth" else "1 / token",
        "exponents": 2,
        **({"memory": 4} if along == "sequence" else {}),
        "seed": 0,
        "prompts": prompts,
    }


def comparison() -> dict[str, Any]:
    """As results.json: `ngc` is on the front everywhere, `svd` is broken at 0.5, `fwsvd` at all sizes."""

    def row(variant: str, keep: float, perplexity: float, section: str = "methods") -> dict[str, Any]:
        stored = int(1000 * keep)
        return {
            "variant": variant,
            "keep": keep,
            "perplexity": perplexity,
            "stored_parameters": stored,
            "section": section,
        }

    return {
        "settings": {"model": "tiny", "evaluation_text": "book.txt", "calibration_tokens": 96},
        "dense": {"perplexity": 10.0, "block_parameters": 1000, "tokens": 95, "parameters": 2000},
        "entries": [
            row("svd", 0.8, 30.0),
            row("svd", 0.5, 900.0),
            row("ngc", 0.8, 12.0),
            row("ngc", 0.5, 20.0),
            row("fwsvd", 0.8, 5000.0),
            row("svd + gauge", 0.8, 25.0, "levers"),
        ],
    }


def metrics() -> list[dict[str, float]]:
    """As the lines of metrics.jsonl; step 2 was done twice."""
    return [
        {"step": 0, "perplexity": 40.0},
        {"step": 1, "loss": 3.0, "divergence": 3.0, "seconds": 1.0},
        {"step": 2, "loss": 9.0, "divergence": 9.0, "seconds": 1.0},
        {"step": 2, "loss": 2.0, "divergence": 2.0, "seconds": 1.0},
        {"step": 2, "perplexity": 30.0},
    ]
