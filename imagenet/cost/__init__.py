"""The arithmetic of a step: its floating-point operations and the bytes of its state. Commands and the log import it."""
