import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.training import sharding
from ngc_jax.training.checkpoints import Checkpoints
from ngc_jax.training.loop import LoopConfig, Placed, train
from ngc_jax.training.step import init_state
from tests.training.setting import CountedBatches, distillation, each_step_compiled_once

ROOT = Path(__file__).parents[2]
# Orbax leaves the other reads of a checkpoint behind when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def setting():
    return distillation()


@pytest.fixture(scope="module", autouse=True)
def _each_step_compiled_once():
    with each_step_compiled_once():
        yield


@pytest.fixture(autouse=True)
def _replicate_the_vocabulary(monkeypatch):
    # 259 tokens are a prime number.
    monkeypatch.setattr(sharding, "LOGICAL_AXES", {**sharding.LOGICAL_AXES, "vocab": None})


def run(setting, steps, directory=None, *, mesh=None, parallel="jit", batches=None, **options):
    settings, evaluate = (options.pop(name, None) for name in ("settings", "evaluate"))
    return train(
        Placed(*setting, mesh or sharding.make_mesh(1, devices=jax.devices()[:1]), parallel),
        CountedBatches() if batches is None else batches,
        LoopConfig(steps, **options),
        directory=directory,
        settings=settings,
        evaluate=evaluate,
    )


def losses(result):
    return {int(entry["step"]): entry["loss"] for entry in result.history if "loss" in entry}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def seven(setting):
    return run(setting, 7)


def test_going_on_is_the_same_as_not_having_stopped(setting, seven, tmp_path):
    first = run(setting, 3, tmp_path / "run")
    assert not first.interrupted
    batches = CountedBatches()
    second = run(setting, 7, tmp_path / "run", batches=batches)
    equal(second.params, seven.params)
    assert losses(first) | losses(second) == losses(seven)
    assert sorted(losses(second)) == [4, 5, 6, 7]
    assert batches.next == 7


def test_going_on_with_nothing_to_do_gives_what_was_there(setting, seven, tmp_path):
    run(setting, 7, tmp_path / "run", save_every=2, keep=2)
    again = run(setting, 7, tmp_path / "run")
    equal(again.params, seven.params)
    assert losses(again) == {}


@pytest.mark.slow
def test_going_on_on_another_mesh_and_by_pmap(setting, seven, tmp_path):
    run(setting, 3, tmp_path / "run", mesh=sharding.make_mesh(2, 2, 2))
    run(setting, 5, tmp_path / "run", mesh=sharding.make_mesh(8), parallel="pmap")
    result = run(setting, 7, tmp_path / "run", mesh=sharding.make_mesh(1, 4, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), result.params, seven.params)
    np.testing.assert_allclose([losses(result)[7]], [losses(seven)[7]], rtol=1e-4)


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_torn_checkpoint_is_passed_over(setting, seven, tmp_path, damage):
    run(setting, 5, tmp_path / "run", save_every=1, keep=2)
    newest = tmp_path / "run" / "5"
    for file in list((newest / "state").rglob("*")):
        if file.is_file():
            if damage == "remove":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    result = run(setting, 7, tmp_path / "run")
    assert min(losses(result)) == 5
    equal(result.params, seven.params)


def test_checkpoints_of_another_model_or_with_other_settings_are_refused(setting, tmp_path):
    run(setting, 1, tmp_path / "run", settings={"seed": 1})
    with pytest.raises(UsageError, match=r"other settings \(seed\)"):
        run(setting, 2, tmp_path / "run", settings={"seed": 2})
    program, trained, _ = setting
    other = init_state(program, jax.tree.map(lambda leaf: leaf[:1], dict(trained)))
    with (
        Checkpoints(tmp_path / "run") as keeper,
        pytest.raises(UsageError, match=r"no checkpoint in .* has shape .*, expected"),
    ):
        keeper.restore(other)


def test_a_loss_that_is_not_finite_stops_with_its_step(setting, tmp_path):
    class Overflowing(CountedBatches):
        def __next__(self):
            batch = super().__next__()
            if self.next == 4:
                batch["weights"] = np.where(batch["weights"] > 0, np.float32(np.inf), np.float32(0))
            return batch

    with pytest.raises(UsageError, match=r"not finite at step 4; the last checkpoint is of step 2"):
        run(setting, 7, tmp_path / "run", batches=Overflowing(), save_every=2)
    with Checkpoints(tmp_path / "run") as keeper:
        assert keeper.steps == [2]


def test_what_was_learnt_is_saved_where_the_data_fail(setting, seven, tmp_path):
    class Failing(CountedBatches):
        def __next__(self):
            if self.next == 4:
                raise ConnectionError("the stream broke off")
            return super().__next__()

    with pytest.raises(ConnectionError):
        run(setting, 7, tmp_path / "run", batches=Failing())
    result = run(setting, 7, tmp_path / "run")
    assert sorted(losses(result)) == [5, 6, 7]
    equal(result.params, seven.params)


