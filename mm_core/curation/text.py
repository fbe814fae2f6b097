"""How much of a picture is covered by text: subtitles, stamps, watermarks, signs."""

from __future__ import annotations

import numpy as np

LINES, AGAIN = 704, 448
"""Pixels of the shorter side at which pictures are read, and at which their parts are where that shows little: over
photographs, see-through letters run into the picture, but seldom into the whole and into a part of it."""
_PARTS = ((0, 2 / 3), (1 / 3, 1))  # of the width
_LITTLE = 1.0  # percent: a name on a coat, say, beside what was not read
_CERTAIN = 0.8  # of the recogniser: what the detector takes for text in faces and furniture is read at 0.7 at most
_LETTERS = 3  # different ones of a word at least: eyes and corners are read as one, glasses as 00, rings as 0000
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
        if max(image.shape[:2]) >= _STRIP * min(image.shape[:2]):
            return 0.0
        share = 100 * float(self._covered(_shrunk(image, LINES)).mean())
        if share >= _LITTLE:
            return share
        image = _shrunk(image, AGAIN)
        covered = np.zeros(image.shape[:2], np.uint8)
        for start, end in _PARTS:
            part = slice(round(start * image.shape[1]), round(end * image.shape[1]))
            covered[:, part] |= self._covered(image[:, part])
        return max(share, 100 * float(covered.mean()))

    def _covered(self, image: np.ndarray) -> np.ndarray:
        """(H, W) uint8: 1 where a word is."""
        import cv2

        found = self._read(np.ascontiguousarray(image[..., ::-1]))
        covered = np.zeros(image.shape[:2], np.uint8)
        for text, box in zip(found.txts or (), () if found.boxes is None else found.boxes):
            if len(set(filter(str.isalnum, text.casefold()))) >= _LETTERS:
                cv2.fillPoly(covered, [np.asarray(box, np.int32)], 1)
        return covered


def _shrunk(image: np.ndarray, lines: int) -> np.ndarray:
    import cv2

    scale = lines / min(image.shape[:2])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image
