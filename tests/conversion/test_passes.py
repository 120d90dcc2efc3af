"""Chains of passes: what every pass keeps to, and that a new one is one file."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from typing import ClassVar

import jax
import numpy as np
import pytest

from ngc_jax.conversion import (
    Calibration,
    chain,
    convert,
    factorise,
    propagate_errors,
    prune_neurons,
    quantise,
    refine,
    remeasure,
)
from ngc_jax.conversion.chains import REGISTERED, Pass, option_names, register_pass
from ngc_jax.conversion.fitted import FitCache
from ngc_jax.conversion.measurement_cache import MeasurementCache
from ngc_jax.conversion.methods import METHODS, method_chain, register_method
from ngc_jax.conversion.registry import all_passes, option_docs
from ngc_jax.errors import UsageError
from ngc_jax.groups.quantised import is_quantised
from ngc_jax.models.save import save_model
from tests.tiny import forward, random_tokens, tiny_model

TOKENS = random_tokens(240)
FULL = factorise("ngc", rank="full")
EXAMPLES = {
    "prune_neurons": chain(prune_neurons(0.75), factorise("ngc", allocation="loss")),
    "factorise": chain(factorise("ngc", allocation="loss", gauge=True)),
    "remeasure": chain(factorise("ngc", allocation="loss"), remeasure()),
    "propagate_errors": chain(factorise("svd_llm"), propagate_errors(0.5)),
    "refine": chain(factorise("svd_llm"), refine(480, 1e-3)),
    "quantise": chain(factorise("ngc", allocation="loss", gauge=True), quantise(3, group_size=32)),
}


def logits(model, tokens=TOKENS[:30]):
    return np.asarray(forward(model.params, tokens[None], decoder=model.decoder)[0])


def made(passes, **options):
    return convert(tiny_model("llama_untied"), passes, TOKENS, window=40, batch_size=2, **options)


def test_there_is_an_example_of_every_pass():
    assert set(EXAMPLES) == {kind.name for kind in all_passes()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_pass_is_deterministic_counted_and_plain_data(name):
    passes = EXAMPLES[name]
    json.dumps(passes.describe())
    once, again = (made(passes, keep=0.6) for _ in range(2))
    for one, other in zip(jax.tree.leaves(once.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(one, other)
    stored = sum(leaf.size for leaf in jax.tree.leaves(once.params["groups"], is_leaf=is_quantised))
    biases = sum(member.d_out for group in once.plan.groups for member in group.members if member.bias)
    left = sum(block.parameters for block in once.plan.dense)
    assert once.plan.count_parameters() == stored + biases + left
    assert once.plan.keep_ratio() <= 0.6
    assert np.isfinite(logits(once)).all()


@pytest.mark.parametrize(
    "passes",
    [chain(FULL), chain(FULL, remeasure()), chain(FULL, propagate_errors(1.0)), chain(prune_neurons(1.0), FULL)],
    ids=lambda passes: passes.passes[-1].name if len(passes.passes) > 1 else "alone",
)
def test_every_pass_is_exact_at_full_rank(passes):
    dense, full = logits(tiny_model("llama_untied")), logits(made(passes))
    assert np.abs(full - dense).max() < 2e-3 * np.abs(dense).max()


@pytest.mark.parametrize("kind", all_passes(), ids=lambda kind: kind.name)
def test_every_option_of_every_pass_is_described(kind):
    assert all(len(option_docs()[name]) > 20 for name in option_names(kind))


def test_conversions_that_share_measurements_and_fits_are_what_they_are_alone(tmp_path):
    """Also where the second finds the fit, and measures again."""
    model, passes = tiny_model("llama_untied"), EXAMPLES["remeasure"]
    calibration = Calibration.of(model, TOKENS, bos="never", window=40, gradient_tokens=120)
    needs = passes.needs(model.config, 0.6, calibration)

    def converted(*keeps):
        with FitCache() as fits:
            cache = MeasurementCache(tmp_path / "statistics", model, calibration, needs, fits)
            return [convert(model, passes, calibration, keep=keep, measurements=cache) for keep in keeps][-1]

    alone, after = converted(0.5), converted(0.6, 0.5)
    for one, other in zip(jax.tree.leaves(alone.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_method_is_a_named_chain():
    tokens = Calibration.of(tiny_model("llama_untied"), TOKENS, bos="never", window=40, batch_size=2)
    by_name = convert(tiny_model("llama_untied"), "nystrom", tokens, keep=0.6)
    by_hand = convert(
        tiny_model("llama_untied"),
        chain(prune_neurons(0.6, flexible=True), factorise("svd_llm", allocation="neurons")),
        tokens,
        keep=0.6,
    )
    np.testing.assert_array_equal(logits(by_name), logits(by_hand))


def test_a_chain_that_only_prunes_makes_a_dense_model():
    result = made(chain(prune_neurons(0.5)))
    assert result.plan.groups == ()
    dense = tiny_model("llama_untied").config
    assert dense.mlp_dim == 40
    assert result.config.mlp_dim == 16  # the multiple of 8 next to 20: 40 is one of no larger tile
    assert result.plan.removed == sum(b.parameters for b in dense.blocks()) - result.plan.count_parameters() > 0
    assert np.isfinite(logits(result)).all()


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ((remeasure(),), "add factorise before remeasure"),
        ((propagate_errors(0.3), factorise("ngc")), "add factorise before propagate_errors"),
        ((factorise("ngc"), factorise("ngc")), "factorises once"),
        ((factorise("svd"), propagate_errors(0.3)), "measures no inputs"),
        ((quantise(4), factorise("ngc")), "put quantise last"),
        ((factorise("ngc"), "propagate"), "pass 1 of the chain is 'propagate'; expected a pass"),
    ],
)
def test_passes_that_contradict_each_other_are_refused(passes, message):
    with pytest.raises(UsageError, match=message):
        chain(*passes)


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("magic", {}, "unknown method 'magic'"),
        (3, {}, "expected the name of a method, a Recipe, a pass, or chain"),
        ("ngc", {"keep": 2.0}, "outside"),
        ("ngc", {"windows": 9}, "calibration has no option 'windows'; expected .*window"),
        ("ngc", {"window": 0}, "window is 0; expected at least 1"),
    ],
)
def test_conversions_that_are_none_are_refused(how, options, message):
    with pytest.raises(UsageError, match=message):
        convert(tiny_model(), how, TOKENS, **options)


def test_a_text_that_is_missing_is_asked_for():
    with pytest.raises(UsageError, match="method ngc reads a text; give one"):
        convert(tiny_model(), "ngc")
    assert convert(tiny_model(), "svd", keep=0.5).plan.keep_ratio() <= 0.5


def test_options_of_two_passes_have_different_names():
    class Other(Pass):
        name = "other"
        __dataclass_fields__ = all_passes()[0].__dataclass_fields__

    with pytest.raises(ValueError, match="has the option 'keep_neurons' of another pass"):
        register_pass()(Other)


def test_what_is_no_pass_is_not_registered():
    class Plain(Pass):
        name = "plain"

    with pytest.raises(ValueError, match=r"Plain cannot be registered .* above @dataclasses.dataclass\(frozen=True\)"):
        register_pass()(Plain)


def test_a_pass_that_follows_none_is_named():
    @register_pass(after="factorize")
    @dataclasses.dataclass(frozen=True)
    class Misplaced(Pass):
        name: ClassVar[str] = "misplaced"

    try:
        with pytest.raises(UsageError, match="'misplaced' is to follow 'factorize', which is no pass; expected one of"):
            all_passes()
    finally:
        del REGISTERED["misplaced"]


def test_a_single_pass_is_a_conversion():
    one, other = (convert(tiny_model(), how, keep=0.5) for how in (factorise("svd"), chain(factorise("svd"))))
    assert one.plan == other.plan


def test_a_method_of_ones_own():
    register_method("own", lambda keep: chain(prune_neurons(keep), factorise("svd_llm", allocation="neurons")))
    try:
        assert method_chain("own", 0.7, {"gauge": True}).options()["keep_neurons"] == 0.7
    finally:
        del METHODS["own"]


SCALE = '''
    """A pass of one's own, and the command line with it."""

    import dataclasses
    from typing import ClassVar

    import jax

    from ngc_jax.conversion import Pass, register_pass


    @register_pass(after="propagate_errors")
    @dataclasses.dataclass(frozen=True)
    class ScaleStates(Pass):
        """Multiply output states by a number.

        Attributes:
            scale: What the output states of every group are multiplied by.
        """

        name: ClassVar[str] = "scale_states"
        scale: float = 1.0

        def apply(self, state):
            groups = {
                name: {**group, "output_states": jax.tree.map(lambda q: q * self.scale, group["output_states"])}
                for name, group in state.compact.params["groups"].items()
            }
            params = {**state.compact.params, "groups": groups}
            return dataclasses.replace(state, compact=dataclasses.replace(state.compact, params=params))


    if __name__ == "__main__":
        from ngc_jax.cli import main

        raise SystemExit(main())
