"""The rows that `train` and `distil` train on, from their options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    from ngc_jax.commands.training import TrainingOptions
    from ngc_jax.models.load import LanguageModel
    from ngc_jax.models.tokenizer import Tokenizer
    from ngc_jax.training.data import Pipeline


def rows_of(
    options: TrainingOptions, tokenizer: Tokenizer, vocab_size: int, teacher: LanguageModel | None = None
) -> Pipeline:
    """This process's rows.

    Args:
        options: The command's.
        tokenizer: The model's.
        vocab_size: The model's.
        teacher: The model that generates the text, if that is sampled.

    Raises:
        UsageError: If a source cannot be used, or is too small for a batch.
    """
    import jax

    from ngc_jax.training.data import DataConfig, make_pipeline
    from ngc_jax.training.sources import SourceConfig, sampled_source

    given_options = dict(options.data_options or {})
    sources = given_options.pop("sources", None)
    if sources is None:
        sources = [{"name": options.text, "skip_tokens": options.skip_tokens, "max_tokens": options.tokens}]
    try:
        data = DataConfig(
            sources=tuple(SourceConfig(**source) if isinstance(source, dict) else source for source in sources),
            sequence_length=options.sequence_length,
            batch_size=options.rows_of_a_step,
            seed=options.seed,
            **{"begin_token": {"auto": None, "always": True, "never": False}[options.bos], **given_options},
        )
    except TypeError as error:
        raise UsageError(f"data_options does not fit ({error}); see docs/data.md") from error
    given = {}
    if any(source.label == "sampled" for source in data.opened):
        if teacher is None:
            raise UsageError("text sampled from the teacher needs a teacher; give another text")
        count = options.tokens or options.steps * options.rows_of_a_step * options.sequence_length
        prefix = prefix_of(options, tokenizer)
        given["sampled"] = sampled_source(
            teacher, count, jax.random.key(options.seed), length=options.sequence_length - len(prefix), prefix=prefix
        )
    return make_pipeline(
        data,
        tokenizer,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        vocab_size=vocab_size,
        given=given,
    )


def prefix_of(options: TrainingOptions, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The prefix of each row and document, in training and evaluation."""
    begin = (options.data_options or {}).get("begin_token")
    return tokenizer.prefix(options.bos if begin is None else "always" if begin else "never")
