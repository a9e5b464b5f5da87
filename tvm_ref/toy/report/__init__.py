"""Metrics and pictures of a trained toy. Imported by its run and by all above it, never by its training."""
