"""`ngc-jax push`."""

from __future__ import annotations

import dataclasses
from typing import Any

from ngc_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class PushConfig:
    """Upload a model directory with its card to the Hugging Face hub.

    Args:
        model: A model directory that convert or export wrote.
        repo: The repository, OWNER/NAME; it is created if it does not exist.
        private: Create the repository as a private one.
        dry_run: Only list files and sizes and show the card; needs neither network nor token.
        json: Also write the summary to this file.
    """

    model: str | None = None
    repo: str | None = None
    private: bool = False
    dry_run: bool = False
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Upload; returns the summary."""
        from ngc_jax.commands.console import console, table
        from ngc_jax.exporting import push

        if self.model is None or self.repo is None:
            raise UsageError("expected a model directory and --repo OWNER/NAME")
        summary = push(self.model, self.repo, private=self.private, dry_run=self.dry_run)
        if self.dry_run:
            rows = [[file["name"], f"{file['bytes'] / 1e6:,.3f}"] for file in summary["files"]]
            kind = "private" if self.private else "public"
            console.print(table(f"{self.repo} ({kind}, nothing was uploaded)", ["file", "MB"], rows))
            console.print(summary["card"], markup=False, highlight=False)
        else:
            console.print(f"{self.model}: {len(summary['files'])} files uploaded, {summary['url']}")
        return summary
