"""lm-eval's own `hf` backend and ours, on the same tiny random models: the same numbers, texts and prompts."""

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

import lm_eval  # noqa: E402
import yaml  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval._cli import HarnessCLI  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tokenizers import Tokenizer as Backend  # noqa: E402
from tokenizers import decoders, models  # noqa: E402

from ngc_jax.errors import UsageError  # noqa: E402
from ngc_jax.evaluation import harness  # noqa: E402
from ngc_jax.evaluation.documents import read_documents  # noqa: E402
from ngc_jax.evaluation.harness import HarnessModel, HarnessOptions  # noqa: E402
from ngc_jax.evaluation.run_tasks import RunOptions, run_task  # noqa: E402
from ngc_jax.evaluation.tasks import read_task  # noqa: E402
from ngc_jax.exporting import export  # noqa: E402
from ngc_jax.models.save import save_model  # noqa: E402
from ngc_jax.models.tokenizer import Tokenizer, wrap  # noqa: E402
from tests.models.compact import fixed_gauge_model  # noqa: E402
from tests.pages import DOCS, run_examples  # noqa: E402
from tests.parity import tiny  # noqa: E402
from tests.tiny import random_tokens  # noqa: E402

PAGE = "howto/lm_evaluation_harness.md"
CPU = {"device": "cpu", "dtype": "float32"}
SIZES = {"vocab_size": 260, "eos_token_id": 256, "pad_token_id": 256}


