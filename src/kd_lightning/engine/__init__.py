"""Lightning Trainer, worker processes and callbacks."""
