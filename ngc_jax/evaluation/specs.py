"""What describes a task: plain data, the same in YAML and in Python. One class for each metric."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from ngc_jax.errors import UsageError

Document = Mapping[str, Any]
Answer = Literal["text", "number", "last_number", "math"]
# The scores of each kind of answer.
ANSWER_SCORES: Mapping[Answer, tuple[str, ...]] = {
    "text": ("exact_match",),
    "number": ("strict", "flexible"),
    "last_number": ("last_number",),
    "math": ("math",),
}
# Seeds of a document's samples are successive numbers; those of the next document begin after this many.
MOST_SAMPLES = 1024


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """What tasks of every metric have.

    Attributes:
        name: The task's name.
        template: Jinja template of a prompt, from the fields of a document.
        source: Where documents come from unless the run says so: a file, relative to the YAML file, or
            `hub:NAME[:CONFIG[:SPLIT]]`; None if the run must say.
        fields: Fields that a document gets in addition or in place of its own, by name: Jinja expressions of its own
            fields, such as `choices.text`, `answer | int` or `question | default(problem)`.
        shots: Number of documents, from the first, that precede every prompt as solved examples; they are not scored.
        delimiter: Text between prompt and choice, or between the prompt and answer of a solved example. Not used in
            chats.
        chat: The prompt is the user's turn in the chat template of the model, and solved examples are earlier turns.
        system: System message of the chat.

    Raises:
        UsageError: If a value is out of range or of another type.
    """

    metric: ClassVar[str]

    name: str
    template: str
    _: dataclasses.KW_ONLY
    source: str | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shots: int = 0
    delimiter: str = " "
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        self._check_texts("name", "template", "source", "delimiter", "system")
        self._check_counts(shots=0)
        if not isinstance(self.chat, bool):
            raise self._wrong("chat", "true or false")
        texts = isinstance(self.fields, Mapping) and all(
            isinstance(one, str) for pair in self.fields.items() for one in pair
        )
        if not texts:
            raise self._wrong("fields", "a mapping of names to Jinja expressions, such as label: answerKey")
        if self.system is not None and not self.chat:
            raise UsageError(f"task {self.name} has a system message, which only chats have; add chat: true")

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What a run of the task depends on, as plain data."""
        return {"metric": self.metric, **dataclasses.asdict(dataclasses.replace(self, source=None))}

    def _wrong(self, field: str, expected: str) -> UsageError:
        return UsageError(f"{field} of task {self.name} is {getattr(self, field)!r}; expected {expected}")

    def _check_texts(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            optional = type(self).__dataclass_fields__[field].default is None
            if not isinstance(value, str) and not (optional and value is None):
                raise self._wrong(field, "a text")

    def _check_counts(self, **least: int) -> None:
        for field, lowest in least.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise self._wrong(field, f"a whole number from {lowest}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipleChoiceSpec(TaskSpec):
    """A task whose answers are given: the likeliest choice counts, by log-likelihood (acc) and per byte (acc_norm).

    Attributes:
        choices: Field of a document with the list of choices, or with a mapping of `text`, their list, and `label`,
            the list of their names.
        label: Field with the right choice: its name, its index from 0, or its letter.

    Example:
        >>> MultipleChoiceSpec("colours", "Question: {{ question }} Answer:").score_names
        ('acc', 'acc_norm')
    """

    metric = "multiple_choice"

    choices: str = "choices"
    label: str = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_texts("choices", "label")

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores."""
        return ("acc", "acc_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSpec(TaskSpec):
    """A task whose answers are generated and compared with a target.

    Attributes:
        target: Jinja template of the right answer.
        solution: Jinja template of the answer that a solved example shows; the target by default.
        answer: How answers are compared. `text`: whole answers without surrounding space. `number`: the number after
            `####` (strict) and the last number (flexible) with the target's last number, as is usual for GSM8K.
            `last_number`: the latter alone. `math`: the last boxed or else the last mathematical expression, by the
            library math-verify.
        until: Texts before which an answer ends.
        max_new_tokens: Longest answer.
        think_end: The tag that ends the reasoning of a model, such as `</think>`. Only what follows it is judged;
            an answer without it is wrong.
        samples: Answers to each document. With several, scores are pass@k.
        pass_at: The k of pass@k; 1 and the number of samples by default.
        temperature: 0 takes the most likely token.
        top_p: Sample from the most likely tokens that together have this probability.
        seed: Of the sampling. Each answer has randomness of its own, which depends on the seed, the document's number
            and the sample's number alone.

    Example:
        >>> GenerationSpec("arithmetic", "{{ question }} =", target="{{ sum }}").score_names
        ('exact_match',)
        >>> GenerationSpec("sums", "{{ question }} =", samples=8, temperature=0.8).score_names
        ('exact_match_pass@1', 'exact_match_pass@8')
    """

    metric = "exact_match"

    target: str = "{{ answer }}"
    solution: str | None = None
    answer: Answer = "text"
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    think_end: str | None = None
    samples: int = 1
    pass_at: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_texts("target", "solution", "answer", "think_end")
        self._check_counts(max_new_tokens=1, samples=1, seed=0)
        if self.answer not in get_args(Answer):
            raise self._wrong("answer", " or ".join(get_args(Answer)))
        if any(not isinstance(text, str) or not text for text in self.until):
            raise UsageError(f"until of task {self.name} is {list(self.until)}; expected texts that are not empty")
        if self.think_end == "":
            raise self._wrong("think_end", "the tag that ends the reasoning, such as </think>")
        for field, value in (("temperature", self.temperature), ("top_p", 1.0 if self.top_p is None else self.top_p)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self._wrong(field, "a number")
        if self.temperature != 0 or self.top_p is not None:
            from ngc_jax.models.sampling import Sampling

            Sampling(self.temperature, top_p=self.top_p)  # checks the values
        if self.samples > MOST_SAMPLES:
            raise self._wrong("samples", f"at most {MOST_SAMPLES}")
        if self.samples > 1 and self.temperature == 0:
            raise UsageError(f"{self.samples} samples at temperature 0 are all the same; set a temperature such as 0.6")
        for k in self.pass_at:
            if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.samples:
                raise self._wrong("pass_at", f"whole numbers from 1 to the number of samples, {self.samples}")

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k; none if there is one sample."""
        if self.samples == 1:
            return ()
        return tuple(sorted(set(self.pass_at or (1, self.samples))))

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores."""
        plain = ANSWER_SCORES[self.answer]
        return tuple(f"{name}_pass@{k}" for name in plain for k in self.ks) if self.ks else plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexitySpec(TaskSpec):
    """A task whose documents are texts: their perplexity by word, byte and token, each document by itself.

    Attributes:
        window: Tokens in a window; windows are those of `measure_perplexity`.

    Example:
        >>> PerplexitySpec("articles", "{{ text }}").score_names
        ('word_perplexity', 'byte_perplexity', 'token_perplexity')
    """

    metric = "perplexity"

    window: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts(window=2)
        if self.shots or self.chat:
            raise UsageError(
                f"task {self.name} measures texts, which have no solved examples and no chat; leave them out"
            )

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores."""
        return ("word_perplexity", "byte_perplexity", "token_perplexity")


Spec = MultipleChoiceSpec | GenerationSpec | PerplexitySpec

METRICS: Mapping[str, type[Spec]] = {kind.metric: kind for kind in (MultipleChoiceSpec, GenerationSpec, PerplexitySpec)}
