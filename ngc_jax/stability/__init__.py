"""Stability of a dynamics: Jacobians, Lyapunov exponents, contraction, fixed points, the driving potential.

Everything exported here takes a pure step function of a state, any pytree, and is independent of models. The modules
`depth`, `sequence` and `driving` apply it to decoders.
"""

from ngc_jax.stability.contraction import (
    MetricFit,
    contraction_rate,
    contraction_rates,
    fit_metric,
    lyapunov_metric,
    matrix_measure,
)
from ngc_jax.stability.equilibria import Decrease, FixedPoint, decrease, fixed_point, quadratic_form
from ngc_jax.stability.jacobians import (
    TopSingularValues,
    henrici_departure,
    jacobian,
    jacobians_along,
    kreiss_lower_bound,
    numerical_abscissa,
    singular_values,
    spectral_radius,
    top_singular_values,
)
from ngc_jax.stability.lyapunov import (
    LyapunovSpectrum,
    kaplan_yorke_dimension,
    lyapunov_of_maps,
    lyapunov_spectrum,
    orthonormalise,
    random_frame,
    standard_error,
)
from ngc_jax.stability.potential import Drive, potential_against, potential_along, share_in_span
from ngc_jax.stability.trajectories import distances, pair_exponents, separation_curves

__all__ = [
    "Decrease",
    "Drive",
    "FixedPoint",
    "LyapunovSpectrum",
    "MetricFit",
    "TopSingularValues",
    "contraction_rate",
    "contraction_rates",
    "decrease",
    "distances",
    "fit_metric",
    "fixed_point",
    "henrici_departure",
    "jacobian",
    "jacobians_along",
    "kaplan_yorke_dimension",
    "kreiss_lower_bound",
    "lyapunov_metric",
    "lyapunov_of_maps",
    "lyapunov_spectrum",
    "matrix_measure",
    "numerical_abscissa",
    "orthonormalise",
    "pair_exponents",
    "potential_against",
    "potential_along",
    "quadratic_form",
    "random_frame",
    "separation_curves",
    "share_in_span",
    "singular_values",
    "spectral_radius",
    "standard_error",
    "top_singular_values",
]
