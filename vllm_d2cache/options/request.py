"""What a request may say, and what follows from it. Imports neither vLLM nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "d2cache_"
SECTION = "d2cache"
# Keys of a request that are no options of decoding and have no server-wide default (requests/asked.py).
CANVAS = PREFIX + "canvas"
REPORT = PREFIX + "report"
SNAPSHOTS = PREFIX + "snapshots"
REQUEST_KEYS = (CANVAS, REPORT, SNAPSHOTS)

SCORES = ("confidence", "margin", "entropy")

# Most tokens that a step commits of a request whose tokens are committed from left to right, unless it asks for more.
LONGEST_RUN = 16


@dataclass(frozen=True)
class RequestOptions:
    """Everything that decides how one request is decoded and cached; requests.resolve makes it.

    Attributes:
        policy: cache policy, by name (docs/policies.md).
        window: positions in which tokens may be committed at a time, left to right; 0 = the whole canvas.
        tokens_per_step: tokens committed in a step, at least.
        threshold: commit every candidate whose score reaches it; 0 = off (docs/methods/d2cache.md, section 4).
        factor: commit as many as the factor rule of section 4 allows; 0 = off.
        score: which statistic ranks candidates, one of :data:`SCORES`.
        sigma: width in positions of the certainty prior when committing; 0 = off (section 3.2).
        confidence_top_p: nucleus filter on the vocabulary before confidences are taken; 1 = off.
        decoder: which rule commits tokens, by name (docs/decoders.md).
        steps: steps for the whole canvas, in place of ``tokens_per_step``: each window gets an equal part of them, and
            its tokens are spread over these as the model family's published code does; 0 = off.
        policy_options: what the policy has in options of its own, by name.
        decoder_options: what the decoder has.
        rule_counts: the decoder's rule says how many tokens a step commits; follows from the decoder.
        ordered: tokens are committed from left to right, as a grammar needs it; follows from the request.
    """

    policy: str = "d2cache"
    window: int = 0
    tokens_per_step: int = 1
    threshold: float = 0.0
    factor: float = 0.0
    score: str = "confidence"
    sigma: float = 10.0
    confidence_top_p: float = 1.0
    decoder: str = "confidence"
    steps: int = 0
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    decoder_options: Mapping[str, Any] = field(default_factory=dict)
    rule_counts: bool = False
    ordered: bool = False

    @property
    def commits_many(self) -> bool:
        """Whether a step may commit more than ``tokens_per_step`` tokens."""
        return self.steps > 0 or self.is_parallel

    @property
    def is_parallel(self) -> bool:
        """Whether a rule decides how many tokens a step commits, rather than a count or a number of steps."""
        return self.threshold > 0 or self.factor > 0 or self.rule_counts

    def value(self, name: str) -> Any:
        """An option by name: one of the policy's or the decoder's own, or a field.

        Raises:
            AttributeError: there is none.
        """
        for own in (self.policy_options, self.decoder_options):
            if name in own:
                return own[name]
        return getattr(self, name)

    def window_length(self, canvas_length: int) -> int:
        """Window length in positions for a canvas of ``canvas_length``."""
        return min(self.window, canvas_length) if self.window else canvas_length

    def longest_run(self, canvas_length: int) -> int:
        """Most tokens that a step commits from left to right; 0 where they are committed in any order."""
        return min(self.window_length(canvas_length), max(self.tokens_per_step, LONGEST_RUN)) if self.ordered else 0

    def most_commits(self, canvas_length: int) -> int:
        """Most tokens that a step commits."""
        if self.ordered:
            return self.longest_run(canvas_length)
        return self.window_length(canvas_length) if self.commits_many else min(self.tokens_per_step, canvas_length)
