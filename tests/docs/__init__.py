"""What the documents and the package promise."""
