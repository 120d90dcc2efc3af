"""Tasks: documents to requests, responses to scores. A task is plain data (`TaskSpec`), from YAML or Python.

A task never sees a model: it is given a predict function, and returns sums.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.requests import Predict
from ngc_jax.files import parse_json
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.tokens import Bos

Metric = Literal["multiple_choice", "exact_match"]
Answer = Literal["text", "number"]
Document = Mapping[str, Any]
_TASKS = resources.files("ngc_jax") / "evaluation" / "task_files"


@dataclasses.dataclass(frozen=True)
class Sum:
    """A score summed over documents.

    Attributes:
        values: The score of each document, 0 or 1, in their order.
    """

    values: tuple[float, ...]

    @property
    def total(self) -> float:
        """Sum of the scores."""
        return math.fsum(self.values)

    @property
    def mean(self) -> float:
        """Their mean."""
        return self.total / len(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean."""
        return wilson_interval(self.total, len(self.values))


class Task(Protocol):
    """What `run_tasks.run_task` needs of a task.

    Attributes:
        name: For summaries.
    """

    @property
    def name(self) -> str:
        """The task's name."""
        ...

    def measure(
        self, documents: Sequence[Document], tokenizer: Tokenizer, predict: Predict, bos: Bos
    ) -> dict[str, Sum]:
        """Prepare requests, have them answered, and score the responses, by the name of the score."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task as it stands in a YAML file.

    Attributes:
        name: The task's name.
        template: Jinja template of a prompt, from the fields of a document.
        metric: `multiple_choice`: the choice of the greatest log-likelihood counts (acc), also per byte (acc_norm).
            `exact_match`: a generated answer is compared with the target.
        source: A file of documents, relative to the YAML file; None if it is given with the run.
        choices: multiple_choice: field of a document with the list of choices.
        label: multiple_choice: field with the index of the right one, from 0, or its letter.
        delimiter: Text between prompt and choice, or between the prompt and target of a solved example.
        target: exact_match: Jinja template of the right answer.
        answer: exact_match: `text` compares whole answers without surrounding space; `number` compares the number after
            `####` (strict) and the last number (flexible) with the target's last number, as is usual for GSM8K.
        shots: Number of documents, from the first, that precede every prompt as solved examples; they are not scored.
        until: exact_match: texts before which a generated answer ends.
        max_new_tokens: exact_match: longest generated answer.

    Raises:
        UsageError: If a value is out of range.

    Example:
        >>> TaskSpec("arithmetic", "{{ question }} =", "exact_match", target="{{ sum }}").score_names
        ('exact_match',)
    """

    name: str
    template: str
    metric: Metric
    source: str | None = None
    choices: str = "choices"
    label: str = "label"
    delimiter: str = " "
    target: str = "{{ answer }}"
    answer: Answer = "text"
    shots: int = 0
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        for field, known in (("metric", get_args(Metric)), ("answer", get_args(Answer))):
            if getattr(self, field) not in known:
                raise UsageError(
                    f"{field} of task {self.name} is {getattr(self, field)!r}; expected {' or '.join(known)}"
                )
        for field, least in (("shots", 0), ("max_new_tokens", 1)):
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                raise UsageError(f"{field} of task {self.name} is {value!r}; expected a whole number from {least}")
        if any(not isinstance(text, str) or not text for text in self.until):
            raise UsageError(f"until of task {self.name} is {list(self.until)}; expected texts that are not empty")

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores."""
        if self.metric == "multiple_choice":
            return ("acc", "acc_norm")
        return ("strict", "flexible") if self.answer == "number" else ("exact_match",)


def task_names() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in _TASKS.iterdir() if file.name.endswith(".yaml"))


def read_task(name: str) -> TaskSpec:
    """Read a task by its name, or from a YAML file.

    Raises:
        UsageError: If there is none, or it is not a task.
    """
    import yaml

    path, place = Path(name), None
    if name in task_names():
        text = (_TASKS / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        if path.suffix not in (".yaml", ".yml"):
            near = difflib.get_close_matches(name, task_names(), n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(task_names())}, or a YAML file"
            raise UsageError(f"there is no task {name!r}; {hint}")
        try:
            text, place = path.read_text(encoding="utf-8"), path.parent
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the task {name} cannot be read ({error}); check its name") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{name} is not YAML ({' '.join(str(error).split())[:160]}); correct it") from None
    fields = [field.name for field in dataclasses.fields(TaskSpec)]
    if not isinstance(data, dict) or not {"name", "template", "metric"} <= set(data):
        raise UsageError(f"{name} is not a task; a task has name, template and metric")
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(fields)}"
            raise UsageError(f"the task {name} has an entry {key!r}; {hint}")
    texts = ("name", "template", "metric", "source", "choices", "label", "delimiter", "target", "answer")
    for key in texts:
        if key in data and not isinstance(data[key], str):
            raise UsageError(f"{key} of the task {name} is {data[key]!r}; expected a text")
    if not isinstance(data.get("until", []), list):
        raise UsageError(f"until of the task {name} is {data['until']!r}; expected a list of texts")
    if place is not None and data.get("source") is not None:
        data["source"] = str(place / data["source"])
    return TaskSpec(**{**data, "until": tuple(data.get("until", ()))})


def read_documents(file: str) -> list[Document]:
    """The documents of a file: JSON Lines, or one JSON list.

    Raises:
        UsageError: If it cannot be read, has no document, or something that is not an object.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the data {file} cannot be read ({error}); give a JSON Lines file in UTF-8") from None
    found: list[Document] = []
    if text.lstrip().startswith("["):
        entries: Iterable[tuple[int, str | Any]] = enumerate(_json(text, file, 1), start=1)
    else:
        entries = (
            (number, _json(line, file, number)) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        )
    for number, entry in entries:
        if not isinstance(entry, dict):
            raise UsageError(f"entry {number} of {file} is {type(entry).__name__}; expected an object with fields")
        found.append(entry)
    if not found:
        raise UsageError(f"{file} has no documents; expected a JSON object on each line")
    return found


def _json(text: str, file: str, line: int) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UsageError(f"line {line} of {file} is not JSON ({error}); correct or remove it") from None


def wilson_interval(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927), 95 % by default.

    Example:
        >>> tuple(round(bound, 4) for bound in wilson_interval(81, 263))
        (0.2553, 0.3662)
    """
    if count < 1:
        raise ValueError("a proportion of nothing has no interval")
    p, scale = successes / count, 1 + z * z / count
    centre = (p + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(max(p * (1 - p), 0.0) / count + z * z / (4 * count * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)
