"""Fetches a model directory from the Hugging Face hub: safetensors, JSON and tokenizer files, never code."""

from pathlib import Path

from ngc_jax.errors import UsageError
from ngc_jax.lazy import needs
from ngc_jax.models.tokenizer import one_line

# No *.py and no pickle files, so that no code can be run. Nor copies of the weights in other layouts.
_WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
_OTHERS = [
    "README.md",
    "config.json",
    "preprocessor_config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "*.jinja",
]


def hub_snapshot(model: str, cache_dir: Path | None = None, *, weights: bool = True) -> Path:
    """Returns a local copy of a hub repository, fetching missing files.

    Args:
        model: `org/name` or `org/name@revision`.
        cache_dir: the hub's own cache by default.
        weights: whether to fetch the weights too.

    Raises:
        UsageError: there is no such repository or revision, access is restricted, or there is neither a
            network nor a cached copy.
    """
    with needs("huggingface_hub", f"{model}: no such path; to fetch it from the hub"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

    repo, _, revision = model.partition("@")
    try:
        # The library itself uses the cached copy when there is no network.
        patterns = [*_OTHERS, *_WEIGHTS] if weights else _OTHERS
        found = snapshot_download(repo, revision=revision or None, cache_dir=cache_dir, allow_patterns=patterns)
    except GatedRepoError:
        raise UsageError(
            f"{repo}: access is restricted; accept its terms on its hub page, then log in with 'hf auth login'"
        ) from None
    except RevisionNotFoundError:
        raise UsageError(f"{repo}: has no revision {revision!r}; check it, or leave @{revision} out") from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"{repo}: no such path and no such hub repository; check the spelling, or log in with "
            "'hf auth login' if it is private"
        ) from None
    except HFValidationError as error:
        raise UsageError(
            f"{model}: no such path, and no valid hub id ({one_line(error)}); expected org/name or org/name@revision"
        ) from None
    except Exception as error:  # network failures come from several libraries
        raise UsageError(
            f"{model}: no such path, the hub cannot be reached and no copy is cached ({one_line(error)}); "
            "connect to the network once, or give a local directory or .gguf file"
        ) from None
    return Path(found)
