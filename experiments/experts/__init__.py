"""A mixture of experts trained from scratch, and converted with and without latent spaces that its experts share."""
