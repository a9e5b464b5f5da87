"""Name the terms of the Wasserstein bound, and list every inequality between them; chain.py says what they are."""

LABELS = {  # of every term
    "w2": "W2 (optimal transport)",
    "displacement": "displacement (eq. 36-38)",
    "terminal_velocity": "terminal velocity (eq. 7)",
    "mean_square": "mean-square, one-sided",
    "pathwise_one_sided": "path-wise, one-sided",
    "pathwise_two_sided": "path-wise, two-sided",
    "global": "global (theorem 1)",
    "global_from_loss": "global, from the TVM loss",
}
TERMS = tuple(LABELS)
LINKS = (  # every inequality of the chain
    ("w2", "displacement"),
    ("displacement", "terminal_velocity"),
    ("displacement", "mean_square"),
    ("displacement", "pathwise_one_sided"),
    ("pathwise_one_sided", "pathwise_two_sided"),
    ("pathwise_two_sided", "global"),
    ("mean_square", "global"),
)
