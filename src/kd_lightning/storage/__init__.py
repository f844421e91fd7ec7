"""What lies on disk: run directories, teachers, their outputs, weights, and what they depend on."""
