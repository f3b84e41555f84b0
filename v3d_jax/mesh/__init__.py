"""Triangle meshes: rendering today, extraction and texturing on the same maths."""
