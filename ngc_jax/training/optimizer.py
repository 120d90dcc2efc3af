"""The optimiser, composed of optax transforms from plain data."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax

from ngc_jax.errors import UsageError

Schedule = Literal["cosine", "linear", "constant"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
        name: Any optimiser of optax by its name there, such as adamw, sgd, lion, adafactor; muon is in optax.contrib.
        learning_rate: Peak learning rate.
        options: Further arguments of the optimiser, such as b2 or weight_decay.
        schedule: Decay of the learning rate from its peak to `final_fraction` of it: `cosine` or `linear`; or
            `constant`.
        warmup_steps: Steps over which it rises from 0 before that.
        steps: Total number of steps; the schedule's end.
        final_fraction: Final learning rate relative to the peak.
        clip_norm: Gradients of a greater global norm are scaled to it; None for no clipping.
        scales: Pairs of a regular expression and a factor: the updates of a parameter are multiplied by the factor of
            the first expression found in its path, joined with "/". A group's states are at
            "groups/<group>/input_states" and "groups/<group>/output_states/<block>".

    Raises:
        UsageError: If a number is out of range or an expression does not compile.

    Example:
        >>> OptimizerConfig(learning_rate=3e-4, warmup_steps=10, steps=100).name
        'adamw'
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    steps: int = 1000
    final_fraction: float = 0.1
    clip_norm: float | None = 1.0
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate is {self.learning_rate}; expected a number above 0")
        if self.steps < 1 or not 0 <= self.warmup_steps <= self.steps:
            raise UsageError(
                f"steps is {self.steps} and warmup_steps {self.warmup_steps}; expected at least one step and no more "
                "steps of warm-up than steps"
            )
        if not 0 <= self.final_fraction <= 1:
            raise UsageError(f"final_fraction is {self.final_fraction}; expected 0 to 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UsageError(f"clip_norm is {self.clip_norm}; expected a number above 0, or none")
        for pattern, factor in self.scales.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"{pattern!r} in scales is not a regular expression: {error}") from error
            if not factor >= 0:
                raise UsageError(f"the factor of {pattern!r} in scales is {factor}; expected at least 0")


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by step."""
    peak, left = config.learning_rate, max(config.steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, left, config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * config.final_fraction, left)
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise UsageError(f"schedule is {config.schedule!r}; expected cosine, linear or constant")
    if not config.warmup_steps:
        return after
    # From one step's share, not from 0, with which the first step would do nothing.
    start = peak / (config.warmup_steps + 1)
    return optax.join_schedules([optax.linear_schedule(start, peak, config.warmup_steps), after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Compose clipping, the optimiser with its schedule, and scaling by path, in this order.

    Raises:
        UsageError: If optax has no such optimiser or it does not take the options.
    """
    make = getattr(optax, config.name, None) or getattr(optax.contrib, config.name, None)
    try:
        parameters = inspect.signature(make).parameters if callable(make) else {}
    except (TypeError, ValueError):
        parameters = {}
    if "learning_rate" not in parameters:
        raise UsageError(f"optax has no optimiser {config.name!r}; expected a name such as adamw, sgd, lion, adafactor")
    try:
        optimizer = make(learning_rate=learning_rate_schedule(config), **config.options)  # type: ignore[misc]
    except TypeError as error:
        raise UsageError(f"{config.name} does not take these options ({error})") from error
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts.append(optimizer)
    if config.scales:
        parts.append(scale_by_path(config.scales))
    return optax.chain(*parts)


def scale_by_path(scales: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiply updates by the factor of the first expression found in their path, joined with "/"; else by 1."""

    def factor(path: Any) -> float:
        joined = "/".join(str(getattr(key, "key", key)) for key in path)
        return next((value for pattern, value in scales.items() if re.search(pattern, joined)), 1.0)

    def update(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, leaf: factor(path) * leaf, updates)

    return optax.stateless(update)
