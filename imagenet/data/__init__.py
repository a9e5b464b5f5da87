"""Images and latents: reading, encoding, batches. Imported by training, metrics and commands."""
