"""Loading the tokenizer of a model that is to be trained or used."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hfkit.data.chat import set_template
from hfkit.errors import HfkitError, reason, way_to

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(
    path: str, use: Literal["train", "generate", "classify"] = "train", chat_template: str | None = None
) -> "PreTrainedTokenizerFast":
    """Return the tokenizer in a folder or on the Hub.

    Args:
        chat_template: that of a recipe, which takes the place of its own.
        use: to train with one, EOS must be learned, and so may not be the padding, which never is. Others take what
            they find: EOS pads where nothing else does, and classifiers need none.

    Raises:
        HfkitError: if it cannot be loaded, or lacks a special token that its use asks for.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # files, network and Hub fail in many ways
        remedy = "a recipe of `stage: tokenizer` makes one" if Path(path).exists() else way_to(path)
        raise HfkitError(f"{path}: no tokenizer can be loaded: {reason(error)}; {remedy}") from None
    if use == "train" and not tokenizer.is_fast:
        raise HfkitError(f"{path}: has no tokenizer.json; convert it with transformers and save it again")
    if use != "classify" and tokenizer.eos_token_id is None:
        raise HfkitError(f"{path}: the tokenizer has no EOS token, so that a model could never stop; set eos_token")
    if use == "train" and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        what = "is its EOS token too" if tokenizer.pad_token_id is not None else "is not set"
        raise HfkitError(f"{path}: the pad token {what}; add one of its own, such as <pad>, and save it again")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise HfkitError(f"{path}: the tokenizer has neither a pad token nor EOS; set pad_token and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_template(tokenizer, chat_template)
    return tokenizer
