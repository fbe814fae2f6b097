"""How much of a picture is covered by text: subtitles, stamps, watermarks, signs."""

from __future__ import annotations

import numpy as np

LINES = 704
"""Pixels of the shorter side at which pictures are read: over photographs see-through letters of fewer run into it."""
_CERTAIN = 0.8  # of the recogniser: what the detector takes for text in faces and furniture is read at 0.7 at most
_LETTERS = 3  # of a word at least: eyes and corners are read as one, glasses as 00
_STRIP = 32  # times as long as wide: there RapidOCR fails, and no face is seen


class TextReader:
    """RapidOCR: PP-OCR's text detector and recogniser, on one CPU core. Their weights come with the package."""

    def __init__(self) -> None:
        from rapidocr import RapidOCR

        one = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
        settings = {"Global.log_level": "error", "Global.use_cls": False, "Global.text_score": _CERTAIN}
        settings["Det.limit_side_len"] = 32  # or it enlarges what is made smaller here
        self._read = RapidOCR(params=one | settings)

    def share(self, image: np.ndarray) -> float:
        """Percent of a picture, (H, W, 3) uint8 RGB, that is covered by words that can be read."""
        import cv2

        if max(image.shape[:2]) >= _STRIP * min(image.shape[:2]):
            return 0.0
        scale = LINES / min(image.shape[:2])
        if scale < 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        found = self._read(np.ascontiguousarray(image[..., ::-1]))
        covered = np.zeros(image.shape[:2], np.uint8)
        for text, box in zip(found.txts or (), () if found.boxes is None else found.boxes):
            if sum(map(str.isalnum, text)) >= _LETTERS:
                cv2.fillPoly(covered, [np.asarray(box, np.int32)], 1)
        return 100 * float(covered.mean())
