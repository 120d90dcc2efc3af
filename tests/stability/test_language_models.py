"""Stability of decoders against Jacobians formed one token at a time, finite differences and invariances."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernels import encode
from ngc_jax.models.attention import init_cache
from ngc_jax.stability.depth import depth_stability
from ngc_jax.stability.driving import alignment, mean_motion, potential_over_alone, potential_over_mean
from ngc_jax.stability.sequence import responses, sequence_stability
from ngc_jax.stability.streams import record, token_maps
from tests.models.compact import compact_model, dense_equivalent, dense_model
from tests.test_tokens import BOS, bos_tokenizer
from tests.tiny import random_tokens, tiny_model

KEY = jax.random.key(5)
LENGTH = 14

# One program instead of one for every step of a layer.
recorded = jax.jit(record, static_argnames="decoder")


def prompt(length=LENGTH, seed=0):
    return jnp.asarray(random_tokens(length, seed))


def padded(*prompts):
    width = max(map(len, prompts)) + 2
    rows = [np.pad(one, (0, width - len(one)), constant_values=7) for one in prompts]
    return jnp.asarray(np.stack(rows)), jnp.asarray(np.array([len(one) for one in prompts], np.int32))


def depth(model, tokens, lengths=None, **options):
    return depth_stability(model.decoder, model.params, tokens, lengths, key=KEY, **options)


def sequence(model, tokens, lengths=None, **options):
    return sequence_stability(model.decoder, model.params, tokens, lengths, key=KEY, **options)


@pytest.mark.parametrize("make", [partial(dense_model, "gemma3"), dense_model, compact_model])
def test_depth_agrees_with_the_jacobians_of_one_token(make):
    """With as many directions as dimensions nothing is random: the metric is that of the Frobenius norm."""
    model = make()
    tokens, embed_dim = prompt(), model.config.embed_dim
    recording = recorded(model.decoder, model.params, tokens)
    found = depth(model, tokens[None], directions=embed_dim)
    n = model.config.num_layers

    @jax.jit
    def jacobians(position):
        maps = token_maps(model.decoder, model.params, recording, position)
        return jnp.stack([jax.jacfwd(f)(x[position]) for f, x in zip(maps, recording.streams, strict=False)])

    for t in (0, 5, LENGTH - 1):
        whole = np.eye(embed_dim)
        lengths = np.linalg.norm(np.asarray(recording.streams, np.float64)[:, t], axis=-1)
        for number, one in enumerate(np.asarray(jacobians(jnp.int32(t)), np.float64), start=1):
            whole = one @ whole
            grown = 0.5 * np.log(np.sum(whole**2) / embed_dim) - np.log(lengths[number] / lengths[0])
            np.testing.assert_allclose(found.growth[0, t, number], grown, atol=2e-4)
        np.testing.assert_allclose(found.metric[0, t], grown / n, atol=1e-4)
        # All exponents together are the growth of volume, whatever the frame.
        np.testing.assert_allclose(found.exponents[0, t].sum() * n, np.linalg.slogdet(whole)[1], atol=5e-3)


def test_a_few_directions_estimate_the_metric_and_say_how_well():
    model = dense_model("llama")
    tokens = jnp.stack([prompt(24, seed) for seed in range(8)])
    exact = depth(model, tokens, directions=24).metric
    few = depth(model, tokens, directions=6)
    z = (few.metric - exact) / few.error
    assert 0.3 < np.sqrt(np.mean(np.square(z))) < 2.0
    assert np.all(np.isnan(depth(model, tokens[:1], directions=1).error))


def test_a_groups_part_is_the_growth_into_its_signal():
    model = compact_model()
    embed_dim, tokens = model.config.embed_dim, prompt()
    found = depth(model, tokens[None], directions=embed_dim)
    group = next(group for group in model.plan.groups if group.name == "0-vv")
    scale = model.params["layers"]["0"]["attn_norm"]["scale"]
    states = model.params["groups"]["0-vv"]
    recording = recorded(model.decoder, model.params, tokens)
    stream = recording.streams[:, 4]

    def signal(x, scale=scale):
        normed = x / jnp.sqrt(jnp.mean(x**2) + model.config.norm_eps) * scale
        return encode(group.kernel, states, normed)

    # The group is heard in both layers; in the second the perturbation has come through the first.
    first_map = token_maps(model.decoder, model.params, recording, jnp.int32(4))[0]
    second = partial(signal, scale=model.params["layers"]["1"]["attn_norm"]["scale"])

    def gain(f, x, before):
        return np.log(
            np.linalg.norm(np.asarray(jax.jit(jax.jacfwd(f))(x)) @ before)
            / np.linalg.norm(jax.jit(f)(x))
            / np.sqrt(embed_dim)
            * np.linalg.norm(x)
        )

    first_jacobian = np.asarray(jax.jit(jax.jacfwd(first_map))(stream[0]))
    grown = np.log(np.linalg.norm(first_jacobian) / np.sqrt(embed_dim))
    expected = [gain(signal, stream[0], np.eye(embed_dim)), gain(second, stream[1], first_jacobian) - grown]
    np.testing.assert_allclose(found.signals["0-vv"][0, 4], np.mean(expected), atol=1e-3)


@pytest.mark.parametrize("measure", [depth, pytest.param(partial(sequence, memory=4), marks=pytest.mark.slow)])
def test_a_compact_model_is_as_stable_as_the_dense_one_it_makes(measure):
    model = compact_model()
    tokens = jnp.stack([prompt(), prompt(seed=1)])
    found, expected = measure(model, tokens), measure(dense_equivalent(model), tokens)
    np.testing.assert_allclose(found.metric, expected.metric, atol=1e-3)
    np.testing.assert_allclose(found.growth, expected.growth, atol=3e-3)


def test_padding_and_company_change_nothing_along_depth():
    model = dense_model("llama")
    one, other = prompt(), prompt(9, seed=1)
    found = depth(model, *padded(one, other), keep_frames=True)
    for row, tokens in enumerate((one, other)):
        alone = depth(model, tokens[None], keep_frames=True)
        for name in ("metric", "error", "exponents", "growth", "frames"):
            values = getattr(found, name)[row]
            np.testing.assert_allclose(values[: len(tokens)], getattr(alone, name)[0], atol=2e-4)
            assert np.all(np.isnan(values[len(tokens) :]))


@pytest.mark.slow
def test_padding_and_company_change_nothing_along_the_sequence():
    model = dense_model("llama")
    one, other = prompt(), prompt(9, seed=1)
    found = sequence(model, *padded(one, other), memory=3)
    for row, tokens in enumerate((one, other)):
        alone = sequence(model, tokens[None], memory=3)
        for name in ("metric", "error"):
            np.testing.assert_allclose(getattr(found, name)[row], getattr(alone, name)[0], atol=2e-4)
        for name in ("segments", "exponents", "growth", "layers"):
            values, expected = getattr(found, name)[row], getattr(alone, name)[0]
            np.testing.assert_allclose(values[: len(expected)], expected, atol=5e-4)
            assert np.all(np.isnan(values[len(expected) :]))


@pytest.mark.parametrize("architecture", ["llama", pytest.param("mistral", marks=pytest.mark.slow)])
def test_the_sequence_agrees_with_the_jacobian_of_the_remembered_cache(architecture):
    """With as many directions as the memory has numbers the metric is that of the Frobenius norm."""
    model, memory, steps = dense_model(architecture), 2, 4
    tokens = prompt(memory + steps)
    config = model.config
    size = config.num_layers * 2 * memory * config.num_kv_heads * config.head_dim
    found = sequence(model, tokens[None], memory=memory, directions=size)

    recording = recorded(model.decoder, model.params, tokens)
    kept = [(np.asarray(layer.keys)[0], np.asarray(layer.values)[0].swapaxes(1, 2)) for layer in recording.cache]
    units = np.array([[np.sqrt(np.mean(part**2)) for part in layer] for layer in kept])
    actual = np.array(kept) / units[:, :, None, None, None]  # (n, 2, heads, H, tokens)
    run = jax.jit(
        lambda cache, token, position: model.decoder.apply(
            {"params": model.params}, token[None, None], position[None, None], cache, method="hidden"
        )[1]
    )

    def new_activations(recent, t):
        """Keys and values of token t of those of the tokens before it, the last `memory` of them as given."""
        cache = init_cache(config, 1, len(tokens), jnp.float32)
        past = jnp.concatenate([jnp.asarray(actual[..., : t - memory]), recent], axis=-1)
        past = past * units[:, :, None, None, None]
        filled = []
        for layer, (keys, values) in zip(cache, past, strict=True):
            slots = layer.positions.shape[1]
            at = np.arange(t) % slots
            filled.append(
                layer._replace(
                    keys=layer.keys.at[0, :, :, at].set(jnp.moveaxis(keys, -1, 0)),
                    values=layer.values.at[0, :, at].set(jnp.moveaxis(values, -1, 0)),
                    positions=layer.positions.at[0, at].set(np.arange(t)),
                )
            )
        after = run(tuple(filled), tokens[t], jnp.int32(t))
        slots = [t % layer.positions.shape[1] for layer in after]
        new = [(layer.keys[0, :, :, s], layer.values[0, :, s]) for layer, s in zip(after, slots, strict=True)]
        return jnp.array([[*layer] for layer in new]) / units[:, :, None, None]

    for segment, start in enumerate(range(memory, memory + steps, memory)):
        tangent = np.eye(size).reshape(size, config.num_layers, 2, config.num_kv_heads, config.head_dim, memory)
        for t in range(start, start + memory):
            recent = jnp.asarray(actual[..., t - memory : t])
            jacobian = np.asarray(jax.jit(jax.jacfwd(partial(new_activations, t=t)))(recent))
            new = np.tensordot(tangent, jacobian, (range(1, 6), range(4, 9)))
            tangent = np.concatenate([tangent[..., 1:], new[..., None]], axis=-1)
            grown = 0.5 * np.log(np.sum(tangent**2) / size)
            np.testing.assert_allclose(found.growth[0, segment, t - start], grown, atol=1e-3)
        np.testing.assert_allclose(found.segments[0, segment], grown / memory, atol=1e-3)
        by_layer = np.sum(tangent**2, axis=(0, 2, 3, 4, 5))
        np.testing.assert_allclose(found.layers[0, segment], by_layer / by_layer.sum(), atol=1e-3)
    assert found.ends.tolist() == [3, 5]


def test_responses_are_causal_and_those_of_finite_differences():
    model = dense_model("llama")
    tokens, sources = prompt(), jnp.array([0, 4])
    found = np.asarray(responses(model.decoder, model.params, tokens, sources, key=KEY))
    np.testing.assert_allclose(found[[0, 1], 0, [0, 4]], 1.0, rtol=1e-5)
    assert np.all(found[1, :, :4] == 0)
    assert np.all(found[:, 0].sum(axis=1) < 1 + 1e-5)
    assert np.all(found[0, 1:] > 0)

    # One more road: the same direction added to one row of the embeddings of a text in which that token occurs once.
    tokens = jnp.asarray(np.random.default_rng(0).permutation(200)[:LENGTH], jnp.int32)
    found = np.asarray(responses(model.decoder, model.params, tokens, sources[1:], key=KEY))[0]
    before = np.asarray(recorded(model.decoder, model.params, tokens).streams)
    table = model.params["embed"]["embedding"]
    (key,) = jax.random.split(KEY, 1)
    direction = jax.random.normal(key, (24,))
    direction *= 1e-3 * np.linalg.norm(table[tokens[4]]) / jnp.linalg.norm(direction)
    runs = []
    for sign in (1, -1):
        moved = {**model.params, "embed": {"embedding": table.at[tokens[4]].add(sign * direction)}}
        runs.append(np.asarray(recorded(model.decoder, moved, tokens).streams, np.float64))
    difference = np.linalg.norm(runs[0] - runs[1], axis=-1) / 2e-3 / np.linalg.norm(before, axis=-1)
    np.testing.assert_allclose(found, difference, rtol=0.02, atol=2e-3)


def test_potentials_and_undriven_motions_add_up_to_the_motion():
    model = dense_model("llama")
    tokens, lengths = padded(prompt(), prompt(9, seed=1))
    over_alone = potential_over_alone(model.decoder, model.params, tokens, lengths)
    motion = mean_motion(model.decoder, model.params, tokens, lengths)
    over_mean = potential_over_mean(model.decoder, model.params, motion, tokens, lengths)
    for row, count in enumerate(lengths.tolist()):
        streams = recorded(model.decoder, model.params, tokens[row], count).streams
        expected = np.diff(np.asarray(streams), axis=0).swapaxes(0, 1)[:count]
        for drive in (over_alone, over_mean):
            motion_LxnxD = np.asarray(drive.potential)[row] + np.asarray(drive.undriven)[row]
            np.testing.assert_allclose(motion_LxnxD[:count], expected, atol=1e-4)
            assert np.all(np.asarray(drive.potential)[row, count:] == 0)
    # Nothing drives the first token, and on average nothing drives the mean field.
    driven = np.asarray(over_alone.potential)
    assert np.abs(driven[:, 0]).max() < 1e-5 < np.abs(driven[:, 1]).max()
    assert np.abs(np.asarray(over_mean.potential).sum(axis=(0, 1))).max() < 1e-3

    # What a token does alone it does alone in a prompt of its own.
    single = recorded(model.decoder, model.params, tokens[0, :1]).streams[:, 0]
    np.testing.assert_allclose(np.asarray(over_alone.undriven)[0, 0], np.diff(single, axis=0), atol=1e-5)
    frames = depth(model, tokens, lengths, directions=24, keep_frames=True).frames
    share = np.asarray(alignment(over_alone, frames))[0, 1:LENGTH]
    np.testing.assert_allclose(share[..., -1], 1, atol=1e-3)
    assert np.all(np.diff(share, axis=-1) > -1e-6)


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: depth(model, jnp.ones((1, 2, 5), int)),
        lambda model: depth(model, []),
        lambda model: depth(model, [[1, 2], []]),
        lambda model: depth(model, [[0.5, 1.0]]),
        lambda model: depth(model, [[1, 2], [3]], jnp.array([2, 1])),
        lambda model: depth(model, 5),
        lambda model: depth(model, [{"role": "user", "content": "Hi"}]),
        lambda model: record(model, ["one", "two"]),
        lambda model: depth(model, prompt()[None], directions=25),
        lambda model: depth(model, prompt()[None].astype(float)),
        lambda model: depth(model, prompt()[None], jnp.array([3, 4])),
        lambda model: depth(model, prompt()[None], jnp.array([999])),
        lambda model: sequence(model, prompt()[None]),
        lambda model: sequence(model, prompt()[None], memory=0),
        lambda model: potential_over_mean(model.decoder, model.params, jnp.zeros((3, 24)), prompt()[None]),
    ],
)
def test_what_does_not_fit_is_refused(measure):
    with pytest.raises(UsageError, match="expected"):
        measure(dense_model("llama"))


@pytest.mark.parametrize(
    "measure",
    [
        depth,
        sequence,
        lambda model, tokens: mean_motion(model.decoder, model.params, tokens),
        lambda model, tokens: responses(model.decoder, model.params, tokens[0], jnp.array([0]), key=KEY),
        lambda model, tokens: record(model.decoder, model.params, tokens[0]),
    ],
)
def test_tokens_that_the_model_does_not_know_are_refused(measure):
    model = dense_model("llama")
    with pytest.raises(UsageError, match=r"token id 30000 \(at position 1\) is outside the model's vocabulary"):
        measure(model, jnp.full((1, 80), 1).at[0, 1].set(30_000))


def test_prompts_are_taken_as_people_have_them():
    """A model and texts, lists or arrays, in one batch of any lengths: as the padded array of their ids."""
    model = dataclasses.replace(tiny_model(), load_tokenizer=bos_tokenizer)
    texts = ["Hi there", "you"]
    rows = [bos_tokenizer().encode_prompt(text) for text in texts]
    assert rows[0][0] == BOS
    options = {"key": KEY, "directions": 3}
    expected = depth(model, *padded(*map(jnp.asarray, rows)), directions=3).metric
    for given in (texts, rows, [row.tolist() for row in rows], [rows[0][None], texts[1]]):
        found = depth_stability(model, given, **options).metric
        for row, ids in enumerate(rows):
            np.testing.assert_allclose(found[row, : len(ids)], expected[row, : len(ids)], atol=1e-4)
        assert np.all(np.isnan(found[1, len(rows[1]) :]))
    alone = depth_stability(model.decoder, model.params, rows[1][None], **options).metric
    for given in ("you", rows[1], rows[1].tolist(), jnp.asarray(rows[1]), rows[1][None], ["you"]):
        np.testing.assert_array_equal(depth_stability(model, given, **options).metric, alone)
    np.testing.assert_array_equal(
        depth_stability(model.decoder, model.params, tokens_BxL=rows[1].tolist(), **options).metric, alone
    )


def test_every_measurement_takes_a_model_and_a_text():
    model = dataclasses.replace(tiny_model(), load_tokenizer=bos_tokenizer)
    row = jnp.asarray(bos_tokenizer().encode_prompt("Hi there"))
    own = (model.decoder, model.params)
    motion = mean_motion(*own, row[None])
    for by_text, by_ids in (
        (mean_motion(model, "Hi there"), motion),
        (potential_over_alone(model, "Hi there").share, potential_over_alone(*own, row[None]).share),
        (potential_over_mean(model, motion, ["Hi there"]).share, potential_over_mean(*own, motion, row[None]).share),
        (record(model, "Hi there").streams, record(*own, row).streams),
        (record(*own, row[None].tolist(), 4).streams, record(*own, row, 4).streams),
        (
            responses(model, "Hi there", jnp.array([1]), key=KEY),
            responses(*own, row, jnp.array([1]), key=KEY),
        ),
        (
            sequence_stability(model, "Hi there", key=KEY, directions=2, memory=3).segments,
            sequence_stability(*own, row[None], key=KEY, directions=2, memory=3).segments,
        ),
    ):
        np.testing.assert_array_equal(by_text, by_ids)


def test_a_text_for_a_decoder_says_what_to_give():
    model = tiny_model()
    with pytest.raises(UsageError, match="give the LanguageModel in place of decoder and parameters"):
        depth(model, "Hi")
    with pytest.raises(UsageError, match="apply_chat_template"):
        depth_stability(model, [{"role": "user", "content": "Hi"}], key=KEY)


def test_what_pads_a_row_may_be_any_number():
    model = dense_model("llama")
    rows, lengths = jnp.stack([prompt(), prompt()]), jnp.array([len(prompt()), 3])
    padded = jnp.where(jnp.arange(rows.shape[1]) < lengths[:, None], rows, -1)
    np.testing.assert_array_equal(depth(model, padded, lengths).metric, depth(model, rows, lengths).metric)


def test_gradients_reach_the_parameters():
    """A regulariser on the metric can be trained: its derivative is that of finite differences."""
    model, tokens = dense_model("llama"), prompt(8)[None]

    def total(kernel):
        layers = model.params["layers"]
        first = {**layers["0"], "mlp": {**layers["0"]["mlp"], "d": {"kernel": kernel}}}
        params = {**model.params, "layers": {**layers, "0": first}}
        return depth_stability(model.decoder, params, tokens, key=KEY, directions=3).metric.mean()

    kernel = model.params["layers"]["0"]["mlp"]["d"]["kernel"]
    slope = jax.jit(jax.grad(total))(kernel)
    direction = slope / jnp.linalg.norm(slope)
    step = 3e-3
    difference = (total(kernel + step * direction) - total(kernel - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(slope * direction), difference, rtol=0.02)
