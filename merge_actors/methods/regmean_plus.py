"""RegMean++: RegMean whose inputs come from the layers that are merged already.

For layer l the Gram matrices of candidate m are taken inside the candidate's own layer l, which is fed by the
merged layers before it: X_m(l) = f_merged(l - 1)(X_m(l - 1)), where RegMean feeds it by the candidate's own.
Layers are merged one after another; the solve is RegMean's.

Nguyen, Dang, Suzuki, Nguyen 2025, arXiv:2508.03121. The paper merges encoder layers; embeddings come first
and are averaged, and what follows the last layer (norm, pooler, head) is treated as one more layer.
"""

from __future__ import annotations

import dataclasses

from raymerge.merge_actors.methods.regmean import REGMEAN

REGMEAN_PLUS = dataclasses.replace(
    REGMEAN, name="regmean_plus", is_sequential=True, source="arXiv:2508.03121"
)
