"""Whether teacher and student mean the same by a token id, and where two tokenizations of a text meet."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hfkit.data.tokenizer import load_tokenizer
from hfkit.errors import HfkitError
from hfkit.model.loading import load_config
from hfkit.model.vocabulary import ids_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3


class Vocabulary(NamedTuple):
    """What the logits of a teacher and its student have in common.

    The student's pad token, which is never predicted, may lie beyond `width`, even beyond the teacher's embeddings.
    """

    width: int  # the first logits of both, which mean the same tokens
    teacher_width: int  # all of the teacher's: a vocabulary is often padded


def compare(teacher: str, student_tokenizer: str, trust_remote_code: bool = False) -> Vocabulary:
    """Compare two vocabularies by their files alone: each token's id, the special tokens, the teacher's logits.

    A pad token is masked wherever it stands: it may differ, and the student may have one that the teacher lacks.

    Args:
        teacher: folder or Hub id of a model with its tokenizer.
        student_tokenizer: folder or Hub id.

    Raises:
        HfkitError: if a token or a BOS, EOS or unknown token is not the same for both, naming the first that differ.
    """
    theirs, ours = load_tokenizer(teacher, "generate"), load_tokenizer(student_tokenizer)
    tokens, own_tokens = ({i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (theirs, ours))
    if ours.pad_token_id not in tokens:
        del own_tokens[ours.pad_token_id]
    problems = _differences(tokens, own_tokens)
    for name in ("bos", "eos", "unk"):
        special, own_special = (_special(tokenizer, name) for tokenizer in (theirs, ours))
        if special != own_special:
            problems.append(f"its {name}_token is {special} and the student's is {own_special}")
    if problems:
        raise HfkitError(
            f"{teacher}: its tokenizer ({len(theirs):,} tokens) is not the student's {student_tokenizer} "
            f"({len(ours):,} tokens): {'; '.join(problems)}. Give the student the teacher's tokenizer, or set "
            f"`cross_tokenizer: uld`, which aligns text spans and compares sorted probabilities"
        )
    width, logits = max(tokens) + 1, load_config(teacher, trust_remote_code).vocab_size
    return Vocabulary(width, ids_of(theirs, logits, teacher))


def _differences(tokens: dict[int, str], own_tokens: dict[int, str]) -> list[str]:
    """Return the first ids that do not mean the same token, told in words."""
    differing = [i for i in sorted(tokens.keys() | own_tokens.keys()) if tokens.get(i) != own_tokens.get(i)]
    differences = []
    for i in differing[:SHOWN]:
        if i in tokens and i in own_tokens:
            differences.append(f'id {i} is "{tokens[i]}" for the teacher and "{own_tokens[i]}" for the student')
        else:
            token, whose = (tokens[i], "teacher") if i in tokens else (own_tokens[i], "student")
            differences.append(f'id {i} is "{token}" for the {whose} and nothing for the other')
    if len(differing) > SHOWN:
        differences.append(f"{len(differing) - SHOWN:,} more ids differ")
    return differences


def _special(tokenizer: "PreTrainedTokenizerBase", name: str) -> str:
    token, token_id = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
    return "not set" if token_id is None else f"{token} (id {token_id})"


def aligned(
    text: str,
    student_tokenizer: "PreTrainedTokenizerBase",
    teacher_tokenizer: "PreTrainedTokenizerBase",
    prompt: str = "",
) -> tuple[list[int], list[int], np.ndarray]:
    """Return the token ids of a text for student and teacher, and the positions at which both predict from the same
    place.

    The text stands between BOS, where the tokenizer has one, and EOS, as in pretraining. With a `prompt` it is a
    completion: it stands after the tokens of the prompt, as in fine-tuning, and none of those is paired.

    Returns:
        The student's ids, the teacher's ids, and the pairs (n, 2), int64: ascending positions i, j such that the
        student's token i + 1 and the teacher's token j + 1 begin at the same character of the text, or are both EOS.
        A token that begins inside a character, as bytes may, is in no pair. What a tokenizer drops, such as white
        space, belongs to the token behind it, unless a token of the other begins where the dropped ends.
    """
    student_ids, starts, reads = _begins(text, student_tokenizer, prompt)
    teacher_ids, teacher_starts, teacher_reads = _begins(text, teacher_tokenizer, prompt)
    offsets = np.where(np.isin(starts, teacher_starts), starts, reads)[1:]  # position i predicts token i + 1
    teacher_places = np.where(np.isin(teacher_starts, starts), teacher_starts, teacher_reads)[1:]
    shared, positions, teacher_positions = np.intersect1d(offsets, teacher_places, return_indices=True)
    return student_ids, teacher_ids, np.stack([positions, teacher_positions], axis=1)[shared >= 0]


def _begins(text: str, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return the ids, and two numbers for each: where in the text it starts, and how far the tokens before it have
    read.

    These differ where characters were dropped between. Both are -1 for a token that begins inside a character, or is
    not of the text.
    """
    before, after = ids_before(prompt, tokenizer), [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, ends = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    reads = np.append(0, ends)[:-1]
    starts = np.where(ends > starts, starts, reads)  # some offsets leave white space out, down to nothing
    is_place = (starts >= reads) & (ends > reads)

    def framed(offsets: np.ndarray) -> np.ndarray:
        inside = np.where(is_place, offsets, -1)
        return np.concatenate([np.full(len(before), -1), inside, np.full(len(after), len(text))])

    return [*before, *encoding["input_ids"], *after], framed(starts), framed(reads)


def ids_before(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return what stands before the text: BOS, or the prompt as the tokenizer begins a text, without an EOS."""
    if not prompt:
        return [tokenizer.bos_token_id] * (tokenizer.bos_token_id is not None)
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