@pytest.mark.parametrize("when", [0, 2])
def test_a_signal_while_it_is_evaluated_stops_before_the_next_step(setting, tmp_path, when):
    looked = []

    def evaluate(params):
        step = 2 * len(looked)
        looked.append(step)
        # Whatever an evaluation does to the process, the checkpoint is whole.
        assert step == 0 or (tmp_path / "run" / str(step)).is_dir()
        if step == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    result = run(setting, 7, tmp_path / "run", evaluate=evaluate, evaluate_every=2)
    assert result.interrupted
    assert result.step == when
    with Checkpoints(tmp_path / "run") as keeper:
        assert keeper.steps == [when][: when > 0]


def test_profiles_of_short_and_of_resumed_runs(setting, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append(directory))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    run(setting, 5, tmp_path / "run", profile="here")
    assert calls == ["here", "stop"]
    run(setting, 7, tmp_path / "run", profile="here")  # two steps are too few for another
    assert calls == ["here", "stop"]


SCRIPT = """
import os, sys, json
processes = int(sys.argv[3])
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=" + str(8 // processes)
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
process = int(sys.argv[4])
if processes > 1:
    jax.distributed.initialize(sys.argv[5], processes, process)
import numpy as np
from ngc_jax.training import sharding
from ngc_jax.training.loop import LoopConfig, Placed, train
from tests.training.setting import CountedBatches, distillation
sharding.LOGICAL_AXES = {**sharding.LOGICAL_AXES, "vocab": None}
program, trained, constants = distillation()
config = LoopConfig(int(sys.argv[2]), save_every=1)
placed = Placed(program, trained, constants, sharding.make_mesh(*json.loads(sys.argv[7])), sys.argv[6])
def say(metrics):
    print(json.dumps(metrics), flush=True)
result = train(placed, CountedBatches(process, processes), config,
               directory=sys.argv[1], on_metrics=say)
print(json.dumps({"interrupted": result.interrupted, "step": result.step}), flush=True)
np.savez(sys.argv[1] + f"-{process}.npz", *jax.tree.leaves(result.params))
"""


def start(directory, steps, processes=1, process=0, port=0, parallel="jit", mesh="[8, 1, 1]"):
    command = [sys.executable, "-c", SCRIPT, str(directory), str(steps), str(processes), str(process)]
    return subprocess.Popen(
        [*command, f"127.0.0.1:{port}", parallel, mesh],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def entries(output):
    """Of the lines that are ours; the libraries print too."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def read_until(process, step):
    for line in process.stdout:
        for entry in entries(line):
            if entry["step"] >= step:
                return entry
    raise AssertionError(process.stderr.read()[-2000:])


@pytest.mark.slow
def test_killed_and_stopped_runs_go_on(tmp_path):
    with start(tmp_path / "run", 1000) as killed:
        read_until(killed, 4)
        killed.kill()
    with start(tmp_path / "run", 1000) as stopped:
        first = read_until(stopped, 0)
        # What is lost came after the last whole checkpoint: that of step 2 was whole before that of step 3 was begun.
        assert first["step"] >= 3
        stopped.send_signal(signal.SIGTERM)
        out, errors = stopped.communicate(timeout=120)
    assert stopped.returncode == 0, errors[-2000:]
    last = entries(out)[-1]
    assert last["interrupted"]
    with Checkpoints(tmp_path / "run") as keeper:
        assert keeper.steps[0] == last["step"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def two_processes(*arguments):
    port = free_port()
    with (
        start(*arguments[:2], 2, 0, port, *arguments[2:]) as first,
        start(*arguments[:2], 2, 1, port, *arguments[2:]) as second,
    ):
        try:
            yield first, second
        finally:
            for process in (first, second):
                if process.poll() is None:
                    process.kill()


def ends_of(processes):
    ends = []
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        ends.append(entries(out))
    return ends


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "mesh"), [("jit", "[2, 2, 2]"), ("pmap", "[8, 1, 1]")])
def test_two_processes_train_as_one(seven, tmp_path, parallel, mesh):
    with two_processes(tmp_path / "run", 7, parallel, mesh) as processes:
        ends = ends_of(processes)
    for index in (0, 1):
        with np.load(f"{tmp_path / 'run'}-{index}.npz") as saved:
            found = [saved[name] for name in saved.files]
        for a, b in zip(found, jax.tree.leaves(seven.params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)
        found = [entry["loss"] for entry in ends[index] if "loss" in entry]
        np.testing.assert_allclose(found, list(losses(seven).values()), rtol=1e-4)


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    with two_processes(tmp_path / "run", 1000) as processes:
        read_until(processes[0], 3)
        processes[1].send_signal(signal.SIGTERM)
        ends = ends_of(processes)
    assert ends[0][-1] == ends[1][-1]
    assert ends[0][-1]["interrupted"]
