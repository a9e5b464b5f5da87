"""Metrics of generated images. Training and commands import it; it draws a model's images through the sampler.

frechet.py has the formulas; inception.py and references.py what FID needs, fid.py puts it together. digits.py and
pictures.py have the metrics of digits and of your own pictures; own.py measures a model by them.
"""
