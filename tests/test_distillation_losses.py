"""The losses of distillation, each held against its formula written out in NumPy, in value and in gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hfkit.distillation import losses

Reference = Callable[[np.ndarray], list[Any]]


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def softmax(row: np.ndarray) -> np.ndarray:
    return np.exp(row) / np.exp(row).sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def check(loss: Callable[[Tensor], Tensor], reference: Reference, student: np.ndarray) -> None:
    """Value in float64, gradient against central differences of the reference, and float32 for bfloat16."""
    given = torch.tensor(student, requires_grad=True)
    found = loss(given)
    expected = np.array(reference(student))
    assert found.dtype == torch.float64 and found.shape == expected.shape
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-10, atol=1e-12)

    weights = np.random.default_rng(1).uniform(0.5, 2.0, expected.shape)  # no two tokens alike
    (gradient,) = torch.autograd.grad((found * torch.tensor(weights)).sum(), given)
    slopes, step = np.zeros(student.shape), 1e-5
    for index in np.ndindex(student.shape):
        moved = np.zeros(student.shape)
        moved[index] = step
        difference = np.array(reference(student + moved)) - np.array(reference(student - moved))
        slopes[index] = (difference * weights).sum() / (2 * step)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-8)
    assert np.abs(slopes).max() > 1e-3

    by_func = torch.func.grad(lambda x: (loss(x) * torch.tensor(weights)).sum())(given.detach())
    torch.testing.assert_close(by_func, gradient)

    rounded = torch.tensor(student).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(rounded)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach(), reference(rounded.detach().double().numpy()), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert rounded.grad is not None and rounded.grad.isfinite().all()


def pairs(random: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Student and teacher. The teacher's numbers are the same in bfloat16."""
    return random.normal(size=shape), in_bfloat16(random.normal(size=shape))


def in_bfloat16(array: np.ndarray) -> np.ndarray:
    return torch.tensor(array).bfloat16().double().numpy()


def like(array: np.ndarray, tensor: Tensor) -> Tensor:
    return torch.tensor(array).to(tensor.dtype)


def test_cross_entropy(random: np.random.Generator) -> None:
    logits, targets = random.normal(size=(4, 7)), [6, 0, -100, 3]

    def reference(logits: np.ndarray) -> list[Any]:
        return [0 if t < 0 else -np.log(softmax(row)[t]) for row, t in zip(logits, targets, strict=True)]

    check(lambda student: losses.cross_entropy(student, torch.tensor(targets)), reference, logits)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_divergences(name: str, temperature: float, random: np.random.Generator) -> None:
    student, teacher = pairs(random, 3, 7)
    beta = 0.3

    def one(s: np.ndarray, t: np.ndarray) -> float:
        q, p = softmax(s / temperature), softmax(t / temperature)
        m = beta * p + (1 - beta) * q
        divergences = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}
        return temperature**2 * divergences[name]

    given = {"temperature": temperature} | ({"beta": beta} if name == "jsd" else {})
    check(
        lambda logits: getattr(losses, name)(logits, like(teacher, logits), **given),
        lambda logits: [one(s, t) for s, t in zip(logits, teacher, strict=True)],
        student,
    )


