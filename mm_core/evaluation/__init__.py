"""How well clips keep a person: likeness over time, face motion, optical flow, success rates (paper, Sec. 4.1, A.2).

`python -m mm_core.evaluation` measures a folder of videos; docs/evaluation.md defines every number.
"""
