"""The 2-Wasserstein bound of the paper (theorem 1), link by link, on trained toys. Imported by experiments only."""
