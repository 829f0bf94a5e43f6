"""What a benchmark draws for the price of speed, and how it looks at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from latentrt.calibrate.judge import Judge
from latentrt.calibrate.picture_metrics import PictureMetric, psnr, ssim
from latentrt.runtime.errors import UsageError

from .drawings import Prompts


@dataclass(frozen=True, kw_only=True)
class QualityPlan:
    """What is drawn for the price of speed, and how it is looked at.

    Attributes:
        prompts: that every row draws.
        random_weights: of the model: nothing is drawn then.
        finest_steps: of the pictures that different settings are held against; 0 for none. They are drawn only where
            there are different settings, since they cost more than all else.
        backend: of the reference. A CPU computes fp32 as it is written; a GPU may round its products.
        lpips: of `load_lpips`; None for none.
        judge: of `latentrt.calibrate.judge.load_judge`; None for none.
        shown: prompts whose pictures are saved for reports.
    """

    prompts: Prompts
    random_weights: bool = False
    finest_steps: int = 100
    backend: str = "onnxruntime"
    lpips: PictureMetric | None = None
    judge: Judge | None = None
    shown: int = 3

    def __post_init__(self) -> None:
        """Check what needs no bundle.

        Raises:
            UsageError: there is no prompt, or a number is negative.
        """
        if not self.prompts.texts:
            raise UsageError("quality: expected prompts, got none. Give one or more.")
        if not (self.finest_steps >= 0 and self.shown >= 0):
            raise UsageError(f"quality: expected no negative number, got {self.finest_steps} and {self.shown}.")

    @property
    def metrics(self) -> Mapping[str, PictureMetric]:
        """Those that can be computed here, by their names in `Quality`."""
        found: dict[str, PictureMetric] = {"psnr": psnr}
        if find_spec("scipy") is not None:
            found["ssim"] = ssim
        if self.lpips is not None:
            found["lpips"] = self.lpips
        return found


def load_lpips(path: Path) -> PictureMetric:
    """LPIPS with the weights of a file, as `latentrt.calibrate.lpips.open_lpips` takes it.

    Raises:
        UsageError: PyTorch, which computes it, is not installed.
        ArtifactError: the file does not hold the weights.
    """
    try:
        from latentrt.calibrate.lpips import open_lpips
    except ImportError as err:
        raise UsageError(f"lpips: expected PyTorch, got: {err}. Run: pip install 'latentrt[calibrate]'") from err
    return open_lpips(path)
