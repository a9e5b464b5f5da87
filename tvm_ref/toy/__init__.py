"""A toy in 2D: train a network in a minute and compare it with the exact flow. Imported by bound and experiments."""