'''


@pytest.mark.slow
def test_a_new_pass_is_one_file(tmp_path):
    """On the command line, in a YAML file, in a comparison's key and row, with nothing else changed."""
    (tmp_path / "scale_states.py").write_text(textwrap.dedent(SCALE))
    save_model(tiny_model("llama_untied"), tmp_path / "dense")
    (tmp_path / "text.txt").write_text("Groups exchange signals; a weight is what two states make of each other.\n" * 9)

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "scale_states.py", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "What the output states of every group are multiplied by" in " ".join(run("convert", "--help").split())
    plain = ["convert", "dense", "--method", "svd", "--keep", "0.5", "--json", "made.json", "--overwrite"]
    run(*plain, "--scale", "2", "--out", "made")
    summary = json.loads((tmp_path / "made.json").read_text())
    assert summary["scale"] == 2
    assert summary["passes"] == ["factorise", "scale_states"]

    def compare(scale):
        variants = f"variants: {{svd: {{method: svd}}, scaled: {{method: svd, scale: {scale}}}}}"
        (tmp_path / "compare.yaml").write_text(variants)
        flags = ["--out", "out", "--keep", "0.5", "--evaluation-text", "text.txt", "--window", "32"]
        run("compare", "dense", "--config", "compare.yaml", *flags)
        return json.loads((tmp_path / "out" / "results.json").read_text())["entries"]

    (one, scaled), (same, other) = compare(2.0), compare(3.0)
    assert scaled["scale"] == 2.0
    assert other["scale"] == 3.0
    assert one == same
    assert len({one["perplexity"], scaled["perplexity"], other["perplexity"]}) == 3
    assert len({one["key"], scaled["key"], other["key"]}) == 3
