"""One file for each method, named after its slug. The registry reads these files; nothing is imported here."""
