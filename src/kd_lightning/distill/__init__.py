"""The Lightning module: a trainable student, a frozen teacher, and the terms between them."""
