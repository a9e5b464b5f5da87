"""The arithmetic of a step: floating-point operations, and bytes of its state. The log and commands import it."""
