"""How Lightning trains it: trainer, processes, optimizers, callbacks."""
