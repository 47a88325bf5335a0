"""The drift of attention in loops over whole maps (docs/policies.md; docs/methods/other-caches.md, section 3)."""

from __future__ import annotations

import torch


class DriftLoop:
    """One request's measurements."""

    def __init__(self) -> None:
        self.attended: list[int] = []  # of each layer
        self.received: list[dict[int, float]] = []  # of each layer: looking position -> what it gave that one

    def step(
        self, maps: list[torch.Tensor], positions: list[int], looking: list[int], known: list[int]
    ) -> tuple[float, list[int]]:
        """Smallest similarity of any layer to the last step, and the positions most attended to now.

        Args:
            maps: of each layer [len(positions), T], averaged over heads.
            positions: behind the rows of the maps.
        """
        attended, received, similarities = [], [], []
        for layer, attention in enumerate(maps):
            rows = {p: attention[positions.index(p)] for p in looking}
            best = max(known, key=lambda t: (sum(float(rows[p][t]) for p in looking), -t))
            attended.append(best)
            received.append({p: float(rows[p][best]) for p in looking})
            if self.received:
                old = self.received[layer]
                shared = [p for p in looking if p in old]
                if len(shared) < 2:
                    similarities.append(0.0)
                    continue
                a = torch.tensor([float(rows[p][self.attended[layer]]) for p in shared], dtype=torch.float64)
                b = torch.tensor([old[p] for p in shared], dtype=torch.float64)
                similarities.append(float(a @ b / (a.norm() * b.norm())))
        self.attended, self.received = attended, received
        return min(similarities, default=0.0), attended
