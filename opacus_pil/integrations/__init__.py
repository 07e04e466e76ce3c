"""Training in other people's loops: `.huggingface` and `.lightning`, each with an extra of its own.

Nothing is loaded here: each module needs the framework it is named after.
"""
