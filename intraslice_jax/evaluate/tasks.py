"""The model class of EleutherAI's lm-evaluation-harness (extra `eval`), registered there as `intraslice`.

torch is not needed. The harness's command line does not load other packages, so this module starts it with the class
registered:

    python -m intraslice_jax.evaluate.tasks run --model intraslice --model_args pretrained=CHECKPOINT --tasks piqa
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from intraslice_jax import api
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate.perplexity import automatic_batch
from intraslice_jax.evaluate.scoring import Request, Score, score
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.generate import generate

MAX_NEW_TOKENS = 256
"""Of tasks that generate and do not say how much, as in the harness's own classes."""

Progress = Callable[[int, int], None]


class IntraSliceLM(TemplateLM):
    """A dense or pruned model behind the harness's three questions."""

    def __init__(
        self,
        pretrained: str | LanguageModel,
        batch_size: int | str | None = 0,
        max_length: int | None = None,
        dtype: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        on_batch: Progress | None = None,
    ) -> None:
        """Loads the model unless it is given.

        Args:
            pretrained: a checkpoint, a folder, a hub id, a .gguf file, or a model.
            batch_size: rows per step; 0, None and `auto` choose it from the rows' length.
            max_length: the most tokens of a row, None for the model's context.
            dtype: of the weights, None for the stored one.
            add_bos_token: whether texts begin with the tokenizer's special tokens, None for its own way.
            prefix_token_id: what stands before a text without a context; None for BOS, or EOS where there is none.
            max_batch_size: not used; the harness passes it to every class.
            device: not used, jax chooses it.
            on_batch: called with the rows done and their total.

        Raises:
            InputError: the model cannot be read, has no tokenizer, or a number is out of range.
        """
        del max_batch_size, device
        super().__init__()
        self.model = api.load(pretrained, dtype) if isinstance(pretrained, str) else api.cast(pretrained, dtype)
        self.tokenizer = self.model.require_tokenizer()
        self.batch_size = _batch_size(batch_size)
        context = self.model.config.max_position_embeddings
        if max_length is not None and not 1 <= max_length <= context:
            raise InputError(f"max_length must be from 1 to the context of {self.model.name}, {context}: {max_length}")
        self.max_length = max_length or context
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._on_batch = on_batch

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos: Any = self.tokenizer.eos_token_id
        if eos is None:
            raise InputError(f"the tokenizer of {self.model.name} has no EOS token; name one in tokenizer_config.json")
        return eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos: Any = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer in its caches."""
        return self.model.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens are not added to what begins with BOS already."""
        del kwargs
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
            if has_bos_prefix(string, str(self.tokenizer.decode([self.prefix_token_id]))):
                add_special_tokens = False
        special: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **special)["input_ids"])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations in their contexts, and whether they are greedy."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        results = self._score([Request(context, continuation) for _, context, continuation in requests])
        for (texts, *_), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(result))
        return [(result.log_likelihood, result.greedy) for result in results]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods of whole texts, in windows that do not overlap."""
        del disable_tqdm
        texts = [request.args[0] for request in requests]
        windows = [list(self._windows(text)) for text in texts]
        flat = iter(self._score([window for of_text in windows for window in of_text]))
        totals = [sum(next(flat).log_likelihood for _ in of_text) for of_text in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return [float(total) for total in totals]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continuations up to the first stop sequence, which is left out."""
        del disable_tqdm
        arguments: list[Any] = [request.args for request in requests]
        collator = Collator(
            arguments,
            sort_fn=lambda pair: (-len(pair[0]), pair[0]),
            group_fn=lambda pair: pair[1],
            group_by="gen_kwargs",
        )
        texts: list[str] = []
        chunks: Any = collator.get_batched(n=self._generation_batch())
        for chunk in chunks:
            contexts, settings = [pair[0] for pair in chunk], chunk[0][1]
            for context, text in zip(contexts, self._generate(contexts, settings), strict=True):
                texts.append(text)
                self.cache_hook.add_partial("generate_until", (context, settings), text)
            if self._on_batch is not None:
                self._on_batch(len(texts), len(requests))
        return collator.get_original(texts)

    def _score(self, requests: list[Request]) -> list[Score]:
        return score(self.model, requests, self.batch_size, self.max_length, self._on_batch)

    def _windows(self, text: str) -> Iterator[Request]:
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        return (Request(*make_disjoint_window(window)) for window in windows)

    def _generation_batch(self) -> int:
        """Caches of keys and values take more than a window's activations, so fewer rows than when scoring."""
        return self.batch_size or min(16, automatic_batch(self.model.config, self.max_length))

    def _generate(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        options: dict[str, Any] = {**normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS)}
        stop = handle_stop_sequences(options.pop("until"), eos=str(self.tokenizer.decode([self.eot_token_id])))
        new = options.pop("max_gen_toks")
        room = self.max_length - new
        if room < 1:
            raise InputError(f"{new} new tokens leave no room for a prompt in the context of {self.max_length}")
        prompts = [self.tok_encode(context)[-room:] for context in contexts]

        def text(tokens: list[int]) -> str:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

        def finished(_: int, tokens: list[int]) -> bool:
            so_far = text(tokens)
            return any(sequence and sequence in so_far for sequence in stop)

        result = generate(self.model, prompts, new, **_sampling(options), finished=finished)
        return [postprocess_generated_text(text(tokens), stop, None) for tokens in result.tokens]


register_model("intraslice")(IntraSliceLM)


def _batch_size(given: int | str | None) -> int:
    if given is None or str(given).partition(":")[0] == "auto":
        return 0
    if not str(given).isdecimal():
        raise InputError(f"batch_size must be a number of rows or `auto`, found {given!r}")
    return int(given)


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """A task's generation settings in our words; greedy unless it samples.

    Raises:
        InputError: it asks for something else, which leaving out would change its results.
    """
    temperature = float(options.pop("temperature", 0.0))
    sampled = options.pop("do_sample")
    found = {"top_k": int(options.pop("top_k", 0) or 0), "top_p": float(options.pop("top_p", 1.0))}
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "num_return_sequences": 1}
    odd = {name: value for name, value in options.items() if neutral.get(name) != value}
    if odd:
        raise InputError(f"a task asks for {odd}, which is not supported; remove it from its generation_kwargs")
    return {"temperature": temperature or 1.0, **found} if sampled else {}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
