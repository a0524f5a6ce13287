"""Tasks that are made on the fly, sequence by sequence, and how many of their answers are right."""
