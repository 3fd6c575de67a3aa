"""Terms of the loss between a student's output and the carried target.

`terms` says what a term is and sums them; `moge_terms` and `depth_terms` hold the package's own, `presets` whole sets of them.
`affine` computes the two of MoGe's that cost most.
Importing this package registers them. A new term is one decorated function in a file of its own, imported here.
"""

from ttt_lib.adaptation.losses import depth_terms, moge_terms, presets

__all__ = ["depth_terms", "moge_terms", "presets"]
