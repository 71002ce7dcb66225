"""IQE-CLIP in JAX: anomaly detection in medical images with few labels or none.

    import iqe_jax
    detector = iqe_jax.load("runs/brain_fewshot/brain-k4-seed0")
    prediction = detector("scan.png")
    prediction.score, prediction.anomaly_map

The public face; importing it is quick, what it offers is imported on first use.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iqe_jax.detector import Detector, Prediction, load

__all__ = ["Detector", "Prediction", "load"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from iqe_jax import detector

        return getattr(detector, name)
    raise AttributeError(f"module 'iqe_jax' has no attribute {name!r}")
