"""What happens beside the training steps, one idea per file."""
