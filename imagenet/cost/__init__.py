"""What a step costs: floating-point operations and memory. Imported by training and commands."""
