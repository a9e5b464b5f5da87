"""Experiments: many trainings, one question each. Commands, imported by nobody outside this folder."""
