"""How well clips keep a person: likeness over time, motion of the face, optical flow and success rates.

The module measures a folder of videos when it is run; the page on evaluation in the documentation defines every number.
"""

# python -m mm_core.evaluation; docs/evaluation.md. After the paper's Sec. 4.1 and A.2.
