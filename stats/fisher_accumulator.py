"""The diagonal of the Fisher information of a model's parameters, example by example.

    F = 1/N sum_n E_y [ (d log p(y | x_n) / d theta)^2 ]

    expected   the expectation over y is summed over all classes: sum_y p(y | x) (d log p(y | x))^2
    sampled    one y is drawn from p(y | x)
    empirical  y is the true label

Source: Matena and Raffel 2021, arXiv:2111.09832, equations 3 and 4. The square is taken per example, so
the result does not depend on how examples are batched.

Of a language model, log p(y | x) is that of the whole sequence: the sum over its real tokens, each given
the true tokens before it. `sampled` draws every token so; in expectation its cross terms vanish and the square
of the sum is the sum of the squares. `expected` would need a backward pass for every word of the
vocabulary and is refused.

Shapes: C classes, T tokens, V words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from raymerge.merge_actors.errors import NotFiniteError, RecipeError

if TYPE_CHECKING:
    import torch

    from raymerge.stats.batches import Batch

Estimator = Literal["expected", "sampled", "empirical"]
ESTIMATORS: tuple[Estimator, ...] = ("expected", "sampled", "empirical")
_SEED = 0x51A75


def fisher_bytes(num_elements: int) -> int:
    """Return what a parameter takes: gradient, shard and squares in float32, total in float64."""
    return (4 + 4 + 4 + 8) * num_elements


class FisherAccumulator:
    """The squared gradients of some parameters of one worker."""

    def __init__(self, model: Any, parameters: Sequence[str], estimator: Estimator) -> None:
        """Let these parameters, and no others, have gradients."""
        import torch

        wanted = set(parameters)
        self._parameters = {name: each for name, each in model.named_parameters() if name in wanted}
        model.requires_grad_(False)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.sparse = (
                    True  # an example touches a few rows; a dense gradient has the whole vocabulary
                )
        self._model, self._estimator = model, estimator
        self._shard = {
            name: torch.zeros_like(each, dtype=torch.float32) for name, each in self._parameters.items()
        }
        self._total: dict[str, torch.Tensor] = {}

    def add(self, batch: Batch) -> None:
        """Add the squared gradients of a batch of one example.

        Raises:
            NotFiniteError: a gradient is NaN or infinite.
        """
        import torch

        [example] = batch.examples
        with torch.enable_grad():
            output = self._model(**batch.inputs)
            if not bool(output.logits.isfinite().all()):
                raise NotFiniteError(
                    f"the model's logits are NaN or infinite for sample {example.number}; leave it out, "
                    "or mend the model."
                )
            for weight, log_likelihood, is_last in self._terms(output.logits.float(), batch):
                gradients = torch.autograd.grad(
                    log_likelihood,
                    list(self._parameters.values()),
                    retain_graph=not is_last,
                    allow_unused=True,
                )
                for name, gradient in zip(self._parameters, gradients, strict=True):
                    if gradient is not None:
                        _add_square(self._shard[name], gradient, weight)

    def end_shard(self) -> None:
        """Add the running shard to the totals and begin another.

        Raises:
            NotFiniteError: a gradient was NaN or infinite.
        """
        for name, shard in self._shard.items():
            if not bool(shard.isfinite().all()):
                raise NotFiniteError(f"the Fisher of {name} is NaN or infinite; mend the model or its data.")
            if name in self._total:
                self._total[name].add_(shard)
            else:
                self._total[name] = shard.double()
            shard.zero_()

    def total(self, name: str) -> torch.Tensor:
        """Return the sum over the examples so far, float64, flat."""
        import torch

        if name not in self._total:
            return torch.zeros(
                self._shard[name].numel(), dtype=torch.float64, device=self._shard[name].device
            )
        return self._total[name].reshape(-1)

    def forget(self, name: str) -> None:
        """Free a parameter's memory."""
        self._total.pop(name, None)
        self._shard.pop(name, None)

    def _terms(self, logits: torch.Tensor, batch: Batch) -> Iterator[tuple[float, torch.Tensor, bool]]:
        """Yield (weight, log likelihood, is it the last) whose squared gradients are summed."""
        import torch

        [example] = batch.examples
        generator = torch.Generator().manual_seed(_SEED * 1_000_003 + example.number)
        if logits.ndim == 3:
            yield 1.0, self._of_sequence(logits[0], batch, generator), True
            return
        log_p_C = logits[0].log_softmax(-1)
        num_classes = log_p_C.shape[0]
        if self._estimator == "expected":
            p_C = log_p_C.detach().exp().tolist()
            for label in range(num_classes):
                yield p_C[label], log_p_C[label], label == num_classes - 1
            return
        if self._estimator == "sampled":
            label = int(torch.multinomial(log_p_C.detach().exp().cpu(), 1, generator=generator))
        else:
            assert example.label is not None
            label = example.label
        yield 1.0, log_p_C[label], True

    def _of_sequence(self, logits_TV: torch.Tensor, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Return the log likelihood of a sequence's true or drawn tokens."""
        import torch

        [example] = batch.examples
        if example.target_ids is not None:  # the decoder reads them shifted by its start token
            labels_T = torch.tensor(example.target_ids, device=logits_TV.device)
        else:
            logits_TV = logits_TV[:-1]
            labels_T = batch.inputs["input_ids"][0, 1:]
        log_p_TV = logits_TV.log_softmax(-1)
        if self._estimator == "sampled":
            drawn = torch.multinomial(log_p_TV.detach().exp().cpu(), 1, generator=generator)
            labels_T = drawn[:, 0].to(log_p_TV.device)
        return log_p_TV.gather(1, labels_T[:, None]).sum()


def _add_square(total: torch.Tensor, gradient: torch.Tensor, weight: float) -> None:
    """Add weight times a gradient's square, in float32; a sparse one is that of an embedding's rows."""
    if gradient.is_sparse:
        gradient = gradient.coalesce()  # a token that occurs twice has one gradient: the sum
        square = gradient.values().float().square()
        total.index_add_(0, gradient.indices()[0], square, alpha=weight)
    else:
        gradient = gradient.float()
        total.addcmul_(gradient, gradient, value=weight)


def check_estimator(estimator: str, config: dict[str, Any], *, has_labels: bool) -> None:
    """Refuse an estimator that the model or the data cannot serve.

    Raises:
        RecipeError: naming the rule and the way out.
    """
    if estimator not in ESTIMATORS:
        raise RecipeError(
            f"the Fisher estimator is {estimator!r}; it must be one of {', '.join(ESTIMATORS)}."
        )
    names = [str(name) for name in config.get("architectures") or ()]
    is_classifier = any(
        name.endswith(("ForSequenceClassification", "ForImageClassification")) for name in names
    )
    is_language_model = any(
        name.endswith(("LMHeadModel", "ForCausalLM", "ForConditionalGeneration")) for name in names
    )
    if not (is_classifier or is_language_model):
        raise RecipeError(
            f"Fisher needs a classification or language-modelling head; the model is {', '.join(names) or 'bare'}."
        )
    if is_language_model and estimator == "expected":
        raise RecipeError(
            "the expected Fisher of a language model needs a backward pass for every word of its vocabulary; "
            "use the estimator sampled, which has the same expectation."
        )
    if is_classifier and estimator == "empirical" and not has_labels:
        raise RecipeError("the empirical Fisher needs true labels; name the label column, or use sampled.")
