"""Upload a model directory to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.models.tokenizer import one_line

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The files of a model directory; anything else in it is not uploaded.
_PATTERNS = (
    "*.safetensors",
    "*.json",
    "*.gguf",
    "*.jinja",
    "*.model",
    "merges.txt",
    "README.md",
    *("LICENSE*", "NOTICE*"),
)
_CODE = ("configuration_ngc.py", "modeling_ngc.py")


def push(
    directory: str | Path, repo: str, *, private: bool = False, dry_run: bool = False, api: Any = None
) -> dict[str, Any]:
    """Upload a model, with its card, to a repository of the Hugging Face hub.

    The repository is created if it does not exist. Files are uploaded in one commit; nothing is deleted there.

    Args:
        directory: A model directory that `save_model`, `convert` or `export` wrote, or one with a GGUF file.
        repo: `OWNER/NAME`.
        private: Create the repository as a private one.
        dry_run: Only list what would be uploaded; needs neither network nor token.
        api: In place of `huggingface_hub.HfApi()`, for other hubs and for tests.

    Returns:
        The repository, whether it is private, the files with their bytes, the text of the card, and, unless it was a
        dry run, the address of the commit.

    Raises:
        UsageError: If the directory has no model or no card, the name is not one of a repository, there is no token, or
            the hub refuses.

    Example:
        >>> from ngc_jax import save_model
        >>> what = push(save_model(compact, "smaller"), "me/smaller", dry_run=True)
        >>> print(*(file["name"] for file in what["files"] if file["name"].endswith("safetensors")))
        model.safetensors
    """
    directory = Path(directory).expanduser()
    if not _REPO.fullmatch(repo):
        raise UsageError(f"{repo!r} is no name of a repository; expected OWNER/NAME, such as me/smollm2-0.8")
    files = _model_files(directory)
    summary: dict[str, Any] = {
        "repo": repo,
        "private": private,
        "dry_run": dry_run,
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "card": (directory / "README.md").read_text(encoding="utf-8"),
    }
    return summary if dry_run else {**summary, "url": _upload(directory, repo, private, [f.name for f in files], api)}


def _model_files(directory: Path) -> list[Path]:
    """The files to upload, by name.

    Raises:
        UsageError: If this is no model directory, or it has no card.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory} is no directory; expected one that convert or export wrote")
    found = sorted({f for pattern in (*_PATTERNS, *_CODE) for f in directory.glob(pattern) if f.is_file()})
    names = {file.name for file in found}
    suffixes = {file.suffix for file in found}
    if not (("config.json" in names and ".safetensors" in suffixes) or ".gguf" in suffixes):
        raise UsageError(
            f"{directory} has neither config.json and safetensors nor a GGUF file; expected a model directory"
        )
    if "README.md" not in names:
        raise UsageError(f"{directory} has no README.md, the model card; add one that says how the model was made")
    return found


def _upload(directory: Path, repo: str, private: bool, names: list[str], api: Any) -> str:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if api is None:
        if huggingface_hub.get_token() is None:
            raise UsageError("there is no token for the Hugging Face hub; log in with 'hf auth login', or set HF_TOKEN")
        api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        commit = api.upload_folder(
            repo_id=repo,
            repo_type="model",
            folder_path=directory,
            allow_patterns=names,
            commit_message="Upload a model by ngc-jax",
        )
    except LocalTokenNotFoundError:
        raise UsageError("the hub asks for a token; log in with 'hf auth login', or set HF_TOKEN") from None
    except (HfHubHTTPError, OSError) as error:
        raise UsageError(f"{repo}: the hub did not take the upload: {one_line(error)}") from None
    return str(commit.commit_url)
