"""A toy in 2D: train a network in a minute and compare it with the exact flow.

Read training.py first (a step of algorithm 1 on one screen), then network.py (F), config.py (the settings), run.py (the
folder and its loop), data/ (distributions whose flow is exact) and report/ (metrics and pictures). __main__.py is the
command, `python -m tvm_ref.toy`.
"""
