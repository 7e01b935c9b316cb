"""Recipes: complete training runs behind one function each."""
