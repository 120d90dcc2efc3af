"""Logits and greedy continuations of every architecture, against transformers' own models."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pathlib import Path  # noqa: E402

import jax.numpy as jnp  # noqa: E402
import transformers  # noqa: E402

from ngc_jax.models.experts import BLOCK_INPUTS  # noqa: E402
from ngc_jax.models.generate import generate  # noqa: E402
from ngc_jax.models.layers import INPUT_SITE  # noqa: E402
from ngc_jax.models.load import load_model  # noqa: E402
from tests.parity import tiny  # noqa: E402

TOLERANCE = 1e-4
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
# One case of every architecture, with as much in it as it can have.
RICH = ("llama biases", "mistral", "qwen2 sliding", "qwen3 sliding", "gemma3 soft cap")
# And of every feature that these have not.
NEWER = ("gemma2", "granite", "smollm3", "olmo3", "glm4", "cohere2", "nemotron")


@pytest.mark.parametrize("case", tiny.CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    theirs = tiny.torch_model(case)
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(tmp_path))
    tokens = tiny.some_tokens()
    expected = tiny.torch_logits(theirs, tokens)
    assert expected.std() > 0.5  # or 1e-4 would say little
    np.testing.assert_allclose(tiny.our_logits(ours, tokens), expected, rtol=0, atol=TOLERANCE)


# Not tied: random tied models repeat themselves.
@pytest.mark.parametrize("case", [*RICH[:-1], "gemma3 biases", "llama yarn"])
def test_greedy_continuation(case: str, tmp_path: Path) -> None:
    theirs = tiny.torch_model(case)
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(tmp_path))
    # The prompt is shorter than the windows: the continuation outgrows them, and the cache with it.
    prompts, new = tiny.some_tokens()[:, :5], 24
    with torch.no_grad():
        continued = theirs.generate(torch.tensor(prompts, dtype=torch.long), max_new_tokens=new, do_sample=False)
    expected = continued[:, prompts.shape[1] :].numpy()
    assert len(np.unique(expected)) > 5
    for batch in (2, 1):
        continuations = generate(ours, list(prompts[:batch]), max_new_tokens=new)
        np.testing.assert_array_equal(np.stack(continuations), expected[:batch])


@pytest.mark.parametrize(
    ("case", "without"),
    [
        ("llama linear", {"rope_parameters": DEFAULT_ROPE | {"rope_theta": 200.0}}),
        ("llama theta", {"rope_parameters": DEFAULT_ROPE}),
        ("llama llama3", {"rope_parameters": DEFAULT_ROPE | {"rope_theta": 500.0}}),
        ("llama yarn", {"rope_parameters": DEFAULT_ROPE | {"rope_theta": 300.0}}),
        ("llama no kv heads", {"hidden_act": "gelu_pytorch_tanh"}),
        ("mistral", {"sliding_window": 12}),
        ("qwen2 sliding", {"sliding_window": 12}),
        ("qwen2 sliding", {"layer_types": None, "max_window_layers": 1}),
        ("qwen3 sliding", {"use_sliding_window": False}),
        ("gemma3", {"sliding_window": 10}),
        ("gemma3", {"query_pre_attn_scalar": 18}),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 3}),
        ("gemma3 linear", {"rope_parameters": tiny.CASES["gemma3"][1]["rope_parameters"]}),
        ("gemma3 soft cap", {"final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 10}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
        ("phi3", {"sliding_window": 12}),
        ("phi3 long", {"max_position_embeddings": 64}),
        ("granite", {"residual_multiplier": 0.61}),
        ("granite", {"embedding_multiplier": 3.1}),
        ("granite", {"attention_multiplier": 0.31}),
        ("granite", {"logits_scaling": 0.71}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 0]}),
        ("smollm3", {"sliding_window": 10}),
        ("olmo3", {"rope_parameters": DEFAULT_ROPE | {"rope_theta": 300.0}}),
        ("ministral", {"sliding_window": 10}),
        ("ministral3", {"rope_parameters": DEFAULT_ROPE | {"rope_theta": 300.0}}),
        ("exaone4", {"layer_types": ["sliding_attention"] * 5}),
        ("glm", {"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 1.0}}),
        ("cohere", {"layer_norm_eps": 3e-2}),
        ("cohere2", {"layer_types": ["sliding_attention"] * 5}),
        ("cohere2", {"logit_scale": 0.81}),
    ],
)
def test_settings_are_seen_in_the_logits(case: str, without: dict, tmp_path: Path) -> None:
    """The cases test what they are named after: a slightly different config.json gives clearly different logits."""
    tiny.torch_model(case).save_pretrained(tmp_path)
    tokens = tiny.some_tokens()
    logits = tiny.our_logits(load_model(str(tmp_path)), tokens)
    tiny.write_config(tmp_path, tiny.read_config(tmp_path) | without)
    changed = tiny.our_logits(load_model(str(tmp_path)), tokens)
    assert np.abs(logits - changed).max() > 20 * TOLERANCE


@pytest.mark.parametrize("case", RICH)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_shards(case: str, dtype: str, tmp_path: Path) -> None:
    """Weights stored in a half type and in several files, computed with in float32."""
    tiny.torch_model(case).to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="12kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = load_model(str(tmp_path))
    assert ours.dtype == jnp.float32
    tokens = tiny.some_tokens()
    expected = tiny.torch_logits(tiny.torch_load(tmp_path), tokens)
    np.testing.assert_allclose(tiny.our_logits(ours, tokens), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", [*RICH, *NEWER])
def test_bfloat16_arithmetic_loses_no_more_than_theirs(case: str, tmp_path: Path) -> None:
    tiny.torch_model(case).to(torch.bfloat16).save_pretrained(tmp_path)
    ours = load_model(str(tmp_path), dtype="bfloat16")
    assert ours.dtype == jnp.bfloat16
    tokens = tiny.some_tokens()
    exact = tiny.torch_logits(tiny.torch_load(tmp_path), tokens)
    our_error = tiny.our_logits(ours, tokens) - exact
    their_error = tiny.torch_logits(tiny.torch_load(tmp_path, torch.bfloat16), tokens) - exact
    assert our_error.std() < 1.1 * their_error.std() < 0.1 * exact.std()


@pytest.mark.parametrize("case", [*RICH, *NEWER])
def test_every_block_reads_what_theirs_reads(case: str, tmp_path: Path) -> None:
    """Layer by layer: the inputs of all blocks, which is also what calibration measures."""
    theirs = tiny.torch_model(case)
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(tmp_path))
    seen: dict[tuple[int, str], np.ndarray] = {}
    modules = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "u": "mlp.up_proj",
        "g": "mlp.gate_proj",
        "d": "mlp.down_proj",
    }
    for layer, block in enumerate(theirs.model.layers):
        for role, path in modules.items():
            if role not in ours.config.roles:
                continue
            fused = role in "ug" and not hasattr(block.mlp, "up_proj")
            block.get_submodule("mlp.gate_up_proj" if fused else path).register_forward_pre_hook(
                lambda module, inputs, at=(layer, role): seen.__setitem__(at, inputs[0].detach().numpy())
            )
    tokens = tiny.some_tokens()
    tiny.torch_logits(theirs, tokens)
    _, state = ours.decoder.apply({"params": ours.params}, jnp.asarray(tokens), mutable=[BLOCK_INPUTS])
    assert len(seen) == len(ours.config.roles) * ours.config.num_layers
    for (layer, role), expected in seen.items():
        node = state[BLOCK_INPUTS]["layers"][str(layer)]
        for name in INPUT_SITE[role].split("."):
            node = node[name]
        np.testing.assert_allclose(node[0], expected, rtol=2e-5, atol=TOLERANCE, err_msg=f"layer {layer} {role}")


def test_a_prompt_gets_the_same_in_a_padded_batch(tmp_path: Path) -> None:
    """Padding and positions are ours; transformers is asked for one sequence at a time."""
    theirs = tiny.torch_model("gemma3")
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(tmp_path))
    tokens = tiny.some_tokens()
    lengths = (31, 12)
    index = np.arange(tiny.LENGTH)
    positions = np.stack([np.where(index < length, index, -1) for length in lengths]).astype(np.int32)
    logits, _ = ours.decoder.apply({"params": ours.params}, jnp.asarray(tokens), jnp.asarray(positions))
    for row, length in enumerate(lengths):
        expected = tiny.torch_logits(theirs, tokens[row : row + 1, :length])[0]
        np.testing.assert_allclose(logits[row, :length], expected, rtol=0, atol=TOLERANCE)


def test_attention_soft_cap() -> None:
    """No model of the supported families sets it, but configs may: against transformers' eager attention."""
    from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward

    from ngc_jax.models.attention import attend, extend

    batch, length, heads, kv_heads, head_dim = 2, 9, 6, 2, 10
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(batch, length, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    module = torch.nn.Module()
    module.num_key_value_groups = heads // kv_heads
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    expected, _ = eager_attention_forward(
        module, *(torch.tensor(x).transpose(1, 2) for x in (q, k, v)), mask, scaling=0.7, softcap=1.3
    )
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    attended, _ = extend(None, jnp.asarray(k), jnp.asarray(v), positions)
    ours = attend(jnp.asarray(q), attended, positions, scale=0.7, soft_cap=1.3)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)


def test_vocabulary_of_cases_is_that_of_transformers_models() -> None:
    """Every supported architecture has a case, by the name that transformers knows it by."""
    from ngc_jax.models.families import FAMILIES

    assert {architecture for architecture, _ in tiny.CASES.values()} == set(FAMILIES)
    assert all(name in transformers.CONFIG_MAPPING for name in FAMILIES)
