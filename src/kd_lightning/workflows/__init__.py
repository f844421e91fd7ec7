"""Workflows: train a student, train a teacher, evaluate, tune, run a grid."""
