"""Structured output: patterns and schemas become automata over bytes, and these become masks over a vocabulary."""