def tokenizer(*, bos: bool) -> Tokenizer:
    """One token for each of 256 characters, so that every sequence of tokens is a text of them; then special tokens."""
    characters = ["\n", *map(chr, range(32, 127)), *map(chr, range(0x410, 0x410 + 160))]
    backend = Backend(models.BPE(vocab={char: index for index, char in enumerate(characters)}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<eos>", "<user>", "<assistant>", "<bos>"])
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    if not bos:
        return wrap(backend, special_tokens={"eos_token": "<eos>"}, chat_template=template)
    template = "{{ bos_token }}{% for m in messages %}<user>{{ m.content | trim }}<eos>{% endfor %}"
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return wrap(backend, special_tokens=special, chat_template=template, add_bos=True)


def save(place: Path, own: Tokenizer, case: str = "llama") -> Path:
    tiny.torch_model(case, **SIZES).save_pretrained(place)
    own.save(place)
    return place


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("plain"), tokenizer(bos=False))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bos"), tokenizer(bos=True), "mistral")


def text(count: int, seed: int) -> str:
    return bytes((random_tokens(count, seed=seed) % 26 + 97).tolist()).decode()


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def pairs() -> list[tuple[str, str]]:
    """Of one character to more than fit; with choices, spaces at the end of a context, and no context."""
    found = [
        (f"Question: {text(9, n)}\nAnswer:", f" {text(1 + 2 * choice, choice)}")
        for n in range(4)
        for choice in range(3)
    ]
    found += [(text(50, 7), text(30, 8)), (text(70, 9), "x"), ("a", "b"), ("Trailing   ", "spaces"), ("", text(5, 1))]
    return [*found, ("", "<eos>then"), ("<eos>a", "b"), ("<bos>c", "d"), (text(3, 2), text(64, 3))]


def both(place: Path, **options: Any) -> Iterator[Any]:
    yield HFLM(pretrained=str(place), batch_size=3, **CPU, **options)
    yield HarnessModel(str(place), batch_size=3, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("plain", {"max_length": 40, "prefix_token_id": 65}),
        ("with_bos", {}),
        ("with_bos", {"add_bos_token": False}),
        ("with_bos", {"add_bos_token": True}),
    ],
)
def test_log_likelihoods(name: str, options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    theirs, ours = both(request.getfixturevalue(name), **options)
    asked = [pair for pair in pairs() if len(pair[1]) <= ours.max_length]
    for theirs_found, ours_found, pair in zip(
        theirs.loglikelihood(instances("loglikelihood", *asked), disable_tqdm=True),
        ours.loglikelihood(instances("loglikelihood", *asked), disable_tqdm=True),
        asked,
        strict=True,
    ):
        assert ours_found[0] == pytest.approx(theirs_found[0], abs=1e-4), pair
        assert ours_found[1] == theirs_found[1], pair


def test_the_likeliest_tokens_are_greedy(plain: Path) -> None:
    theirs, ours = both(plain)
    prompts = [text(n, n) for n in (3, 8, 20)]
    given = [(prompt, {"until": [], "max_gen_toks": 5}) for prompt in prompts]
    answers = theirs.generate_until(instances("generate_until", *given), disable_tqdm=True)
    asked = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer]
    asked += [(prompt, answer[:-1] + "~") for prompt, answer in asked]
    for model in (theirs, ours):
        found = [greedy for _, greedy in model.loglikelihood(instances("loglikelihood", *asked), disable_tqdm=True)]
        assert found == [True] * (len(asked) // 2) + [False] * (len(asked) // 2)
        assert found


@pytest.mark.parametrize("name", ["plain", "with_bos"])
def test_rolling_log_likelihoods(name: str, request: pytest.FixtureRequest) -> None:
    texts = [(text(count, count),) for count in (1, 30, 63, 64, 65, 150)]
    theirs, ours = both(request.getfixturevalue(name))
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", *texts), disable_tqdm=True)
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", ["plain", "with_bos"])
def test_generated_texts(name: str, request: pytest.FixtureRequest) -> None:
    theirs, ours = both(request.getfixturevalue(name))
    # All with BOS written in them or none: `hf` decides for a whole batch by its first prompt.
    given = [text(count, count) for count in (1, 5, 14, 60)]
    for prompts in (given, ["<bos>" + prompt for prompt in given[:2]]):
        compare_texts(theirs, ours, prompts)


def compare_texts(theirs: Any, ours: Any, prompts: list[str]) -> None:

    def answers(model: Any, **options: Any) -> list[str]:
        asked = instances("generate_until", *[(prompt, {"max_gen_toks": 20, **options}) for prompt in prompts])
        return model.generate_until(asked, disable_tqdm=True)

    whole = answers(theirs, until=[])
    assert len(set(whole)) == len(prompts)
    assert answers(ours, until=[], do_sample=False) == whole
    stops = [whole[0][9:10], whole[1][4:6], "never"]
    expected = answers(theirs, until=stops)
    assert expected != whole
    assert answers(ours, until=stops, temperature=0.0, num_beams=1) == expected
    assert answers(ours, until=stops[0]) == answers(theirs, until=stops[0])


def test_samples(plain: Path) -> None:
    """Another for every request; the same for the same seed, of the model or lm-eval's of NumPy."""
    options = {"until": [], "do_sample": True, "temperature": 1.2, "top_p": 0.95, "max_gen_toks": 12}
    asked = instances("generate_until", *[("Once", options)] * 4)
    model = HarnessModel(str(plain), batch_size=2, seed=5)
    found = model.generate_until(asked, disable_tqdm=True)
    assert len(set(found)) == 4
    assert HarnessModel(str(plain), batch_size=4, seed=5).generate_until(asked, disable_tqdm=True) == found
    drawn = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        drawn.append(HarnessModel(str(plain), batch_size=4).generate_until(asked, disable_tqdm=True))
    assert drawn[0] == drawn[1] != drawn[2]
    for wrong, message in (({"num_beams": 3}, "num_beams=3"), ({"temperature": 0.0}, "above 0")):
        with pytest.raises(UsageError, match=message):
            model.generate_until(instances("generate_until", ("Once", {**options, **wrong})))


def test_thoughts_are_no_part_of_an_answer(plain: Path) -> None:
    asked = instances("generate_until", ("Once", {"until": ["e", "o"], "max_gen_toks": 30}))
    (whole,) = HarnessModel(str(plain)).generate_until(
        instances("generate_until", ("Once", {"until": [], "max_gen_toks": 30}))
    )
    end = whole[8:10]
    theirs, ours = both(plain, think_end_token=end)
    expected = whole.split(end)[-1].lstrip().split("e")[0].split("o")[0]
    assert ours.generate_until(asked, disable_tqdm=True) == [expected]
    assert theirs.generate_until(
        instances("generate_until", ("Once", {"until": [], "max_gen_toks": 30})), disable_tqdm=True
    ) == [whole.split(end)[-1].lstrip()]
    with pytest.raises(UsageError, match="for generated answers"):
        HarnessModel(str(plain), think_end_token=end, enable_thinking=True).loglikelihood(asked)


@pytest.mark.parametrize("name", ["plain", "with_bos"])
def test_conversations(name: str, request: pytest.FixtureRequest) -> None:
    theirs, ours = both(request.getfixturevalue(name))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "It is "},
    ]
    for history, prompt in ((messages[:2], True), (messages, False), (messages[:2], False)):
        assert ours.apply_chat_template(history, prompt) == theirs.apply_chat_template(history, prompt)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.chat_template(False) is None
    assert ours.tokenizer_name
    assert "/" not in ours.tokenizer_name


