"""Generated answers compared with targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.answers import GeneratedAnswer, Judge, judging, last_number
from ngc_jax.evaluation.prompts import fill, prepare_prompts, with_fields
from ngc_jax.evaluation.requests import GenerationRequest, Predict, Response
from ngc_jax.evaluation.scores import Sum, pass_at_k
from ngc_jax.evaluation.specs import ANSWER_SCORES, MOST_SAMPLES, Document, GenerationSpec
from ngc_jax.evaluation.tasks import Measured
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.tokens import Bos


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """A generated answer is right if it equals the target.

    Attributes:
        spec: The task's description.
    """

    spec: GenerationSpec

    @property
    def name(self) -> str:
        """The task's name."""
        return self.spec.name

    def prepare(self, documents: Sequence[Document], tokenizer: Tokenizer, bos: Bos) -> list[list[GenerationRequest]]:
        """The requests of each scored document, one for each sample.

        Raises:
            UsageError: If a document lacks a field, or the target of a task of numbers has no number.
        """
        spec = self.spec

        def solution(document: Document, number: int) -> str:
            return fill(spec.target if spec.solution is None else spec.solution, document, number)

        prompts, scored = prepare_prompts(spec, with_fields(spec, documents), tokenizer, bos, solution)
        special_tokens = spec.think_end is not None and _is_lost(spec.think_end, tokenizer)
        found = []
        for number, document in scored:
            target = fill(spec.target, document, number)
            if spec.answer in ("number", "last_number") and last_number(target) is None:
                raise UsageError(f"the target of document {number} has no number; use answer: text")
            plain = GenerationRequest(
                str(number),
                prompts.encode(prompts.text(document, number)),
                spec.max_new_tokens,
                # Reasoning may contain what ends an answer.
                until=spec.until if spec.think_end is None else (),
                temperature=spec.temperature,
                top_p=spec.top_p,
                seed=(spec.seed, number * MOST_SAMPLES),
                special_tokens=special_tokens,
                about={"document": number, "target": target},
            )
            found.append([_sample(plain, sample) for sample in range(spec.samples)] if spec.samples > 1 else [plain])
        return found

    def measure(self, documents: Sequence[Document], tokenizer: Tokenizer, predict: Predict, bos: Bos) -> Measured:
        """The scores of the kind of answer, pass@k with several samples; truncated answers and their tokens.

        Raises:
            UsageError: As `prepare`; or if the library that compares answers is missing.
        """
        asked = self.prepare(documents, tokenizer, bos)
        with judging(self.spec.answer) as judge:  # before the model answers: the library may be missing
            responses = predict([request for requests in asked for request in requests])
            judged = [[self._judge(judge, one, responses[one.id]) for one in requests] for requests in asked]
        right = [[scores for scores, _ in answers] for answers in judged]
        truncated = tuple(sum(cut for _, cut in answers) / len(answers) for answers in judged)
        tokens = tuple(sum(responses[one.id]["tokens"] for one in requests) / len(requests) for requests in asked)
        numbers = tuple(int(requests[0].about["document"]) for requests in asked)
        return Measured(numbers, self._scores(right), Sum(truncated), tokens)

    def _judge(self, judge: Judge, request: GenerationRequest, response: Response) -> tuple[Sequence[bool], bool]:
        """The scores of an answer, and whether it is truncated."""
        answer = GeneratedAnswer.of(response, self.spec.think_end, self.spec.until)
        if answer.text is None:
            return [False] * len(ANSWER_SCORES[self.spec.answer]), answer.truncated
        return judge(answer.text, str(request.about["target"])), answer.truncated

    def _scores(self, right: Sequence[Sequence[Sequence[bool]]]) -> Mapping[str, Sum]:
        """Scores by name, from documents, their samples, and the scores of each sample."""
        found = {}
        for index, name in enumerate(ANSWER_SCORES[self.spec.answer]):
            counts = [sum(sample[index] for sample in samples) for samples in right]
            if not self.spec.ks:
                found[name] = Sum(tuple(map(float, counts)))
            for k in self.spec.ks:
                values = (pass_at_k(self.spec.samples, count, k) for count in counts)
                found[f"{name}_pass@{k}"] = Sum(tuple(values))
        return found


def _sample(request: GenerationRequest, sample: int) -> GenerationRequest:
    run, first = request.seed
    about = {**request.about, "sample": sample}
    return dataclasses.replace(request, id=f"{request.id}/{sample}", seed=(run, first + sample), about=about)


def _is_lost(text: str, tokenizer: Tokenizer) -> bool:
    """Whether decoding without special tokens loses a text, because it is one."""
    return text not in tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)
