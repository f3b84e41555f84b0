"""Gaussian splatting."""
