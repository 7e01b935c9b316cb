"""Algorithms on tensors that methods share. Import them from their modules."""
