"""Array math without weights or I/O: imports jax and numpy only."""