def test_logit_mse(random: np.random.Generator) -> None:
    student, teacher = pairs(random, 3, 7)
    check(
        lambda logits: losses.logit_mse(logits, like(teacher, logits)),
        lambda logits: [
            sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 7 for s, t in zip(logits, teacher, strict=True)
        ],
        student,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sparse_forward_kl(temperature: float, random: np.random.Generator) -> None:
    """Tokens whose probabilities sum to 1, to less, and to nothing; padding in the middle; an entry given twice."""
    student = random.normal(size=(4, 7))
    ids = np.array([[1, 4, 6], [3, 0, 2], [0, 0, 0], [5, 5, 1]])
    probabilities = np.array([[0.5, 0.25, 0.25], [0.5, 0.0, 0.25], [0.0, 0.0, 0.0], [0.25, 0.25, 0.25]])

    def one(logits: np.ndarray, ids: np.ndarray, probabilities: np.ndarray) -> float:
        q = softmax(logits / temperature)
        return temperature**2 * sum(p * np.log(p / q[i]) for i, p in zip(ids, probabilities, strict=True) if p > 0)

    check(
        lambda logits: losses.sparse_forward_kl(logits, torch.tensor(ids), like(probabilities, logits), temperature),
        lambda logits: [one(*row) for row in zip(logits, ids, probabilities, strict=True)],
        student,
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_sparse_forward_kl_against_all_entries_is_forward_kl(temperature: float, random: np.random.Generator) -> None:
    student, teacher = (torch.tensor(logits, requires_grad=True) for logits in pairs(random, 5, 9))
    ids = torch.tensor(np.argsort(random.normal(size=(5, 9))))
    kept = (teacher.detach() / temperature).softmax(-1).gather(-1, ids)
    sparse = losses.sparse_forward_kl(student, ids, kept, temperature)
    dense = losses.forward_kl(student, teacher.detach(), temperature)
    torch.testing.assert_close(sparse, dense)
    (found,), (expected,) = (torch.autograd.grad(loss.sum(), student) for loss in (sparse, dense))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("widths", [(7, 7), (5, 8), (8, 5)])
def test_uld(widths: tuple[int, int], random: np.random.Generator) -> None:
    student, teacher = random.normal(size=(3, widths[0])), in_bfloat16(random.normal(size=(3, widths[1])))

    def one(s: np.ndarray, t: np.ndarray) -> float:
        q, p = (sorted(softmax(logits / 2.0), reverse=True) + [0.0] * (8 - len(logits)) for logits in (s, t))
        return sum(abs(a - b) for a, b in zip(p, q, strict=True))

    check(
        lambda logits: losses.uld(logits, like(teacher, logits), temperature=2.0),
        lambda logits: [one(s, t) for s, t in zip(logits, teacher, strict=True)],
        student,
    )


def test_hidden_states(random: np.random.Generator) -> None:
    student, teacher = pairs(random, 2, 3, 5)

    def reference(kind: str) -> Reference:
        def one(s: np.ndarray, t: np.ndarray) -> float:
            if kind == "cosine":
                return 1 - sum(s * t) / np.sqrt(sum(s * s) * sum(t * t))
            return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 5

        return lambda states: [[one(states[b, n], teacher[b, n]) for n in range(3)] for b in range(2)]

    check(lambda states: losses.hidden_states(states, like(teacher, states)), reference("mse"), student)
    check(lambda states: losses.hidden_states(states, like(teacher, states), "cosine"), reference("cosine"), student)


def allowed_positions(random: np.random.Generator) -> np.ndarray:
    """(2, 4, 4): causal with two documents in a row, and arbitrary with a token that may look at nothing."""
    documents = np.array([0, 0, 1, 1])
    causal = np.tril(np.ones((4, 4), bool)) & (documents[:, None] == documents)
    arbitrary = random.random((4, 4)) < 0.6
    arbitrary[2] = False
    return np.stack([causal, arbitrary])


# (student's heads, size), (teacher's heads, size), the recipe's number, the number that it means
HEADS = [((2, 6), (3, 4), None, 2), ((4, 2), (4, 3), None, 4), ((3, 4), (4, 4), None, 2), ((2, 3), (2, 3), 3, 3)]


@pytest.mark.parametrize(("of_student", "of_teacher", "asked", "heads"), HEADS)
def test_relations(
    of_student: tuple[int, int],
    of_teacher: tuple[int, int],
    asked: int | None,
    heads: int,
    random: np.random.Generator,
) -> None:
    student = random.normal(size=(2, of_student[0], 4, of_student[1]))
    teacher = in_bfloat16(random.normal(size=(2, of_teacher[0], 4, of_teacher[1])))
    allowed = allowed_positions(random)

    def relation(states: np.ndarray, batch: int, head: int, query: int) -> np.ndarray:
        vectors = [np.concatenate([states[batch, h, token] for h in range(states.shape[1])]) for token in range(4)]
        parts = [np.split(vector, heads)[head] for vector in vectors]
        keys = [key for key in range(4) if allowed[batch, query, key]]
        return softmax(np.array([parts[query] @ parts[key] / np.sqrt(len(parts[0])) for key in keys]))

    def reference(states: np.ndarray) -> list[Any]:
        return [
            [
                sum(kl(relation(teacher, b, h, n), relation(states, b, h, n)) for h in range(heads)) / heads
                if allowed[b, n].any()
                else 0.0
                for n in range(4)
            ]
            for b in range(2)
        ]

    check(
        lambda states: losses.relations(states, like(teacher, states), torch.tensor(allowed), asked),
        reference,
        student,
    )


def test_relations_do_not_see_what_is_not_allowed(random: np.random.Generator) -> None:
    student, teacher = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in pairs(random, 2, 2, 4, 6))
    allowed = torch.tensor(allowed_positions(random))
    allowed[0] = allowed[0] & torch.tensor([True, True, True, False])  # nobody sees the last token, nor does it look
    allowed[0, 3] = False
    found = losses.relations(student, teacher, allowed)
    found.sum().backward()
    assert student.grad is not None and teacher.grad is not None
    assert found.isfinite().all() and student.grad.isfinite().all() and teacher.grad.isfinite().all()
    assert not student.grad[0, :, 3].any() and student.grad[0, :, 1].any()
    assert found[0, 3] == 0 and found[1, 2] == 0 and (found[0, 1] > 0)
    with torch.no_grad():
        student[0, :, 3] = 1e4
    torch.testing.assert_close(losses.relations(student, teacher, allowed), found)


def attention(random: np.random.Generator, heads: int) -> np.ndarray:
    """Probabilities (2, heads, 3, 4); the last key is masked in the first row, a whole query in the second."""
    maps = random.uniform(0.1, 1.0, size=(2, heads, 3, 4))
    maps[0, ..., 3] = 0.0
    maps /= maps.sum(-1, keepdims=True)
    maps[1, :, 2] = 0.0
    return maps


@pytest.mark.parametrize("heads", [(2, 2), (3, 2)])
def test_attention_maps(heads: tuple[int, int], random: np.random.Generator) -> None:
    student, teacher = attention(random, heads[0]), in_bfloat16(attention(random, heads[1]))

    def reference(q: np.ndarray) -> list[Any]:
        p = teacher
        if heads[0] != heads[1]:
            p, q = p.mean(1, keepdims=True), q.mean(1, keepdims=True)
        shared = range(q.shape[1])
        return [[sum(kl(p[b, h, n], q[b, h, n]) for h in shared) / len(shared) for n in range(3)] for b in range(2)]

    check(lambda maps: losses.attention_maps(maps, like(teacher, maps)), reference, student)


def test_attention_that_misses_what_the_teacher_sees_is_finite() -> None:
    teacher, student = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]], requires_grad=True)
    found = losses.attention_maps(student, teacher)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert found.isfinite().all() and found > 50 and gradient.isfinite().all()


