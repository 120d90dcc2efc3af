"""Which modules of ngc_jax a conversion passes through, on a tiny random model.

    python -m experiments.call_chain --out runs/call_chain

Printed are the call stack from `convert` to the attention of a calibration token, and the modules whose functions are
entered anywhere in the conversion. A return is a module that is entered again while a call of its own waits below on
the stack, with another module between: a reader goes back to that file. The figures do not depend on the hardware.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ngc_jax.conversion
from ngc_jax.conversion import convert
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.tokenizer import Tokenizer

PACKAGE = "ngc_jax"


class CallChain(NamedTuple):
    """Modules of the package, in the order in which they are entered.

    Attributes:
        modules: All.
        returns: Those that are returned to.
        stack: Function by function from the call to the target, each with its module; empty if it was not reached.
    """

    modules: list[str]
    returns: list[str]
    stack: list[str]


def chain_of(run: Callable[[], Any], target: str = "") -> CallChain:
    """Follow a call through the package; other threads are not followed.

    Args:
        run: The call.
        target: Name of the function at the end of the stack.
    """
    entered: dict[str, None] = {}
    returns: dict[str, None] = {}
    stack: list[tuple[str, str]] = []
    reached: list[str] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # modules and class bodies are not
        if event not in ("call", "return") or not module.startswith(PACKAGE) or not is_function:
            return
        if event == "return":
            if stack:
                stack.pop()
            return
        entered.setdefault(module)
        if stack and stack[-1][0] != module and any(module == below for below, _ in stack):
            returns.setdefault(module)
        stack.append((module, frame.f_code.co_name))
        if frame.f_code.co_name == target and not reached:
            reached.extend(f"{module}.{function}" for module, function in stack)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return CallChain(list(entered), list(returns), reached)


def tiny_model() -> LanguageModel:
    """A random decoder of three layers."""
    hf_config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
    }
    config = DecoderConfig.from_hf(hf_config)
    params = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]

    def no_tokenizer() -> Tokenizer:
        raise NotImplementedError("this model has no tokenizer")

    return LanguageModel("tiny", config, None, params, hf_config, no_tokenizer)


def main() -> None:
    """Print the modules that each method enters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["svd_llm", "ngc"], help="names of methods")
    parser.add_argument("--out", type=Path, default=None, help="directory for results.json; none by default")
    options = parser.parse_args()
    for module in pkgutil.walk_packages(ngc_jax.conversion.__path__, "ngc_jax.conversion."):
        importlib.import_module(module.name)  # imports are not followed
    model, tokens = tiny_model(), np.random.default_rng(0).integers(0, 64, 200).astype(np.int32)
    found = {}
    for method in options.methods:
        chain = chain_of(partial(convert, model, method, tokens, keep=0.6, window=40, bos="never"), "attend")
        found[method] = chain._asdict()
        on_the_way = dict.fromkeys(function.rsplit(".", 1)[0] for function in chain.stack)
        print(f"{method}: {len(chain.modules)} modules, {len(chain.returns)} of them returned to: {chain.returns}")
        print(f"  to the attention of a token: {len(chain.stack)} functions in {len(on_the_way)} modules")
        for function in chain.stack:
            print(f"    {function.removeprefix('ngc_jax.')}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
