"""`--dry-run` of training: compile a step, print its memory, train nothing."""

from __future__ import annotations

import time
from typing import Any


def dry_run(placed: Any, batches: Any) -> dict[str, Any]:
    """Compile a step; print where the state is placed and how much memory the step takes."""
    import jax

    from ngc_jax.commands.console import console, table

    batch = placed.batch(next(batches))
    started = time.perf_counter()
    compiled = placed.step.lower(placed.state, placed.constants, batch).compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    bytes_of = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs not in the arguments' place": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    rows = [[name, f"{value / 2**20:,.1f}"] for name, value in bytes_of.items()]
    console.print(table("MiB on each device", ["", "MiB"], rows))
    kinds: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed.state.params):
        spec = getattr(leaf.sharding, "spec", leaf.sharding)
        name = str(path[-1].key) if "output_states" not in str(path) else f"output_states {path[-1].key.split('.')[-1]}"
        kinds[f"{name}: {spec}"] = kinds.get(f"{name}: {spec}", 0) + leaf.size
    for kind, size in sorted(kinds.items()):
        console.print(f"  {kind}, {size:,} parameters")
    console.print(f"compiled in {seconds:.0f} s; nothing was trained")
    return {"dry_run": True, "bytes_per_device": bytes_of, "compile_seconds": seconds}
