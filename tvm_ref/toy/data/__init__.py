"""The toy's data: Gaussian mixtures, whose flow is exact, and your own points. Imports no other part of the toy."""
