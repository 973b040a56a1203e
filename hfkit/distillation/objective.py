"""The objective of a distillation: its losses, computed from one forward pass of the student, in chunks of tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from hfkit.data.rows.learned import LEARNED, places, taken
from hfkit.distillation import losses as of_tensors
from hfkit.distillation.catalogue import LossSpec, function_of
from hfkit.distillation.settings import Loss, layer_pairs
from hfkit.distillation.teacher import Layers, Teacher, Watch, allowed, layers_of
from hfkit.model.heads import TRAINING_ONLY, causal_of
from hfkit.training.chunked_head import chunk_tokens, chunked_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PROJECTIONS = TRAINING_ONLY.removesuffix(".")


class Term(NamedTuple):
    """A loss between logits, ready to be compiled: its functions, and the arguments that the recipe gives."""

    spec: LossSpec
    function: Callable[..., torch.Tensor] | None
    sparse: Callable[..., torch.Tensor] | None
    given: dict[str, float]

    @classmethod
    def of(cls, loss: Loss) -> "Term":
        spec = loss.spec
        function, sparse = (function_of(name) if name else None for name in (spec.function, spec.sparse))
        arguments = {name: getattr(loss, name) for name in spec.arguments if getattr(loss, name) is not None}
        return cls(spec, function, sparse, arguments)

    def of_tokens(
        self, logits: torch.Tensor, shared: torch.Tensor, targets: torch.Tensor, teacher: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Return the loss of each token, (tokens,), of logits and of those that are shared with the teacher."""
        function: Any = self.function
        if self.spec.compares == "data":
            return function(logits, targets)
        if self.spec.is_across_tokenizers:
            return function(logits, teacher[0], **self.given) * teacher[1]
        if len(teacher) == 2:
            function = self.sparse
        return function(shared, *teacher, **self.given)


