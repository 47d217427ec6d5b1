from bisect import bisect_right

import torch
from mmengine.logging import MMLogger
from torch import Tensor

from ...functional import check_keep_rate, gather_patches, kept_counts, least_redundant
from ...registry import MODELS
from ..taps import Taps, ViTOutput, ViTSpec, merge_taps
from ..vit import Recorded, Reducer


@MODELS.register_module()
class ProgressiveTokenMasker:
    """Progressive redundant token masking (Hybrid Distill, arXiv 2306.15876).

    The paper states the name and the purpose (lower cost, no early local optimum). Ours [choice]: stages at depth
    fractions 0, 1/3, 2/3, each keeping the least redundant fraction r of what the stage before left, in one of two
    places:

    - ``input``: a teacher that sees the full image scores the tokens at its own layers 0, L/3, 2L/3, and the student
      is fed only what is left after all stages, K = N r^3;
    - ``encoder``: the student scores its own tokens and drops them as it goes deeper: stage 1 sees all N, stage 2 N r,
      stage 3 N r^2.

    Extra tokens are never dropped. The masker has no parameters; the ``RedundantTokenMasker`` hook moves
    :attr:`keep_rate` over training.

    Args:
        place: ``input`` or ``encoder``.
        keep_rate: r in (0, 1], per stage.
        scorer: config of a redundancy scorer.
        teacher: name of the scoring teacher, for ``input`` with a scorer that reads a model.
        num_stages: number of stages, at equal depth fractions.
        round_to: round token counts up to a multiple of it.
    """

    def __init__(self, place: str = 'input', keep_rate: float = 0.7, scorer: dict | None = None,
                 teacher: str | None = None, num_stages: int = 3, round_to: int | None = None):
        if place not in ('input', 'encoder'):
            raise ValueError(f"unknown place '{place}': choose 'input' (a teacher scores, the student is fed what is "
                             "kept) or 'encoder' (the student drops its own tokens as it goes deeper).")
        check_keep_rate(keep_rate)
        if num_stages < 1:
            raise ValueError(f'num_stages must be at least 1, got {num_stages}.')
        self.place = place
        self.keep_rate = keep_rate
        self.scorer = MODELS.build(scorer or dict(type='mmhdistill.SimilarityScorer'))
        self.num_stages = num_stages
        self.round_to = round_to
        self.last_counts: list[int] = []
        self._rounding_told = False
        reads_teacher = place == 'input' and bool(self.scorer.kinds)
        if reads_teacher and teacher is None:
            raise ValueError(f"place='input' with {type(self.scorer).__name__} needs the name of the teacher that "
                             'scores the tokens: set teacher to one of the names in teachers.')
        if teacher is not None and not reads_teacher:
            raise ValueError(f"teacher='{teacher}' is given, but with place='{place}' and "
                             f'{type(self.scorer).__name__} no teacher is read: leave it out.')
        self.teacher = teacher

    def bind(self, spec: ViTSpec) -> None:
        """Fix the model whose tokens are scored: the scoring teacher for ``input``, else the student."""
        if spec.depth < self.num_stages:
            raise ValueError(f'{self.num_stages} stages need a scoring model of at least as many layers, but it has '
                             f'{spec.depth}: set num_stages to at most {spec.depth}.')
        self.scorer.check(spec)
        self._spec = spec
        starts = [stage * spec.depth // self.num_stages for stage in range(self.num_stages)]
        if self.place == 'input':
            self._score_layers = starts
        else:
            # Stage 1 sees every token; each later stage is scored by the block before it.
            self._drop_before = starts[1:]
            self._score_layers = [start - 1 for start in starts[1:]]

    @property
    def taps(self) -> Taps:
        """What the scorer reads of the bound model."""
        if not self.scorer.kinds:
            return {}
        return merge_taps({layer: self.scorer.kinds} for layer in self._score_layers)

    def counts(self, num_patches: int) -> list[int]:
        """K_s after each stage at the present keep rate."""
        return kept_counts(num_patches, self.keep_rate, self._exponents(), self.round_to)

    def kept_by_layer(self, num_patches: int, depth: int) -> list[int]:
        """Patches that each of the student's ``depth`` blocks sees at the present keep rate."""
        counts = self.counts(num_patches)
        if self.place == 'input':
            return counts[-1:] * depth
        return [counts[bisect_right(self._drop_before, layer)] for layer in range(depth)]

    def _exponents(self) -> list[int]:
        first = 1 if self.place == 'input' else 0
        return list(range(first, first + self.num_stages))

    def reducer(self, batch: int, num_patches: int, device: torch.device,
                reference: ViTOutput | None) -> Reducer | None:
        """What :func:`mmhdistill.models.vit.encode` asks before each block of the student.

        Args:
            reference: output of the scoring teacher, for ``input``.
        """
        counts = self.counts(num_patches)
        self._tell_rounding(num_patches, counts)
        self.last_counts = counts
        if counts[-1] == num_patches:
            return None
        everything = torch.arange(num_patches, device=device).expand(batch, -1)
        if self.place == 'input':
            keep_ids = self.select(everything, counts, reference)
            return lambda index, recorded: keep_ids if index == 0 else None
        # A student that ends before a stage never drops its tokens.
        self.last_counts = counts[:1]
        drop_to = dict(zip(self._drop_before, counts[1:]))
        kept = everything

        def reduce(index: int, recorded: Recorded) -> Tensor | None:
            nonlocal kept
            if index not in drop_to:
                return None
            self.last_counts.append(drop_to[index])
            tokens = {kind: recorded[index - 1, kind] for kind in self.scorer.kinds}
            local = self._keep(tokens, kept, drop_to[index])
            kept = kept.gather(1, local)
            return local

        return reduce

    def select(self, keep_ids: Tensor, counts: list[int], reference: ViTOutput | None) -> Tensor:
        """Patches (B, K) left of ``keep_ids`` after one stage per count, scored on the taps of ``reference``."""
        for layer, count in zip(self._score_layers, counts):
            extra = self._spec.num_extra_tokens
            tokens = {kind: gather_patches(reference.taps[layer, kind], keep_ids, extra) for kind in self.scorer.kinds}
            keep_ids = keep_ids.gather(1, self._keep(tokens, keep_ids, count))
        return keep_ids

    def _tell_rounding(self, num_patches: int, counts: list[int]) -> None:
        if self.round_to is None or self._rounding_told:
            return
        exact = kept_counts(num_patches, self.keep_rate, self._exponents())
        MMLogger.get_current_instance().info(
            f'round_to={self.round_to}: {counts} tokens are left after the stages instead of {exact}')
        self._rounding_told = True

    @torch.no_grad()
    def _keep(self, tokens: dict[str, Tensor], keep_ids: Tensor, count: int) -> Tensor:
        return least_redundant(self.scorer(tokens, keep_ids, self._spec), count)
