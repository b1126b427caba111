"""Conversion of attention layers to linear attention, which learns from the attention that it replaces.

:func:`.run.convert` implements `effpass train fg2-gdn`.
"""
