"""What a student learns from its teacher: one loss a token, as functions of tensors without state.

All compute in float32 at least, whatever the dtype of their inputs. Logits are finite. Losses of distributions are
divergences in nats; those that take a temperature T soften both distributions by it and are multiplied by T^2, so that
the size of the gradient hardly depends on T (Hinton et al., 2015, arXiv 1503.02531) and a weight keeps its meaning.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log of the probability of each target, in nats: (tokens, vocabulary), (tokens,) -> (tokens,).

    A target of -100 gives 0.
    """
    return functional.cross_entropy(_wide(logits), targets, reduction="none")


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(teacher || student): the student covers all that the teacher finds likely.

    Source: Hinton et al., 2015, arXiv 1503.02531.

    Args:
        student_logits, teacher_logits: (tokens, vocabulary).

    Returns:
        (tokens,)
    """
    student, teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    return temperature**2 * _kl(teacher, student)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(student || teacher): the student avoids what the teacher finds unlikely.

    Source: MiniLLM (Gu et al., 2023, arXiv 2306.08543). Shapes as in `forward_kl`.
    """
    student, teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    return temperature**2 * _kl(student, teacher)


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Return T^2 (beta KL(teacher || M) + (1 - beta) KL(student || M)), M = beta teacher + (1 - beta) student.

    The generalized Jensen-Shannon divergence, 0 < beta < 1. Divided by beta it tends to `forward_kl` where beta tends
    to 0; divided by 1 - beta it tends to `reverse_kl` where beta tends to 1.

    Source: GKD (Agarwal et al., 2023, arXiv 2306.13649). Shapes as in `forward_kl`.
    """
    student, teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    # In logs: the probabilities themselves may all vanish.
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return temperature**2 * (beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture))


def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the mean over the vocabulary of the squared differences: (tokens, vocabulary) twice -> (tokens,).

    Source: Kim et al., 2021, arXiv 2105.08919.
    """
    return (_wide(student_logits) - _wide(teacher_logits)).square().mean(-1)


def sparse_forward_kl(student_logits: Tensor, ids: Tensor, probabilities: Tensor, temperature: float = 1.0) -> Tensor:
    """Return `forward_kl` against a teacher of whom only some probabilities are kept: T^2 sum p log(p / student).

    Where the probabilities p of a token do not sum to 1, as of a plain top-k, the student's log-sum-exp is weighted by
    their sum: the gradient is that of sum p (-log student), and the value can be negative.

    Source: Anshumann et al., 2025, arXiv 2503.16870.

    Args:
        student_logits: (tokens, vocabulary).
        ids: of the kept entries, int64 (tokens, entries). Those of padding are in the vocabulary too, such as 0.
        probabilities: of the kept entries at this temperature (tokens, entries), 0 where an entry is padding. No
            gradient is taken of them.

    Returns:
        (tokens,)
    """
    logits, probabilities = _wide(student_logits) / temperature, _wide(probabilities)
    # Only the kept entries of log_softmax are made.
    log_probabilities = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
    return temperature**2 * (torch.xlogy(probabilities, probabilities) - probabilities * log_probabilities).sum(-1)


