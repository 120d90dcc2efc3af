"""A hook of mkdocs: one page of the API reference for each public module, and CONTRIBUTING.md as a page.

The pages are made when the site is built, so that a module that is added or renamed needs no other change.
"""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "groups",
    "models",
    "planning",
    "conversion",
    "training",
    "stability",
    "evaluation",
    "exporting",
    "reporting",
)


def modules(package: Path) -> list[Path]:
    """The public modules and packages inside a package, sorted by name."""
    inside = [path for path in package.glob("*.py") if not path.stem.startswith("_")]
    inside += [path.parent for path in package.glob("*/__init__.py") if not path.parent.name.startswith("_")]
    return sorted(inside, key=lambda path: path.stem)


def page(path: Path) -> str:
    """Where the page of a module or package stands, relative to docs/."""
    inside = path.relative_to(ROOT / "ngc_jax").with_suffix("")
    return f"api/{inside.as_posix()}/index.md" if path.is_dir() else f"api/{inside.as_posix()}.md"


def reference(path: Path) -> dict[str, Any]:
    """The navigation's entry of a module or package, with all that is inside."""
    if not path.is_dir():
        return {path.stem: page(path)}
    return {path.name: [page(path), *map(reference, modules(path))]}


def pages(path: Path) -> list[Path]:
    """A module or package, and all that is inside."""
    return [path, *(inner for inside in (modules(path) if path.is_dir() else []) for inner in pages(inside))]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the navigation's entry of the API reference."""
    for entry in config.nav or []:
        if "API reference" in entry:
            entry["API reference"] = ["api/index.md", *(reference(ROOT / "ngc_jax" / name) for name in PACKAGES)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    contents = {"contributing.md": contributing.replace("](docs/", "](")}
    for path in (inner for name in PACKAGES for inner in pages(ROOT / "ngc_jax" / name)):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        contents[page(path)] = f"---\ntitle: {name}\n---\n\n::: {name}\n"
    for where, content in contents.items():
        files.append(File.generated(config, where, content=content))
    return files
