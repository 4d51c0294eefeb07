"""Records of a run: the append-only file, its locks, and long-form rows."""
