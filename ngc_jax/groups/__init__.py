"""Core concepts: states, interaction kernels, communication dynamics, topologies, plans and their linen modules."""