def uld(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the sum of absolute differences of the probabilities, each model's sorted in descending order.

    For models with different tokenizers: it compares how sure they are, not of what. The shorter vector is filled up
    with zeros. As in its source it is not multiplied by T^2.

    Source: Universal Logit Distillation (Boizard et al., 2024, arXiv 2402.12030).

    Args:
        student_logits: (tokens, vocabulary of the student).
        teacher_logits: (tokens, vocabulary of the teacher).

    Returns:
        (tokens,), from 0 to 2.
    """
    width = max(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = (
        functional.pad((_wide(logits) / temperature).softmax(-1).sort(descending=True).values, (0, width - size))
        for logits, size in ((student_logits, student_logits.shape[-1]), (teacher_logits, teacher_logits.shape[-1]))
    )
    return (student - teacher).abs().sum(-1)


def hidden_states(student: Tensor, teacher: Tensor, kind: Literal["mse", "cosine"] = "mse") -> Tensor:
    """Return how far the hidden states are apart: (..., width) twice -> (...).

    `mse` is the mean over the width of the squared differences (FitNets, Romero et al., 2014, arXiv 1412.6550;
    TinyBERT, Jiao et al., 2019, arXiv 1909.10351); `cosine` is 1 - the cosine of the angle between them (DistilBERT,
    Sanh et al., 2019, arXiv 1910.01108). Where the widths differ, the caller projects the student's.
    """
    student, teacher = _wide(student), _wide(teacher)
    if kind == "cosine":
        return 1 - functional.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(-1)


def relations(student: Tensor, teacher: Tensor, allowed: Tensor, relation_heads: int | None = None) -> Tensor:
    """Return KL(teacher || student) of how the vectors of a sequence (queries, keys or values) relate to each other.

    The vectors of all heads are joined and split again into `relation_heads`, so that neither the heads nor the widths
    of the models need agree. A relation is softmax(x x^T / sqrt(size of a relation head)) over the allowed positions.

    Source: MiniLMv2 (Wang et al., 2020, arXiv 2012.15828).

    Args:
        student, teacher: (batch, heads, tokens, size of a head), each model its own heads and size.
        allowed: whether a token (the row) may look at another one (the column), bool (batch, tokens, tokens).
        relation_heads: divides heads * size of both models; by default the largest such number that is not above
            either model's number of heads.

    Returns:
        (batch, tokens), the mean over the relation heads; 0 for a token that may look at nothing.
    """
    widths = [states.shape[1] * states.shape[3] for states in (student, teacher)]
    if relation_heads is None:
        most = min(student.shape[1], teacher.shape[1])
        relation_heads = next(heads for heads in range(most, 0, -1) if not any(width % heads for width in widths))
    student, teacher = (_log_relations(states, allowed, relation_heads) for states in (student, teacher))
    return _kl(teacher, student).mean(1)


def attention_maps(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of the attention of each query, the mean over heads.

    Where the models have different numbers of heads, each one's heads are averaged first. A probability of 0, such as
    of a masked key, adds nothing where both have it.

    Source: MiniLM (Wang et al., 2020, arXiv 2002.10957). TinyBERT (arXiv 1909.10351) takes the mean squared error of
    the scores before softmax instead; the divergence asks for no more than the probabilities, which models return,
    and weighs each query alike, however many keys it has.

    Args:
        student, teacher: probabilities (batch, heads, query, key).

    Returns:
        (batch, query)
    """
    student, teacher = _wide(student), _wide(teacher)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    # The smallest normal number in place of 0: its log is finite, and so is the gradient.
    log_student = student.clamp_min(torch.finfo(student.dtype).tiny).log()
    return (torch.xlogy(teacher, teacher) - teacher * log_student).sum(-1).mean(1)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or float64 where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return functional.log_softmax(_wide(logits) / temperature, dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of log-probabilities: (..., n) twice -> (...)."""
    return (p.exp() * (p - q)).sum(-1)


def _log_relations(states: Tensor, allowed: Tensor, heads: int) -> Tensor:
    """Return log-probabilities (batch, relation heads, tokens, tokens) of states (batch, heads, tokens, size)."""
    batch, _, tokens, _ = states.shape
    # (batch, relation heads, tokens, size of a relation head)
    joined = _wide(states).transpose(1, 2).reshape(batch, tokens, heads, -1).transpose(1, 2)
    with torch.autocast(states.device.type, enabled=False):
        scores = joined @ joined.transpose(2, 3) / math.sqrt(joined.shape[-1])
    # Finite, so that the difference of two masked entries is 0 and not NaN, also in the gradient. A token that may
    # look at nothing gets the same even distribution of both models.
    scores = scores.masked_fill(~allowed[:, None], torch.finfo(scores.dtype).min / 2)
    return functional.log_softmax(scores, dim=-1)
