"""The 2-Wasserstein bound of the paper (theorem 1), link by link, on trained toys. Imported by experiments only.

Read chain.py first (every term and link), then paths.py (the model's path, the exact one, the loss) and lipschitz.py
(L). other_bounds.py has the bounds by other losses, measuring.py the settings, plots.py the pictures;
`python -m tvm_ref.bound` is __main__.py.
"""
