"""What was asked for: the configuration tree, its checks, and the plan of a run."""
