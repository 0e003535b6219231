"""The command line: one file per command, each of which parses, calls one function and prints.

Results go to stdout and everything else to stderr. Heavy imports stand inside functions, so that the first output comes
at once.
"""
