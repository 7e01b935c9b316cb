"""Storage of the KV cache: layers that hold what a plan left, in the form in which it asked for it."""
