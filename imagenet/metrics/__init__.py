"""How good generated images are. Training and commands import it; it draws a model's images through the sampler.

frechet.py has the formulas; inception.py and references.py what FID needs, fid.py puts it together, digits.py has the
metrics of digits.
"""
