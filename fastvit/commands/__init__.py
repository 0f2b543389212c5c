"""The commands of `fastvit`, a file each: `add` adds the command's parser, `run` does it and returns the exit status.

What takes time to import, torch above all, is imported in functions: `fastvit --help` answers at once.
"""
