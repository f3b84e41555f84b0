"""What the training loop is given: objectives (autoencoder, video model) and a run's record."""
