"""insightface's model packs on disk: where one is, how it is fetched, how it is loaded."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MagicMirrorError, downloading

INSIGHTFACE = Path.home() / ".insightface"
"""Where insightface keeps its `models`, and commands look for them."""
USUAL_PACKS = ("buffalo_l", "antelopev2", "buffalo_sc")
"""insightface's own packs that hold detection and recognition."""
MODULES = ("detection", "recognition", "landmark_3d_68")


def onnx_files(folder: Path) -> list[Path]:
    """A pack's models; antelopev2.zip unpacks into a folder inside its folder."""
    return sorted(folder.glob("*.onnx")) or sorted(folder.glob(f"{folder.name}/*.onnx"))


def pack_folder(root: Path, pack: str, fetch: str = "") -> Path:
    """The folder of a pack's models. root: holds `models`, and in there a folder for each pack.

    fetch: how the user can have it fetched, for the CheckpointError that is raised where it is missing.
    """
    folder = root.expanduser().absolute() / "models" / pack
    files = onnx_files(folder)
    if not files:
        raise CheckpointError(
            f"The face models are missing: {folder} must hold the .onnx files of insightface's pack '{pack}' "
            "(detection and recognition). Download it from github.com/deepinsight/insightface (its models are licensed "
            f"for non-commercial research only) and unzip it there{fetch and ', or '}{fetch}"
        )
    return files[0].parent


def download_pack(root: Path, pack: str) -> None:
    """Fetch a pack into `<root>/models/<pack>` unless it is there; only when the user asked for it.

    The models are licensed by InsightFace for non-commercial research only.
    """
    models = root.expanduser() / "models"
    if onnx_files(models / pack):
        return
    with _face_packages():
        from insightface.utils.storage import download

    models.mkdir(parents=True, exist_ok=True)
    # In a folder of its own first: half a pack must not look like a pack.
    with downloading(f"{pack} into {models}"), tempfile.TemporaryDirectory(dir=models) as temporary:
        Path(download("models", pack, root=temporary)).rename(models / pack)


def load_pack(folder: Path, device: str, detection_size: tuple[int, int]) -> Any:
    """An insightface FaceAnalysis on a pack's folder, ready to use. device: auto or cpu, as in `FaceAnalyzer`."""
    import torch

    with _face_packages():
        import onnxruntime
        from insightface.app import FaceAnalysis
    # onnxruntime offers CUDA whenever it was built with it, and goes on with the CPU if it then cannot be started.
    wants_cuda = device == "auto" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    providers: list[Any] = ["CPUExecutionProvider"]
    if wants_cuda:  # torch knows which GPU is this process's; onnxruntime would take the first for all
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else 0
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": gpu}))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # both libraries print while loading
            app = FaceAnalysis(name=str(folder), allowed_modules=list(MODULES), providers=providers)
            app.prepare(ctx_id=0, det_size=detection_size)
    except Exception as error:  # onnxruntime's errors share no base class, a pack without detector fails an assert
        raise CheckpointError(
            f"The face models in {folder} cannot be loaded: {str(error) or 'no detection model'}. "
            "Download the pack again and unzip all of its .onnx files there"
        ) from error
    if "recognition" not in app.models:
        raise CheckpointError(
            f"The face models in {folder} lack recognition, found only {', '.join(app.models)}. "
            "Use a complete pack such as buffalo_l or antelopev2"
        )
    return app


@contextlib.contextmanager
def _face_packages() -> Iterator[None]:
    """Around their imports: one that is missing becomes a MagicMirrorError that says what to install."""
    try:
        yield
    except (ImportError, AttributeError) as error:  # an uninstall can leave an empty onnxruntime behind
        raise MagicMirrorError(
            f"Face analysis needs insightface and onnxruntime ({error}). Install them for the Python of ComfyUI: "
            "python -m pip install insightface onnxruntime, or for CUDA onnxruntime-gpu"
        ) from error