class Objective:
    """The weighted sum of the losses over the learned tokens, divided by their number.

    It is what the student's forward pass calls instead of its own loss (`hfkit.model.heads.compute_loss_with`). The
    trainer gives it each batch, and what the teacher says of it, before.

    Args:
        losses: those of the recipe.
        width: how many leading logits teacher and student share.
        compiled: whether to compile the losses of a chunk.

    Attributes:
        parts: of the last batch, the sum of each loss over its tokens, unweighted.
    """

    def __init__(
        self, losses: list[Loss], student: "PreTrainedModel", teacher_config: Any, width: int, compiled: bool
    ):
        self.losses = [loss for loss in losses if loss.weight]
        self.names = _names(self.losses)
        self.terms = [Term.of(loss) for loss in self.losses]
        self.of_logits = [index for index, loss in enumerate(self.losses) if loss.spec.compares != "layers"]
        self.of_layers = [index for index, loss in enumerate(self.losses) if loss.spec.compares == "layers"]
        self.width, self.compiled = width, compiled
        self.parts: dict[str, torch.Tensor] = {}
        self.batch: dict[str, torch.Tensor] = {}
        self.places: torch.Tensor | None = None
        self.teacher: Any = None
        self.teacher_states: torch.Tensor | None = None
        self.teacher_layers: Any = None
        config = student.config.get_text_config()
        self.pairs = {index: layer_pairs(self.losses[index], config, teacher_config) for index in self.of_layers}
        self.student_watch = Watch(student, self.watched(0), "student") if self.watched(0) else None
        self.maps = nn.ModuleDict()
        if teacher_config is not None:
            self._project(student, config.hidden_size, teacher_config.hidden_size)

    # ---- what it needs

    def watched(self, side: int) -> set[int]:
        """Return the layers whose queries, keys and values are compared; side 0 is the student's, 1 the teacher's."""
        relations = [index for index in self.of_layers if self.losses[index].way == "relations"]
        return {pair[side] for index in relations for pair in self.pairs[index]}

    def options(self) -> dict[str, bool]:
        """Return what both models must give beside their last hidden states."""
        ways = {self.losses[index].way for index in self.of_layers}
        options = {"output_hidden_states": bool(ways & {"mse", "cosine"}), "output_attentions": "maps" in ways}
        return {name: True for name, is_needed in options.items() if is_needed}

    @property
    def needs_teacher_logits(self) -> bool:
        return any(loss.spec.compares == "logits" for loss in self.losses)

    def _project(self, student: "PreTrainedModel", width: int, teacher_width: int) -> None:
        """Give the student a learned map to the teacher's width for each pair of layers that is compared so."""
        maps = nn.ModuleDict()
        for index in self.of_layers:
            loss = self.losses[index]
            if loss.loss == "hidden_states" and (
                width != teacher_width if loss.projection is None else loss.projection
            ):
                maps.update({f"{index}_{pair[0]}": nn.Linear(width, teacher_width) for pair in self.pairs[index]})
        self.maps = maps
        if maps:
            causal_of(student).add_module(PROJECTIONS, maps)

    # ---- each batch

    def prepare(self, batch: dict[str, torch.Tensor], teacher: Teacher | None) -> None:
        """Take a batch, and ask the teacher where it runs beside the student."""
        self.batch, self.teacher = batch, teacher
        self.places = batch.get(LEARNED)
        theirs = batch
        if "partner" in batch:
            theirs = {name: batch[f"teacher_{name}"] for name in ("input_ids", "attention_mask")}
        self.teacher_states, self.teacher_layers = teacher(theirs) if teacher is not None else (None, None)

    @torch.compiler.disable
    def __call__(
        self, outputs: Any, head: nn.Module, labels: torch.Tensor, items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Return the loss. The student's forward pass calls it.

        Args:
            outputs: of the student's decoder.
            items: learned tokens of the whole step, on all processes; None takes those of this batch.
        """
        at = places(labels) if self.places is None else self.places
        items = len(at) if items is None else items
        total: Any = 0.0
        self.parts = {}
        if self.of_logits:
            total = self._logits(taken(outputs.last_hidden_state, at), labels.flatten()[at + 1], at, head)
        if self.of_layers:
            layers = layers_of(outputs, self.student_watch)
            for index in self.of_layers:
                sums = taken(self._layers(index, layers), at).sum()
                self.parts[self.names[index]] = sums.detach()
                total = total + self.losses[index].weight * sums
        return total / items

    # ---- between logits

    def _logits(self, states: torch.Tensor, targets: torch.Tensor, at: torch.Tensor, head: Any) -> torch.Tensor:
        """Return the weighted sum over the learned tokens: states (tokens, hidden), targets (tokens,)."""
        teacher_states, partner = self._partners(at)
        sparse = [taken(self.batch[name], at) for name in ("target_ids", "target_probabilities") if name in self.batch]

        def of_rows(rows: slice) -> tuple[torch.Tensor, ...]:
            """Return what else the chunk's losses take, beside the student's logits."""
            if teacher_states is not None and self.needs_teacher_logits:
                logits = self.teacher.logits(teacher_states[rows], self.width)
                return targets[rows], logits, *(tensor[rows] for tensor in partner)
            return targets[rows], *(tensor[rows] for tensor in sparse)

        chunk = chunk_tokens(head.weight.shape[0], states.device)
        total, parts = chunked_head(states, head.weight, head.bias, self._chunk, of_rows, chunk, self.compiled)
        self.parts |= {self.names[index]: part for index, part in zip(self.of_logits, parts, strict=True)}
        return total

    def _partners(self, at: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return the teacher's hidden state of each learned token, (tokens, hidden), and, where its tokenizer is
        another, whether the token has one, (tokens,)."""
        if self.teacher_states is None:
            return None, []
        if "partner" not in self.batch:
            return taken(self.teacher_states, at), []
        partner = taken(self.batch["partner"], at)
        return self.teacher_states.flatten(0, 1)[partner.clamp_min(0)], [partner >= 0]

    def _chunk(self, logits: torch.Tensor, targets: torch.Tensor, *teacher: torch.Tensor) -> Any:
        """Return the loss to learn of a chunk, and the sums of its parts: logits (tokens, vocabulary)."""
        shared = logits[:, : self.width]
        sums = [self.terms[index].of_tokens(logits, shared, targets, teacher).sum() for index in self.of_logits]
        weights = [self.losses[index].weight for index in self.of_logits]
        total = sum(weight * value for weight, value in zip(weights, sums, strict=True))
        return total, torch.stack(sums).detach()

    # ---- between layers

    def _layers(self, index: int, student: Layers) -> torch.Tensor:
        """Return the loss of each token, (batch, tokens), the mean over the pairs of layers."""
        pairs = self.pairs[index]
        return torch.stack([self._pair(index, student, *pair) for pair in pairs]).mean(0)

    def _pair(self, index: int, student: Layers, own: int, other: int) -> torch.Tensor:
        loss, teacher = self.losses[index], self.teacher_layers
        if loss.loss == "hidden_states":
            states = student.hidden_states[own]
            if f"{index}_{own}" in self.maps:
                states = self.maps[f"{index}_{own}"](states)
            return of_tensors.hidden_states(states, teacher.hidden_states[other], loss.way)  # type: ignore[arg-type]
        if loss.way == "maps":
            return of_tensors.attention_maps(student.attentions[own], teacher.attentions[other])
        mask = allowed(self.batch)
        distances = [
            of_tensors.relations(
                student.projections[own, name], teacher.projections[other, name], mask, loss.relation_heads
            )
            for name in ("q_proj", "k_proj", "v_proj")
        ]
        return torch.stack(distances).sum(0)


def _names(losses: list[Loss]) -> list[str]:
    """Return a name for each loss; a second one of a kind is numbered."""
    names: list[str] = []
    for loss in losses:
        number = sum(name.split(".")[0] == loss.loss for name in names)
        names.append(f"{loss.loss}.{number + 1}" if number else loss.loss)
    return names
