"""The command line: each command has a file in `commands/`, which parses, calls one function and prints.

Results go to stdout, everything else to stderr. Heavy imports are inside functions, so that the first output
appears at once.
"""
