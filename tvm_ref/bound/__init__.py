"""The 2-Wasserstein bound of theorem 1 with every constant in place, measured on the plane."""
