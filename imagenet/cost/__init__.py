"""The arithmetic of a step: floating-point operations, and bytes of its state. Only commands import it."""
