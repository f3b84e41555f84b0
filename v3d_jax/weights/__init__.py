"""Reading and writing weights: published key layouts, our folder format, the packaged model."""
