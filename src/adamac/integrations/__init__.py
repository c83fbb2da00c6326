"""Adapters to the frameworks that people already use."""
