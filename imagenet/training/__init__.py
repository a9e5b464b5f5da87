"""Training a model. Only commands import it; it may import every other folder but cost/ and foreign/.

Read step.py first (algorithm 1, and the parts of a training), then run.py (the folder of its results) and
log.py. checkpoint.py keeps states complete or absent under their name; state.py writes and reads their tensors.
"""
