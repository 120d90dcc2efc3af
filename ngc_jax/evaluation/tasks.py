"""Tasks: documents to requests, responses to scores. A task is plain data (`specs`), from YAML or Python.

A task never sees a model: it is given a predict function, and returns sums.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.documents import HUB
from ngc_jax.evaluation.requests import Predict
from ngc_jax.evaluation.scores import Sum
from ngc_jax.evaluation.specs import METRICS, Document, Spec
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.tokens import Bos

_TASKS = resources.files("ngc_jax") / "evaluation" / "task_files"
_REQUIRED = ("name", "template", "metric")
_LISTS = {"until": "texts", "pass_at": "whole numbers"}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a task measured.

    Attributes:
        numbers: Of the scored documents, in their order.
        scores: By name; the values are in the order of the documents.
        truncated: For generated answers, the share of each document's that reached the longest answer before their
            end.
        tokens: For generated answers, the mean number of tokens of each document's.
    """

    numbers: tuple[int, ...]
    scores: Mapping[str, Sum]
    truncated: Sum | None = None
    tokens: tuple[float, ...] = ()


class Task(Protocol):
    """What `run_tasks.run_task` needs of a task.

    Attributes:
        name: For summaries.
    """

    @property
    def name(self) -> str:
        """The task's name."""
        ...

    def measure(self, documents: Sequence[Document], tokenizer: Tokenizer, predict: Predict, bos: Bos) -> Measured:
        """Prepare requests, have them answered, and score the responses."""
        ...


def task_names() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in _TASKS.iterdir() if file.name.endswith(".yaml"))


def read_task(name: str) -> Spec:
    """Read a task by its name, or from a YAML file.

    Raises:
        UsageError: If there is none, or it is not a task.

    Example:
        >>> read_task("gsm8k").score_names
        ('strict', 'flexible')
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
    if not isinstance(data, dict) or not set(_REQUIRED) <= set(data):
        raise UsageError(f"{name} is not a task; a task has name, template and metric")
    source = data.get("source")
    if place is not None and isinstance(source, str) and not source.startswith(HUB):
        data["source"] = str(place / source)
    return task_from(data)


def task_from(data: Mapping[str, Any]) -> Spec:
    """A task from plain data, as a YAML file has it.

    Args:
        data: `metric`, and the fields of its class in `specs`. Fields of the other metric have no effect.

    Raises:
        UsageError: If it is not a task.

    Example:
        >>> task_from({"name": "sums", "template": "{{ question }} =", "metric": "exact_match"}).target
        '{{ answer }}'
    """
    task = data.get("name")
    kind = METRICS.get(data["metric"]) if isinstance(data["metric"], str) else None
    if kind is None:
        raise UsageError(f"metric of task {task} is {data['metric']!r}; expected {' or '.join(METRICS)}")
    own = {field.name for field in dataclasses.fields(kind)}
    known = ["metric", *dict.fromkeys(field.name for one in METRICS.values() for field in dataclasses.fields(one))]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}"
            raise UsageError(f"the task {task} has an entry {key!r}; {hint}")
    values = {key: value for key, value in data.items() if key in own}
    for key, parts in _LISTS.items():
        if key in values and not isinstance(values[key], list | tuple):
            raise UsageError(f"{key} of the task {task} is {values[key]!r}; expected a list of {parts}")
        values |= {key: tuple(values[key])} if key in values else {}
    return kind(**values)
