"""Experiments that need images or classes. These are commands; nothing imports them."""
