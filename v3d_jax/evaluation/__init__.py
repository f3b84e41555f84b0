"""Scores of models on held-out objects and scenes, and of the frames that they make."""
