"""The passes of a conversion, one lever a module; `ngc_jax.conversion` exports them."""