def test_a_model_of_groups_in_their_backend(tmp_path: Path) -> None:
    """What `export --to hf-grouped` writes, in lm-eval's `hf` backend, and what it was made from, in ours."""
    compact = dataclasses.replace(
        fixed_gauge_model("qwen2", vocab_size=SIZES["vocab_size"]), load_tokenizer=lambda: tokenizer(bos=False)
    )
    save_model(compact, tmp_path / "compact")
    export(tmp_path / "compact", tmp_path / "grouped", to="hf-grouped")
    theirs = HFLM(pretrained=str(tmp_path / "grouped"), trust_remote_code=True, batch_size=3, **CPU)
    ours = HarnessModel(str(tmp_path / "compact"), batch_size=3)
    asked = [pair for pair in pairs() if len(pair[1]) <= ours.max_length]
    expected = theirs.loglikelihood(instances("loglikelihood", *asked), disable_tqdm=True)
    found = ours.loglikelihood(instances("loglikelihood", *asked), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    compare_texts(theirs, ours, [text(count, count) for count in (1, 5, 14)])


def write_tasks(place: Path) -> None:
    """One task of each kind; their documents are in a file beside them."""
    documents = [
        {"question": text(8 + n, n), "choices": [text(3, 2 * n), text(5, n + 9)], "label": n % 2, "text": text(90, n)}
        for n in range(7)
    ]
    (place / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "documents.jsonl")}, "cache_dir": str(place / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    choice |= {"doc_to_text": "Q: {{question}}\nA:", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    rolling |= {"metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]}
    answer = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}"}
    answer |= {"metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"until": ["e"], "max_gen_toks": 9}}
    for name, task in (("choice", choice), ("rolling", rolling), ("answer", answer)):
        (place / f"tiny_{name}.yaml").write_text(json.dumps({"task": f"tiny_{name}", **common, **task}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # lm-eval's table is made in processes of its own
def test_whole_evaluations(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """By lm-eval's function and its command line; with solved examples, a chat template, and its cache of responses."""
    write_tasks(tmp_path)
    names = ["tiny_choice", "tiny_rolling", "tiny_answer"]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    how = {"batch_size": 2, "num_fewshot": 1, "bootstrap_iters": 0, "task_manager": manager}

    def evaluate(model: str, arguments: str, **more: Any) -> dict[str, Any]:
        result = simple_evaluate(model=model, model_args=f"pretrained={plain},{arguments}", tasks=names, **how, **more)
        return {
            (task, name): value
            for task, scores in result["results"].items()
            for name, value in scores.items()
            if isinstance(value, float)
        }

    expected = evaluate("hf", "dtype=float32", device="cpu")
    assert len(expected) >= 6
    cache = str(tmp_path / "responses")
    assert evaluate("ngc_jax", "dtype=float32", use_cache=cache) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(harness, "plan_batches", None)  # all are in the cache
    assert evaluate("ngc_jax", "dtype=float32", use_cache=cache) == pytest.approx(expected, rel=1e-4)
    monkeypatch.undo()

    line = f"--model ngc_jax --model_args pretrained={plain} --include_path {tmp_path} --tasks tiny_choice"
    monkeypatch.setattr(sys, "argv", ["harness", *line.split(), "--apply_chat_template", "--batch_size", "auto"])
    assert harness.main() == 0
    assert "acc_norm" in capsys.readouterr().out
    line = (
        f"--model ngc_jax --model_args pretrained={plain},dtpye=float32 --include_path {tmp_path} --tasks tiny_choice"
    )
    monkeypatch.setattr(sys, "argv", ["harness", *line.split()])
    assert harness.main() == 2
    assert "did you mean dtype" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "folder"), [("arc_easy", "arc"), ("openbookqa", "openbookqa")])
def test_our_own_tasks_ask_what_theirs_ask(name: str, folder: str, plain: Path, tmp_path: Path) -> None:
    """Log-likelihoods of every choice, by the prompts of lm-eval's task files and by ours."""
    write_tasks(tmp_path)
    theirs = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / folder / f"{name}.yaml").read_text())
    local = json.loads((tmp_path / "tiny_choice.yaml").read_text())
    prompt = theirs["doc_to_text"].replace("question_stem", "question")  # a field of the hub's documents
    (tmp_path / "tiny_choice.yaml").write_text(json.dumps(local | {"doc_to_text": prompt}))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    ours = HarnessModel(str(plain), batch_size=2)
    found = simple_evaluate(model=ours, tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0)
    documents = read_documents(str(tmp_path / "documents.jsonl"))
    result = run_task(ours.model, read_task(name), documents, tmp_path / "run", how=RunOptions(2))
    kept = [json.loads(line) for line in (tmp_path / "run" / "responses.jsonl").read_text().splitlines()[1:]]
    responses = {row["id"]: row["log_likelihood"] for row in kept}
    samples = {sample["doc_id"]: [each[0][0] for each in sample["resps"]] for sample in found["samples"]["tiny_choice"]}
    assert len(samples) == len(documents) == result.documents
    for number, values in samples.items():
        asked = [responses[f"{number}/{choice}"] for choice in range(len(values))]
        assert asked == pytest.approx([float(value) for value in values], abs=1e-5)
    scores = found["results"]["tiny_choice"]
    assert {score: result.scores[score].mean for score in ("acc", "acc_norm")} == pytest.approx(
        {score: scores[f"{score},none"] for score in ("acc", "acc_norm")}
    )


@pytest.mark.slow
def test_the_page_about_it(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval knows the options of its command lines, and its Python runs, with a tiny model and task."""
    lines = re.findall(r"python -m ngc_jax\.evaluation\.harness (--(?:.*\\\n)*.*)", (DOCS / PAGE).read_text())
    assert lines
    for line in lines:
        monkeypatch.setattr(sys, "argv", ["harness", *shlex.split(line.replace("\\\n", ""))])
        given = HarnessCLI().parse_args()
        assert given.model == harness.NAME
        HarnessOptions.of({name: value for name, value in given.model_args.items() if name != "pretrained"})

    def evaluate(tasks: list[str], **options: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = simple_evaluate(tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0, **options)
        return {"results": {tasks[0]: found["results"]["tiny_choice"]}}

    write_tasks(tmp_path)
    (tmp_path / "smollm2-0.8").symlink_to(plain)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lm_eval.simple_evaluate", evaluate)
    assert "acc,none" in run_examples(PAGE, least=1)["results"]["results"]["arc_easy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "big"}, "batch_size is 'big'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 1}, "max_length is 1"),
        ({"think_end_token": 5}, "the token's text"),
        ({"enable_thinking": True}, "needs think_end_token"),
        ({"think_end_token": "<user>"}, "special token"),
        ({"maximum_length": 9}, "did you mean max_length"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, plain: Path) -> None:
    with pytest.raises(UsageError, match=message):
        HarnessModel(str(plain), **options)


def test_what_is_recorded(plain: Path) -> None:
    model = HarnessModel(str(plain), batch_size="auto", max_batch_size=6)
    assert model.batch_size == 6
    assert model.get_model_info()["model_dtype"] == "float32"
    assert model.get_model_info()["model_num_parameters"] > 1000
