"""TVM on the plane, where the exact answer is known: distributions, a small network, training, pictures."""
