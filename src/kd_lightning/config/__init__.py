"""The configuration tree, its validation, and the resolved plan of a run."""
