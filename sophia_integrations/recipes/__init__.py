"""Recipes: one YAML file in, one run folder out.  Knows data, models and trainers; never the command line.

Read in this order: ``schema.py`` (what a recipe may say), ``loader.py`` (YAML to recipe, problems with file:line),
``data.py`` and ``tokenizer.py`` (text to blocks of tokens), ``folder.py`` (the run folder), ``train.py`` (the run).
"""
