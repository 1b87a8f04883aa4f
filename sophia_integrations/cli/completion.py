"""A script that completes the words of ``sophia`` in a shell, made by shtab: verbs, options, recipes, folders."""

from __future__ import annotations

import argparse

RECIPE = {"bash": "_sophia_recipe", "zsh": "_sophia_recipe", "tcsh": "f:*.yaml"}
FOLDER = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "tcsh": "d"}
FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}

_BASH = """\
_sophia_recipe() {{
  compgen -W "{names}" -- "$1"
  compgen -d -- "$1"
  compgen -f -X '!*.y*ml' -- "$1"
}}
"""
_ZSH = """\
_sophia_recipe() {{
  _alternative 'recipes:recipe:({names})' 'files:file:_files -g "*.(yaml|yml)"'
}}
"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for `shell`: bash, zsh or tcsh.  The names of the shipped recipes are in it."""
    import shtab

    from ..recipes.catalog import names

    known = " ".join(names())
    preamble = {"bash": _BASH.format(names=known), "zsh": _ZSH.format(names=known), "tcsh": ""}
    return shtab.complete(parser, shell=shell, preamble=preamble)
