"""Mathematical answers: equality of forms, and comparisons that never end."""

import logging
import threading

import pytest

from ngc_jax.errors import UsageError
from ngc_jax.evaluation.answers import judging
from ngc_jax.evaluation.exact_match import ExactMatch
from ngc_jax.evaluation.math_answers import MathJudge
from ngc_jax.evaluation.tasks import read_task
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def judge():
    with MathJudge(seconds=20) as found:
        yield found


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        (r"So we have $x = \boxed{\frac{1}{2}}$.", "0.5", True),
        (r"So we have $x = \boxed{\frac{1}{2}}$.", r"\frac{2}{4}", True),
        (r"So we have $x = \boxed{\frac{1}{3}}$.", "0.5", False),
        (r"First $\boxed{3}$, and then $\boxed{4}$, which is not 5", "4", True),
        (r"First $\boxed{3}$, and then $\boxed{4}$", "3", False),
        (r"First \boxed{3}. So the result is \boxed{4}, as they are not 5.", "4", True),
        (r"It is $\boxed{3}$ or $\boxed{4}$.", "3, 4", True),
        ("The final answer is $3$. A box would be better: $\\boxed{4}$", "4", True),
        ("half of them is 1,234 in all", "1234", True),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left(3,\pi/2\right)", True),
        (r"\boxed{(\frac{\pi}{2}, 3)}", r"\left( 3, \frac{\pi}{2} \right)", False),
        (r"\boxed{\{3, 1, 2\}}", r"\{1,2,3\}", True),
        (r"$\boxed{(x+1)(x-1)}$", "x^2 - 1", True),
        (r"$\boxed{90^\circ}$", r"90^\circ", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        (r"\boxed{\text{Evelin}}", r"\text{Evelyn}", False),
        (r"\boxed{6 - 5i}", "6 - 5i", True),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", True),
        ("", "3", False),
        ("no idea", "3", False),
        (r"\boxed{", "3", False),
    ],
)
def test_expressions_are_compared_whatever_their_form(answer, target, right, judge):
    assert judge(answer, target) is right


def test_a_comparison_that_never_ends_is_wrong_and_the_next_one_works_outside_the_main_thread(caplog):
    found = []

    def compare():
        with MathJudge(seconds=1.0) as judge:
            found.append(judge(r"\boxed{1 + 10^{10^{10^{10}}} - 10^{10^{10^{10}}}}", "1"))
            found.append(judge(r"\boxed{9999999^{99999999}}", "9999999^{99999998}"))
            judge._seconds = 60.0
            found.append(judge(r"\boxed{\frac{1}{2}}", "0.5"))
            found.append(judge(r"\boxed{\frac{1}{2}}", "0.5"))

    with caplog.at_level(logging.WARNING, logger="ngc_jax"):
        thread = threading.Thread(target=compare)
        thread.start()
        thread.join()
    assert found == [False, False, True, True]
    assert "2 answers could not be compared within 60 seconds" in caplog.text


def test_a_killed_process_is_replaced():
    with MathJudge(seconds=20) as judge:
        assert judge("$3$", "3")
        judge._worker.kill()
        judge._worker.wait()
        assert judge("$4$", "4")


def test_a_missing_library_is_said_before_the_model_answers(monkeypatch):
    monkeypatch.setattr(MathJudge, "_read", lambda self, seconds: {"missing": "math_verify"})

    def predict(requests):
        raise AssertionError("asked")

    documents = [{"problem": "1+1", "answer": "2"}]
    with pytest.raises(UsageError, match=r"need math_verify, which is not installed; pip install 'ngc-jax\[eval\]'"):
        ExactMatch(read_task("math500")).measure(documents, tiny_tokenizer(), predict, "auto")


def test_the_worker_says_which_package_is_missing(monkeypatch, tmp_path):
    """With a package of that name that cannot be imported, before those installed."""
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError('no', name='math_verify')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="math_verify, which is not installed"):
        MathJudge()


def test_problems_and_answers_of_math_500_are_judged():
    documents = [
        {"problem": "What is $1/2 + 1/2$?", "answer": "1", "solution": "It is $\\boxed{1}$."},
        {"problem": "Factor $x^2-1$.", "answer": "(x-1)(x+1)"},
    ]
    spec = read_task("math500")

    def predict(requests):
        texts = [r"So \(\boxed{\dfrac{2}{2}}\).", r"\[ \boxed{(x+1)(x-1)} \]"]
        return {
            request.id: {"text": text, "tokens": 9, "finish": "stop"}
            for request, text in zip(requests, texts, strict=True)
        }

    measured = ExactMatch(spec).measure(documents, tiny_tokenizer(), predict, "auto")
    assert measured.scores["math"].values == (1.0, 1.0)
    with judging("math") as judge:
        assert judge("12", "12") == (True,)