def divergence_pairs() -> list[Callable[[Tensor, Tensor], Tensor]]:
    return [
        losses.forward_kl,
        losses.reverse_kl,
        losses.jsd,
        losses.logit_mse,
        losses.uld,
        losses.hidden_states,
        lambda student, teacher: losses.hidden_states(student, teacher, "cosine"),
        lambda student, teacher: losses.forward_kl(student, teacher, 4.0),
        lambda student, teacher: losses.sparse_forward_kl(student, torch.arange(9).expand(5, 9), teacher.softmax(-1)),
    ]


@pytest.mark.parametrize("loss", divergence_pairs())
def test_a_student_like_its_teacher_has_nothing_to_learn(
    loss: Callable[[Tensor, Tensor], Tensor], random: np.random.Generator
) -> None:
    student, teacher = (torch.tensor(logits, requires_grad=True) for logits in pairs(random, 5, 9))
    same = loss(student, student.detach())
    (gradient,) = torch.autograd.grad(same.sum(), student)
    torch.testing.assert_close(same, torch.zeros_like(same))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    assert (loss(student, teacher) > 1e-3).all()


def test_relations_and_attention_of_the_same_model_are_zero(random: np.random.Generator) -> None:
    states = torch.tensor(random.normal(size=(2, 2, 4, 6)))
    turned = states @ torch.linalg.qr(torch.tensor(random.normal(size=(6, 6)))).Q
    allowed = torch.tensor(allowed_positions(random))
    for other in (states, turned):  # relations are the same in another basis
        torch.testing.assert_close(losses.relations(states, other, allowed), torch.zeros(2, 4, dtype=torch.float64))
    maps = torch.tensor(attention(random, 2))
    torch.testing.assert_close(losses.attention_maps(maps, maps), torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "sparse_forward_kl"])
