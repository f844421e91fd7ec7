"""Files on disk: run directories, teacher store, teacher-output cache, weights, hashes."""
