"""Rendered people: any number of them, in short captioned clips, drawn on a CPU.

A seed is a person; a seed and a clip's number are a clip. `python -m lab.people render` writes a data set;
README.md beside it says what it is good for.
"""
