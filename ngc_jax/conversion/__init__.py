"""Post-hoc conversion of dense models to compact ones: a chain of passes over measured statistics.

>>> from ngc_jax.conversion import chain, factorise, prune_neurons
>>> own = chain(prune_neurons(0.9), factorise("ngc", allocation="loss", gauge=True))
"""

from typing import TYPE_CHECKING

from ngc_jax.lazy import lazy_names

if TYPE_CHECKING:
    from ngc_jax.conversion.chains import Chain, Pass, chain, register_pass
    from ngc_jax.conversion.methods import METHODS, Recipe, method_chain, register_method
    from ngc_jax.conversion.passes.factorise import factorise
    from ngc_jax.conversion.passes.propagate_errors import propagate_errors
    from ngc_jax.conversion.passes.prune_neurons import prune_neurons
    from ngc_jax.conversion.passes.quantise import quantise
    from ngc_jax.conversion.passes.refine import refine
    from ngc_jax.conversion.passes.remeasure import remeasure
    from ngc_jax.conversion.pipeline import convert
    from ngc_jax.conversion.state import Calibration, ConversionState
    from ngc_jax.conversion.statistics import calibrate

__all__ = [
    "METHODS",
    "Calibration",
    "Chain",
    "ConversionState",
    "Pass",
    "Recipe",
    "calibrate",
    "chain",
    "convert",
    "factorise",
    "method_chain",
    "propagate_errors",
    "prune_neurons",
    "quantise",
    "refine",
    "register_method",
    "register_pass",
    "remeasure",
]
_PLACES = {
    "chains": ("Chain", "Pass", "chain", "register_pass"),
    "methods": ("METHODS", "Recipe", "method_chain", "register_method"),
    "passes.factorise": ("factorise",),
    "passes.propagate_errors": ("propagate_errors",),
    "passes.prune_neurons": ("prune_neurons",),
    "passes.quantise": ("quantise",),
    "passes.refine": ("refine",),
    "passes.remeasure": ("remeasure",),
    "pipeline": ("convert",),
    "state": ("Calibration", "ConversionState"),
    "statistics": ("calibrate",),
}
__getattr__, __dir__ = lazy_names(
    __name__, {name: f"{__name__}.{module}" for module, names in _PLACES.items() for name in names}
)
