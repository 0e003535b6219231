"""The command line: one file per command, which parses, calls one function and prints.

Results go to stdout and everything else to stderr. Heavy imports are inside functions, so that the first output appears
at once.
"""
