"""EDM diffusion: schedule, preconditioning, guidance, samplers, loss (arXiv 2206.00364)."""
