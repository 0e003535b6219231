"""The command line: `commands/` has a file for each, which parses, calls one function and prints.

Results go to stdout and everything else to stderr. Heavy imports are inside functions, so that the first output appears
at once.
"""
