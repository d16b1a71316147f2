"""The parts of `benchmarks/structured.py`: vocabularies, cases, sides, and a module for each section."""
