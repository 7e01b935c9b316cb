"""Streams of frames that a model writes one by one, at toy scale: what Deep Forcing is tried on."""
