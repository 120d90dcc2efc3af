"""Options of the model and of generation, as lm-evaluation-harness gives them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.tokens import Bos

# Batch size of `auto`: nothing is tried out, because an accelerator that is out of memory may take the program with it.
_AUTO_BATCH = 16
# transformers samples from the 50 likeliest tokens unless another number is given.
_TOP_K = 50
# Other options of transformers' generation, where they change nothing.
_WITHOUT_EFFECT: Mapping[str, Any] = {
    "early_stopping": False,
    "min_p": 0.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "typical_p": 1.0,
    "use_cache": True,
}


@dataclasses.dataclass(frozen=True)
class HarnessOptions:
    """What `--model_args` may hold beside `pretrained`; named as for lm-eval's `hf`.

    Attributes:
        tokenizer: A model whose tokenizer replaces its own, or a directory with a tokenizer.
        dtype: Of the computation; see `load_model`. `auto` is the same as None.
        param_dtype: In which parameters are stored in memory.
        batch_size: Prompts, or contexts, at once; `auto` for max_batch_size.
        max_batch_size: The batch size of `auto`; None for 16.
        max_length: Most tokens that the model reads at once; None for the length that it was trained on.
        add_bos_token: Whether texts begin with BOS; None for the tokenizer's own rule.
        prefix_token_id: What precedes a text that has no context; None for BOS, or EOS if there is none.
        chat_template_args: Further variables of the chat template.
        enable_thinking: The variable of this name of the chat template.
        think_end_token: Text of a token; what is before it is no part of an answer, and is not searched for ends.
        device: Accepted from lm-eval, and not obeyed: JAX chooses the device (JAX_PLATFORMS).
        trust_remote_code: Accepted from lm-eval; no code of a model's repository is ever run.
        seed: Of samples; None to draw it from NumPy's generator, which lm-eval's --seed sets.

    Raises:
        UsageError: If a value is out of range.
    """

    tokenizer: str | None = None
    dtype: str | None = None
    param_dtype: str | None = None
    batch_size: int | str = 1
    max_batch_size: int | None = None
    max_length: int | None = None
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    chat_template_args: Mapping[str, Any] | None = None
    enable_thinking: bool | None = None
    think_end_token: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UsageError(f"batch_size is {self.batch_size!r}; expected a whole number from 1, or auto")
        if self.max_length is not None and self.max_length < 2:
            raise UsageError(f"max_length is {self.max_length}; expected at least 2")
        if self.think_end_token is not None and not isinstance(self.think_end_token, str):
            raise UsageError(
                f"think_end_token is {self.think_end_token!r}; expected the token's text, such as </think>"
            )
        if self.enable_thinking and self.think_end_token is None:
            raise UsageError("enable_thinking needs think_end_token, the text that ends the thinking, such as </think>")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> HarnessOptions:
        """The options by name.

        Raises:
            UsageError: If there is none of a name, or a value is out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}"
                raise UsageError(f"the model ngc_jax has no argument {name!r}; {hint}")
        return cls(**options)

    @property
    def rows(self) -> int:
        """The batch size as a number."""
        if str(self.batch_size).startswith("auto"):
            return int(self.max_batch_size or _AUTO_BATCH)
        try:
            return int(self.batch_size)
        except ValueError:
            raise UsageError(f"batch_size is {self.batch_size!r}; expected a whole number from 1, or auto") from None

    @property
    def bos(self) -> Bos:
        """The start of a text, as `Tokenizer.prefix` takes it."""
        return {None: "auto", True: "always", False: "never"}[self.add_bos_token]  # type: ignore[return-value]

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**(self.chat_template_args or {}), **thinking}


def sampling_options(options: dict[str, Any]) -> dict[str, Any]:
    """How tokens are chosen, as a request has it, from transformers' options.

    Raises:
        UsageError: If one of them is unknown and changes the result, or out of range.
    """
    sampled, temperature = options.pop("do_sample"), options.pop("temperature", 0.0)
    top_k, top_p = options.pop("top_k", _TOP_K), options.pop("top_p", None)
    for name, value in options.items():
        if name not in _WITHOUT_EFFECT or value != _WITHOUT_EFFECT[name]:
            raise UsageError(
                f"the option {name}={value!r} of generation is not supported; "
                "expected until, max_gen_toks, do_sample, temperature, top_k and top_p"
            )
    if not sampled:
        return {}
    if temperature <= 0:
        raise UsageError(f"do_sample with temperature {temperature}; expected a temperature above 0, or no do_sample")
    return {"temperature": temperature, "top_k": top_k or None, "top_p": top_p}