def test_the_size_of_the_gradient_hardly_depends_on_the_temperature(name: str, random: np.random.Generator) -> None:
    student, teacher = (torch.tensor(0.1 * logits, requires_grad=True) for logits in pairs(random, 20, 50))

    def size(temperature: float) -> float:
        if name == "sparse_forward_kl":
            target = (teacher.detach() / temperature).softmax(-1)
            loss = losses.sparse_forward_kl(student, torch.arange(50).expand(20, 50), target, temperature)
        else:
            loss = getattr(losses, name)(student, teacher.detach(), temperature=temperature)
        return torch.autograd.grad(loss.sum(), student)[0].norm().item()

    assert size(2.0) == pytest.approx(size(1.0), rel=0.02)
    assert size(8.0) == pytest.approx(size(1.0), rel=0.02)


def test_jsd_is_symmetric_and_lies_between_the_divergences(random: np.random.Generator) -> None:
    student, teacher = (torch.tensor(logits, requires_grad=True) for logits in pairs(random, 5, 9))
    for beta in (0.5, 0.2):
        torch.testing.assert_close(losses.jsd(student, teacher, beta), losses.jsd(teacher, student, 1 - beta))
    assert (losses.jsd(student, teacher) < np.log(2)).all()
    near = 1e-6
    for loss, limit in (
        (losses.jsd(student, teacher, near) / near, losses.forward_kl(student, teacher)),
        (losses.jsd(student, teacher, 1 - near) / near, losses.reverse_kl(student, teacher)),
    ):
        torch.testing.assert_close(loss, limit, rtol=1e-4, atol=1e-6)
        found, expected = (torch.autograd.grad(each.sum(), student)[0] for each in (loss, limit))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sure_models_give_no_nan() -> None:
    """All probability on one token, and not the same one: exp underflows, the logs do not."""
    student, teacher = torch.zeros(2, 6), torch.zeros(2, 6)
    student[:, 0], teacher[0, 0], teacher[1, 5] = 500.0, 500.0, 500.0
    student.requires_grad_()
    for loss in (losses.forward_kl, losses.reverse_kl, losses.jsd):
        found = loss(student, teacher)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert found.isfinite().all() and gradient.isfinite().all()
        assert found[0] == 0 and found[1] > 0.5


def test_all_compile_without_a_break(random: np.random.Generator) -> None:
    student, teacher = (torch.tensor(logits, dtype=torch.float32) for logits in pairs(random, 2, 2, 4, 6))
    logits, other, ids = student[0, 0], teacher[0, 0], torch.tensor([[0, 5], [1, 2], [3, 3], [4, 0]])
    allowed = torch.tensor(allowed_positions(random))

    def everything(logits: Tensor, states: Tensor) -> Tensor:
        by_token = torch.stack(
            [
                losses.cross_entropy(logits, ids[:, 0]),
                losses.forward_kl(logits, other, 2.0),
                losses.reverse_kl(logits, other),
                losses.jsd(logits, other, 0.1),
                losses.logit_mse(logits, other),
                losses.sparse_forward_kl(logits, ids, other.softmax(-1)[:, :2]),
                losses.uld(logits, other[:, :5]),
                losses.hidden_states(logits, other, "cosine"),
            ]
        )
        of_states = losses.relations(states, teacher, allowed).sum()
        return by_token.sum() + of_states + losses.attention_maps(states.softmax(-1), teacher.softmax(-1)).sum()

    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    before = student.clone()
    found, expected = [], []
    for function, results in ((compiled, found), (everything, expected)):
        given = (logits.clone().requires_grad_(), student.clone().requires_grad_())
        value = function(*given)
        results += [value, *torch.autograd.grad(value, given)]
    torch.testing.assert_close(found, expected)
    assert torch.equal(student, before)  # nothing was written into the inputs
