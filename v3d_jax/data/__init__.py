"""The outside world: pictures, meshes, orbit data sets and the training input pipeline."""
