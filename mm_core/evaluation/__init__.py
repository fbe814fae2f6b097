"""How well clips keep a person: likeness over time, motion of the face, optical flow, success rates (Sec. 4.1, A.2).

`python -m mm_core.evaluation` measures a folder of videos; docs/evaluation.md defines every number.
"""
