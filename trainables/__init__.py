"""Recipes and everything that turns one into weights."""
