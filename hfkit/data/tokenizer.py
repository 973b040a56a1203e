"""Loading a tokenizer that a model can be trained with."""

from typing import TYPE_CHECKING

from hfkit.errors import HfkitError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(place: str) -> "PreTrainedTokenizerFast":
    """The tokenizer in a folder or on the Hub.

    Raises:
        HfkitError: if it cannot be loaded, or has no pad token of its own or no EOS token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # files, network and Hub fail in many ways
        remedy = "a recipe of `stage: tokenizer` makes one"
        raise HfkitError(f"{place}: no tokenizer can be loaded: {reason(error)}; {remedy}") from None
    if not tokenizer.is_fast:
        raise HfkitError(f"{place}: has no tokenizer.json; convert it with transformers and save it again")
    if tokenizer.eos_token_id is None:
        raise HfkitError(f"{place}: the tokenizer has no EOS token, so that a model could never stop; set eos_token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        what = "is its EOS token too" if tokenizer.pad_token_id is not None else "is not set"
        raise HfkitError(f"{place}: the pad token {what}; add one of its own, such as <pad>, and save it again")
    return tokenizer
