"""WiSE-FT: one interpolation coefficient between the pre-trained and the fine-tuned model."""

from __future__ import annotations

from dataclasses import dataclass

from merge_ray.methods.base import Merged, MergeInputs, Method, param, register
from merge_ray.methods.finetuned import OwnWeights
from merge_ray.space import Float


@register("wise_ft", paper="Wortsman et al., Robust Fine-tuning of Zero-shot Models, CVPR 2022", by_columns=True)
@dataclass(frozen=True)
class WiseFt(Method):
    """``(1 - alpha) theta_0 + alpha theta_t`` for task ``t``, in a bank of one task or of several.

    The baseline of ``dawin_robust``, whose coefficient depends on the sample.
    """

    coefficient: float = param(
        0.5, valid=Float(0, 1), search=Float(0, 1), help="alpha: 0 is the base, 1 the fine-tuned model"
    )

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`WiseFt`."""
        return OwnWeights(self, inputs.bank, self.coefficient)
