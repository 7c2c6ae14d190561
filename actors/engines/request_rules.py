"""The rules that every engine holds a request to, so that a bad one fails alone and before it takes a slot."""

from distrl.errors import StageError
from distrl.sampling import SampleRequest


def check_request(request: SampleRequest, *, vocabulary_size: int, context_length: int) -> None:
    """Refuse a request that no engine could answer.

    Raises:
        StageError: names the request, the rule, the value and the remedy.
    """
    prompt, params = request.prompt_token_ids, request.params
    total = len(prompt) + params.max_new_tokens
    lowest, highest = (min(prompt), max(prompt)) if prompt else (0, 0)
    rules = (
        (
            len(prompt) >= 1,
            "prompt must have >= 1 token, got 0",
            "begin it with the beginning-of-sequence token",
        ),
        (
            lowest >= 0 and highest < vocabulary_size,
            f"prompt tokens must be in 0..{vocabulary_size - 1}, got {lowest if lowest < 0 else highest}",
            "use the tokenizer that belongs to the model",
        ),
        (request.responses >= 1, f"responses must be >= 1, got {request.responses}", "ask for one response"),
        (
            params.max_new_tokens >= 1,
            f"max_new_tokens must be >= 1, got {params.max_new_tokens}",
            "ask for one token",
        ),
        (
            total <= context_length,
            f"prompt + max_new_tokens must be <= {context_length} tokens (the model's context), "
            f"got {len(prompt)} + {params.max_new_tokens} = {total}",
            "drop the prompt or lower max_new_tokens",
        ),
        (
            params.temperature > 0,
            f"temperature must be > 0, got {params.temperature}",
            "use a small one such as 0.001 for nearly greedy decoding",
        ),
        (0 < params.top_p <= 1, f"top_p must be in (0, 1], got {params.top_p}", "use 1 to keep all tokens"),
        (params.top_k >= 0, f"top_k must be >= 0, got {params.top_k}", "use 0 to keep all tokens"),
    )
    for holds, rule, remedy in rules:
        if not holds:
            raise StageError(f"generation request {request.request_id!r}: {rule}; {remedy}")
