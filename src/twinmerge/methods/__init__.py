"""The papers: one combining rule per file, pure, found by file name."""
