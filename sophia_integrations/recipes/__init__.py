"""Recipes: one YAML file in, one run folder out.  Knows text, models and trainers; never the command line.

``reading/`` turns YAML into a checked recipe, ``running/`` turns a recipe into a run folder.
"""
