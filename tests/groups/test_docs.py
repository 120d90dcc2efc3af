"""The examples of docs/groups.md and of the tutorial on dynamics run; their assertions hold."""

from tests.pages import python_blocks, run_examples


def test_the_examples_run():
    session = run_examples("groups.md", least=8)
    # Printed on failure only: how far from the limits the examples are.
    for name, kernel, states in [
        ("lifted", session["lifted"], session["fitted"]),
        ("bilinear", session["kernel"], session["best_bilinear"](21)),
    ]:
        print(name, float(session["error"](kernel, states)))
    print("driven", float(session["distance"](session["driven"])), float(session["distance"](session["u"])))


def test_the_tutorial_runs_in_sixty_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples("tutorials/group_dynamics.md", least=6)
    assert (tmp_path / "group-dynamics.png").stat().st_size > 10_000
    lines = [line for _, code in python_blocks("tutorials/group_dynamics.md") for line in code.splitlines()]
    assert sum(bool(line.strip()) for line in lines) <= 60
