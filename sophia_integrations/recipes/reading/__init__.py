"""YAML to a checked recipe: ``schema.py`` says what it may hold, ``loader.py`` names every problem with its place."""
