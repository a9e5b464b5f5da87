"""The network: a semi-Lipschitz DiT, how its weights start, and DDP or FSDP around it.

It imports only distributed.py and the method; everything else in imagenet/ may import it. Read dit.py first.
"""
