"""The network: a semi-Lipschitz DiT and how its weights start. All of imagenet imports it; it imports nothing of it."""
