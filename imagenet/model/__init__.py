"""The network: a semi-Lipschitz DiT, its initial weights, the processes that train it, and DDP or FSDP around it.

It imports only the method; everything else in imagenet/ may import it. Read dit.py first.
"""
