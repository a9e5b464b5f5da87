"""Terminal Velocity Matching on images: a semi-Lipschitz DiT, its training, sampling and evaluation."""
