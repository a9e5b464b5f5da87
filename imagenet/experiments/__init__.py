"""Questions about the method that need images or classes: commands, which nothing imports."""
