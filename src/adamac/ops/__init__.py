"""What the hardware does: one folder an operation.

A folder's ``__init__.py`` is the contract (what is computed, shapes, errors), ``reference.py`` is the meaning, written
slowly and clearly, and every other file is a faster claim about it that the tests hold to the reference.
"""
