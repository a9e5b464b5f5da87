"""The data of the toy: Gaussian mixtures, whose flow is exact, and your own points. Imported by all above it."""
