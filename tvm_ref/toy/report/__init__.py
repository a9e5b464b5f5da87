"""The report of a run: metrics and pictures. Imported by the toy's command, bound and experiments."""
