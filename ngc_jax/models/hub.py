"""Fetches a model directory from the Hugging Face hub: safetensors, JSON and tokenizer files, never code."""

from pathlib import Path

from ngc_jax.errors import UsageError

# No *.py and no pickle files: what is not fetched cannot be run.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def hub_snapshot(model: str, cache_dir: Path | None = None) -> Path:
    """Returns a local copy of a hub repository, fetching what is missing.

    Args:
        model: `org/name` or `org/name@revision`.
        cache_dir: the hub's own cache by default.

    Raises:
        UsageError: there is no such repository or revision, access is restricted, or there is neither a network nor
            a cached copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    repo, _, revision = model.partition("@")
    try:
        # Falls back to the cached copy by itself when there is no network.
        return Path(
            snapshot_download(repo, revision=revision or None, cache_dir=cache_dir, allow_patterns=_PATTERNS)
        )
    except GatedRepoError:
        raise UsageError(
            f"{repo}: access is restricted; accept its terms on its hub page, then log in with 'hf auth login'"
        ) from None
    except RevisionNotFoundError:
        raise UsageError(
            f"{repo}: has no revision {revision!r}; check it, or leave @{revision} out"
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"{repo}: no such path and no such hub repository; check the spelling, or log in with 'hf auth login' if it is private"
        ) from None
    except Exception as error:  # network failures come from several libraries
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UsageError(
            f"{model}: no such path, and the hub cannot be reached nor is a copy cached ({reason}); "
            "connect to the network once, or give a local directory or .gguf file"
        ) from None
