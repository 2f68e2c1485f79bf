"""The paper's algorithms as pure functions; imports nothing else of the package.

`divergence` (Eqs. 13-16), `objectives` (Eq. 23: masks, caps, coefficients), `advantages` (section 4.1). This
file re-exports nothing, so that the rollout client can use `advantages` without importing torch.
"""
