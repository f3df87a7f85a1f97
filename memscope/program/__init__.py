"""Other people's training programs, unchanged: start them, watch them, stop them.

The launcher (`launch`) starts the program's own command line. `_site/sitecustomize.py` attaches memscope to every
Python that starts in it, as soon as that Python has imported torch (`attached`); the one that trains is watched
(`watch`).
"""
