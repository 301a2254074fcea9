"""Prompts to token ids to text conditioning."""
