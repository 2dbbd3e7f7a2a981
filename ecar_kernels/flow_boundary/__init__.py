"""What lies between two network calls of a stage."""
