"""The report of a run: metrics, pictures, an animation. Imported by the toy's command, bound and experiments."""
