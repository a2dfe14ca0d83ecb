"""Dataclasses of every setting, strict loading, where each value came from. Standard library and yaml only."""
