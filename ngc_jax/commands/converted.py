"""What `ngc-jax convert` does with a converted model, of texts or of images: save it, and say what it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ngc_jax.commands.console import console
from ngc_jax.host_memory import peak_bytes
from ngc_jax.models.inspect import inspect_model
from ngc_jax.models.save import save_model
from ngc_jax.models.sources import open_source

if TYPE_CHECKING:
    from ngc_jax.commands.convert import ConvertConfig
    from ngc_jax.models.load import LanguageModel


def save_converted(
    config: ConvertConfig, compact: LanguageModel, dense_parameters: int, started: float
) -> dict[str, Any]:
    """Save the result of a conversion and print what it is; returns the summary.

    Args:
        config: The options.
        compact: The converted model as it is saved, with its `conversion`.
        dense_parameters: All parameters of the dense model.
        started: When the conversion began, by `time.perf_counter`.
    """
    assert config.out is not None
    save_model(compact, config.out, overwrite=config.overwrite)
    with open_source(config.out) as saved:
        summary = {
            **(compact.conversion or {}),
            **inspect_model(saved).summary(),
            "total_dense_parameters": dense_parameters,
            "out": config.out,
            "seconds": time.perf_counter() - started,
            "peak_bytes": peak_bytes(),
        }
    console.print(
        f"{config.out}: {summary['groups']} groups, keep ratio {summary['keep_ratio']:.4f} "
        f"({summary['stored_parameters']:,} of {summary['dense_parameters']:,} parameters in the grouped blocks), "
        f"{summary['bytes'] / 1e6:,.1f} MB, {summary['seconds']:.0f} s, "
        f"{summary['peak_bytes'] / 2**30:.2f} GiB of memory at most"
    )
    return summary
