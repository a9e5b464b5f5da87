"""How good samples are: FID, precision and recall, and the digits' own. Imported by training and commands."""
