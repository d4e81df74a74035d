"""Exact order statistics of a tensor that nobody holds whole.

The question: which elements are the k largest by magnitude, ties broken by the lower element
index? A sort would need the tensor; this needs two looks at each slice:

    1. a strided sample of the magnitudes (one element in 127) brackets the k-th largest one:
       its rank in the sample is known to a few sigma;
    2. every unit reports how many elements lie above the bracket, how many equal its ends if the
       sample saw them often (deltas of bf16 weights are lumpy), and the other values inside the
       bracket, about one percent.

From the second the threshold is exact, as is the unit in which the quota of equals runs out. If
the rank fell outside the bracket, or if too many values lie inside it, histograms narrow it
down; each divides the range by 4,096, so the search always ends, on NaN as well. Magnitudes are
compared by their bit patterns, which order like the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.errors import MismatchError
from raymerge.merge_actors.methods.interface import Measure

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block

#: values(block, **arguments) -> the quantity to order, of the block's shape, in scratch
Values = Callable[..., "torch.Tensor"]
#: Bit patterns, unsigned, as wide as the floats they come from.
Patterns = NDArray[Any]

#: One element in so many is sampled, ...
_STRIDE = 127
#: ... but this many at least (smaller tensors whole) ...
_SMALLEST_SAMPLE = 1 << 14
#: ... and at most, over all slices: a whole model can be measured at once.
_LARGEST_SAMPLE = 1 << 20
#: Half the width of the bracket, in standard deviations of the rank within the sample.
_SIGMAS = 5.0
#: An end of the bracket is a lump, counted and not collected, if it is this share of the sample.
_LUMP = 1 / 512
#: Above this number of expected values inside the bracket, histograms narrow it first.
_MOST_COLLECTED = 1 << 22
_HISTOGRAM_BITS = 12


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the k largest end: at the elements equal to `value`, somewhere in `unit`."""

    value: float
    """The k-th largest magnitude; infinity above all if k = 0."""
    unit: int | None = None
    """Number of the unit in which the kept equals run out; None if all equals are kept."""
    quota: int = 0
    """How many equals of that unit are kept, the first ones."""
    keeps_none: bool = False
    """k = 0."""


@dataclass(frozen=True, slots=True)
class Question:
    """What every unit is asked about the bit patterns of a closed range [low, high]."""

    low: int
    high: int
    lumps: tuple[int, ...] = ()
    """Ends of the range that are counted and not collected."""
    shift: int | None = None
    """Ask for a histogram of (pattern - low) >> shift instead of the patterns."""

    def range_without_lumps(self) -> tuple[int, int]:
        """Return the range without the ends that are counted."""
        return self.low + (self.low in self.lumps), self.high - (self.high in self.lumps)


@dataclass(frozen=True, slots=True)
class Answer:
    """One slice's answer to a question."""

    num_above: int
    """Elements above the range."""
    lump_counts: NDArray[np.int64]
    """Per unit, per lump: (units, lumps)."""
    num_inside: NDArray[np.int64]
    """Per unit, how many of `inside` are its own."""
    inside: Patterns
    """Patterns of the range that are no lumps, unit by unit."""
    histogram: NDArray[np.int64] | None = None


Search = Generator[Question, list[Answer], Cut]


