"""Training: from scratch, or a compact model towards its teacher; data, losses, the loop, meshes and checkpoints."""
