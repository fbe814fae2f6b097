"""Rendered people: any number of them, in short captioned clips, drawn on a CPU.

A seed is a person; a seed and a clip's number are a clip. `python -m mm_core.data.people render` writes a data set;
docs/rendered_people.md says what it is good for.
"""