def find_cuts(
    values: Values,
    arguments: Mapping[str, Any],
    num_elements: int,
    ranks: Sequence[int],
    is_pointwise: bool,
) -> Generator[Measure, list[Any], tuple[Cut, ...]]:
    """Find where the k largest values end, for each k of `ranks`.

    Args:
        values: a module-level function of a block and `arguments`: what to order, by magnitude.
        arguments: picklable.
        num_elements: of everything that is measured.
        ranks: each k, in [0, num_elements].
        is_pointwise: is the value of an element a function of that element alone, before any
            sparsifying step? Then the sample is computed without the rest.

    Returns:
        A cut for each rank.
    """
    of = {"values": values, "arguments": arguments}
    found: dict[int, Cut] = {0: Cut(math.inf, keeps_none=True)}
    wanted = sorted(set(ranks) - {0})
    if wanted:
        size = min(max(num_elements // _STRIDE, _SMALLEST_SAMPLE), _LARGEST_SAMPLE)
        stride = num_elements // size | 1  # odd, so that no power of two hides columns from the sample
        parts = yield Measure(
            collect=collect_sample, arguments=of | {"stride": stride, "is_pointwise": is_pointwise}
        )
        sample = np.concatenate(_of_one_width(parts))
        searches = {rank: _search(rank, sample, num_elements) for rank in wanted}
        questions = {rank: next(search) for rank, search in searches.items()}
        while questions:
            asked = list(dict.fromkeys(questions.values()))
            answers = yield Measure(collect=collect_answers, arguments=of | {"questions": asked})
            answer_of = {question: [part[i] for part in answers] for i, question in enumerate(asked)}
            for rank, question in list(questions.items()):
                try:
                    questions[rank] = searches[rank].send(answer_of[question])
                except StopIteration as stop:
                    found[rank] = stop.value
                    del questions[rank]
    return tuple(found[rank] for rank in ranks)


def keep_largest(values_P: torch.Tensor, cut: Cut, block: Block) -> torch.Tensor:
    """Zero, in place, all elements of a block that are not among the largest."""
    import torch

    if cut.keeps_none:
        return values_P.zero_()
    if cut.value == 0:
        return values_P
    as_numpy = np.float64 if values_P.dtype == torch.float64 else np.float32
    below = float(np.nextafter(as_numpy(cut.value), as_numpy(0)))
    flat = values_P.view(-1)
    num_elements = flat.numel()
    begin = num_elements if cut.unit is None else cut.unit * block.unit - block.begin
    begin, end = (min(max(at, 0), num_elements) for at in (begin, begin + block.unit))
    if begin > 0:
        torch.hardshrink(flat[:begin], below, out=flat[:begin])
    if begin < end:
        unit = torch.hardshrink(flat[begin:end], below, out=flat[begin:end])
        equals = (unit.abs() == cut.value).nonzero().view(-1)
        unit[equals[cut.quota :]] = 0
    if end < num_elements:
        torch.hardshrink(flat[end:], cut.value, out=flat[end:])
    return values_P


def collect_sample(
    blocks: Iterable[Block], values: Values, arguments: Mapping[str, Any], stride: int, is_pointwise: bool
) -> Patterns:
    """Return the bit patterns of every `stride`-th element of each block."""
    parts = []
    for block in blocks:
        if is_pointwise and stride > 1:
            parts.append(_patterns(values(block.strided(stride), **arguments)).cpu().numpy().copy())
        else:
            parts.append(_patterns(values(block, **arguments))[::stride].cpu().numpy().copy())
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def collect_answers(
    blocks: Iterable[Block], values: Values, arguments: Mapping[str, Any], questions: Sequence[Question]
) -> list[Answer]:
    """Answer questions about all elements of a slice."""
    parts: list[list[Answer]] = [[] for _ in questions]
    for block in blocks:
        patterns_P = _patterns(values(block, **arguments))
        answer = _answer_on_cpu if patterns_P.device.type == "cpu" else _answer_on_device
        for of_question, question in zip(parts, questions, strict=True):
            of_question.append(answer(patterns_P, block.unit, question))
    return [_joined(*each) for each in zip(parts, questions, strict=True)]


def _of_one_width(samples: Sequence[Patterns]) -> list[Patterns]:
    """Return the samples that are not empty; patterns of float32 and float64 do not order together."""
    filled = [sample for sample in samples if len(sample)]
    if len({sample.dtype for sample in filled}) > 1:
        raise MismatchError(
            "some tensors of the model are float64 and others are not, so no one threshold can be taken over "
            "the whole model; use trim: tensor, or convert the float64 tensors."
        )
    return filled


def _patterns(values: torch.Tensor) -> torch.Tensor:
    """Return the bit patterns of |values| as integers >= 0, in place."""
    import torch

    is_double = values.dtype == torch.float64
    integers = values.view(-1).view(torch.int64 if is_double else torch.int32)
    return integers.bitwise_and_(0x7FFFFFFFFFFFFFFF if is_double else 0x7FFFFFFF)


def _answer_on_cpu(patterns_P: torch.Tensor, unit: int, question: Question) -> Answer:
    """Answer for a block on a CPU: numpy compares and finds faster than torch."""
    patterns = patterns_P.numpy()
    unsigned = patterns.view(np.uint64 if patterns.itemsize == 8 else np.uint32)
    integer = unsigned.dtype.type
    low, high = question.range_without_lumps()
    num_above = int(np.count_nonzero(unsigned > integer(question.high)))
    counts, lengths, inside = [], [], []
    for begin in range(0, len(unsigned), unit):
        piece = unsigned[begin : begin + unit]
        counts.append([int(np.count_nonzero(piece == integer(lump))) for lump in question.lumps])
        found = piece[:0]
        if low <= high:
            found = piece[np.flatnonzero(piece - integer(low) <= integer(high - low))]
        lengths.append(len(found))
        inside.append(found)
    joined = np.concatenate(inside) if inside else unsigned[:0].copy()
    return _packed(question, num_above, counts, lengths, joined.view(patterns.dtype))


def _answer_on_device(patterns_P: torch.Tensor, unit: int, question: Question) -> Answer:
    """Answer for a block of many units on an accelerator."""
    import torch

    num_units = -(-patterns_P.numel() // unit)

    def per_unit(positions: torch.Tensor) -> list[int]:
        return list(torch.bincount(positions // unit, minlength=num_units).tolist())

    def where(mask_P: torch.Tensor) -> torch.Tensor:
        return mask_P.nonzero().view(-1)

    low, high = question.range_without_lumps()
    num_above = int((patterns_P > question.high).sum())
    columns = [per_unit(where(patterns_P == lump)) for lump in question.lumps]
    found = where((patterns_P >= low) & (patterns_P <= high))
    counts = np.array(columns, np.int64).reshape(len(columns), num_units).T
    return _packed(question, num_above, counts.tolist(), per_unit(found), patterns_P[found].cpu().numpy())


def _packed(
    question: Question, num_above: int, counts: list[list[int]], lengths: list[int], inside: Patterns
) -> Answer:
    lump_counts = np.array(counts, np.int64).reshape(len(counts), len(question.lumps))
    if question.shift is None:
        return Answer(num_above, lump_counts, np.array(lengths, np.int64), inside)
    buckets = (inside - inside.dtype.type(question.low)) >> inside.dtype.type(question.shift)
    histogram = np.bincount(buckets, minlength=((question.high - question.low) >> question.shift) + 1)
    return Answer(num_above, lump_counts, np.zeros(len(counts), np.int64), inside[:0], histogram)


def _joined(answers: Sequence[Answer], question: Question) -> Answer:
    """Join the answers of consecutive blocks or slices."""
    if not answers:
        return _packed(question, 0, [], [], np.zeros(0, np.int32))
    histograms = [a.histogram for a in answers if a.histogram is not None]
    return Answer(
        sum(a.num_above for a in answers),
        np.concatenate([a.lump_counts for a in answers]),
        np.concatenate([a.num_inside for a in answers]),
        np.concatenate([a.inside for a in answers]),
        np.sum(histograms, axis=0) if histograms else None,
    )


def _search(rank: int, sample: Patterns, num_elements: int) -> Search:
    """Find the cut of one rank: narrow the range until it can be collected, then look it up."""
    largest = (1 << (8 * sample.itemsize - 1)) - 1
    question, num_expected = _bracket(rank, sample, num_elements, largest)
    while True:
        if num_expected > _MOST_COLLECTED:
            question = yield from _narrowed(rank, question.low, question.high, largest)
        answer = _joined((yield question), question)
        num_inside = int(answer.lump_counts.sum()) + len(answer.inside)
        if answer.num_above < rank <= answer.num_above + num_inside:
            return _looked_up(rank - answer.num_above, question, answer)
        # The sample misled: the rank lies beyond the bracket, anywhere.
        low, high = (question.high + 1, largest) if rank <= answer.num_above else (0, question.low - 1)
        question, num_expected = Question(low, high), num_elements + _MOST_COLLECTED


def _bracket(rank: int, sample: Patterns, num_elements: int, largest: int) -> tuple[Question, float]:
    """Return the range that almost surely holds the rank, and how many elements to expect in it."""
    share = (rank - 0.5) / num_elements
    is_whole = len(sample) == num_elements
    margin = 0.0 if is_whole else _SIGMAS * math.sqrt(len(sample) * share * (1 - share)) + 2
    from_end = len(sample) - share * len(sample)
    first, last = math.floor(from_end - margin), math.floor(from_end + margin)
    places = [at for at in (first, last) if 0 <= at < len(sample)]
    ordered = np.partition(sample, places) if places else sample
    low = int(ordered[first]) if first >= 0 else 0
    high = int(ordered[last]) if last < len(sample) else largest
    counts = {end: int(np.count_nonzero(sample == sample.dtype.type(end))) for end in (low, high)}
    lumps = tuple(sorted(end for end, count in counts.items() if is_whole or count > _LUMP * len(sample)))
    is_inside = (sample >= sample.dtype.type(low)) & (sample <= sample.dtype.type(high))
    num_inside = int(np.count_nonzero(is_inside))
    num_inside -= sum(counts[lump] for lump in lumps)
    return Question(low, high, lumps), num_inside * num_elements / len(sample)


def _narrowed(rank: int, low: int, high: int, largest: int) -> Generator[Question, list[Answer], Question]:
    """Narrow a range by histograms until few enough elements lie in it, or a single pattern."""
    while True:
        shift = max(0, (high - low + 1).bit_length() - _HISTOGRAM_BITS)
        question = Question(low, high, shift=shift)
        answer = _joined((yield question), question)
        assert answer.histogram is not None
        above = answer.num_above + np.append(np.cumsum(answer.histogram[::-1])[::-1], 0)
        if rank <= answer.num_above:
            low, high = high + 1, largest
        elif rank > above[0]:
            low, high = 0, low - 1
        else:
            bucket = int(np.flatnonzero(above >= rank)[-1])
            low, high = low + (bucket << shift), min(high, low + ((bucket + 1) << shift) - 1)
            if low == high or answer.histogram[bucket] <= _MOST_COLLECTED:
                return Question(low, high, (low,) if low == high else ())


def _looked_up(rank: int, question: Question, answer: Answer) -> Cut:
    """Return the cut, given the `rank`-th largest of the elements inside the range."""
    low, inside = question.range_without_lumps()[0], answer.inside
    num_high = int(answer.lump_counts[:, -1].sum()) if question.high in question.lumps else 0
    if rank <= num_high:
        return _cut(question.high, rank, answer.lump_counts[:, -1], inside.dtype)
    rank -= num_high
    if rank > len(inside):
        assert low > question.low
        return _cut(question.low, rank - len(inside), answer.lump_counts[:, 0], inside.dtype)
    # A sort, since lumpy values, many of them equal, are what makes a partition slow.
    pattern = np.sort(inside)[len(inside) - rank]
    unit_of_equals = np.searchsorted(np.cumsum(answer.num_inside), np.flatnonzero(inside == pattern), "right")
    quota = rank - int(np.count_nonzero(inside > pattern))
    per_unit = np.bincount(unit_of_equals, minlength=len(answer.num_inside))
    return _cut(int(pattern), quota, per_unit, inside.dtype)


def _cut(pattern: int, quota: int, per_unit: NDArray[np.int64], dtype: np.dtype[Any]) -> Cut:
    """Return the cut that keeps the first `quota` of the elements equal to a pattern."""
    value = float(np.array([pattern], dtype).view(np.float64 if dtype.itemsize == 8 else np.float32)[0])
    filled = np.cumsum(per_unit)
    if quota == filled[-1]:
        return Cut(value)
    unit = int(np.searchsorted(filled, quota))
    return Cut(value, unit, quota - int(filled[unit] - per_unit[unit]))
