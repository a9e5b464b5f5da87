"""Command lines: options, errors, files, signals and progress. Imported by commands and configurations."""
